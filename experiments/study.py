"""What studies share: settings, the noise schedules of Gaussian images, the score of a path, and tables of scores."""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

import cli
from checkpoint import LoadedModel
from diffusion.sampler import image_seeds, sample_seeds, scale_shapes
from diffusion.step import Solver
from evaluation.pixel_metrics import SlicedWasserstein
from paths.path import Path
from runtime.device import autocast
from runtime.settings import REQUIRED, Settings, option
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum

SCHEDULES = {"cosine_clipped": "cosine_clipped", "cosine from λ = -10": "cosine"}
NEARLY_ZERO_TERMINAL_LOG_SNR = -10.0
COLUMNS = ("schedule", "model", "spacing", "offset", "nfe", "seed", "value", "detail")


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Where a study writes."""

    output: str = option(REQUIRED, "name of the files without suffix")


@dataclass(frozen=True, kw_only=True)
class CallsSettings(StudySettings):
    """How many network calls the paths have."""

    nfe: tuple[int, ...] = option((6, 10, 18, 36), parse=cli.positive_int, nargs="+")


@dataclass(frozen=True, kw_only=True)
class GaussianSettings(CallsSettings):
    """A study of Gaussian images."""

    spectrum: str | None = option(None, "variances of real images (a power law)", metavar="FILE")
    resolution: int = option(64, "of the power law", parse=cli.positive_int)

    def variances(self) -> Spectrum:
        """Those of the images, of three channels if they follow the power law; raises what `Spectrum.load` raises."""
        return Spectrum.load(self.spectrum) if self.spectrum else Spectrum.power_law(self.resolution)


def noisiest_timestep(scheduler: DDIMScheduler) -> int:
    """The last timestep whose log SNR is at least `NEARLY_ZERO_TERMINAL_LOG_SNR`: 999 where the schedule ends above."""
    return int(np.flatnonzero(scheduler.log_snr.numpy() >= NEARLY_ZERO_TERMINAL_LOG_SNR)[-1])


def score(
    loaded: LoadedModel,
    path: Path,
    seed: int,
    num_images: int,
    batch_size: int,
    precision: str,
    metric: SlicedWasserstein,
    device: torch.device,
    solver: Solver | None = None,  # None: DDIM
) -> float:
    """Sliced Wasserstein distance (x1000, mean over levels) of images along a path."""
    shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.side)
    seeds = image_seeds(seed, num_images)
    batches = sample_seeds(
        loaded.denoise_with_variance, loaded.scheduler, path, seeds, shapes, batch_size, device, solver=solver
    )
    with autocast(device, precision):
        pixels = torch.cat([loaded.space.pixels(samples.images[0]).cpu() for _, samples in batches])
    return statistics.mean(metric.distance(pixels).values())


def read_csv(file: FilePath) -> list[dict[str, str]]:
    """The rows of an earlier run."""
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every combination, in the order of the rows."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[c] for c in COLUMNS[:5]), []).append(float(row["value"]))
    return [
        dict(zip(COLUMNS[:5], key, strict=True))
        | {"value": statistics.mean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "n": len(v)}
        for key, v in groups.items()
    ]
