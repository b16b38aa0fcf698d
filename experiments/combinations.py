"""Every spacing of a path put together with every offset; `experiments/factorial.py` says what these are."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from paths.path import Path
from planning.map_paths import heatmap_path, kl_refined

SPACINGS = ("uniform t", "uniform λ", "published", "optimal")
OFFSETS = ("diagonal", "published", "coarse ahead by 1", "coarse behind by 1", "optimal 2-D")
SHIFTS = {"coarse ahead by 1": 1.0, "coarse behind by 1": -1.0}


def combine(spacing: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The points `[N + 1, 2]` of a curve `[M, 2]` in the plane of log SNRs at which their mean is spacing `[N + 1]`."""
    along = curve.mean(1)
    return np.stack([np.interp(spacing, along, column) for column in curve.T], axis=1)


def shifted_diagonal(first: float, last: float, shift: float) -> np.ndarray:
    """The curve λ_32 = λ_64 + shift between the ends (first, first) and (last, last), within which both scales stay."""
    u = np.linspace(first, last, 1001)
    points = np.stack([u - shift / 2, u + shift / 2], axis=1).clip(first, last)
    points[0], points[-1] = first, last
    return points


def all_combinations(spacings: dict[str, np.ndarray], curves: dict[str, np.ndarray]) -> Iterator[tuple[str, str, Any]]:
    """Every spacing with every offset; the optimal pair is a path of its own, `curves["optimal 2-D"]`."""
    for spacing in SPACINGS:
        for offset in OFFSETS:
            whole = spacing == "optimal" and offset == "optimal 2-D"
            yield spacing, offset, curves[offset] if whole else combine(spacings[spacing], curves[offset])


def to_path(points: np.ndarray, log_snr: np.ndarray, kind: str) -> Path:
    """The path through the timesteps nearest to points in log SNR; equal ones are moved apart towards noise."""
    nearest = np.abs(log_snr - points[..., None]).argmin(-1)  # [N+1, 2]
    nearest[-1] = 0
    for k in range(len(nearest) - 2, -1, -1):
        nearest[k] = np.maximum(nearest[k], nearest[k + 1])
        if (nearest[k] == nearest[k + 1]).all():
            nearest[k] += 1
    return Path(nearest.tolist(), kind, {})


def trained_paths(heatmap: dict, log_snr: np.ndarray, nfe: int) -> Iterator[tuple[str, str, str, Path]]:
    """(model, spacing, offset, path) of every combination for a network."""
    t_grid = heatmap["t_grid"].tolist()
    first, last = log_snr[t_grid[0]], log_snr[0]
    published = log_snr[np.array(heatmap_path(heatmap, "dp_total", nfe)[0].points)]
    diagonal, plane = (
        log_snr[np.array(kl_refined(heatmap, log_snr, nfe, 1.0, diagonal=d).path.points)] for d in (True, False)
    )
    spacings = {
        "uniform t": log_snr[np.rint(np.linspace(t_grid[0], 0, nfe + 1)).astype(int)],
        "uniform λ": np.linspace(first, last, nfe + 1),
        "published": published.mean(1),
        "optimal": diagonal[:, 0],
    }
    curves = {"diagonal": shifted_diagonal(first, last, 0.0), "published": published, "optimal 2-D": plane}
    curves |= {offset: shifted_diagonal(first, last, shift) for offset, shift in SHIFTS.items()}
    for spacing, offset, points in all_combinations(spacings, curves):
        yield "LIFT", spacing, offset, to_path(points, log_snr, f"{spacing}, {offset}")
    for spacing in SPACINGS:
        yield "baseline", spacing, "", to_path(spacings[spacing][:, None], log_snr, spacing)
