"""Score checkpoints: FID and sliced Wasserstein distance (SWD) of images sampled along paths.

    python eval_fid_batch.py --model_type baseline --device 0                      # every epoch, FID
    python eval_fid_batch.py --model_type lift --path_type diagonal dp_64 dp_total --epochs 400 --ema
    python eval_fid_batch.py --metrics swd --num_images 1000 --seeds 42 43 44      # needs no weights

Every checkpoint in --checkpoint_dir x path type x seed is one job; its rows are appended to
results/fid_results.csv. A job whose rows exist is skipped unless --force. All but diagonals need the heatmap of the
same weights (compute_heatmap_30.py). --list_jobs prints the jobs as single commands and stops.
"""

import argparse
import re
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import cli
from checkpoint import FILE_STEMS, LoadedModel, load_model
from data import ImageSet, to_uint8
from device import autocast, resolve_precision, select_device
from metrics import (
    SlicedWasserstein,
    fid_reference_moments,
    frechet_distance,
    inception_features,
    inception_fingerprint,
    load_inception,
    swd_levels,
)
from path import Path as SamplingPath
from path_choice import PATH_TYPES, add_path_arguments, choose_path, heatmap_file
from results_table import VALUE_FIELDS, append_row, has_row
from sampler import ENDS, image_seeds, sample_seeds, scale_shapes

PUBLISHED_SEEDS = [42, 43, 44, 45, 46]
MODEL_ALIASES = {"lift": "dual"}


class Job(NamedTuple):
    """One evaluation: a checkpoint sampled along a type of path from one seed."""

    checkpoint: Path
    path_type: str
    seed: int


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
    add("--path_type", nargs="+", choices=PATH_TYPES, default=["diagonal"], help="(diagonal)")
    add("--ema", action="store_true", help="score the EMA weights")
    add("--seeds", nargs="+", type=cli.seed, default=[42], help="(42)")
    add("--multi-seed", dest="seeds", action="store_const", const=PUBLISHED_SEEDS, help="seeds 42 to 46")
    add("--num_images", type=cli.positive_int, default=None, help="images per job (as many as the reference)")
    add("--batch_size", type=cli.positive_int, default=64, help="images per network call (64)")
    add("--metrics", nargs="+", choices=("fid", "swd"), default=["fid"], help="(fid)")
    add("--inception_weights", metavar="FILE", help="pt_inception-2015-12-05 weights, if they cannot be downloaded")
    add("--heatmap_dir", default="results", help="folder of heatmap_30_{epoch}ep[_ema].pth (results)")
    add("--grid", type=cli.positive_int, default=30, help="grid lines of those heatmaps (30)")
    add("--eta", type=cli.unit_interval, default=0.0, help="0 DDIM to 1 ancestral (0)")
    add("--end", choices=ENDS, default="clean", help="land on the clean image, or on t=0 as published (clean)")
    add("--output", default="results/fid_results.csv", help="(results/fid_results.csv)")
    add("--list_jobs", action="store_true", help="print one command per job and stop")
    add("--force", action="store_true", help="score again what has been scored")
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    add_path_arguments(parser)
    return parser.parse_args()


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs the flags ask for, by model, epoch, path and seed; only dual models have DP paths."""
    jobs = []
    for name in dict.fromkeys(MODEL_ALIASES.get(name, name) for name in args.model_type):
        pattern = re.compile(rf"{re.escape(FILE_STEMS[name])}_(\d+)ep\.pth")
        found = {
            int(match[1]): file
            for file in Path(args.checkpoint_dir).glob("*.pth")
            if (match := pattern.fullmatch(file.name))
        }
        epochs = sorted(found) if args.epochs is None else args.epochs
        missing = [epoch for epoch in epochs if epoch not in found]
        if missing or not epochs:
            raise ValueError(
                f"{args.checkpoint_dir} has no {FILE_STEMS[name]} checkpoint"
                f"{f' of epoch {missing[0]}' if missing else ''}; train it or pass another --checkpoint_dir."
            )
        path_types = [t for t in args.path_type if name == "dual" or t == "diagonal"]
        jobs += [Job(found[e], t, seed) for e in epochs for t in path_types for seed in args.seeds]
    if not jobs:
        raise ValueError(
            f"--path_type {' '.join(args.path_type)} needs a model with two clocks, but --model_type is "
            f"{' '.join(args.model_type)}; add --model_type lift or --path_type diagonal."
        )
    return jobs


def job_command(job: Job) -> str:
    """The command that runs one job with every other flag as given."""
    kept = [word for word in sys.argv if word not in ("--list_jobs", "--multi-seed")]
    name, epoch = re.fullmatch(r"(.+)_(\d+)ep", job.checkpoint.stem).groups()
    model_type = next(key for key, stem in FILE_STEMS.items() if stem == name)
    chosen = ["--model_type", model_type, "--epochs", epoch, "--path_type", job.path_type, "--seeds", str(job.seed)]
    return shlex.join(["python", *kept, *chosen])


class Scorer:
    """Turns generated images into result rows; reference data and networks are made once and reused."""

    def __init__(self, args: argparse.Namespace, images: ImageSet, device: torch.device):
        self.args, self.images, self.device = args, images, device
        self.num_images = args.num_images or len(images)
        self.features: dict[str, str] = {}
        if "swd" in args.metrics:
            levels = "-".join(str(level) for level in swd_levels(images.pixels.shape[-1]))
            self.features["swd"] = f"swd-7x7-{levels}"
            self.swd = SlicedWasserstein(images.pixels, self.num_images, device=device)
        if "fid" in args.metrics:
            self.inception = load_inception(args.inception_weights, device)
            weights_fingerprint = inception_fingerprint(self.inception)
            self.features["fid"] = f"inception-{weights_fingerprint}"
            self.reference = fid_reference_moments(
                images.pixels, images.fingerprint, self.inception, weights_fingerprint, args.cache_dir, device=device
            )

    def score(self, metric: str, pixels: torch.Tensor) -> dict[str, float]:
        """The value columns of one metric for uint8 `[N, C, H, W]`."""
        if metric == "fid":
            moments = inception_features(pixels, self.inception, device=self.device)
            return {"fid": round(frechet_distance(moments.mean, moments.cov, *self.reference), 4)}
        distances = self.swd.distance(pixels)
        levels = {f"swd_{level}": round(value, 4) for level, value in distances.items()}
        # The table has a column for the levels of 64x64 images only; the mean counts every level.
        levels = {name: value for name, value in levels.items() if name in VALUE_FIELDS}
        return levels | {"swd": round(sum(distances.values()) / len(distances), 4)}


def generate(
    loaded: LoadedModel, path: SamplingPath, args: argparse.Namespace, seed: int, count: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The fine images of one job, uint8 `[N, C, R, R]` on the CPU, and the network calls each took."""
    shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.config["resolution"])
    pixels, nfe = [], 0
    batches = sample_seeds(
        loaded.model.denoise, loaded.scheduler, path, image_seeds(seed, count), shapes,
        args.batch_size, device, args.eta, end=args.end,
    )  # fmt: skip
    with autocast(device, args.precision), tqdm(total=count, unit="img", leave=False) as bar:
        for chosen, samples in batches:
            nfe = samples.nfe
            pixels.append(to_uint8(samples.images[0]).cpu())
            bar.update(len(chosen))
    return torch.cat(pixels), nfe


