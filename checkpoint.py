"""Checkpoints: written whole or not at all, verified when read, complete enough to rebuild their model.

A snapshot `{name}_{epoch}ep.pth` holds `model_state`, `ema_state`, `config`, `epoch`, `step`,
`format_version` and nothing that `torch.load(weights_only=True)` refuses. A resume file `{name}_last.pth`
adds what training needs to go on (RESUME_KEYS); random numbers follow from seed and step. Every entry of a file has
a checksum, which is compared when it is read.
"""

import errno
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from baseline_model import BaselineModel
from diffusion.cold import ColdScheduler
from diffusion.degradations import make_degradation
from diffusion.solvers import COLD_SOLVERS
from diffusion.space import Space, image_channels_of, open_space, side_of
from diffusion.step import Solver
from images.representation import Images
from model import (
    CascadeModel,
    LIFTBaselineModel,
    LIFTDualTimestepModel,
    NoTimestepModel,
    ScaleModel,
    SingleTimestepModel,
)
from networks.classifier import NoisyClassifier, PairClassifier
from networks.ema import USUAL_RAMPUP, ema_note
from networks.fingerprint import weights_fingerprint
from networks.pretrained import model_options
from runtime.device import memory_format
from runtime.errors import need_file
from runtime.reports import say_once
from runtime.runs import hint_at_runs, places, results_of
from runtime.safe_write import replacing, versions
from scheduler import COLD, NO_VARIANCE, DDIMScheduler, Denoiser, predictions_alone

FORMAT_VERSION = 1
# Objectives whose models are sampled by solvers of their own, and by no others.
OWN_SOLVERS = {"consistency": ("consistency",), COLD: tuple(COLD_SOLVERS)}
# What makes images, and so is sampled, mapped, planned for, scored and exported.
MODEL_CLASSES = {
    "baseline": BaselineModel,
    "dual": LIFTDualTimestepModel,
    "shared_t": LIFTBaselineModel,
    "single_t": SingleTimestepModel,
    "no_t": NoTimestepModel,
    "cascade": CascadeModel,
}
# What a model makes images from that does not make them from noise alone.
START_IMAGES, DEGRADED_IMAGES, COARSE_IMAGES = "start images", "degraded images", "coarse images"
_NEEDS = {
    START_IMAGES: "{} was trained to walk from images of '{start_dataset}', not from noise; only "
    "generate_with_path_30.py --start and eval_fid_batch.py take such a model, so pass another checkpoint here.",
    DEGRADED_IMAGES: "{} is a model of cold diffusion, which restores degraded images and knows no noise level; only "
    "restore.py, generate_with_path_30.py and eval_fid_batch.py take such a model, so pass another checkpoint here.",
    COARSE_IMAGES: "{} enlarges images that it is given and makes none from noise alone; pass it to "
    "generate_cascade.py or generate_sr.py, or another model here.",
}
# What says of noisy images what they are of, and guides or judges the others.
CLASSIFIERS = {"classifier": NoisyClassifier, "classifier_pair": PairClassifier}
FILE_STEMS = {name: name for name in (*MODEL_CLASSES, *CLASSIFIERS)} | {"dual": "lift_dual_timestep"}
REQUIRED_KEYS = ("format_version", "model_state", "ema_state", "config", "epoch", "step")
# Of a resume file: AdamW, learning rate, loss scale of fp16, sums since the last row of the log, counts of skipped
# steps, rows that a full disk kept out of the log, and how the run was executed, which may change its rounding.
RESUME_KEYS = ("optimizer", "lr_schedule", "loss_scaler", "window", "bad_steps", "unwritten_rows", "execution")


class DamagedCheckpointError(ValueError):
    """A file is not what was written: cut short, altered, or no checkpoint at all."""


def network_class(model_type: str) -> type[ScaleModel] | type[NoisyClassifier]:
    """The class of a model or classifier by its type; raises KeyError for an unknown one."""
    return (MODEL_CLASSES | CLASSIFIERS)[model_type]


def build_model(config: dict[str, Any]) -> nn.Module:
    """A freshly initialised model of the `model_type` of a config, of what `model_options` finds there."""
    model_class, options = network_class(config["model_type"]), model_options(config)
    if model_class.num_scales == 1:
        options.pop("representation", None)
    return model_class(**options)


