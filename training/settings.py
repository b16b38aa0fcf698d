"""The settings of a training run: all that `train` needs to know, each declared once, with its flag.

    settings = TrainingSettings(model_type="dual", dataset="synthetic", limit=512, resolution=32, epochs=2)
    train(settings)

What checkpoints and logs hold of them is `settings.recorded()`: the settings that decide what is computed.
"""

from dataclasses import dataclass
from typing import Any

import cli
from checkpoint import CLASSIFIERS, FILE_STEMS, MODEL_CLASSES, network_class
from cli import CompileSettings, HardwareSettings, TrainingDataSettings
from diffusion.cold import SEVERITY_SCHEDULES
from diffusion.degradations import DEGRADATIONS, make_degradation, parse_degradation
from images.representation import REPRESENTATIONS
from model import DEFAULT_HIDDEN_DIMS, network_name, resolve_network
from networks.ema import USUAL_RAMPUP
from planning.presets import PRESETS, balanced_weights, preset_help, preset_values
from planning.regimes import check_regime, default_regime, parse_regime
from runtime.runs import derived_name, is_same, resume_folder, run_name
from runtime.settings import REQUIRED, Settings, option
from scheduler import ALL_SCHEDULES, COLD, PREDICTION_TYPES, PROCESSES, schedule_name, split_schedule_name
from training.cold import COLD_SETTINGS, check_cold
from training.consistency import TEACHER_SOLVERS, check_consistency
from training.coupling import COUPLINGS, INDEPENDENT
from training.noise_levels import FORMS, ICT
from training.objectives import OBJECTIVES
from training.timesteps import IMPORTANCE, TIMESTEP_WEIGHTS, UNIFORM, law_name, parse_law
from training.variational import VLB_WEIGHT, check_chain

