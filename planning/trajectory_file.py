"""Trajectories of a checkpoint: what is measured by which settings, and the file it is kept in."""

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from filelock import FileLock

import cli
from checkpoint import LoadedModel, describe_model, load_model, peek, weights_fingerprint
from cli import CheckpointSettings, HardwareSettings
from diffusion.likelihood import why_no_equation
from diffusion.sampler import SeededNoise, image_seeds, scale_shapes
from paths.families import diagonal, log_snr_shift
from paths.path import Path
from planning.map_file import read_measured
from planning.map_paths import beyond_seen
from planning.regimes import seen_range
from planning.students import file_words
from planning.trajectories import Band, Trajectories, fine_trajectories
from runtime.device import autocast, resolve_precision, select_device
from runtime.errors import need_file
from runtime.runs import results_of
from runtime.safe_write import beside, replacing
from runtime.settings import option

TRAJECTORY_FORMAT_VERSION = 1
AGAIN = "compute it again with --force, or remove it"
ONE_CLOCK_LINES, TWO_CLOCK_LINES = 100, 60
BEYOND = 0.05  # In log SNR, by which lines may be off what was trained on, as timesteps are.
BAND_FIELDS = ("scales", "result", "variances", "states", "seen")


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings(CheckpointSettings, HardwareSettings):
    """What is measured of which checkpoint, and where it is kept."""

    output: str | None = option(None, "file (trajectories_[{model}_]{epoch}ep[_ema].pth in the run's results)")
    num_images: int = option(16, "noises that trajectories start from, 2 or more", parse=cli.positive_int)
    lines: int | None = option(
        None,
        f"points of a trajectory, evenly in log SNR ({ONE_CLOCK_LINES}; with two clocks {TWO_CLOCK_LINES})",
        parse=cli.positive_int,
    )
    reach: float = option(
        2.0, "with two clocks: log SNR by which either may lead; where the model was trained on that", parse=float
    )
    start: int | None = option(None, "noisiest timestep (the first with a signal)", parse=cli.positive_int)
    batch_size: int = option(16, "images per network call", parse=cli.positive_int)
    seed: int = option(0, "of the noises, as in sampling", parse=cli.seed)
    force: bool = option(False, "replace a file made with other settings")

    def check(self) -> None:
        super().check()
        if self.num_images < 2 or (self.lines or 3) < 3 or not self.reach >= 0:
            raise ValueError("--num_images must be 2 or more, --lines 3 or more, and --reach 0 or more")


def trajectory_file(checkpoint: str | os.PathLike, config: Mapping[str, Any], epoch: int, weights: str) -> FilePath:
    """The file of the trajectories of a checkpoint whose config says what model it is."""
    name = f"trajectories_{file_words(config, epoch)}{'_ema' if weights == 'ema' else ''}.pth"
    return results_of(checkpoint, config) / name


def trajectories_of(settings: CheckpointSettings) -> FilePath:
    """The file of the trajectories of the checkpoint of settings, which is not loaded for it."""
    said = describe_model(settings.checkpoint)
    return trajectory_file(settings.checkpoint, said["config"], said["epoch"], "ema" if settings.ema else "raw")


def save_trajectories(file: str | os.PathLike, trajectories: Trajectories, said: dict[str, Any]) -> None:
    """Write trajectories, and what they are of, atomically: plain types and tensors, coordinates in float32."""
    bands = [dict(zip(BAND_FIELDS, band, strict=True)) for band in trajectories.bands]
    for band in bands:
        band |= {name: band[name].float() for name in ("states", "seen")}
    content = trajectories._asdict() | {"bands": bands}
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        torch.save({"format_version": TRAJECTORY_FORMAT_VERSION, "trajectories": content} | said, stream)


def load_trajectories(file: str | os.PathLike) -> tuple[Trajectories, dict[str, Any]]:
    """Trajectories from a file, and what else it says.

    Raises FileNotFoundError if it is missing, ValueError if it is damaged, something else, or of a later version.
    """
    file = need_file(file, "File of trajectories", "make it with compute_trajectories.py")
    wrong = f"{file} holds no trajectories; make them with compute_trajectories.py."
    content = read_measured(file, str(file), "trajectories", wrong, AGAIN, TRAJECTORY_FORMAT_VERSION)
    found = content.pop("trajectories")
    try:
        bands = tuple(
            Band(*(band[name].double() if name in ("states", "seen") else band[name] for name in BAND_FIELDS))
            for band in found.pop("bands")
        )
        return Trajectories(**found, bands=bands), content
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} lacks what trajectories have ({error}); {AGAIN}.") from error


def trajectory_fingerprint(trajectories: Trajectories) -> str:
    """16 hex digits of what was measured."""
    measured = {"points": trajectories.points, "cells": trajectories.cells}
    for number, band in enumerate(trajectories.bands):
        measured |= {f"states {number}": band.states.float(), f"seen {number}": band.seen.float()}
    return weights_fingerprint(measured)


