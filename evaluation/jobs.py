"""Jobs of evaluation: weights of a checkpoint, sampled along a path from a seed, scored, and a row for every metric.

settings = EvaluationSettings(metrics=("swd",), epochs=(400,), path_type=("diagonal", "dp_total"))
evaluation = Evaluation(settings, Processes(None))
for job in find_jobs(settings):
    evaluation.run(job, wait=True)
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from filelock import FileLock, Timeout

import cli
from checkpoint import (
    DEGRADED_IMAGES,
    MODEL_CLASSES,
    START_IMAGES,
    LoadedModel,
    describe_model,
    find_checkpoints,
    load_model,
    read_checkpoint,
    types_in_run,
)
from cli import CompileSettings
from data import BACKGROUND, ImageSet
from diffusion.adaptive import MOST_CALLS
from diffusion.cold_starts import MixtureStarts
from diffusion.sampler import COARSE_FEEDS, Denoiser, coarse_feed, compile_denoiser, image_seeds, scale_shapes
from diffusion.space import image_channels_of
from diffusion.starts import Starts, check_walk
from evaluation.inception import NUM_FEATURES, RESIZES, Inception, load_inception
from evaluation.judge import Judge, load_judge
from evaluation.reference_set import ReferenceSet, from_images, load_reference
from evaluation.results_table import METRICS, append_row, has_row
from evaluation.scoring import EITHER_METRICS, FEATURES, JUDGE_METRICS, Scorer, generate, judged, needs_inception
from evaluation.training_columns import describe_training
from paths.optimal import check_steps
from paths.path import Path as SamplingPath
from paths.schedule_file import load_schedule
from planning.choice import (
    SeveralPathsSettings,
    check_followed,
    choose_path,
    solver_problem,
    why_not,
)
from planning.cold_walks import MixtureSettings
from planning.conditions import ClassSettings, Conditions, listed
from planning.heatmap import MissingMapSettings, compute_missing, heatmap_file
from planning.path_types import parse_path_type
from planning.regimes import default_regime, off_regime_note
from planning.students import NO_STUDENT, STUDENT_PATH, student_path
from runtime.device import resolve_compile, resolve_precision
from runtime.distributed import Processes
from runtime.runs import CHECKPOINTS, RESULTS, SCORES_FILE, places, results_of, run_name
from runtime.safe_write import beside
from runtime.settings import Settings, option

PUBLISHED_SEEDS = (42, 43, 44, 45, 46)
MODEL_ALIASES = {"lift": "dual"}
# What the printed scores call columns of the table; the others have their names.
VALUE_NAMES = {f"swd_{size}": f"swd level {size} px" for size in (64, 32, 16)}


@dataclass(frozen=True, kw_only=True)
class MetricSettings(Settings):
    """What images are compared with, and how."""

    group = "metrics"
    metrics: tuple[str, ...] = option(("fid",), choices=METRICS, nargs="+")
    reference: str = option(
        "train", "train, holdout, a folder of images of the model's size, or an .npz of pytorch-fid or EDM"
    )
    resize: str = option("pytorch-fid", "filter by which images reach the 299x299 pixels of Inception", choices=RESIZES)
    inception_weights: str | None = option(None, "pt_inception-2015-12-05 weights, if not downloaded", metavar="FILE")
    judge: str | None = option(
        None,
        f"a checkpoint of train_classifier.py, of whose features or probabilities {', '.join(JUDGE_METRICS)} are",
        metavar="FILE",
    )
    features: str = option("inception", f"of which {' and '.join(EITHER_METRICS)} are, also judge", choices=FEATURES)

    def check(self) -> None:
        super().check()
        by_judge = judged(self.metrics, self.features)
        if by_judge and self.judge is None:
            raise ValueError(f"the metric {min(by_judge)} needs a judge; pass --judge FILE, of train_classifier.py")
        if self.judge is not None and not by_judge:
            raise ValueError(
                f"--judge belongs to --metrics {', '.join(JUDGE_METRICS)} and to --features judge; leave it out"
            )
        if self.features == "judge" and not set(self.metrics) & set(EITHER_METRICS):
            raise ValueError(f"--features belongs to --metrics {' and '.join(EITHER_METRICS)}; leave it out")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(
    ClassSettings, MetricSettings, MissingMapSettings, SeveralPathsSettings, MixtureSettings, CompileSettings
):
    """Which checkpoints are sampled, how, and how they are scored."""

    run: tuple[str, ...] | None = option(None, "score what these runs have", parse=run_name, metavar="NAME", nargs="+")
    checkpoint: tuple[str, ...] | None = option(None, "score these files", metavar="FILE", nargs="+")
    checkpoint_dir: str | None = option(None, "folder of {model}_{epoch}ep.pth files (checkpoints)")
    model_type: tuple[str, ...] | None = option(
        None,
        "types of model in these folders (baseline lift; of a run, all it has)",
        choices=(*MODEL_CLASSES, *MODEL_ALIASES),
        nargs="+",
    )
    epochs: tuple[int, ...] | None = option(None, "epochs to score (all found)", parse=cli.positive_int, nargs="+")
    coarse_from: tuple[str, ...] = option(
        ("x0",),
        "coarse images that models read and do not predict: of their clean or of their noisy fine image",
        choices=COARSE_FEEDS,
        nargs="+",
    )
    weights: tuple[str, ...] = option(
        ("raw",), choices=("raw", "ema"), nargs="+", shortcuts={"--ema": (("ema",), "score the EMA weights alone")}
    )
    num_calls: tuple[int, ...] | None = option(
        None,
        "network calls, in place of --num_steps: the most steps that do with so many; of ode the most for an image "
        f"({MOST_CALLS})",
        parse=cli.positive_int,
        metavar="N",
        nargs="+",
    )
    seeds: tuple[int, ...] = option(
        (42,), parse=cli.seed, nargs="+", shortcuts={"--multi-seed": (PUBLISHED_SEEDS, "seeds 42 to 46")}
    )
    num_images: int | None = option(None, "images per job (as many as the reference)", parse=cli.positive_int)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    output: str | None = option(
        None,
        "results table, or a folder for it (results/fid_results.csv; of a run with a name, that in its results)",
        aliases=("--output_dir",),
    )
    force: bool = option(False, "score again what has been scored")

    def check(self) -> None:
        super().check()
        if sum(place is not None for place in (self.run, self.checkpoint, self.checkpoint_dir)) > 1:
            raise ValueError("--run, --checkpoint and --checkpoint_dir exclude each other; name one of them")
        if self.checkpoint is not None and (self.model_type or self.epochs):
            raise ValueError("--model_type and --epochs choose from a folder; leave them out beside --checkpoint")
        if self.num_calls is not None and self.solver == "ode" and len(self.num_calls) > 1:
            raise ValueError("--num_calls is the limit of --solver ode, which has one; pass --tolerance to take fewer")
        if self.output is not None and (Path(self.output).is_dir() or not Path(self.output).suffix):
            self._derive(output=str(Path(self.output) / SCORES_FILE))


class Job(NamedTuple):
    """One evaluation: weights of a checkpoint sampled along a type of path, in so many steps, from one seed."""

    checkpoint: Path
    weights: str  # raw or ema
    path_type: str
    coarse_from: str | None  # None for models that predict what they read
    num_steps: int
    seed: int
    output: Path  # the table that its rows go to

    def __str__(self) -> str:
        feed = f"coarse from {self.coarse_from} " if self.coarse_from else ""
        return f"{self.checkpoint.name} {self.weights} {self.path_type} {feed}{self.num_steps} steps seed {self.seed}"


def find_jobs(settings: EvaluationSettings) -> list[Job]:
    """The jobs that settings ask for, in their order; paths that a type of model cannot follow are left out for it.

    Raises ValueError if a checkpoint is missing, no model can follow any of the paths, or steps do not cross the grid.
    """
    jobs = []
    refused: dict[tuple[str, str], str] = {}
    found = _found(settings)
    for name, files in found:
        problem = solver_problem(settings, name)
        reasons = {path_type: why_not(name, path_type) or problem for path_type in settings.path_type}
        refused |= {(name, path_type): reason for path_type, reason in reasons.items() if reason}
        jobs += [
            Job(file, weights, path_type, feed, num_steps, seed, output)
            for file, output in files
            for weights in settings.weights
            for path_type in settings.path_type
            if not reasons[path_type]
            for feed in (coarse_feed(MODEL_CLASSES[name], feed) for feed in settings.coarse_from)
            for num_steps in steps_of(path_type, settings, file)
            for seed in settings.seeds
        ]
    if STUDENT_PATH in settings.path_type:
        others = [file for _, files in found for file, _ in files if not steps_of(STUDENT_PATH, settings, file)]
        refused |= {(file.name, STUDENT_PATH): NO_STUDENT.format(file) for file in others}
    if not jobs:
        raise ValueError(next(iter(refused.values())))
    followed = {job.path_type for job in jobs}
    for (name, path_type), reason in refused.items():
        # That one clock keeps to the diagonal, beside models of two, goes without saying.
        if path_type == STUDENT_PATH or not MODEL_CLASSES[name].one_clock or path_type not in followed:
            print(f"note: left out: {reason}", file=sys.stderr)
    for job in jobs:
        settings.check_calls(job.num_steps)
        if job.path_type.startswith("dp"):
            check_steps(settings.grid, job.num_steps, settings.max_jump)
    return list(dict.fromkeys(jobs))


def _found(settings: EvaluationSettings) -> list[tuple[str, list[tuple[Path, Path]]]]:
    """Checkpoints by type of model, each with the table that its rows go to."""
    if settings.checkpoint is not None:
        # Of a file that is no checkpoint, reading says why.
        said = {Path(file): describe_model(file)["config"] for file in settings.checkpoint}
        tables = {file: settings.output or results_of(file, config) / SCORES_FILE for file, config in said.items()}
        types = {file: config["model_type"] for file, config in said.items()}
        return [
            (name, [(f, Path(tables[f])) for f in types if types[f] == name]) for name in dict.fromkeys(types.values())
        ]
    named = [MODEL_ALIASES.get(name, name) for name in settings.model_type or ()]
    if settings.run is None:
        folders = {Path(settings.checkpoint_dir or CHECKPOINTS): named or ["baseline", "dual"]}
    else:
        folders = {places(run).checkpoints: named or types_in_run(run) for run in settings.run}
    found = []
    for folder, types in folders.items():
        results = RESULTS if settings.run is None else places(folder.name).results
        output = Path(settings.output or results / SCORES_FILE)
        for name in dict.fromkeys(types):
            found.append((name, [(file, output) for file in find_checkpoints(folder, name, settings.epochs).values()]))
    return found


def steps_of(path_type: str, settings: EvaluationSettings, file: Path) -> tuple[int, ...]:
    """The numbers of steps of a type of path: those of the flags, or its own, a schedule's or that of a student.

    There is none for a file that is no student.
    """
    kind = parse_path_type(path_type)
    if kind.name == "through":
        return (len(kind.parameters) + 1,)
    if kind.name == STUDENT_PATH:
        path = student_path(describe_model(file)["config"])
        return () if path is None else (path.nfe,)
    return (load_schedule(kind.parameters[0]).nfe,) if kind.name == "schedule" else settings.num_steps


class Evaluation:
    """Runs jobs one after the other; what they share is loaded and made once."""

    def __init__(self, settings: EvaluationSettings, processes: Processes):
        self.settings, self.processes, self.device = settings, processes, processes.device
        self._loaded: tuple[Any, LoadedModel, Conditions, Denoiser, str] | None = None
        self._inception: Inception | None = None
        self._judge: Judge | None = None
        self._scorer: Scorer | None = None
        # Of a model that starts from images, those held out or else all; of cold diffusion draws of a mixture.
        self._starts: Starts | MixtureStarts | None = None
        self._warned = False
        self._judged: set[tuple[str, str, str | None]] = set()

    def run(self, job: Job, wait: bool) -> bool:
        """Generate and score what has no row yet; False if another process is at this job and `wait` is not set.

        Raises ValueError for a path, reference, metric or number of images that does not suit the model, for images
        that are not finite, and what `load_model`, `choose_path` and `compute_missing` raise.
        """
        with self._claim(job, wait) as claimed:
            if claimed:
                self._run(job)
        return claimed

    def reference(self, job: Job) -> ReferenceSet:
        """What the images of a job are compared with; raises ValueError for one that does not suit the model."""
        config = read_checkpoint(job.checkpoint)["config"]
        return self._reference(*cli.load_image_parts(self.settings, config), config)

    @contextmanager
    def _claim(self, job: Job, wait: bool) -> Iterator[bool]:
        """Keep other processes away from a job, until the end or the death of this one; yields whether that is so."""
        words = (job.checkpoint.resolve(), job.weights, job.path_type, job.coarse_from, job.num_steps, job.seed)
        name = os.fsencode(" ".join(str(word) for word in words if word is not None))
        file = beside(job.output, ".jobs") / f"{hashlib.sha256(name).hexdigest()[:16]}.lock"
        lock = FileLock(file)
        claimed = True
        if self.processes.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                claimed = False
        claimed = not self.processes.any(not claimed)[0]
        try:
            yield claimed
        finally:
            lock.release()

    def _run(self, job: Job) -> None:
        chosen = self.settings
        loaded, conditions, denoise, dataset = self._model(job)
        path = self._path(job, loaded)
        scorer = self._scorer
        is_training_set = loaded.config.get("data_fingerprint") in (None, scorer.training.fingerprint)
        trained = describe_training(loaded, len(scorer.training) if is_training_set else None)
        if chosen.solver == "ddim":  # As rows of earlier versions have it.
            walk = "" if (chosen.eta, chosen.end) == (0.0, "clean") else f"-eta{chosen.eta!r}-{chosen.end}"
        else:
            walk = f"-{chosen.solver_label.replace(' ', '-')}"
        # Images depend on where the network's coarse image comes from as they do on the solver.
        walk += f"-{job.coarse_from}" if job.coarse_from else ""
        walk += f"-{quote(conditions.label, safe='')}" if conditions.names else ""  # So that no two labels meet.
        solver = chosen.make_solver()
        if self._starts is not None:
            check_walk(path, solver, loaded.scheduler)
            if scorer.num_images > len(self._starts):
                raise ValueError(
                    f"{scorer.num_images} images are to be scored, but {len(self._starts)} there are to start from, "
                    f"each of which gives one; pass --num_images {len(self._starts)} or fewer."
                )
        key = {
            "checkpoint_fingerprint": loaded.fingerprint,
            "weights": loaded.weights,
            "path_fingerprint": path.fingerprint() + walk,
            "nfe": None if solver.adaptive else chosen.calls(path.nfe),
            "seed": job.seed,
            "num_images": scorer.num_images,
            "reference_fingerprint": scorer.reference.fingerprint,
            "precision": resolve_precision(self.device, chosen.precision),
            # Two types of path may have the same points and two runs the same weights, but each has its column.
            "path_type": job.path_type,
            "run": trained["run"],
        }
        keys = {metric: key | more for metric, more in scorer.settings.items()}
        missing = {m: k for m, k in keys.items() if chosen.force or not has_row(job.output, k)}
        # What the first process finds in the table counts for all, as the others may see it as it was before.
        wanted = [bool(missing), needs_inception(missing, chosen.features)]
        any_missing, any_features = self.processes.any(*(self.processes.is_main and one for one in wanted))
        if not any_missing:
            self._say(f"{job}: scored already")
            return
        self._warn_off_regime(job, loaded, path)
        scorer.prepare(missing)
        start = time.perf_counter()
        seeds = image_seeds(job.seed, scorer.num_images)
        generated = generate(
            loaded,
            path,
            seeds,
            self.processes,
            chosen.batch_size,
            chosen.precision,
            solver,
            chosen.end,
            scorer.inception if any_features else None,
            denoise,
            coarse_from=job.coarse_from or "x0",
            labels=conditions.labels(seeds),
            starts=self._starts,
        )
        if generated is None:
            return
        sampling_seconds = time.perf_counter() - start
        for metric, row in missing.items():
            start = time.perf_counter()
            values = scorer.score(metric, generated)
            row |= values | {
                "nfe": generated.nfe,
                # A row is one line, whatever the names of folders hold.
                "dataset": " ".join(dataset.splitlines()),
                "reference": " ".join(scorer.reference.name.splitlines()),
                "reference_images": scorer.reference.count,
                "floor_images": scorer.floors[metric],
                "model_type": loaded.config["model_type"],
                "epoch": loaded.config["epoch"],
                "coarse_from": job.coarse_from,
                "regime": loaded.config.get("t_pairs") or default_regime(loaded.config["model_type"]),
                "representation": loaded.scheduler.representation.name if loaded.model.num_scales > 1 else "",
                "solver": chosen.solver_label,
                "guidance": conditions.label,
                **trained,
                "seconds": round(sampling_seconds + time.perf_counter() - start, 1),
                "checkpoint": job.checkpoint.name,
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            append_row(job.output, row)
            said = (f"{VALUE_NAMES.get(name, name)} {value:.5g}" for name, value in values.items())
            print(f"{job}: {', '.join(said)}")

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text)

    def _warn_off_regime(self, job: Job, loaded: LoadedModel, path: SamplingPath) -> None:
        # Jobs of other seeds have the same weights and path.
        judged = loaded.fingerprint, path.fingerprint(), job.coarse_from
        if judged in self._judged or not self.processes.is_main:
            return
        self._judged.add(judged)
        note = off_regime_note(path, loaded.config, loaded.scheduler, job.coarse_from)
        if note:
            print(f"warning: {job.checkpoint.name}: {note}", file=sys.stderr)

    def _model(self, job: Job) -> tuple[LoadedModel, Conditions, Denoiser, str]:
        """The weights of a job, what is sampled, what denoises with them, and the name of their data.

        It sees to the scorer.
        """
        settings, which = self.settings, (job.checkpoint, job.weights)
        if self._loaded is None or self._loaded[0] != which:
            loaded = load_model(
                job.checkpoint, job.weights == "ema", self.device, given=(START_IMAGES, DEGRADED_IMAGES)
            )
            loaded.check_solver(settings.make_solver())
            if settings.make_solver().reads_variance:
                loaded.check_variance()
            config, conditions = loaded.config, settings.conditions(loaded)
            _ = loaded.space  # An autoencoder that is not there is missed now, rather than after a heatmap.
            denoise = conditions.told_classes(loaded.denoise_with_variance)
            self._starts = settings.mixture_starts(loaded, settings)
            if loaded.starts_from_images:
                starts, held_out = cli.load_start_parts(settings, config["channels"], config)
                self._starts = Starts((held_out or starts).pixels)
            training, held_out = cli.load_image_parts(settings, config)
            if self._scorer is None or self._scorer.training.fingerprint != training.fingerprint:
                self._scorer = self._new_scorer(self._reference(training, held_out, config), training, held_out)
            if "ca" in settings.metrics:
                self._check_classes(loaded, conditions)
            jobs_in_steps = len(settings.path_type) * len(settings.seeds) * sum(settings.num_steps)
            if resolve_compile(self.device, settings.compile, jobs_in_steps * self._scorer.num_images):
                shapes = scale_shapes(loaded.model.num_scales, config["channels"], loaded.side)
                batch_size = min(settings.batch_size, self._scorer.num_images)
                denoise, note = compile_denoiser(
                    denoise, shapes, batch_size, self.device, settings.precision, with_labels=bool(conditions.names)
                )
                self._say(note or "the network is compiled")
            self._loaded = which, loaded, conditions, conditions.guided(denoise, loaded), training.name
        return self._loaded[1:]

    def _reference(self, training: ImageSet, held_out: ImageSet | None, config: dict) -> ReferenceSet:
        place = self.settings.reference
        if place == "train":
            return from_images(training, place)
        if place == "holdout":
            if held_out is None:
                raise ValueError(
                    f"--reference holdout needs images that were kept out of training on '{training.name}', but none "
                    "were; train with --holdout N, or pass a folder."
                )
            return from_images(held_out, place)
        return load_reference(
            place,
            config["resolution"],
            image_channels_of(config),
            self.settings.cache_dir,
            self.settings.num_workers,
            config.get("background", BACKGROUND),
            config.get("pad"),
        )

    def _check_classes(self, loaded: LoadedModel, conditions: Conditions) -> None:
        """Raise ValueError unless samples are of classes that the judge knows."""
        if not conditions.names:
            raise ValueError(
                f"The metric ca needs images sampled by class, but {loaded.file} was trained without classes; leave it "
                "out of --metrics, or pass --classifier."
            )
        if conditions.known != self._judge.class_names:
            raise ValueError(
                f"The judge {self.settings.judge} knows the classes {listed(self._judge.class_names)}, but the samples "
                f"of {loaded.file} are of {listed(conditions.known)}; train one on the same data."
            )

    def _new_scorer(self, reference: ReferenceSet, training: ImageSet, held_out: ImageSet | None) -> Scorer:
        settings = self.settings
        num_images = settings.num_images or reference.count
        if num_images is None:
            raise ValueError(f"{reference.name} does not say of how many images it is; pass --num_images.")
        if settings.judge is not None and self._judge is None:
            self._judge = load_judge(settings.judge, self.device)
        uses_features = needs_inception(settings.metrics, settings.features)
        if uses_features and self._inception is None:
            self._inception = load_inception(settings.inception_weights, self.device, settings.resize)
        widths = [NUM_FEATURES] * uses_features + [
            self._judge.num_features for metric in settings.metrics if metric == "fd"
        ]
        if widths and num_images < max(widths) and not self._warned and self.processes.is_main:
            self._warned = True
            print(
                f"note: {num_images} images are fewer than the {max(widths)} features, so that these scores compare "
                "with none of another number of images",
                file=sys.stderr,
            )
        scorer = Scorer(
            settings.metrics,
            num_images,
            reference,
            training,
            self._inception,
            self.device,
            settings.cache_dir,
            self._judge,
            held_out,
            settings.features,
        )
        without = [metric for metric in settings.metrics if metric in JUDGE_METRICS and scorer.floors[metric] is None]
        if without and self.processes.is_main:
            print(
                f"note: {', '.join(without)} of real images would need images held out of training, for ca with "
                "labels of the judge's classes, and there are none, or too few; train with --holdout N",
                file=sys.stderr,
            )
        return scorer

    def _path(self, job: Job, loaded: LoadedModel) -> SamplingPath:
        """The path of a job, on a heatmap that is computed if there is none."""
        config, weights, settings = loaded.config, loaded.weights, self.settings
        heatmap = heatmap_file(settings.heatmap_dir or loaded.results, config, config["epoch"], weights, settings.grid)
        check_followed(job.path_type, loaded)
        if parse_path_type(job.path_type).needs_heatmap and self.processes.any(not heatmap.exists())[0]:
            self._say(f"{job}: computing {heatmap} first")
            compute_missing(settings, job.checkpoint, weights, heatmap, self.processes)
        return choose_path(settings, job.path_type, job.num_steps, loaded, heatmap)
