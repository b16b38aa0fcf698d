"""Heatmaps as files: the error map of a checkpoint with its settings, computed where there is none.

A heatmap is a dict of plain types and tensors: what `error_map` returns, the settings it was measured with, and the
published paths on it once they have been found.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

import cli
from checkpoint import MODEL_CLASSES, LoadedModel, describe_model, load_model, peek
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import ImageSet
from paths.optimal import check_steps, find_optimal_paths_all_steps
from paths.path import GRID_SPACINGS, timestep_grid
from planning.error_map import DIFFERENTIATED, MAPS, error_map, largest_deviation, published_errors
from planning.map_file import PartFiles, load_heatmap, save_heatmap
from planning.map_paths import path_errors, seen_cells
from planning.regimes import seen_range
from planning.students import file_words
from runtime.device import autocast, resolve_precision
from runtime.distributed import Processes
from runtime.runs import results_of
from runtime.safe_write import beside
from runtime.settings import option

# What a heatmap's published paths were found with, beside the map itself.
PATH_SETTINGS = ("factor", "normalisation", "num_steps", "max_jump")


@dataclass(frozen=True, kw_only=True)
class GridSettings(DataSettings, HardwareSettings):
    """On which lines of the plane a map is measured, and with how many probes."""

    grid: int = option(30, "grid lines per axis of a heatmap", parse=cli.positive_int)
    grid_spacing: str = option("uniform_t", "of the grid lines", choices=GRID_SPACINGS)
    K: int = option(4, "Hutchinson probes", parse=cli.positive_int)


@dataclass(frozen=True, kw_only=True)
class MapSettings(CheckpointSettings, GridSettings):
    """What is measured of which checkpoint, and where it is kept."""

    output: str | None = option(
        None, "the heatmap file, or the PNG beside it (heatmap_30_[{model}_]{epoch}ep[_ema].pth in the run's results)"
    )
    num_images: int = option(16, "images averaged over", parse=cli.positive_int)
    maps: str = option("all", "blocks need 2K backward passes, mse none", choices=MAPS)
    of: str = option("eps", "differentiate the noise predicted, or the image", choices=DIFFERENTIATED)
    coarse: int | None = option(None, "measure M lines per axis, interpolate", parse=cli.positive_int, metavar="M")
    seen_only: bool = option(
        False, "measure only pairs that the model was trained on; others take the error of the nearest coarse timestep"
    )
    start: int | None = option(None, "noisiest timestep of the grid (the first with a signal)", parse=cli.positive_int)
    batch_size: int | None = option(None, "samples per network call (the images)", parse=cli.positive_int)
    seed: int = option(42, "choice of images, noise and probes", parse=cli.seed)
    force: bool = option(False, "replace an existing heatmap made with other settings")

    def check(self) -> None:
        super().check()
        if self.seen_only and self.coarse is not None:
            raise ValueError("--coarse interpolates over all pairs of timesteps; leave it out beside --seen_only")


@dataclass(frozen=True, kw_only=True)
class MissingMapSettings(GridSettings):
    """Where a stage that needs heatmaps finds them, and how `compute_missing` makes one."""

    group = "heatmaps, computed when they are missing"
    heatmap_dir: str | None = option(None, "folder of heatmap_30_{epoch}ep[_ema].pth (the results of the run)")
    heatmap_images: int = option(16, "images averaged over", parse=cli.positive_int)


def heatmap_file(folder: str | Path, config: Mapping[str, Any], epoch: int, weights: str, grid: int = 30) -> Path:
    """`{folder}/heatmap_{grid}_{epoch}ep.pth`, with `_ema` before the suffix for EMA weights.

    Types of models other than dual are named, as in `heatmap_30_single_t_400ep.pth`, and so are students, by the config
    of their checkpoint.
    """
    return Path(folder) / f"heatmap_{grid}_{file_words(config, epoch)}{'_ema' if weights == 'ema' else ''}.pth"


def find_map(checkpoint: str | Path, config: Mapping[str, Any], epoch: int, weights: str) -> Path:
    """The file of the map that was made of a checkpoint: of 30 lines or, if that is not there, the only other one.

    config: of the checkpoint. Where there is no map, or several, the name is that of 30 lines.
    """
    folder = results_of(checkpoint, config)
    usual = heatmap_file(folder, config, epoch, weights)
    others = sorted(folder.glob(usual.name.replace("_30_", "_[0-9]*_", 1)))
    others = [file for file in others if re.fullmatch(usual.name.replace("_30_", r"_\d+_", 1), file.name)]
    return others[0] if len(others) == 1 else usual


def map_of(settings: CheckpointSettings) -> Path:
    """The file of the map that was made of the checkpoint of settings, which is not loaded for it."""
    # Of a file that is no checkpoint, reading says why.
    said = describe_model(settings.checkpoint)
    return find_map(settings.checkpoint, said["config"], said["epoch"], "ema" if settings.ema else "raw")


def beside_figure(output: str | Path) -> Path:
    """The file of a map that is to be written as `output`: of a PNG, the name of its figure, the .pth beside it."""
    file = Path(output)
    return file.with_suffix(".pth") if file.suffix.lower() == ".png" else file


def compute_missing(
    settings: MissingMapSettings, checkpoint: str | Path, weights: str, file: str | Path, processes: Processes
) -> None:
    """Compute the heatmap of a checkpoint that another stage needs, and save it as `file`.

    Raises what `compute` raises.
    """
    # The processes have their device already.
    shared = [field.name for field in dataclasses.fields(GridSettings) if field.name != "device"]
    compute(
        MapSettings(
            checkpoint=checkpoint,
            ema=weights == "ema",
            output=file,
            num_images=settings.heatmap_images,
            **{name: getattr(settings, name) for name in shared},
        ),
        processes,
    )


def dp_names(content: dict) -> tuple[str, ...]:
    """What the published paths on a map minimise: the fine error, and where the coarse one is known the total."""
    return ("64", "total") if "LL" in content["jacobian"] else ("64",)


def path_fields(content: dict, factor: str, normalisation: str, num_steps: int, max_jump: int) -> dict:
    """What follows from a map for a factor, a normalisation and a rule for steps: errors, optimal paths for every N."""
    error_64, error_32 = published_errors(content, factor, normalisation)
    fields = dict(zip(PATH_SETTINGS, (factor, normalisation, num_steps, max_jump), strict=True))
    fields["error_64"] = error_64
    if "total" in dp_names(content):
        fields |= {"error_32": error_32, "error_total": error_64 + error_32}
    t_grid = content["t_grid"].tolist()
    costs, all_steps = {}, {}
    for name in dp_names(content):
        errors = path_errors(content, f"dp_{name}", factor, normalisation)
        optima = find_optimal_paths_all_steps(*errors, 2 * (len(t_grid) - 1), max_jump)
        all_steps[name] = {n: {"cells": [list(c) for c in cells], "cost": cost} for n, (cells, cost) in optima.items()}
        cells, costs[name] = optima[num_steps]
        fields[f"samples_{name}"] = [list(cell) for cell in cells]
        fields[f"timesteps_{name}"] = [[t_grid[i], t_grid[j]] for i, j in cells]
    return fields | {"costs": costs, "all_steps": all_steps}


def compute(
    settings: MapSettings, processes: Processes, published_rule: tuple[int, int] | None = None
) -> tuple[dict, Path]:
    """The map with its settings, and the file it belongs in; an existing file with equal settings is reused.

    published_rule: number of steps and largest jump of published paths that are to be found on it, for which its grid
    must do. Of several runs that want one file at a time, the first makes it and the others wait and reuse it. Raises
    ValueError for a model that has no map, and settings or images that do not suit it, or for a file of other settings.
    """
    device = processes.device
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_means("an error map")
    model_type = loaded.config["model_type"]
    if loaded.model.one_clock and loaded.model.num_scales > 1:  # Neither a plane nor one scale.
        mapped = (
            name
            for name, kind in MODEL_CLASSES.items()
            if not (kind.one_clock and kind.num_scales > 1) and not kind.coarse_given
        )
        raise ValueError(
            f"{settings.checkpoint} is a '{model_type}' model, but an error map needs one scale, or two that may be "
            f"at any two timesteps; pass a checkpoint of one of {', '.join(mapped)}."
        )
    if loaded.model.num_scales == 1:
        settings = settings.but(maps="mse", coarse=None)
    if published_rule is not None and settings.maps != "mse":  # Of which no published path is made.
        check_steps(settings.grid, *published_rule)
    seen = seen_range(loaded.config, loaded.scheduler)
    if settings.seen_only and seen is None:
        raise ValueError(f"{settings.checkpoint} was trained on all pairs of timesteps; leave --seen_only out.")
    if settings.coarse is not None and seen is not None and processes.is_main:
        print(
            "note: --coarse interpolates between pairs of timesteps that this model was not trained on; --seen_only "
            "does not",
            file=sys.stderr,
        )
    log_snr = loaded.scheduler.log_snr.numpy()
    if settings.start is None:
        settings = settings.but(start=int((loaded.scheduler.snr > 0).nonzero().max()))
    if settings.start < len(log_snr) and loaded.scheduler.snr[settings.start] == 0:
        raise ValueError(
            f"{settings.checkpoint} was trained with schedule '{loaded.config['beta_schedule']}', whose SNR is 0 at "
            f"timestep {settings.start}, where a map has no log SNR; pass a --start below it, such as "
            f"{settings.start - 1}."
        )
    usual = heatmap_file(loaded.results, loaded.config, loaded.config["epoch"], loaded.weights, settings.grid)
    file = beside_figure(settings.output or usual)
    images = cli.load_training_images(settings, loaded.config)
    if images.channels != loaded.image_channels:
        raise ValueError(
            f"The images of '{images.name}' have {images.channels} channel(s) but {settings.checkpoint} was trained on "
            f"{loaded.image_channels}; pass another --dataset."
        )
    if settings.num_images > len(images):
        raise ValueError(f"--num_images {settings.num_images} exceeds the {len(images)} images of '{images.name}'.")
    said = {
        "fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "epoch": loaded.config["epoch"],
        "data_fingerprint": images.fingerprint,
        "beta_schedule": loaded.config["beta_schedule"],
        "K": settings.K,
        "batch": settings.num_images,
        "seed": settings.seed,
        "grid": settings.grid,
        "grid_spacing": settings.grid_spacing,
        "start": settings.start,
        "maps": settings.maps,
        "of": settings.of,
        "coarse": settings.coarse,
        "precision": settings.precision,
    }
    said |= {"seen_only": True} if settings.seen_only else {}  # As files have it that do not know the choice.
    file.parent.mkdir(parents=True, exist_ok=True)
    # The first process holds the file for all.
    with FileLock(beside(file, ".lock")) if processes.is_main else nullcontext():
        # Hosts that share files may see them at different moments, and the first process is the one that writes.
        [kept] = processes.any(processes.is_main and file.exists() and not settings.force)
        if kept:
            content = load_heatmap(file)
            different = [name for name, value in said.items() if content.get(name) != value]
            different += [name for name in ("seen_only",) if name in content.keys() - said.keys()]
            if different:
                run = f" (it is of the run {content['run']})" if content.get("run") else ""
                raise ValueError(
                    f"{file} exists with another {', '.join(different)}{run}; pass --force or another --output."
                )
            if processes.is_main:
                print(f"the map of {file} has these settings and is kept")
        else:
            if processes.is_main and peek(file):
                raise ValueError(f"{file} is a checkpoint, which no map replaces; pass another --output.")
            content = measure(settings, loaded, images, said, seen, file, processes)
            processes.any(False)  # The file is there when any of them goes on.
    return content | said, file


def measure(
    settings: MapSettings,
    loaded: LoadedModel,
    images: ImageSet,
    said: dict,  # of the map, in its file
    seen: torch.Tensor | None,  # of `seen_range`
    file: Path,
    processes: Processes,
) -> dict:
    """The map itself, saved by the first process."""
    device = processes.device
    chosen = np.random.default_rng(settings.seed).choice(len(images), settings.num_images, replace=False)
    x_64 = loaded.space.clean(images, np.sort(chosen), settings.seed, settings.cache_dir, device)

    def run(timesteps: np.ndarray, precision: str, **options) -> dict:
        return error_map(
            loaded.denoise,
            loaded.scheduler,
            x_64,
            timesteps.tolist(),
            num_probes=settings.K,
            seed=settings.seed,
            batch_size=settings.batch_size or settings.num_images,
            autocast=functools.partial(autocast, device, precision),
            maps=settings.maps,
            of=settings.of,
            num_predictions=loaded.model.num_predictions,
            num_scales=loaded.model.num_scales,
            **options,
        )

    num_timesteps = loaded.config["num_train_timesteps"]
    grid = timestep_grid(
        settings.grid, num_timesteps, settings.grid_spacing, settings.start, loaded.scheduler.log_snr.numpy()
    )
    precision = fast = resolve_precision(device, settings.precision)
    if settings.precision == "auto" and precision != "fp32":
        few = grid[sorted({0, len(grid) // 2, len(grid) - 1})]
        deviation = largest_deviation(*(run(few, kind, progress=False) for kind in (precision, "fp32")))
        # The cells are shared, and must be alike.
        if processes.any(not deviation <= 1)[0]:
            precision = "fp32"
        if processes.is_main:
            print(f"{fast} differs from fp32 by at most {deviation:.2g} standard errors: {precision}")
    parts = PartFiles(file, said | {"used": precision})
    where = {} if seen is None else {"seen_32": seen}
    options = {"coarse": settings.coarse, "processes": processes, "parts": parts}
    if settings.seen_only:
        band = where | {"t_grid": grid}
        options["cells"] = torch.from_numpy(seen_cells(band, grid, loaded.scheduler.log_snr.numpy()))
    content = run(grid, precision, **options) | where
    content |= {"used_precision": precision, "num_train_timesteps": num_timesteps}
    # It follows from the fingerprint, so that maps from before it was told are kept.
    content["model_type"] = loaded.config["model_type"]
    content["student"] = loaded.config.get("student")
    content["run"] = loaded.config.get("run")
    # The file calls these K and batch, as published.
    del content["num_probes"], content["num_images"]
    if processes.is_main:
        save_heatmap(file, content | said)
        parts.remove()
    return content
