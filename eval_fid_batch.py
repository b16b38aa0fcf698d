"""Score checkpoints: FID, KID, Inception score, precision and recall, SWD, memorisation of images sampled along paths.

    python eval_fid_batch.py --model_type baseline --device 0                      # every epoch, FID
    python eval_fid_batch.py --model_type lift --path_type diagonal dp_64 dp_total --epochs 400 --ema
    python eval_fid_batch.py --weights raw ema --num_steps 6 10 18 36 --multi-seed --metrics fid fid_infinity kid is pr
    python eval_fid_batch.py --metrics swd nn --num_images 1000 --seeds 42 43 44   # needs no Inception weights
    python eval_fid_batch.py --model_type lift --path_type cascade:2,6 cascade:best shift:1 lead:2 heuristic:0.8
    python eval_fid_batch.py --model_type single_t no_t --path_type diagonal dp_64 --coarse_from x0 noisy
    torchrun --standalone --nproc_per_node=4 eval_fid_batch.py --epochs 400        # every job on four GPUs

Every checkpoint in --checkpoint_dir x weights x path type x number of steps x seed is one job, for models that predict
the fine image alone (single_t, no_t) also x --coarse_from; its rows, one per metric, are appended to
results/fid_results.csv. A job whose rows exist is skipped unless --force, and one that another process is at is left to
it, so the same command may run on many GPUs and hosts at once. The dp and kl paths and cascade:best need the heatmap of
the same weights, which is used as it is and computed when it is missing. A job that fails does not keep the others from
running. --list_jobs prints the jobs as single commands.
"""

import argparse
import hashlib
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

import cli
import compute_heatmap_30
from checkpoint import FILE_STEMS, MODEL_CLASSES, LoadedModel, find_checkpoints, load_model
from data import ImageSet
from diffusion.sampler import COARSE_FEEDS, ENDS, Denoiser, coarse_feed, compile_denoiser, image_seeds, scale_shapes
from evaluation.inception import NUM_FEATURES, RESIZES, Inception, load_inception
from evaluation.reference_set import ReferenceSet, from_images, load_reference
from evaluation.results_table import METRICS, append_row, has_row, read_rows
from evaluation.scoring import FEATURE_METRICS, Scorer, generate
from paths.optimal import check_steps
from paths.path import Path as SamplingPath
from paths.schedule_file import load_schedule
from planning.choice import (
    ONE_CLOCK,
    add_path_arguments,
    add_path_type_argument,
    check_followed,
    choose_path,
    heatmap_file,
    parse_path_type,
    why_not,
)
from planning.regimes import default_regime, off_regime_note
from runtime.device import is_out_of_memory, resolve_compile, resolve_precision
from runtime.distributed import PATIENCE, Processes

PUBLISHED_SEEDS = [42, 43, 44, 45, 46]
MODEL_ALIASES = {"lift": "dual"}