def build_scheduler(config: dict[str, Any]) -> DDIMScheduler:
    """The process of a config, with its prediction type and representation; latents are not clamped."""
    if config["beta_schedule"] == COLD:
        return ColdScheduler(
            make_degradation(config["degradation"], config["resolution"]),
            config["severity_schedule"],
            config["input_noise"],
            config["num_train_timesteps"],
        )
    return DDIMScheduler(
        config["num_train_timesteps"],
        config["beta_schedule"],
        config["prediction_type"],
        clip_sample=config.get("latents") is None,
        representation=config.get("representation", "overcomplete"),
    )


def checkpoint_file(
    output_dir: str | os.PathLike, model_type: str, epoch: int | str, student: str | None = None
) -> Path:
    """`{output_dir}/{stem}_{epoch}ep.pth`, or `{stem}_last.pth` for epoch "last".

    Of a student, by what its settings call it, `{stem}_{student}.pth` whatever the epoch, and
    `{stem}_{student}_last.pth`.
    """
    words = [FILE_STEMS[model_type], student, "last" if epoch == "last" else None if student else f"{epoch}ep"]
    return Path(output_dir) / f"{'_'.join(filter(None, words))}.pth"


def find_checkpoints(
    folder: str | os.PathLike, model_type: str, epochs: Sequence[int] | None = None
) -> dict[int, Path]:
    """The snapshots of a model type in a folder by epoch: those of `epochs` in that order, or all, ascending.

    Of a folder that has students alone they are these, numbered in the order of their names. Raises ValueError if there
    is none, or none of an epoch that is asked for.
    """
    found = _snapshots(folder, model_type) or ({} if epochs else dict(enumerate(_students(folder, model_type))))
    wanted = sorted(found) if epochs is None else epochs
    missing = [epoch for epoch in wanted if epoch not in found]
    if missing or not wanted:
        raise ValueError(
            f"{folder} has no {FILE_STEMS[model_type]} checkpoint{f' of epoch {missing[0]}' if missing else ''}; train "
            f"it, or name where it is by --checkpoint_dir or --run{hint_at_runs()}."
        )
    return {epoch: found[epoch] for epoch in wanted}


def _students(folder: str | os.PathLike, model_type: str) -> list[Path]:
    # As `checkpoint_file` calls them; stems of other types begin otherwise.
    stem, own = FILE_STEMS[model_type], re.compile(r"(\d+calls|consistency|reflow\d+(_1calls)?)\.pth")
    files = Path(folder).glob(f"{stem}_*.pth")
    found = [file for file in files if own.fullmatch(file.name.removeprefix(f"{stem}_"))]
    return sorted(
        found, key=lambda file: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", file.name)]
    )


def _snapshots(folder: str | os.PathLike, model_type: str) -> dict[int, Path]:
    pattern = re.compile(rf"{re.escape(FILE_STEMS[model_type])}_(\d+)ep\.pth")
    matches = ((pattern.fullmatch(file.name), file) for file in Path(folder).glob("*.pth"))
    return {int(match[1]): file for match, file in matches if match}


def checkpoint_of_run(run: str, model_type: str | None = None, epoch: int | None = None) -> Path:
    """The snapshot of a run, by its name, of the epoch, or the last; of its only type of model unless one is named.

    Raises ValueError if there is none such, or several types.
    """
    folder, types = places(run).checkpoints, [model_type] if model_type else types_in_run(run)
    if len(types) > 1:
        raise ValueError(f"{folder} has models of several types; pass --model_type {' or '.join(types)}.")
    found = find_checkpoints(folder, types[0], None if epoch is None else [epoch])
    return found[max(found)]


def types_in_run(run: str) -> list[str]:
    """The types of model that a run, by its name, has checkpoints of. Raises ValueError if there are none."""
    folder = places(run).checkpoints
    there = [name for name in MODEL_CLASSES if _snapshots(folder, name) or _students(folder, name)]
    if not there:
        raise ValueError(f"{folder} has no checkpoint; train the run, or pass another --run{hint_at_runs()}.")
    return there


def bytes_of(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(bytes_of, content.values()))
    return sum(map(bytes_of, content)) if isinstance(content, list | tuple) else 0


