"""From the flags of a stage to the path it samples along."""

import argparse
from pathlib import Path as FilePath
from typing import NamedTuple

import numpy as np
import torch

import cli
from checkpoint import LoadedModel
from error_map import CHAIN_RULE_FACTORS, CLIPPED_MSES, MSES, NORMALISATIONS, load_heatmap, published_errors
from map_interpolation import interpolate_map
from path import SPACINGS, Path, diagonal, find_optimal_path_n_steps_lambda, kl_path, path_from_cells, timestep_grid
from path_refine import Refined, refine_path
from schedule_file import load_schedule

PATH_TYPES = ("diagonal", "dp_64", "dp_total", "kl", "kl_diagonal")
# What a heatmap's published paths were found with, beside the map itself.
PATH_SETTINGS = ("factor", "normalisation", "num_steps", "max_jump")


def add_path_arguments(parser: argparse.ArgumentParser, several_steps: bool = False) -> None:
    """The flags that decide a path, other than its type; --num_steps gives a list where there may be several."""
    group = parser.add_argument_group("path")
    steps = {"nargs": "+", "default": [18]} if several_steps else {"default": 18}
    group.add_argument("--num_steps", type=cli.positive_int, help="steps, each one network call (18)", **steps)
    group.add_argument("--spacing", choices=SPACINGS, default="uniform_t", help="of the diagonal (uniform_t)")
    add_criterion_arguments(parser)


