"""Greedy steps, which try every move, beside diagonals of as many network calls.

    python experiments/greedy.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --output FILE

For every number of rungs and spacing, `diffusion.sampler.sample_greedy` on the rungs of a diagonal, the diagonal
itself, and a diagonal of as many calls as greedy took on average, trials included. All start from the same noise; the
score is the sliced Wasserstein distance (x1000, mean over levels). Prints a report in Markdown.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from checkpoint import load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from diffusion.sampler import SeededNoise, image_seeds, sample_greedy, scale_shapes
from evaluation.pixel_metrics import SlicedWasserstein
from images.representation import OVERCOMPLETE
from paths.families import diagonal
from paths.path import Path as SamplingPath
from runtime.device import autocast, select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_settings
from study import score

SPACINGS = ("uniform_t", "uniform_log_snr")


@dataclass(frozen=True, kw_only=True)
class GreedySettings(CheckpointSettings, DataSettings, HardwareSettings):
    """Whose greedy steps are scored, on how many rungs and images."""

    checkpoint: str | None = option(None, "a model of two clocks")
    rungs: tuple[int, ...] = option((3, 5, 8), "steps of a diagonal", parse=cli.positive_int, nargs="+")
    num_images: int = option(200, parse=cli.positive_int)
    batch_size: int = option(100, parse=cli.positive_int)
    seed: int = option(42, parse=cli.seed)
    output: str | None = option(None, "write the report here too", metavar="FILE")


def parse_args() -> GreedySettings:
    """The settings of this study, from its flags."""
    return parse_settings(GreedySettings, __doc__)


def main() -> None:
    """Sample, score, print and write."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    if loaded.scheduler.representation is not OVERCOMPLETE:
        raise ValueError("Greedy steps are compared with diagonals of over-complete pairs; pass such a --checkpoint.")
    images = cli.load_training_images(settings, loaded.config)
    metric = SlicedWasserstein(images.pixels, settings.num_images, device=device)
    log_snr = loaded.scheduler.log_snr.numpy()
    shapes = scale_shapes(2, loaded.config["channels"], loaded.side)

    def score_of(path: SamplingPath) -> float:
        return score(
            loaded, path, settings.seed, settings.num_images, settings.batch_size, settings.precision, metric, device
        )

    rows = []
    for steps in settings.rungs:
        for spacing in SPACINGS:
            base = diagonal(steps, spacing, log_snr=log_snr)
            pixels, calls, taken = [], [], set()
            for seeds in torch.tensor(image_seeds(settings.seed, settings.num_images)).split(settings.batch_size):
                source = SeededNoise(seeds.tolist())
                noise = [source.draw(shape, device) for shape in shapes]
                with autocast(device, settings.precision):
                    rungs = [t for t, _ in base.points]
                    samples = sample_greedy(loaded.denoise, loaded.scheduler, rungs, noise)
                pixels.append(loaded.space.pixels(samples.images[0]).cpu())
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
                    "diagonal of these rungs": score_of(base),
                    "diagonal of equal calls": score_of(equal),
                }
            )
    title = f"# Greedy steps, {Path(settings.checkpoint).stem}, SWD x1000 of {settings.num_images} images"
    print_report(f"{title}\n\n{markdown_table(rows)}", settings.output)


if __name__ == "__main__":
    cli.run_stage(main)