def compute(settings: TrajectorySettings) -> tuple[Trajectories, dict[str, Any], FilePath]:
    """The trajectories, what they are of, and their file; an existing file with equal settings is reused.

    Raises ValueError for a model that predicts less than it reads, for settings that do not suit it, and for a file of
    other settings.
    """
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_means("a trajectory")
    model, config, scheduler = loaded.model, loaded.config, loaded.scheduler
    if reason := why_no_equation(model.num_scales, model.num_predictions, "Trajectories are not"):
        raise ValueError(f"{settings.checkpoint} is a '{config['model_type']}' model: {reason}")
    if settings.lines is None:
        settings = settings.but(lines=TWO_CLOCK_LINES if model.has_two_clocks() else ONE_CLOCK_LINES)
    # In flow the SNR of the last timestep is taken half a timestep inside, but a sampler finds no signal there.
    with_signal = (scheduler.alphas > 0) & (scheduler.snr > 0)
    noisiest = int(with_signal.nonzero().max())
    if settings.start is None:
        settings = settings.but(start=noisiest)
    if settings.start > noisiest:
        raise ValueError(
            f"--start {settings.start} is beyond timestep {noisiest}, the noisiest one of {settings.checkpoint} that "
            "has a signal."
        )
    if settings.lines > settings.start:
        raise ValueError(
            f"--lines {settings.lines} are more than the {settings.start} timesteps below --start; choose fewer."
        )
    file = FilePath(settings.output or trajectory_file(settings.checkpoint, config, config["epoch"], loaded.weights))
    precision = resolve_precision(device, settings.precision)
    said = {
        "fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "epoch": config["epoch"],
        "model_type": config["model_type"],
        "student": config.get("student"),
        "beta_schedule": config["beta_schedule"],
        "num_train_timesteps": config["num_train_timesteps"],
        "representation": scheduler.representation.name,
        "resolution": config["resolution"],
        "num_images": settings.num_images,
        "lines": settings.lines,
        "reach": settings.reach,
        "start": settings.start,
        "seed": settings.seed,
        "precision": precision,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(beside(file, ".lock")):
        if file.exists() and not settings.force:
            trajectories, content = load_trajectories(file)
            if different := [name for name, value in said.items() if content.get(name) != value]:
                raise ValueError(
                    f"{file} exists with another {', '.join(different)}; pass --force or another --output."
                )
            print(f"the trajectories of {file} have these settings and are kept")
            return trajectories, content, file
        if peek(file):
            raise ValueError(f"{file} is a checkpoint, which no trajectories replace; pass another --output.")
        trajectories = measure(settings, loaded, device, precision)
        said |= {"run": config.get("run"), "data_fingerprint": config.get("data_fingerprint")}
        save_trajectories(file, trajectories, said)
    return trajectories, said, file


def measure(settings: TrajectorySettings, loaded: LoadedModel, device: torch.device, precision: str) -> Trajectories:
    """The trajectories of a model from noises of its seeds, along the diagonal of the image."""
    scheduler, model = loaded.scheduler, loaded.model
    log_snr = scheduler.log_snr.cpu().numpy()
    table = {"log_snr": log_snr, "num_train_timesteps": len(log_snr), "start": settings.start}
    # A step leads from each line to the next, and from the last one to the clean image.
    path = diagonal(settings.lines, "uniform_log_snr", model.num_scales, **table)
    cells = None
    if model.has_two_clocks():
        ahead = scheduler.representation.image_lead
        path = log_snr_shift(path, ahead, log_snr) if ahead else path
        cells = near_diagonal(path, log_snr, settings.reach, seen_range(loaded.config, scheduler))
        if settings.reach and int(cells.sum()) == settings.lines:
            print(
                f"note: no pair of lines beside the diagonal is within --reach {settings.reach:g} and where the model "
                "was trained, so that plans will tie the clocks; take more --lines",
                file=sys.stderr,
            )
    shapes = scale_shapes(model.num_scales, loaded.config["channels"], loaded.side)
    source = SeededNoise(image_seeds(settings.seed, settings.num_images))
    noise = tuple(source.draw(shape, device) for shape in shapes)
    entered = functools.partial(autocast, device, precision)
    return fine_trajectories(loaded.denoise, scheduler, path.points, noise, cells, settings.batch_size, entered)


def near_diagonal(path: Path, log_snr: np.ndarray, reach: float, seen: torch.Tensor | None) -> torch.Tensor:
    """Which pairs of a fine and a coarse line are measured, bool `[n, n]`, on the n lines of a diagonal.

    Those where either scale leads by at most `reach` in log SNR and, with the range `seen` of `seen_range`, where the
    network was trained.
    """
    points = np.array(path.points[:-1])  # [n, 2]
    coarse = log_snr[points[:, 1]]
    near = np.abs(coarse[:, None] - coarse) <= reach
    pairs = np.stack(np.meshgrid(points[:, 0], points[:, 1], indexing="ij"), -1)  # [n, n, 2]
    if seen is not None:
        trained = {"seen_32": seen, "t_grid": points[:1, 0]}
        near &= beyond_seen(trained, pairs, log_snr) <= BEYOND
    return torch.from_numpy(near)