def add_criterion_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that decide what an optimal path minimises."""
    group = parser.add_argument_group("criterion")
    group.add_argument("--max_jump", type=cli.positive_int, default=5, help="cells a dp step may move per axis (5)")
    group.add_argument("--factor", choices=tuple(CHAIN_RULE_FACTORS), default="B", help="chain-rule factor (B)")
    text = "what a dp error is divided by: pixels squared, dimensions, or nothing (published)"
    group.add_argument("--normalisation", choices=tuple(NORMALISATIONS), default="published", help=text)
    text = "of the kl paths: 0 is KL, 1 weighs log SNR evenly (1)"
    group.add_argument("--kl_weight", type=cli.unit_interval, default=1.0, help=text)


def heatmap_file(folder: str, epoch: int, weights: str, grid: int = 30) -> FilePath:
    """`{folder}/heatmap_{grid}_{epoch}ep.pth`, with `_ema` before the suffix for EMA weights."""
    return FilePath(folder) / f"heatmap_{grid}_{epoch}ep{'_ema' if weights == 'ema' else ''}.pth"


def path_errors(
    heatmap: dict, path_type: str, factor: str, normalisation: str = "published"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """error_64 and error_32 `[n, n]` as a dp type counts them, `dp_64` without the coarse one, and log SNR `[n]`."""
    error_64, error_32 = published_errors(heatmap, factor, normalisation)
    if path_type == "dp_64":
        error_32 = torch.zeros_like(error_32)
    return error_64.numpy(), error_32.numpy(), heatmap["log_snr_grid"].numpy()


def path_mses(heatmap: dict) -> tuple[str, ...]:
    """The names of the three denoising errors that paths go by: clamped, as the sampler clamps, where measured."""
    return CLIPPED_MSES if CLIPPED_MSES[0] in heatmap else MSES


class KLProblem(NamedTuple):
    """What the KL paths minimise on a heatmap, as `kl_path` and `refine_path` take it.

    Weight 0 is the KL divergence of the sampler's chain from the true one and counts the errors of both scales. A
    weight p > 0 counts the bands of the fine image (docs/theory.md, section 5): the details with the error measured
    there, mse_64 - mse_64_low, and the low band with the lesser of mse_64_low and 4 mse_32, that of the prediction that
    knows more. These two are equal for a perfect denoiser. A network may leave one of them large where the other scale
    is nearly clean, and then a path would see no cost in moving the clock that it leaves unread.
    Errors are those of the clamped image, which is what the sampler goes by: at high noise that of a network's raw
    prediction can be several times the variance of the images.
    """

    mse_64: np.ndarray  # [n, n], totals in x-space, as the next
    mse_32: np.ndarray  # of the coarse image, or with bands a quarter of that of the low band
    snr: np.ndarray  # [n]
    weight: float
    bands: bool

    @classmethod
    def of(cls, heatmap: dict, weight: float) -> "KLProblem":
        """The problem of the mean maps of a heatmap. Raises ValueError for one without denoising errors."""
        if "mse_64" not in heatmap:
            raise ValueError("This heatmap holds no denoising errors; compute it again with --maps all.")
        return cls.of_maps(*(heatmap[name].numpy() for name in path_mses(heatmap)), heatmap["snr_grid"].numpy(), weight)

    @classmethod
    def of_maps(
        cls, mse_64: np.ndarray, mse_32: np.ndarray, mse_64_low: np.ndarray, snr: np.ndarray, weight: float
    ) -> "KLProblem":
        """The same from the three maps `[n, n]` themselves."""
        if weight == 0:
            return cls(mse_64, mse_32, snr, weight, bands=False)
        low = np.minimum(mse_64_low, 4 * mse_32)
        return cls(mse_64 - mse_64_low + low, low / 4, snr, weight, bands=True)

    def on_lines(self, log_snr: np.ndarray) -> "KLProblem":
        """The same problem with the maps interpolated to other grid lines."""
        maps = interpolate_map(np.stack([self.mse_64, self.mse_32]), np.log(self.snr), log_snr)
        return self._replace(mse_64=maps[0], mse_32=maps[1], snr=np.exp(log_snr))


def heatmap_path(
    heatmap: dict,
    path_type: str,  # dp_64 or dp_total
    num_steps: int = 18,
    max_jump: int = 5,
    factor: str = "B",
    normalisation: str = "published",
) -> tuple[Path, float]:
    """The published optimum on a heatmap as a path through timesteps, and its cost.

    Raises ValueError if num_steps steps of at most max_jump cells do not reach the end.
    """
    errors = path_errors(heatmap, path_type, factor, normalisation)
    cells, cost = find_optimal_path_n_steps_lambda(*errors, num_steps, max_jump)
    criterion = f"{path_type}, factor {factor}, max_jump {max_jump}"
    if normalisation != "published":
        criterion += f", normalisation {normalisation}"
    if heatmap.get("of", "eps") != "eps":
        criterion += f", Jacobian of {heatmap['of']}"
    provenance = {
        "criterion": criterion,
        "cost": cost,
        "cells": [list(cell) for cell in cells],
        "heatmap_weights": heatmap.get("fingerprint"),
    }
    return path_from_cells(cells, heatmap["t_grid"].numpy(), path_type, provenance), cost


def kl_refined(
    heatmap: dict,
    log_snr: np.ndarray,  # [num_train_timesteps]
    num_steps: int,
    weight: float = 1.0,
    diagonal: bool = False,
    start: int | None = None,  # timestep of the first point; None for the noisiest of the heatmap
    end: int = 0,  # timestep at which the cost ends; the last step goes on to clean
    num_lines: int = 60,  # of the grid on which the optimum is first sought, at least 2 for each step
) -> Refined:
    """The KL optimum on a heatmap whose points may lie anywhere: on a finer grid, even in log SNR, then off it.

    The last of `points` is at `end`, that of `path` at 0 as of every path. Raises ValueError for a heatmap without
    denoising errors, a start that is not on the map, and for what `kl_path` and `refine_path` refuse.
    """
    t_grid = kl_lines(heatmap, log_snr, start, end, max(num_lines, 2 * num_steps))
    problem = KLProblem.of(heatmap, weight).on_lines(log_snr[t_grid])
    cells, _ = kl_path(*problem[:3], num_steps, weight, diagonal=diagonal, bands=problem.bands)
    options = {"weight": weight, "diagonal": diagonal, "bands": problem.bands}
    # A schedule that begins at `end` is like any other.
    refined = refine_path(cells, t_grid - end, *problem[:2], log_snr[end:], **options)
    grid_path = [[t + end for t in point] for point in refined.path.provenance["grid_path"]]
    provenance = refined.path.provenance | {"grid_path": grid_path, "start": int(t_grid[0]), "end": end}
    return refined._replace(points=refined.points + end, path=lift_path(refined.path, end, provenance))


def lift_path(path: Path, end: int, provenance: dict | None = None) -> Path:
    """The path over timesteps that are `end` higher, but for its last point, which is clean."""
    points = [tuple(t + end for t in point) for point in path.points[:-1]] + [(0,) * path.num_scales]
    return Path(points, path.kind, path.provenance | {"end": end} if provenance is None else provenance)


def kl_lines(heatmap: dict, log_snr: np.ndarray, start: int | None, end: int, num_lines: int) -> np.ndarray:
    """Timesteps of at most num_lines lines from start to end, even in log SNR.

    Raises ValueError unless noisiest timestep of the heatmap >= start > end >= 0.
    """
    noisiest = int(heatmap["t_grid"][0])
    start = noisiest if start is None else start
    if not noisiest >= start > end >= 0:
        raise ValueError(
            f"A path from timestep {start} to {end} is not on this heatmap, which spans {noisiest} to 0; choose within."
        )
    return end + timestep_grid(
        min(num_lines, start - end + 1), len(log_snr) - end, "uniform_log_snr", start - end, log_snr[end:]
    )


def choose_path(
    args: argparse.Namespace,
    path_type: str,
    loaded: LoadedModel,
    heatmap: str | FilePath | None = None,
    schedule: str | None = None,
) -> Path:
    """The path of `--schedule`, or of a path type for a loaded model.

    Raises ValueError if a DP path is asked of a model with one clock, if the schedule is for other scales or
    clocks, if the heatmap was computed with other weights, and what the path functions and the files raise.
    """
    if schedule is not None:
        path = load_schedule(schedule)
        two_clocks = any(len(set(point)) > 1 for point in path.points)
        if path.num_scales != loaded.model.num_scales or (two_clocks and loaded.config["model_type"] != "dual"):
            raise ValueError(
                f"Schedule {schedule} moves {path.num_scales} scale(s){' by two clocks' if two_clocks else ''}, which "
                f"a '{loaded.config['model_type']}' model cannot follow; pass one made for it."
            )
        return path
    log_snr = loaded.scheduler.log_snr.numpy()
    if path_type == "diagonal":
        return diagonal(args.num_steps, args.spacing, loaded.model.num_scales, log_snr=log_snr)
    if loaded.config["model_type"] != "dual":
        raise ValueError(
            f"--path_type {path_type} needs a model with two clocks, but this one is "
            f"'{loaded.config['model_type']}'; use --path_type diagonal."
        )
    content = load_heatmap(heatmap)
    if content["fingerprint"] != loaded.fingerprint:
        raise ValueError(
            f"Heatmap {heatmap} was computed with other weights than the {loaded.weights} ones of this checkpoint; "
            "compute it again (compute_heatmap_30.py --force) or name another."
        )
    if path_type.startswith("kl"):
        refined = kl_refined(content, log_snr, args.num_steps, args.kl_weight, path_type == "kl_diagonal")
        criterion = {"criterion": f"{path_type}, weight {args.kl_weight:g}", "heatmap_weights": content["fingerprint"]}
        return Path(refined.path.points, path_type, refined.path.provenance | criterion)
    return heatmap_path(content, path_type, args.num_steps, args.max_jump, args.factor, args.normalisation)[0]