class Job(NamedTuple):
    """One evaluation: weights of a checkpoint sampled along a type of path, in so many steps, from one seed."""

    checkpoint: Path
    weights: str  # raw or ema
    path_type: str
    coarse_from: str | None  # None for models that predict what they read
    num_steps: int
    seed: int

    def __str__(self) -> str:
        feed = f"coarse from {self.coarse_from} " if self.coarse_from else ""
        return f"{self.checkpoint.name} {self.weights} {self.path_type} {feed}{self.num_steps} steps seed {self.seed}"


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # An abbreviated --list_jobs would stay in the commands it prints.
    )
    add = parser.add_argument
    types = (*FILE_STEMS, *MODEL_ALIASES)
    add("--checkpoint_dir", default="checkpoints", help="folder of {model}_{epoch}ep.pth files (checkpoints)")
    add("--model_type", nargs="+", choices=types, default=["baseline", "lift"], help="(baseline lift)")
    add("--epochs", nargs="+", type=cli.positive_int, default=None, help="epochs to score (all found)")
    add_path_type_argument(parser, several=True)
    text = "coarse images that models read and do not predict: of their clean or of their noisy fine image (x0)"
    add("--coarse_from", nargs="+", choices=COARSE_FEEDS, default=["x0"], help=text)
    add("--weights", nargs="+", choices=("raw", "ema"), default=["raw"], help="(raw)")
    add("--ema", dest="weights", action="store_const", const=["ema"], help="score the EMA weights alone")
    add("--seeds", nargs="+", type=cli.seed, default=[42], help="(42)")
    add("--multi-seed", dest="seeds", action="store_const", const=PUBLISHED_SEEDS, help="seeds 42 to 46")
    add("--num_images", type=cli.positive_int, default=None, help="images per job (as many as the reference)")
    add("--batch_size", type=cli.positive_int, default=64, help="images per network call (64)")
    add("--eta", type=cli.unit_interval, default=0.0, help="0 DDIM to 1 ancestral (0)")
    add("--end", choices=ENDS, default="clean", help="land on the clean image, or on t=0 as published (clean)")
    add("--output", default="results/fid_results.csv", help="(results/fid_results.csv)")
    add("--list_jobs", action="store_true", help="print one command per job and stop")
    add("--force", action="store_true", help="score again what has been scored")
    group = parser.add_argument_group("metrics")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=["fid"], help="(fid)")
    text = "train, holdout, a folder of images of the model's size, or an .npz of pytorch-fid or EDM (train)"
    group.add_argument("--reference", default="train", help=text)
    text = "filter by which images reach the 299x299 pixels of Inception (pytorch-fid)"
    group.add_argument("--resize", choices=RESIZES, default="pytorch-fid", help=text)
    group.add_argument("--inception_weights", metavar="FILE", help="pt_inception-2015-12-05 weights, if not downloaded")
    compute_heatmap_30.add_missing_map_arguments(parser)
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    cli.add_compile_argument(parser)
    add_path_arguments(parser, several_steps=True)
    return parser.parse_args()


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs the flags ask for, in their order; paths that a type of model cannot follow are left out of its jobs."""
    jobs = []
    refused: dict[tuple[str, str], str] = {}
    for name in dict.fromkeys(MODEL_ALIASES.get(name, name) for name in args.model_type):
        found = find_checkpoints(args.checkpoint_dir, name, args.epochs)
        reasons = {path_type: why_not(name, path_type) for path_type in args.path_type}
        refused |= {(name, path_type): reason for path_type, reason in reasons.items() if reason}
        jobs += [
            Job(file, weights, path_type, feed, num_steps, seed)
            for file in found.values()
            for weights in args.weights
            for path_type in args.path_type
            if not reasons[path_type]
            for feed in (coarse_feed(MODEL_CLASSES[name], feed) for feed in args.coarse_from)
            for num_steps in steps_of(path_type, args)
            for seed in args.seeds
        ]
    if not jobs:
        raise ValueError(next(iter(refused.values())))
    followed = {job.path_type for job in jobs}
    for (name, path_type), reason in refused.items():
        # That one clock keeps to the diagonal, beside models of two, goes without saying.
        if name not in ONE_CLOCK or path_type not in followed:
            print(f"note: left out: {reason}", file=sys.stderr)
    for job in jobs:
        if job.path_type.startswith("dp"):
            check_steps(args.grid, job.num_steps, args.max_jump)
    return list(dict.fromkeys(jobs))


def steps_of(path_type: str, args: argparse.Namespace) -> list[int]:
    """The numbers of steps of a type of path: those of the flags, or the one of a schedule."""
    kind = parse_path_type(path_type)
    return [load_schedule(kind.parameters[0]).nfe] if kind.name == "schedule" else args.num_steps


def job_command(job: Job) -> str:
    """The command that runs one job with every other flag as given."""
    kept = [word for word in sys.argv if word not in ("--list_jobs", "--multi-seed")]
    name, epoch = re.fullmatch(r"(.+)_(\d+)ep", job.checkpoint.stem).groups()
    model_type = next(key for key, stem in FILE_STEMS.items() if stem == name)
    chosen = {
        "--model_type": model_type,
        "--epochs": epoch,
        "--weights": job.weights,
        "--path_type": job.path_type,
        "--num_steps": job.num_steps,
        "--seeds": job.seed,
    }
    if job.coarse_from:
        chosen["--coarse_from"] = job.coarse_from
    return shlex.join(["python", *kept, *(str(word) for pair in chosen.items() for word in pair)])


class Evaluation:
    """Runs jobs one after the other; what they share is loaded and made once."""

    def __init__(self, args: argparse.Namespace, processes: Processes):
        self.args, self.processes, self.device = args, processes, processes.device
        self._loaded: tuple[Any, LoadedModel, Denoiser, str] | None = None
        self._inception: Inception | None = None
        self._scorer: Scorer | None = None
        self._warned = False
        self._judged: set[tuple[str, str, str | None]] = set()

    def run(self, job: Job, wait: bool) -> bool:
        """Generate and score what has no row yet; False if another process is at this job and `wait` is not set."""
        with self._claim(job, wait) as claimed:
            if claimed:
                self._run(job)
        return claimed

    @contextmanager
    def _claim(self, job: Job, wait: bool) -> Iterator[bool]:
        """Keep other processes away from a job, until the end or the death of this one; yields whether that is so."""
        words = (job.checkpoint.resolve(), job.weights, job.path_type, job.coarse_from, job.num_steps, job.seed)
        name = " ".join(str(word) for word in words if word is not None)
        file = Path(f"{self.args.output}.jobs") / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
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
        args = argparse.Namespace(**vars(self.args) | {"num_steps": job.num_steps})
        loaded, denoise, dataset = self._model(job)
        path = self._path(job, args, loaded)
        scorer = self._scorer
        solver = "" if (args.eta, args.end) == (0.0, "clean") else f"-eta{args.eta!r}-{args.end}"
        # Images depend on where the network's coarse image comes from as they do on the solver.
        solver += f"-{job.coarse_from}" if job.coarse_from else ""
        key = {
            "checkpoint_fingerprint": loaded.fingerprint,
            "weights": loaded.weights,
            "path_fingerprint": path.fingerprint() + solver,
            "nfe": path.nfe,
            "seed": job.seed,
            "num_images": scorer.num_images,
            "reference_fingerprint": scorer.reference.fingerprint,
            "precision": resolve_precision(self.device, args.precision),
            # Two types of path may have the same points, and each gets its column of the table.
            "path_type": job.path_type,
        }
        keys = {metric: key | settings for metric, settings in scorer.settings.items()}
        missing = {m: k for m, k in keys.items() if args.force or not has_row(args.output, k)}
        # What the first process finds in the table counts for all, as the others may see it as it was before.
        wanted = [bool(missing), bool(set(missing) & set(FEATURE_METRICS))]
        any_missing, any_features = self.processes.any(*(self.processes.is_main and one for one in wanted))
        if not any_missing:
            self._say(f"{job}: scored already")
            return
        self._warn_off_regime(job, loaded, path)
        scorer.prepare(missing)
        start = time.perf_counter()
        generated = generate(
            loaded,
            path,
            image_seeds(job.seed, scorer.num_images),
            self.processes,
            args.batch_size,
            args.precision,
            args.eta,
            args.end,
            scorer.inception if any_features else None,
            denoise,
            coarse_from=job.coarse_from or "x0",
        )
        if generated is None:
            return
        sampling_seconds = time.perf_counter() - start
        for metric, row in missing.items():
            start = time.perf_counter()
            values = scorer.score(metric, generated)
            row |= values | {
                "nfe": generated.nfe,
                "dataset": dataset,
                "reference": scorer.reference.name,
                "reference_images": scorer.reference.count,
                "model_type": loaded.config["model_type"],
                "epoch": loaded.config["epoch"],
                "coarse_from": job.coarse_from,
                "regime": loaded.config.get("t_pairs") or default_regime(loaded.config["model_type"]),
                "representation": loaded.scheduler.representation.name if loaded.model.num_scales > 1 else "",
                "seconds": round(sampling_seconds + time.perf_counter() - start, 1),
                "checkpoint": job.checkpoint.name,
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            append_row(args.output, row)
            print(f"{job}: {', '.join(f'{name} {value:.5g}' for name, value in values.items())}")

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

    def _model(self, job: Job) -> tuple[LoadedModel, Denoiser, str]:
        """The weights of a job, what is called to denoise with them, and the name of their data; sees to the scorer."""
        args, which = self.args, (job.checkpoint, job.weights)
        if self._loaded is None or self._loaded[0] != which:
            loaded = load_model(job.checkpoint, job.weights == "ema", self.device)
            config, denoise = loaded.config, loaded.model.denoise
            training, held_out = cli.load_image_parts(args, config)
            if self._scorer is None or self._scorer.training.fingerprint != training.fingerprint:
                self._scorer = self._new_scorer(self._reference(training, held_out, config), training)
            jobs_in_steps = len(args.path_type) * len(args.seeds) * sum(args.num_steps)
            if resolve_compile(self.device, args.compile, jobs_in_steps * self._scorer.num_images):
                shapes = scale_shapes(loaded.model.num_scales, config["channels"], config["resolution"])
                batch_size = min(args.batch_size, self._scorer.num_images)
                denoise, note = compile_denoiser(denoise, shapes, batch_size, self.device, args.precision)
                self._say(note or "the network is compiled")
            self._loaded = which, loaded, denoise, training.name
        return self._loaded[1:]

    def _reference(self, training: ImageSet, held_out: ImageSet | None, config: dict) -> ReferenceSet:
        place = self.args.reference
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
            place, config["resolution"], config["channels"], self.args.cache_dir, self.args.num_workers
        )

    def _new_scorer(self, reference: ReferenceSet, training: ImageSet) -> Scorer:
        args = self.args
        num_images = args.num_images or reference.count
        if num_images is None:
            raise ValueError(f"{reference.name} does not say of how many images it is; pass --num_images.")
        uses_features = bool(set(args.metrics) & set(FEATURE_METRICS))
        if uses_features and self._inception is None:
            self._inception = load_inception(args.inception_weights, self.device, args.resize)
        if uses_features and num_images < NUM_FEATURES and not self._warned and self.processes.is_main:
            self._warned = True
            print(
                f"note: {num_images} images are fewer than the {NUM_FEATURES} features, so that these scores compare "
                "with none of another number of images",
                file=sys.stderr,
            )
        return Scorer(args.metrics, num_images, reference, training, self._inception, self.device, args.cache_dir)

    def _path(self, job: Job, args: argparse.Namespace, loaded: LoadedModel) -> SamplingPath:
        """The path of a job, on a heatmap that is computed if there is none."""
        config, weights = loaded.config, loaded.weights
        heatmap = heatmap_file(args.heatmap_dir, config["epoch"], weights, args.grid, config["model_type"])
        check_followed(job.path_type, loaded)
        if parse_path_type(job.path_type).needs_heatmap and self.processes.any(not heatmap.exists())[0]:
            self._say(f"{job}: computing {heatmap} first")
            compute_heatmap_30.compute_missing(args, job.checkpoint, weights, heatmap, self.processes)
        return choose_path(args, job.path_type, loaded, heatmap)


def main() -> None:
    """Run every job; those that other processes are at come last, and by then have their rows."""
    args = parse_args()
    jobs = find_jobs(args)
    if args.list_jobs:
        print("\n".join(job_command(job) for job in jobs))
        return
    read_rows(args.output)  # A table that cannot be added to is refused before anything is computed.
    processes = Processes(args.device, PATIENCE)
    evaluation = Evaluation(args, processes)
    failures: dict[str, Exception] = {}

    def attempt(job: Job, wait: bool) -> bool:
        try:
            return evaluation.run(job, wait)
        except (ValueError, RuntimeError) as error:
            # Other processes of this run would wait for one that goes on, and memory stays short.
            if processes.count > 1 or is_out_of_memory(error):
                raise
            failures[str(error)] = error
            if len(jobs) > 1:
                print(f"{job}: failed: {' '.join(str(error).split())}", file=sys.stderr)
            return True

    taken = [job for job in jobs if not attempt(job, wait=False)]
    for job in taken:
        if processes.is_main:
            print(f"{job}: waiting for the process that is at it")
        attempt(job, wait=True)
    processes.close()
    if failures:
        # One cause of however many failures is the end of the run; of several the first is.
        raise next(iter(failures.values()))


if __name__ == "__main__":
    cli.run_stage(main)
