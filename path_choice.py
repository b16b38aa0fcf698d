"""From the flags of a stage to the path it samples along."""

import argparse
from pathlib import Path as FilePath

import numpy as np
import torch

import cli
from checkpoint import LoadedModel
from error_map import CHAIN_RULE_FACTORS, load_heatmap, published_errors
from path import SPACINGS, Path, diagonal, find_optimal_path_n_steps_lambda, load_schedule, path_from_cells

PATH_TYPES = ("diagonal", "dp_64", "dp_total")


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that decide a path, other than its type."""
    group = parser.add_argument_group("path")
    group.add_argument("--num_steps", type=cli.positive_int, default=18, help="steps, each one network call (18)")
    group.add_argument("--spacing", choices=SPACINGS, default="uniform_t", help="of the diagonal (uniform_t)")
    group.add_argument("--max_jump", type=cli.positive_int, default=5, help="cells a dp step may move per axis (5)")
    group.add_argument("--factor", choices=tuple(CHAIN_RULE_FACTORS), default="B", help="chain-rule factor (B)")


def heatmap_file(folder: str, epoch: int, weights: str, grid: int = 30) -> FilePath:
    """`{folder}/heatmap_{grid}_{epoch}ep.pth`, with `_ema` before the suffix for EMA weights."""
    return FilePath(folder) / f"heatmap_{grid}_{epoch}ep{'_ema' if weights == 'ema' else ''}.pth"


def path_errors(heatmap: dict, path_type: str, factor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """error_64 and error_32 `[n, n]` as a dp type counts them, `dp_64` without the coarse one, and log SNR `[n]`."""
    error_64, error_32 = published_errors(heatmap, factor)
    if path_type == "dp_64":
        error_32 = torch.zeros_like(error_32)
    return error_64.numpy(), error_32.numpy(), heatmap["log_snr_grid"].numpy()


def heatmap_path(
    heatmap: dict, path_type: str, num_steps: int = 18, max_jump: int = 5, factor: str = "B"
) -> tuple[Path, float]:
    """The published optimum on a heatmap as a path through timesteps, and its cost.

    Raises ValueError if num_steps steps of at most max_jump cells do not reach the end.
    """
    cells, cost = find_optimal_path_n_steps_lambda(*path_errors(heatmap, path_type, factor), num_steps, max_jump)
    provenance = {
        "criterion": f"{path_type}, factor {factor}, max_jump {max_jump}",
        "cost": cost,
        "cells": [list(cell) for cell in cells],
        "heatmap_weights": heatmap["fingerprint"],
    }
    return path_from_cells(cells, heatmap["t_grid"].numpy(), path_type, provenance), cost


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
    if path_type == "diagonal":
        log_snr = loaded.scheduler.log_snr.numpy()
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
    return heatmap_path(content, path_type, args.num_steps, args.max_jump, args.factor)[0]
