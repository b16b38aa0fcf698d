"""The plane of a fine and a coarse timestep, in which maps and paths lie: names of its axes, and maps over log SNR.

A map `[n, n]` has the index of t_64 along its rows and that of t_32 along its columns; index 0 is noise. Noise is at
the lower left of every figure. Cells whose value has no logarithm, because it is not positive and finite, stay light
grey.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LogNorm
from matplotlib.ticker import MaxNLocator

from figures.style import spread_out

COARSE_LABEL = r"coarse timestep  (noise $\rightarrow$ clean)"
FINE_LABEL = r"fine timestep  (noise $\rightarrow$ clean)"
SHORT_COARSE_LABEL = "coarse timestep"
SHORT_FINE_LABEL = "fine timestep"
COARSE_LOG_SNR_LABEL = "coarse log SNR"
FINE_LOG_SNR_LABEL = "fine log SNR"
NO_LOGARITHM = "0.85"  # Colour of cells whose value has none.


def check_map(name: str, values, t_grid, log_snr_grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All three as arrays. Raises ValueError, naming the map, if they are not [n, n], [n] and [n]."""
    values = np.asarray(values, dtype=np.float64)
    t_grid, log_snr_grid = np.asarray(t_grid), np.asarray(log_snr_grid, dtype=np.float64)
    n = t_grid.size
    if values.shape != (n, n) or t_grid.shape != (n,) or log_snr_grid.shape != (n,):
        raise ValueError(
            f"{name} has shape {list(values.shape)}, t_grid {list(t_grid.shape)} and log_snr_grid "
            f"{list(log_snr_grid.shape)}; pass [n, n], [n] and [n]"
        )
    return values, t_grid, log_snr_grid


def check_log_snr_map(name: str, values, t_grid, log_snr_grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `check_map`, for maps over log SNR: raises ValueError too if log SNRs are not finite and rising, 2 or more."""
    values, t_grid, log_snr_grid = check_map(name, values, t_grid, log_snr_grid)
    if len(t_grid) < 2 or not np.isfinite(log_snr_grid).all() or not (np.diff(log_snr_grid) > 0).all():
        raise ValueError("log_snr_grid must hold at least 2 finite values that rise from noise to clean")
    return values, t_grid, log_snr_grid


def log_norm(values: np.ndarray) -> LogNorm:
    """A logarithmic colour scale over all values that have a logarithm."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    # A constant map still needs a range, and at least half a decade keeps tick labels apart.
    widen = max(1.0, math.sqrt(10**0.5 * low / high))
    return LogNorm(low / widen, high * widen)


def with_logarithm(values: np.ndarray) -> np.ma.MaskedArray:
    """The values, those masked that are not positive and finite."""
    return np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)


def draw_log_snr_map(
    axes: Axes,
    values: np.ndarray,
    t_grid: np.ndarray,
    log_snr_grid: np.ndarray,
    norm: LogNorm,
    cmap: str | Colormap = "viridis",
) -> QuadMesh:
    """Draw a map `[n, n]` whose cells lie around their log SNRs, with timesteps on the upper and right axes."""
    axes.set_facecolor(NO_LOGARITHM)
    # "nearest" puts the edges of cells half way between the lines, and the outermost as far beyond the last ones.
    mesh = axes.pcolormesh(log_snr_grid, log_snr_grid, with_logarithm(values), shading="nearest", cmap=cmap, norm=norm)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel(COARSE_LOG_SNR_LABEL)
    axes.set_ylabel(FINE_LOG_SNR_LABEL)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(9, steps=[1, 2, 4, 10], integer=True))
    first, last = log_snr_grid[[0, -1]]
    order = [0, len(t_grid) - 1, *range(1, len(t_grid) - 1)]
    lines = [order[k] for k in spread_out(log_snr_grid[order], 0.17 * (last - first))]
    top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    top.set_xticks(log_snr_grid[lines], [str(t) for t in t_grid[lines]])
    right.set_yticks(log_snr_grid[lines], [str(t) for t in t_grid[lines]])
    top.set_xlabel(SHORT_COARSE_LABEL)
    right.set_ylabel(SHORT_FINE_LABEL)
    return mesh


def label_outside_only(panels: np.ndarray) -> None:
    """Take from panels `[rows, columns]` of one plane the inner numbers and labels, which repeat the outer ones."""
    for (row, column), axes in np.ndenumerate(panels):
        if axes is None:
            continue
        top, right = axes.child_axes
        if any(panels[:row, column]):
            top.tick_params(top=False, labeltop=False)
            top.set_xlabel("")
        if any(panels[row + 1 :, column]):
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
        if any(panels[row, :column]):
            axes.tick_params(labelleft=False)
            axes.set_ylabel("")
        if column < panels.shape[1] - 1:
            right.tick_params(right=False, labelright=False)
            right.set_ylabel("")


def log_snr_label(value: float) -> str:
    """The number of a tick, infinities named."""
    return ("∞" if value > 0 else "−∞") if np.isinf(value) else f"{value:.1f}".replace("-", "−")
