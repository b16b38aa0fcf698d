"""Paths that are optimal on a heatmap: the published ones, and those of least denoising error (KL).

Shapes: n grid lines of the map; a heatmap is the content of a file of `planning.heatmap`.
"""

from typing import NamedTuple

import numpy as np
import torch

from checkpoint import MODEL_CLASSES
from images.representation import REPRESENTATIONS, Overcomplete
from paths.families import log_snr_shift
from paths.map_interpolation import interpolate_map, nearest_in_row
from paths.optimal import best_cascade, find_optimal_path_n_steps_lambda, kl_path
from paths.path import Path, path_from_cells, timestep_grid
from paths.refine import Refined, refine_path
from planning.error_map import CLIPPED_MSES, MSES, published_errors

NO_CASCADE = (
    "cascade:best needs a model that was trained on all pairs of timesteps, and this one was not; use --path_type kl."
)


def path_errors(
    heatmap: dict, path_type: str, factor: str, normalisation: str = "published"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """error_64 and error_32 `[n, n]` as a dp type counts them, `dp_64` without the coarse one, and log SNR `[n]`."""
    error_64, error_32 = published_errors(heatmap, factor, normalisation)
    if path_type == "dp_64":
        error_32 = torch.zeros_like(error_32)
    return error_64.numpy(), error_32.numpy(), heatmap["log_snr_grid"].numpy()


def _has_one_scale(heatmap: dict) -> bool:
    # Older files do not say: they are of two.
    return MODEL_CLASSES[heatmap.get("model_type", "dual")].num_scales == 1


def representation_of(heatmap: dict) -> Overcomplete:
    """The representation that a heatmap is of; one that does not say is from before there was a choice."""
    return REPRESENTATIONS[heatmap.get("representation", "overcomplete")]


def path_mses(heatmap: dict) -> tuple[str, ...]:
    """The names of the three denoising errors that paths go by: clamped, as the sampler clamps, where measured."""
    return CLIPPED_MSES if CLIPPED_MSES[0] in heatmap else MSES


def beyond_seen(heatmap: dict, points: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """How far points `[..., 2]` in (fractional) timesteps are from what was trained on, in log SNR of the coarse scale.

    Zero within the range that the heatmap gives for t_64 (`seen_32`), and everywhere for one that gives none.
    """
    if "seen_32" not in heatmap:
        return np.zeros(points.shape[:-1])
    timesteps = np.arange(len(log_snr))
    finite = np.maximum(log_snr, log_snr[int(heatmap["t_grid"][0])])
    t_64, t_32 = np.moveaxis(points, -1, 0)
    least, most = (np.interp(t_64, timesteps, np.maximum(ends, finite[-1])) for ends in heatmap["seen_32"].numpy())
    here = np.interp(t_32, timesteps, finite)
    return np.maximum(np.maximum(least - here, here - most), 0)


def seen_cells(heatmap: dict, t_grid: np.ndarray, log_snr: np.ndarray) -> np.ndarray | None:
    """The cells `[n, n]` of a grid where the network was trained, at least the nearest for each t_64; None for all."""
    if "seen_32" not in heatmap:
        return None
    off = beyond_seen(heatmap, np.stack(np.meshgrid(t_grid, t_grid, indexing="ij"), -1), log_snr)
    return off <= off.min(1, keepdims=True)


def trusted(heatmap: dict, log_snr: np.ndarray) -> dict:
    """The heatmap with denoising errors where the network was trained, and elsewhere those of the nearest such t_32.

    What the errors of a network are where it was never trained says nothing about the images. A path that goes by how
    errors fall would see information lost on the way there, and count that as a gain.
    """
    t_grid = heatmap["t_grid"].numpy()
    seen = seen_cells(heatmap, t_grid, log_snr)
    if seen is None:
        return heatmap
    rows, columns = torch.arange(len(t_grid))[:, None], torch.from_numpy(nearest_in_row(seen, log_snr[t_grid]))
    changed = {name: heatmap[name][rows, columns] for name in MSES + CLIPPED_MSES if name in heatmap}
    if "mse_per_image" in heatmap:
        changed["mse_per_image"] = heatmap["mse_per_image"][:, rows, columns]
    return heatmap | changed


class KLProblem(NamedTuple):
    """What the KL paths minimise on a heatmap, as `kl_path` and `refine_path` take it.

    Weight 0 is the KL divergence of the sampler's chain from the true one and counts the errors of both scales. A
    weight p > 0 counts the bands of the fine image (docs/theory.md, section 5): the details with the error measured
    there, mse_64 - mse_64_low, and the low band with the lesser of mse_64_low and 4 mse_32, that of the prediction that
    knows more. These two are equal for a perfect denoiser. A network may leave one of them large where the other scale
    is nearly clean, and then a path would see no cost in moving the clock that it leaves unread.
    Errors are those of the clamped image, which is what the sampler goes by: at high noise that of a network's raw
    prediction can be several times the variance of the images.

    In the residual representation the scales are the bands already. That of the coarse one, summed over the image,
    counts four times and is seen at a quarter of its SNR; together that is a factor of 4^p. One clock on one scale
    sees both bands at one SNR, where the parts of their costs add up to that of the whole image.
    """

    mse_64: np.ndarray  # [n, n], totals in x-space, as the next
    mse_32: np.ndarray  # of the coarse image, or with bands a quarter of that of the low band
    snr: np.ndarray  # [n]
    weight: float
    bands: bool

    @classmethod
    def of(cls, heatmap: dict, weight: float) -> "KLProblem":
        """The problem of the mean maps of a heatmap. Raises ValueError for one without those of all its scales."""
        if "mse_64" not in heatmap:
            raise ValueError("This heatmap holds no denoising errors; compute it again with --maps all.")
        if "mse_32" not in heatmap and _has_one_scale(heatmap):
            mse_64 = heatmap[path_mses(heatmap)[0]].numpy()
            return cls(mse_64, np.zeros_like(mse_64), heatmap["snr_grid"].numpy(), weight, bands=False)
        if "mse_32" not in heatmap:
            raise ValueError(
                "This heatmap is of a model that predicts the fine image alone, and KL paths count the error of the "
                "coarse one too; use dp_64."
            )
        maps = (heatmap[name].numpy() for name in path_mses(heatmap))
        return cls.of_maps(*maps, heatmap["snr_grid"].numpy(), weight, representation_of(heatmap).name)

    @classmethod
    def of_maps(
        cls,
        mse_64: np.ndarray,
        mse_32: np.ndarray,
        mse_64_low: np.ndarray,
        snr: np.ndarray,
        weight: float,
        representation: str = "overcomplete",
    ) -> "KLProblem":
        """The same from the three maps `[n, n]` themselves."""
        if representation == "residual":
            return cls(mse_64, 4**weight * mse_32, snr, weight, bands=False)
        if weight == 0:
            return cls(mse_64, mse_32, snr, weight, bands=False)
        low = np.minimum(mse_64_low, 4 * mse_32)
        return cls(mse_64 - mse_64_low + low, low / 4, snr, weight, bands=True)

    def on_lines(self, log_snr: np.ndarray, log_snr_32: np.ndarray | None = None) -> "KLProblem":
        """The same problem with the maps interpolated to other grid lines, the coarse ones at `log_snr_32` if given."""
        maps = interpolate_map(np.stack([self.mse_64, self.mse_32]), np.log(self.snr), log_snr, log_snr_32)
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

    The last of `points` is at `end`, that of `path` at 0 as of every path. The diagonal is that of the image: in the
    residual representation t_32 follows t_64 at λ_32 = λ_64 + log 4, as in `paths.families.log_snr_shift`. Any other
    path keeps to where the network was trained (`seen_cells`), and goes by its errors there (`trusted`). Raises
    ValueError for a heatmap without denoising errors, one of a single scale but for the diagonal, a start that is not
    on the map, and for what `kl_path` and `refine_path` refuse.
    """
    if _has_one_scale(heatmap) and not diagonal:
        raise ValueError("This heatmap is of a model of one scale, whose points lie on the diagonal; use kl_diagonal.")
    t_grid = kl_lines(heatmap, log_snr, start, end, max(num_lines, 2 * num_steps))
    ahead = representation_of(heatmap).image_lead if diagonal else 0.0
    # Where the coarse clock would be beyond the map it waits at its end.
    log_snr_32 = np.minimum(log_snr + ahead, log_snr[end]) if ahead else log_snr
    problem = KLProblem.of(trusted(heatmap, log_snr), weight).on_lines(log_snr[t_grid], log_snr_32[t_grid])
    options = {"weight": weight, "diagonal": diagonal, "bands": problem.bands}
    seen = None if diagonal else seen_cells(heatmap, t_grid, log_snr)
    cells, _ = kl_path(*problem[:3], num_steps, **options, snr_32=np.exp(log_snr_32[t_grid]), allowed=seen)
    allowed = None
    if seen is not None:
        inner = t_grid[np.array(cells[1:-1], dtype=int).reshape(-1, 2)]
        # Where grid lines or timesteps are farther apart than the band is wide they may be off it.
        reach = beyond_seen(heatmap, inner, log_snr).max(initial=0)

        def allowed(points: np.ndarray) -> np.ndarray:
            return beyond_seen(heatmap, points + end, log_snr) <= reach

    # A schedule that begins at `end` is like any other.
    options |= {"log_snr_32": log_snr_32[end:], "allowed": allowed}
    refined = refine_path(cells, t_grid - end, *problem[:2], log_snr[end:], **options)
    grid_path = [[t + end for t in point] for point in refined.path.provenance["grid_path"]]
    provenance = refined.path.provenance | {"grid_path": grid_path, "start": int(t_grid[0]), "end": end}
    path = lift_path(refined.path, end, provenance)
    if ahead:
        points = log_snr_shift(Path([(t,) for t, _ in path.points], "diagonal", {}), ahead, log_snr).points
        path = Path(points, path.kind, provenance)
    return refined._replace(points=refined.points + end, path=path)


def kl_cascade(
    heatmap: dict,
    log_snr: np.ndarray,  # [num_train_timesteps]
    num_steps: int,
    weight: float = 1.0,
    start: int | None = None,  # as of `kl_refined`, and so is end
    end: int = 0,
    num_lines: int = 200,  # of the grid, at least 2 for each step
) -> Path:
    """The cascade of least KL divergence on a heatmap, over a grid of many lines even in log SNR.

    Its provenance has the cost on that grid, `first_steps` of the coarse scale, and the timestep `remaining` at which
    it waits, also as `waits_at_log_snr`. Raises ValueError as `kl_refined` does, for a network that was not trained on
    all pairs of timesteps, and for what `best_cascade` refuses.
    """
    if "seen_32" in heatmap:
        raise ValueError(NO_CASCADE)
    t_grid = kl_lines(heatmap, log_snr, start, end, max(num_lines, 2 * num_steps))
    problem = KLProblem.of(heatmap, weight).on_lines(log_snr[t_grid])
    cells, cost = best_cascade(*problem[:3], num_steps, weight, bands=problem.bands)
    waits = cells[-2][1]
    provenance = {
        "cost": cost,
        "weight": weight,
        "start": int(t_grid[0]),
        "end": end,
        "first_steps": sum(i == 0 for i, _ in cells) - 1,
        "remaining": int(t_grid[waits]),
        "waits_at_log_snr": float(log_snr[t_grid[waits]]),
    }
    points = [(int(t_grid[i]), int(t_grid[j])) for i, j in cells[:-1]]
    return Path([*points, (0, 0)], "cascade", provenance)


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