def save_checkpoint(file: str | os.PathLike, content: dict[str, Any], keep: int | None = None) -> None:
    """Write a checkpoint atomically; `format_version` is added here, `keep` as for `replacing`.

    Raises OSError, naming the file and the bytes needed, if that fails; what was there before stays.
    """
    try:
        with replacing(file, keep) as temporary:
            torch.save({"format_version": FORMAT_VERSION} | content, temporary)
    except (OSError, RuntimeError) as error:  # The writer of torch.save reports a full disk as a RuntimeError.
        folder = next(parent for parent in Path(file).absolute().parents if parent.is_dir())
        needed, free = bytes_of(content), shutil.disk_usage(folder).free
        reason = str(error).splitlines()[0]
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif free < needed:
            reason = os.strerror(errno.ENOSPC)
        raise OSError(
            f"{file} could not be saved: it needs at least {needed:,} bytes, and {free:,} are free there ({reason})"
        ) from error


def read_checkpoint(file: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises FileNotFoundError if it is missing, DamagedCheckpointError if it is damaged, ValueError if it is not one
    of LIFT's or written by a later version.
    """
    file = need_file(file, "Checkpoint", "train first or pass another --checkpoint")
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not compare the checksums it wrote.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(file, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A damaged zip or pickle raises whatever the damage happens to hit.
        # Not the file, but what lies between it and here; seeking within a file cut short is an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedCheckpointError(
            f"Checkpoint {file} is damaged or not a checkpoint ({type(error).__name__}); use another or train again."
        ) from error
    missing = [key for key in REQUIRED_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{file} is not a LIFT checkpoint: it lacks {', '.join(missing)}.")
    if content["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"Checkpoint {file} has format version {content['format_version']}, newer than the "
            f"{FORMAT_VERSION} this code reads; update LIFT."
        )
    return content


def peek(file: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says beside its tensors, which stay on the disk and unverified; nothing if it is damaged."""
    try:
        content = torch.load(file, mmap=True, weights_only=True)
        return content if {"config", "epoch"} <= content.keys() else {}
    except Exception:  # A damaged zip or pickle raises whatever the damage happens to hit.
        return {}


def describe_model(file: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint of a model of images says beside its tensors, which `peek` leaves on the disk.

    Raises what `read_checkpoint` raises if that is nothing, and ValueError for a classifier.
    """
    said = peek(file) or read_checkpoint(file)
    _check_makes_images(file, said["config"])
    return said


def has_ema(file: str | os.PathLike, weights: str | None = None) -> bool:
    """Whether EMA weights are meant: "ema" or "raw" as asked for, else where there are any.

    Raises what `describe_model` raises.
    """
    return weights == "ema" if weights else describe_model(file)["ema_state"] is not None


def _check_makes_images(file: str | os.PathLike, config: dict[str, Any]) -> None:
    if config.get("model_type") in CLASSIFIERS:
        raise ValueError(
            f"{file} is a classifier, which makes no images; pass it as --classifier or --judge, or another checkpoint."
        )


def read_resume_file(file: str | os.PathLike) -> tuple[dict[str, Any], Path, list[Path]]:
    """The newest whole version of a resume file: its content, its name, and the newer versions that are damaged.

    Raises what `read_checkpoint` raises if no version is whole, and ValueError for a file that is no resume file.
    """
    damaged = []
    for version in versions(file) or [Path(file)]:
        try:
            content = read_checkpoint(version)
        except DamagedCheckpointError as error:
            damaged.append(version)
            last_error = error
            continue
        missing = [key for key in RESUME_KEYS if key not in content]
        if missing:
            raise ValueError(f"{version} lacks {', '.join(missing)}; resume needs the _last.pth of a run.")
        return content, version, damaged
    raise last_error


def unmet_need(what: object, config: dict[str, Any], given: Collection[str] = ()) -> str:
    """What a model needs beside noise and what is `given`, as a sentence that names it, or an empty text."""
    needs = {
        START_IMAGES: config.get("start_dataset") is not None,
        DEGRADED_IMAGES: config.get("objective") == COLD,
        COARSE_IMAGES: getattr(MODEL_CLASSES.get(config.get("model_type")), "coarse_given", False),
    }
    unmet = [need for need, has in needs.items() if has and need not in given]
    return _NEEDS[unmet[0]].format(what, **config) if unmet else ""


class LoadedModel(NamedTuple):
    """A checkpoint ready for use: frozen model, its schedule, its config, the fingerprint of its weights, its file."""

    model: nn.Module
    scheduler: DDIMScheduler
    config: dict[str, Any]
    fingerprint: str
    file: Path

    @property
    def denoise(self) -> Denoiser:
        """The model as a denoiser of noisy images of its process, which returns predictions alone."""
        learned = self.learned_variance
        return predictions_alone(self.denoise_with_variance) if learned else self.denoise_with_variance

    @property
    def denoise_with_variance(self) -> Denoiser:
        """The same with all that the model returns: for the walk, which splits it, and for what acts on all of it."""
        return self.scheduler.denoiser(self.model.denoise)

    @property
    def learned_variance(self) -> bool:
        """Whether the model says what variance a step has."""
        return getattr(self.model, "learned_variance", False)

    def check_variance(self) -> None:
        """Raise ValueError unless the model says what variance a step has."""
        if not self.learned_variance:
            raise ValueError(NO_VARIANCE)

    @property
    def is_consistency(self) -> bool:
        """Whether its clean images are the ends of paths, as a consistency model has them, and no means."""
        return self.config.get("objective") == "consistency"

    def check_solver(self, solver: Solver) -> None:
        """Raise ValueError unless the model can be sampled by a solver."""
        name, objective = solver.name, self.config.get("objective")
        own = OWN_SOLVERS.get(objective, (name,))
        if name not in own:
            raise ValueError(
                f"{self.file} was trained with --objective {objective}, and only --solver {' or '.join(own)} samples "
                f"such a model, not {name}; pass {'that one' if len(own) == 1 else 'one of these'}."
            )
        for theirs, solvers in OWN_SOLVERS.items():
            if name in solvers and objective != theirs:
                raise ValueError(
                    f"--solver {name} samples models that were trained with --objective {theirs}, and {self.file} "
                    "was not; choose another solver."
                )
        if objective == "progressive" and (name != "ddim" or solver.draws):
            what, way = ("takes others", "leave --solver out") if name != "ddim" else ("draws noise", "pass --eta 0")
            flag = "solver" if name != "ddim" else "eta"
            raise ValueError(f"{self.file} is a student of steps of DDIM, and --{flag} {what}; {way}.")

    def require_means(self, stage: str) -> None:
        """Raise ValueError, naming the stage, for a model whose clean images are no means of what may have been."""
        if self.is_consistency:
            raise ValueError(
                f"{self.file} was trained with --objective consistency: it predicts where a path ends, and no mean of "
                f"clean images, by which {stage} goes; pass a checkpoint of another objective."
            )

    def require_enlarging(self) -> None:
        """Raise ValueError for a model that cannot be given a coarse image at a noise level."""
        if not self.model.enlarges():
            raise ValueError(
                f"{self.file} is a '{self.config['model_type']}' model; super-resolution needs one with two clocks "
                "(train_lift.py), which can be told that the coarse image is clean, or how noisy it is."
            )

    @property
    def is_cold(self) -> bool:
        """Whether it restores degraded images, and knows no noise level."""
        return self.config.get("objective") == COLD

    @property
    def starts_from_images(self) -> bool:
        """Whether it was trained to walk from images of another data set, and not from noise."""
        return self.config.get("start_dataset") is not None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def results(self) -> Path:
        """The folder for what is made with it."""
        return results_of(self.file, self.config)

    @property
    def side(self) -> int:
        """The side of the fine scale as the model sees it, in pixels or in values of a latent."""
        return side_of(self.config)

    @property
    def image_channels(self) -> int:
        """Channels of an image, 1 or 3, whatever the model sees of it."""
        return image_channels_of(self.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image, in pixels."""
        return self.image_channels, self.config["resolution"], self.config["resolution"]

    @property
    def space(self) -> Space:
        """Between images and what the model sees of them; raises what `open_space` raises."""
        if self.config.get("latents") is None:
            return open_space(self.config, self.file, "cpu")
        return open_space(self.config, self.file, self.device)

    def require_pixels(self, stage: str) -> None:
        """Raise ValueError, naming the stage, for a model of latents, of which it makes no sense or nothing yet."""
        if self.config.get("latents") is not None:
            raise ValueError(
                f"{self.file} was trained on latents of '{self.config['latents']}', and {stage} is for models of "
                "pixels; pass a checkpoint of a training without --latents."
            )

    @property
    def weights(self) -> str:
        """Which set of weights was chosen: "raw" or "ema"."""
        return self.config["weights"]


def load_model(
    file: str | os.PathLike,
    ema: bool = False,
    device: torch.device | str = "cpu",
    given: Collection[str] = (),  # what the caller has for models: START_IMAGES, DEGRADED_IMAGES, COARSE_IMAGES
) -> LoadedModel:
    """The model a checkpoint describes, frozen, in eval mode on `device`, with raw or EMA weights.

    Its config also holds `epoch`, `step` and `weights`, and where the file has them `steps_per_epoch` and
    `regime_state`. Prints a warning, once per file, if EMA weights are largely the initial ones
    (`networks.ema.ema_note`). Raises what `read_checkpoint` raises, and ValueError if `ema` is asked of a file without
    EMA weights, if the weights do not fit the model of the config, for a classifier, or for a model that starts from
    images of a data set, enlarges coarse ones, or restores degraded ones, where there are none for it: what is noise to
    others is none to that.
    """
    content = read_checkpoint(file)
    _check_makes_images(file, content["config"])
    if problem := unmet_need(file, content["config"], given):
        raise ValueError(problem)
    model, scheduler, config, fingerprint = _load(file, content, ema, device)
    return LoadedModel(model, scheduler, config, fingerprint, Path(file))


def _load(
    file: str | os.PathLike, content: dict[str, Any], ema: bool, device: torch.device | str
) -> tuple[nn.Module, DDIMScheduler, dict[str, Any], str]:
    state = content["ema_state" if ema else "model_state"]
    if state is None:
        raise ValueError(f"Checkpoint {file} holds no EMA weights; leave --ema out or train with --ema_decay.")
    config = content["config"] | {
        "epoch": content["epoch"],
        "step": content["step"],
        "weights": "ema" if ema else "raw",
    }
    config |= {name: content[name] for name in ("steps_per_epoch", "regime_state") if content.get(name) is not None}
    try:
        model = build_model(config)
        model.load_state_dict(state)
        scheduler = build_scheduler(config)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"Checkpoint {file} does not fit the model its config describes; it is damaged.") from error
    if ema and (note := ema_note(config, config["step"])):
        # Of a classifier nobody chooses the weights.
        raw = "" if config["model_type"] in CLASSIFIERS else "use the raw weights, "
        say_once(f"warning: {file}: {note}; {raw}train longer, or train with --ema_rampup_ratio {USUAL_RAMPUP}")
    model = model.to(device, memory_format=memory_format(torch.device(device))).eval().requires_grad_(False)
    return model, scheduler, config, weights_fingerprint(state)


class LoadedClassifier(NamedTuple):
    """A checkpoint of a classifier ready for use: as `LoadedModel`, on the device of the model."""

    model: NoisyClassifier
    scheduler: DDIMScheduler
    config: dict[str, Any]
    fingerprint: str
    file: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes, in the order of its logits."""
        return tuple(self.config["class_names"])

    def shown(self, xs: Images, ts: Images) -> Images:
        """What its `features` and `forward` take, of images as its process makes them, at timesteps by scale."""
        zs = tuple(self.scheduler.shown(x, t) for x, t in zip(xs, ts, strict=True))
        return self.model.inputs(zs, ts)

    def log_probability(self, xs: Images, ts: Images, labels: torch.Tensor) -> torch.Tensor:
        """log p(label | noisy images) `[B]`, differentiable in the images `[B, C, H, W]` by scale; labels int64 `[B]`.

        Scales that it does not read do not matter.
        """
        logits = self.model(*self.shown(xs, ts)).float()  # [B, K]
        return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def load_classifier(file: str | os.PathLike, device: torch.device | str = "cpu") -> LoadedClassifier:
    """The classifier of a checkpoint, frozen, in eval mode on `device`, with its EMA weights if it has them.

    Raises what `load_model` raises, and ValueError for a checkpoint of anything else.
    """
    content = read_checkpoint(need_file(file, "Classifier", "train one with train_classifier.py, or pass another file"))
    if content["config"].get("model_type") not in CLASSIFIERS:
        raise ValueError(f"{file} is no classifier; pass a checkpoint of train_classifier.py.")
    model, scheduler, config, fingerprint = _load(file, content, content["ema_state"] is not None, device)
    return LoadedClassifier(model, scheduler.to(device), config, fingerprint, Path(file))