def run_job(job: Job, loaded: LoadedModel, scorer: Scorer, args: argparse.Namespace, device: torch.device) -> None:
    """Generate and score what has no row yet."""
    config = loaded.config
    heatmap = heatmap_file(args.heatmap_dir, config["epoch"], loaded.weights, args.grid)
    path = choose_path(args, job.path_type, loaded, heatmap)
    solver = "" if (args.eta, args.end) == (0.0, "clean") else f"-eta{args.eta:g}-{args.end}"
    key = {
        "checkpoint_fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "path_fingerprint": path.fingerprint() + solver,
        "nfe": path.nfe,
        "seed": job.seed,
        "num_images": scorer.num_images,
        "reference_fingerprint": scorer.images.fingerprint,
        "precision": resolve_precision(device, args.precision),
        # Two types of path may have the same points, and each gets its column of the table.
        "path_type": job.path_type,
    }
    keys = {metric: key | {"metric_features": features} for metric, features in scorer.features.items()}
    missing = {m: k for m, k in keys.items() if args.force or not has_row(args.output, k)}
    label = f"{job.checkpoint.name} {loaded.weights} {job.path_type} seed {job.seed}"
    if not missing:
        print(f"{label}: scored already")
        return
    start = time.perf_counter()
    pixels, nfe = generate(loaded, path, args, job.seed, scorer.num_images, device)
    sampling_seconds = time.perf_counter() - start
    for metric, row in missing.items():
        start = time.perf_counter()
        values = scorer.score(metric, pixels)
        row |= values | {
            "nfe": nfe,
            "dataset": scorer.images.name,
            "model_type": config["model_type"],
            "epoch": config["epoch"],
            "metric": metric,
            "seconds": round(sampling_seconds + time.perf_counter() - start, 1),
            "checkpoint": job.checkpoint.name,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        append_row(args.output, row)
        print(f"{label}: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}")


def main() -> None:
    """Run every job, loading each checkpoint once."""
    args = parse_args()
    jobs = find_jobs(args)
    if args.list_jobs:
        print("\n".join(job_command(job) for job in jobs))
        return
    device = select_device(args.device)
    scorer, loaded, loaded_file = None, None, None
    for job in jobs:
        if job.checkpoint != loaded_file:
            loaded, loaded_file = load_model(job.checkpoint, args.ema, device), job.checkpoint
            images = cli.load_training_images(args, loaded.config)
            if scorer is None or scorer.images.fingerprint != images.fingerprint:
                scorer = Scorer(args, images, device)
        run_job(job, loaded, scorer, args, device)


if __name__ == "__main__":
    cli.run_stage(main)
