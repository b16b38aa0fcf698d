"""Greedy steps, which try every move, beside diagonals of as many network calls.

    python benchmarks/greedy.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --output FILE

For every number of rungs and spacing, `sampler.sample_greedy` on the rungs of a diagonal, the diagonal itself, and a
diagonal of as many calls as greedy took on average, trials included. All start from the same noise; the score is the
sliced Wasserstein distance (x1000, mean over levels). Prints a report in Markdown.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from bench_train import show, table
from checkpoint import load_model
from data import to_uint8
from diffusion.sampler import SeededNoise, image_seeds, sample_greedy, scale_shapes
from evaluation.metrics import SlicedWasserstein
from factorial import score
from images.representation import OVERCOMPLETE
from paths.families import diagonal
from runtime.device import autocast, select_device

SPACINGS = ("uniform_t", "uniform_log_snr")


def parse_args() -> argparse.Namespace:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a model of two clocks")
    add("--ema", action="store_true", help="use the EMA weights")
    add("--rungs", nargs="+", type=cli.positive_int, default=[3, 5, 8], help="steps of a diagonal (3 5 8)")
    add("--num_images", type=cli.positive_int, default=200, help="(200)")
    add("--batch_size", type=cli.positive_int, default=100, help="(100)")
    add("--seed", type=cli.seed, default=42, help="(42)")
    add("--output", default=None, metavar="FILE", help="write the report here too")
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Sample, score, print and write."""
    args = parse_args()
    device = select_device(args.device)
    loaded = load_model(args.checkpoint, args.ema, device)
    if loaded.scheduler.representation is not OVERCOMPLETE:
        raise ValueError("Greedy steps are compared with diagonals of over-complete pairs; pass such a --checkpoint.")
    images = cli.load_training_images(args, loaded.config)
    metric = SlicedWasserstein(images.pixels, args.num_images, device=device)
    log_snr = loaded.scheduler.log_snr.numpy()
    shapes = scale_shapes(2, loaded.config["channels"], loaded.config["resolution"])
    rows = []
    for steps in args.rungs:
        for spacing in SPACINGS:
            base = diagonal(steps, spacing, log_snr=log_snr)
            pixels, calls, taken = [], [], set()
            for seeds in torch.tensor(image_seeds(args.seed, args.num_images)).split(args.batch_size):
                source = SeededNoise(seeds.tolist())
                noise = [source.draw(shape, device) for shape in shapes]
                with autocast(device, args.precision):
                    rungs = [t for t, _ in base.points]
                    samples = sample_greedy(loaded.model.denoise, loaded.scheduler, rungs, noise)
                pixels.append(to_uint8(samples.images[0]).cpu())
                calls += samples.nfe.tolist()
                taken |= {tuple(map(tuple, points)) for points in samples.points.tolist()}
            mean_calls = statistics.mean(calls)
            equal = diagonal(round(mean_calls), spacing, log_snr=log_snr)
            rows.append(
                {
                    "rungs": f"{steps}, {spacing}",
                    "calls of greedy": f"{mean_calls:.1f} ({min(calls)} to {max(calls)})",
                    "paths taken": len(taken),
                    "greedy": statistics.mean(metric.distance(torch.cat(pixels)).values()),
                    "diagonal of these rungs": score(loaded, base, args.seed, args, metric, device),
                    "diagonal of equal calls": score(loaded, equal, args.seed, args, metric, device),
                }
            )
    text = f"# Greedy steps, {Path(args.checkpoint).stem}, SWD x1000 of {args.num_images} images\n\n{table(rows)}"
    show(text, args.output)


if __name__ == "__main__":
    cli.run_stage(main)