TIMES = ("whole", "real")
STUDENT_SETTINGS = ("student",)  # What `distill.py` says itself; no stage has flags for them.
UNFLAGGED = (*STUDENT_SETTINGS, "start_dataset")  # Nor for what `--target_dataset` says.
LABEL_DROPOUT = 0.1  # Unless told otherwise (arXiv 2207.12598 tries 0.1, 0.2 and 0.5).
REPLAN_EVERY, REPLAN_IMAGES = 10, 16  # Epochs and images, unless told otherwise.
# What only models of two scales have; the stage of the baseline has no flags for them.
TWO_SCALE_SETTINGS = ("t_pairs", "replan_every", "replan_images", "loss_weights", "representation")
CONSISTENCY_PAIRS = {"overcomplete": "same", "residual": "band:image,0"}  # The curve of noise on one image.
# What only models of images have; the stage of classifiers has no flags for them.
IMAGE_SETTINGS = (
    "network", "objective", "vlb_weight", "consistency", "consistency_solver",
    "perceptual_weight", "feature_weight", "vgg_weights", "prediction_type",
    "min_snr_gamma", "timestep_weights", "replan_every", "replan_images", "loss_weights", "label_dropout",
    "latents", "coupling", "target_dataset", "start_dataset", *COLD_SETTINGS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(CompileSettings, HardwareSettings):
    """How a step is executed."""

    group = "execution (what is computed stays the same up to rounding)"
    cuda_graphs: bool = option(False, "replay the compiled network as CUDA graphs, for small batches")
    accumulate: int = option(1, "run a step in N parts, for less memory", parse=cli.positive_int, metavar="N")
    recompute: bool = option(False, "recompute activations in the backward pass, for less memory")
    deterministic: bool = option(False, "deterministic kernels only, for equal bits on a GPU")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Where a run writes, how often, and whether it goes on from an earlier one."""

    group = "checkpoints and logs"
    save_every: int = option(200, "epochs between checkpoints", parse=cli.positive_int)
    resume_minutes: float = option(10.0, "minutes between resume files", parse=cli.positive_float)
    keep_last: int = option(2, "resume files kept, newest first", parse=cli.positive_int, metavar="K")
    max_bad_steps: int = option(20, "non-finite steps in a row that end a run", parse=cli.positive_int)
    log_every: int = option(50, "steps between rows of metrics.jsonl", parse=cli.positive_int)
    run: str | None = option(
        None,
        "name of this run: checkpoints and logs go to checkpoints/NAME, what is made with them to results/NAME (of "
        "model, preset, resolution, data set and seed)",
        parse=run_name,
        metavar="NAME",
        recorded=True,
        absent=None,
    )
    output_dir: str | None = option(
        None, "checkpoints go here (the folder of the run; what the published code can train: checkpoints)"
    )
    log_dir: str | None = option(
        None, "metrics, TensorBoard and sample grids go to a folder here (logs in --output_dir, or beside checkpoints)"
    )
    wandb: bool = option(False, "log to Weights & Biases too, if it is installed")
    dry_run: bool = option(False, "print what would be run and the memory it would take, and end")
    resume: str | None = option(
        None,
        "continue from the _last.pth of the run, or from that in the folder DIR with the settings it was trained with; "
        "with auto, start afresh if there is none",
        nargs="?",
        const="required",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(RunSettings, ExecutionSettings, TrainingDataSettings):
    """A training run; the defaults are the published settings.

    What is None and decided by the preset has its value once the object is made, and `loss_weights` is a number for
    every predicted scale; `but(preset="improved")` decides it anew. Raises ValueError for settings that a model of this
    type cannot have, or that exclude each other.
    """

    group = "training"
    model_type: str = option(REQUIRED, choices=(*MODEL_CLASSES, *CLASSIFIERS), recorded=True)
    preset: str = option(
        "published",
        f"what the flags that are not given are: {preset_help()}",
        choices=tuple(PRESETS),
        recorded=True,
        absent=None,
    )
    epochs: int = option(2000, "passes over the data", parse=cli.positive_int, recorded=True)
    batch_size: int = option(64, "images per step, over all processes", parse=cli.positive_int, recorded=True)
    lr: float = option(1e-4, "AdamW learning rate", parse=cli.positive_float, shown="1e-4", recorded=True)
    lr_schedule: str = option("constant", "cosine decays to 0", choices=("constant", "cosine"), recorded=True)
    weight_decay: float = option(0.01, "AdamW weight decay", parse=cli.unit_interval, recorded=True)
    grad_clip: float = option(1.0, "largest gradient norm", parse=cli.positive_float, recorded=True)
    ema_decay: float = option(0.9999, "EMA decay per step; 0 keeps no EMA", parse=cli.unit_interval, recorded=True)
    ema_rampup_ratio: float | None = option(
        None,
        f"half-life of the EMA as a share of the steps so far, at most; {USUAL_RAMPUP} is usual, 0 leaves it to "
        "--ema_decay (that of the preset)",
        parse=cli.unit_interval,
        metavar="RATIO",
        recorded=True,
        absent=0.0,
    )
    network: str | None = option(
        None,
        "backbone: unet, that of the published code; ddpm_unet, a smaller one with attention; ddpm_unet_plain, that "
        "without attention; DiT-S/P, DiT-B/P, DiT-L/P and DiT-XL/P, diffusion transformers of patches of PxP pixels; "
        "DiT/P, one of --hidden_dims; resnet and resnet_circular, of one resolution (that of the preset)",
        parse=cli.checked(network_name),
        metavar="NAME",
        recorded=True,
        absent="unet",
    )
    hidden_dims: tuple[int, ...] = option(
        DEFAULT_HIDDEN_DIMS,
        "channels per level; of DiT/P and resnet the width of every block, such as 128,128,128,128",
        parse=cli.hidden_dims,
        recorded=True,
    )
    process: str | None = option(
        None,
        "the two curves of image and noise; cold: degradations without noise (that of the preset)",
        choices=(*PROCESSES, COLD),
        recorded=True,
        absent="vp",
    )
    beta_schedule: str | None = option(
        None, "noise schedule of vp and sub_vp (that of the preset)", choices=(*ALL_SCHEDULES, COLD), recorded=True
    )
    prediction_type: str | None = option(None, "(that of the preset)", choices=PREDICTION_TYPES, recorded=True)
    objective: str | None = option(
        None,
        "what a step minimises: denoising, squared errors; hybrid, those and the variational bound of variances that "
        "are learnt with it; vlb, that bound alone; consistency, how far the ends differ that neighbouring noise "
        "levels lead to; progressive, of distill.py, what two steps of a teacher lead to; cold, absolute errors of "
        "images restored from degraded ones (that of the preset)",
        choices=tuple(OBJECTIVES),
        recorded=True,
        absent="denoising",
    )
    vlb_weight: float | None = option(
        None,
        f"of hybrid: weight of the bound, a sum over all timesteps in bits per dimension ({VLB_WEIGHT})",
        parse=cli.positive_float,
        metavar="WEIGHT",
        recorded=True,
        absent=None,
    )
    consistency: str | None = option(
        None,
        "of consistency: which noise levels, distances and targets: ct, those of the first consistency models; ict, of "
        f"the improved ones; ect, of easy tuning, from a trained model ({ICT})",
        choices=tuple(FORMS),
        recorded=True,
        absent=None,
    )
    consistency_solver: str | None = option(
        None,
        "of consistency with a teacher: how that steps to the next level (heun; of ect none, both levels have the same "
        "noise)",
        choices=TEACHER_SOLVERS,
        recorded=True,
        absent=None,
    )
    degradation: str | None = option(
        None,
        f"of cold: what happens to images, {', '.join(DEGRADATIONS)}, with its extent such as blur:8, a deviation of 8 "
        "pixels (blur, of a quarter of the side)",
        parse=cli.checked(parse_degradation),
        metavar="NAME[:EXTENT]",
        recorded=True,
        absent=None,
    )
    severity_schedule: str | None = option(
        None,
        "of cold: how severity grows from 0 to 1 over timesteps (linear)",
        choices=tuple(SEVERITY_SCHEDULES),
        recorded=True,
        absent=None,
    )
    input_noise: float | None = option(
        None,
        "of cold: deviation of noise on the degraded images that are shown (0)",
        parse=cli.number_from_zero,
        metavar="SIGMA",
        recorded=True,
        absent=None,
    )
    min_snr_gamma: float | None = option(
        None,
        "weigh the loss by min(SNR, GAMMA) times that of the clean image; 5 is usual (all timesteps alike)",
        parse=cli.positive_float,
        metavar="GAMMA",
        recorded=True,
        absent=None,
    )
    timestep_weights: str | None = option(
        None,
        "what errors count at each timestep: published, as much in the prediction; sigma2, as much in the noise; edm, "
        "SNR + 4 in the clean image, for v, velocity and x0; likelihood, what the bound of the likelihood says; for "
        "min-SNR --min_snr_gamma (that of the preset)",
        choices=TIMESTEP_WEIGHTS,
        recorded=True,
        absent="published",
    )
    t_law: str | None = option(
        None,
        "how often timesteps are drawn: uniform, log_normal:M,S of sigma / alpha (-1.2,1.2), logit_normal:M,S of "
        "t / (T - 1) (0,1), importance by the size of the loss, which is divided by it again; of the clock that leads "
        "in --t_pairs (that of the preset)",
        parse=cli.checked(parse_law),
        metavar="LAW",
        recorded=True,
        absent=UNIFORM,
    )
    times: str | None = option(
        None,
        "timesteps to train at: whole numbers, or all real ones between them (those of the preset)",
        choices=TIMES,
        recorded=True,
        absent="whole",
    )
    t_pairs: str | None = option(
        None,
        "pairs of fine and coarse timesteps to train on: independent, same, shift:D, heuristic:F, band:W, path:FILE, "
        "follow:W, band:PATH,W with PATH diagonal, image, shift:D, heuristic:F or FILE; W-V changes over the run (that "
        "of the preset)",
        parse=cli.checked(parse_regime),
        metavar="REGIME",
        recorded=True,
    )
    replan_every: int | None = option(
        None,
        f"epochs between plans of --t_pairs follow:W ({REPLAN_EVERY})",
        parse=cli.positive_int,
        metavar="E",
        recorded=True,
        absent=None,
    )
    replan_images: int | None = option(
        None,
        f"images whose errors are measured for them ({REPLAN_IMAGES})",
        parse=cli.positive_int,
        metavar="N",
        recorded=True,
        absent=None,
    )
    loss_weights: tuple[float, ...] | str | None = option(
        None,
        "weights of the losses of the fine and the coarse scale; auto: by dimensions (that of the preset)",
        parse=cli.loss_weights,
        metavar="A,B",
        recorded=True,
    )
    perceptual_weight: float | None = option(
        None,
        "weight of a further loss: how far the predicted clean image is from the true one in features of VGG19, times "
        "alpha^2; 0 for none (that of the preset)",
        parse=cli.number_from_zero,
        metavar="A",
        recorded=True,
        absent=0.0,
    )
    vgg_weights: str | None = option(
        None, "weights of torchvision's vgg19 for it (those that torchvision downloads)", metavar="FILE"
    )
    feature_weight: float | None = option(
        None,
        "likewise in features of the EMA network, both images being noised as in the step (that of the preset)",
        parse=cli.number_from_zero,
        metavar="A",
        recorded=True,
        absent=0.0,
    )
    representation: str = option(
        "overcomplete",
        "the scales: image and half-size image, or half-size image and the details it lacks",
        choices=tuple(REPRESENTATIONS),
        recorded=True,
        absent="overcomplete",
    )
    coupling: str | None = option(
        None,
        "of process flow, which noise goes with which image: independent, any; ot, by optimal transport within the "
        "batch, of each class by itself (independent)",
        choices=COUPLINGS,
        recorded=True,
        absent=None,
    )
    target_dataset: str | None = option(
        None,
        "of process flow: learn to walk from images of --dataset, in place of noise, to images of this set, a hub id, "
        "folder or synthetic (off)",
        metavar="DATASET",
    )
    start_dataset: str | None = option(  # Then `dataset` is what walks end at, as without it.
        None, "data set whose images take the place of noise", metavar="DATASET", recorded=True, absent=None
    )
    label_dropout: float | None = option(
        None,
        "share of the images whose class is not told, from which the null class is learned (0.1)",
        parse=cli.proper_share,
        metavar="SHARE",
        recorded=True,
        absent=None,
    )
    student: str | None = option(
        None, "what a student is called beside its model, such as 4calls", metavar="NAME", recorded=True, absent=None
    )
    flip: bool = option(False, "mirror images at random (off, as published)", recorded=True)
    seed: int = option(42, "initial weights, order, noise, timesteps", parse=cli.seed, recorded=True)

    def check(self) -> None:
        super().check()
        if self.resume not in (None, "required", "auto"):
            folder = resume_folder(self.resume)
            if self.output_dir is not None and not is_same(self.output_dir, folder):
                raise ValueError(f"--resume {self.resume} names the folder of the run; leave --output_dir out.")
            self._derive(output_dir=str(folder), resume="required")
        if self.target_dataset is not None:
            if self.start_dataset is not None:
                raise ValueError("target_dataset and start_dataset exclude each other; leave one of them out.")
            # What a run learns to make is its data set, here as elsewhere.
            self._derive(start_dataset=self.dataset, dataset=self.target_dataset, target_dataset=None)
        kind = network_class(self.model_type)
        predictions = max(1, kind.num_predictions)
        preset = preset_values(self.preset, self.model_type, self.representation)
        if not kind.predicts_images:
            self._check_classifier(kind.num_scales)
            preset = {name: value for name, value in preset.items() if name not in IMAGE_SETTINGS}
        self._derive_process(preset)
        self._derive(**{name: value for name, value in preset.items() if getattr(self, name) is None})
        if kind.predicts_images:
            network = resolve_network(self.network, self.hidden_dims, kind.knows_time)
            if network.hidden_dims != self.hidden_dims:
                self._derive(hidden_dims=network.hidden_dims)
            if network.name != self.network:
                self._derive(network=network.name)
        if self.min_snr_gamma is not None and self.timestep_weights != "published":
            if "timestep_weights" not in self._derived:
                raise ValueError("--min_snr_gamma and --timestep_weights exclude each other; leave one of them out.")
            self._derive(timestep_weights="published")
        if self.timestep_weights == "edm" and self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"--timestep_weights edm weighs errors of the clean image, of which a prediction of "
                f"{self.prediction_type} says nothing at low SNR; use --prediction_type v, velocity or x0."
            )
        if law_name(self.t_law) != self.t_law:
            self._derive(t_law=law_name(self.t_law))
        self._check_objective()
        if self.loss_weights == "auto":
            self._derive(loss_weights=balanced_weights(self.representation) if predictions > 1 else (1.0,))
        if len(self.loss_weights) != predictions or (predictions == 1 and self.loss_weights != (1.0,)):
            losses = "the loss of the fine scale alone" if predictions == 1 else "a loss for each scale"
            raise ValueError(f"a '{self.model_type}' model has {losses}; leave --loss_weights out, or weigh these.")
        if self.representation == "residual" and kind.predicts_images and predictions == 1 and not kind.coarse_given:
            raise ValueError(
                f"a '{self.model_type}' model predicts the fine scale alone, of which no image can be composed; train "
                "a dual, shared_t or cascade model, or leave --representation residual out."
            )
        if self.coupling == INDEPENDENT:
            self._derive(coupling=None)  # Of runs from before there was a choice, too.
        if self.coupling is not None and self.process != "flow":
            raise ValueError(
                f"--coupling {self.coupling} makes lines from noise to images cross less, which only the process flow "
                f"has, not {self.process}; pass --preset flow, or leave --coupling out."
            )
        if self.start_dataset is not None:
            self._check_start()
        if self.classes is None and self.label_dropout is not None:
            raise ValueError("--label_dropout belongs to --classes; name that too, or leave it out.")
        if self.classes is not None and self.label_dropout is None and kind.predicts_images:
            self._derive(label_dropout=LABEL_DROPOUT)
        if self.classes is not None and not kind.knows_time:
            raise ValueError(
                f"a '{self.model_type}' model has no clock, beside which classes are told; leave --classes out."
            )
        if self.feature_weight and not self.ema_decay:
            raise ValueError(
                "--feature_weight compares features of the EMA network, of which --ema_decay 0 keeps none; leave that "
                "out, or pass --feature_weight 0."
            )
        if self.vgg_weights is not None and not self.perceptual_weight:
            raise ValueError("--vgg_weights belongs to --perceptual_weight, which is 0; leave it out, or pass both.")
        if self.latents is not None and (self.perceptual_weight or self.feature_weight):
            raise ValueError(
                "--perceptual_weight and --feature_weight compare images in [-1, 1], which latents are not; with "
                "--latents pass 0 for both."
            )
        check_regime(self.t_pairs, self.model_type)
        if (self.replan_every or self.replan_images) and not self.follows:
            raise ValueError("--replan_every and --replan_images belong to --t_pairs follow:W; leave them out.")
        if self.cuda_graphs and self.accumulate > 1:
            # A graph replayed for the second part would write over the gradients of the first.
            raise ValueError("--cuda_graphs and --accumulate exclude each other; leave one of them out.")
        if self.run is None:
            named = self.model_type, self.representation, self.preset, self.resolution
            self._derive(run=derived_name(*named, self.dataset, self.seed, self.start_dataset))

    def _check_start(self) -> None:
        """What starts from images has lines to follow, and no noise that anything else could be known of."""
        kind, flag = network_class(self.model_type), "--target_dataset"
        if self.process != "flow":
            raise ValueError(
                f"{flag} takes lines from images to images, which only the process flow has, not {self.process}; pass "
                f"--preset flow, or leave {flag} out."
            )
        if self.objective != "denoising":
            raise ValueError(f"{flag} goes with --objective denoising, not with {self.objective}; leave one out.")
        for name in ("classes", "latents"):
            if getattr(self, name) is not None:
                raise ValueError(f"{flag} maps pixels without classes; leave it or --{name} out.")
        if kind.num_predictions < kind.num_scales:
            raise ValueError(
                f"{flag} needs a model that predicts what it reads, as lines of all scales start from one image; a "
                f"'{self.model_type}' model does not."
            )
        if self.follows:
            raise ValueError(f"{flag} leaves nothing to plan by noise, as --t_pairs {self.t_pairs} does; pass another.")
        if kind.has_two_clocks() and self.representation == "overcomplete" and self.t_pairs != "same":
            # Two mixtures of one pair of coarse images, at two times, give both away.
            raise ValueError(
                f"{flag} starts both scales from one image, so that over-complete scales at different timesteps tell "
                "the network where the line ends; pass --representation residual or --t_pairs same."
            )

    def _check_objective(self) -> None:
        if self.vlb_weight is not None and self.objective != "hybrid":
            raise ValueError(f"--vlb_weight belongs to --objective hybrid, not to {self.objective}; leave it out.")
        for name in ("consistency", "consistency_solver"):
            if getattr(self, name) is not None and self.objective != "consistency":
                raise ValueError(f"--{name} belongs to --objective consistency, not to {self.objective}; leave it out.")
        if self.objective == "consistency":
            self._check_consistency()
        check_cold(self)
        if self.objective == COLD:
            self._derive_cold()
        if self.objective is None or not OBJECTIVES[self.objective].learned_variance:
            return
        check_chain(self.objective, self.process, self.times)
        if self.t_law not in (UNIFORM, IMPORTANCE):
            raise ValueError(
                f"--objective {self.objective} has a bound in which all timesteps count, so that --t_law {self.t_law} "
                f"would change it; choose {UNIFORM} or {IMPORTANCE}."
            )
        if self.objective == "vlb" and (self.min_snr_gamma is not None or self.timestep_weights != "published"):
            raise ValueError(
                "--objective vlb says itself what errors count at each timestep; leave --timestep_weights and "
                "--min_snr_gamma out, or use hybrid."
            )
        if self.objective == "vlb" and (self.perceptual_weight or self.feature_weight):
            raise ValueError(
                "--objective vlb minimises the bound alone; pass --perceptual_weight 0 and --feature_weight 0, or use "
                "hybrid."
            )
        if self.objective == "hybrid" and self.vlb_weight is None:
            self._derive(vlb_weight=VLB_WEIGHT)

    def _derive_cold(self) -> None:
        usual = {"degradation": "blur", "severity_schedule": "linear", "input_noise": 0.0}
        said = {name: getattr(self, name) for name in COLD_SETTINGS if getattr(self, name) is not None}
        chosen = usual | said
        chosen["degradation"] = str(make_degradation(chosen["degradation"], self.resolution))
        self._derive(**{name: value for name, value in chosen.items() if value != getattr(self, name)})

    def _check_consistency(self) -> None:
        kind = network_class(self.model_type)
        pairs = CONSISTENCY_PAIRS[self.representation] if kind.has_two_clocks() else self.t_pairs
        for name, only in {"times": "real", "t_pairs": pairs}.items():
            if getattr(self, name) == only:
                continue
            if name not in self._derived:
                raise ValueError(
                    f"--objective consistency has --{name} {only}, as its noise levels lie on one curve of real times; "
                    "leave that out."
                )
            self._derive(**{name: only})
        check_consistency(self)
        if self.consistency is None:
            self._derive(consistency=ICT)
        if self.student is not None and self.consistency_solver is None and self.consistency != "ect":
            self._derive(consistency_solver=TEACHER_SOLVERS[0])

    def _check_classifier(self, num_scales: int) -> None:
        """A classifier predicts no image, so that its config says of predictions what changes nothing."""
        given = [name for name in IMAGE_SETTINGS if getattr(self, name) is not None]
        if given:
            raise ValueError(f"a classifier predicts no image, to which --{given[0]} belongs; leave it out.")
        if self.classes is None:
            raise ValueError("a classifier is trained on classes; leave --classes as it is, or name the column.")
        if num_scales == 1 and (self.t_pairs is not None or self.representation != "overcomplete"):
            raise ValueError("--t_pairs and --representation belong to classifiers of both scales; pass --scales 2.")
        # Any process can be trained with it, one that ends at zero SNR too.
        self._derive(prediction_type="x0", timestep_weights="published", loss_weights=(1.0,))

    def _derive_process(self, preset: dict[str, Any]) -> None:
        """Both have a value in the end, the noise schedule the name that says the process too."""
        said, schedule = split_schedule_name(self.beta_schedule or preset["beta_schedule"])
        schedule = schedule or PRESETS["improved"]["beta_schedule"]
        process = self.process or (preset["process"] if self.beta_schedule is None or said == "vp" else said)
        if self.beta_schedule is not None and process != said and (process, said) != ("sub_vp", "vp"):
            raise ValueError(
                f"--beta_schedule {self.beta_schedule} is no noise schedule of the process '{process}'; leave it out, "
                "or pass another --process."
            )
        if self.process is None:
            self._derive(process=process)
        if self.beta_schedule != (name := schedule_name(process, schedule)):
            self._derive(beta_schedule=name)

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return "_".join(filter(None, (FILE_STEMS[self.model_type], self.student)))

    @property
    def is_named(self) -> bool:
        """Whether the name of the run was given."""
        return "run" not in self._derived

    @property
    def is_published_kind(self) -> bool:
        """Whether the published code trains such a model, for which it has a place."""
        return self.preset == "published" and self.representation == "overcomplete" and self.latents is None

    @property
    def follows(self) -> bool:
        """Whether the pairs of timesteps follow a path that is planned again in the course of the run."""
        return (self.t_pairs or "").startswith("follow:")

    def before_choices(self) -> dict[str, Any]:
        """What runs have that say nothing of a setting, those from before there was a choice, by its name."""
        return self.absent() | {
            "t_pairs": default_regime(self.model_type),
            "t_pairs_points": None,
            "vgg_fingerprint": None,
            "latents_fingerprint": None,
            "start_fingerprint": None,
            "loss_weights": [1.0] * len(self.loss_weights),
            "class_names": None,
            "labels_fingerprint": None,
        }
