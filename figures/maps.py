"""Figures of maps in the plane of timesteps: errors with paths over them, Jacobian blocks, and how certain a path is.

Each `plot_*` function takes data (numpy arrays, CPU tensors, nested lists) and the name of a PNG file, which
appears complete or not at all. Rows and columns of a map are those of `figures.plane`.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from figures.plane import (
    COARSE_LABEL,
    COARSE_LOG_SNR_LABEL,
    FINE_LABEL,
    FINE_LOG_SNR_LABEL,
    NO_LOGARITHM,
    check_log_snr_map,
    check_map,
    draw_log_snr_map,
    label_outside_only,
    log_norm,
    log_snr_label,
    with_logarithm,
)
from figures.style import COLORS, STYLE, curve_style, even_columns, save_figure

PREDICTIONS = {"eps": r"\varepsilon", "x0": r"\hat{x}"}  # Symbols of what may be differentiated.
MAP_TITLES = {
    "HH": r"$J_{HH} = \partial PREDICTION_\mathrm{fine}\,/\,\partial x_\mathrm{fine}$",
    "HL": r"$J_{HL} = \partial PREDICTION_\mathrm{fine}\,/\,\partial x_\mathrm{coarse}$",
    "LH": r"$J_{LH} = \partial PREDICTION_\mathrm{coarse}\,/\,\partial x_\mathrm{fine}$",
    "LL": r"$J_{LL} = \partial PREDICTION_\mathrm{coarse}\,/\,\partial x_\mathrm{coarse}$",
    "mse_64": r"fine error, $\|x - \hat{x}\|^2$",
    "mse_32": r"coarse error, $\|x - \hat{x}\|^2$",
}
# Label of a colour bar -> the maps under it, fine prediction first. The cross blocks are orders of magnitude below
# the others, so that on one scale for all blocks nothing of them would show.
SHARED_SCALES = {
    r"squared norm $\|J\|_F^2$ within a scale": ("HH", "LL"),
    r"squared norm $\|J\|_F^2$ across scales": ("HL", "LH"),
    r"squared error of an image, units of $x^2$": ("mse_64", "mse_32"),
}
# A map in these greys stays lighter than whatever lies over it.
PALE_GREYS = LinearSegmentedColormap.from_list("pale greys", ["1.0", "0.62"])
DENSITY_COLORS = LinearSegmentedColormap.from_list("density", [to_rgba(COLORS[1], 0.2), to_rgba(COLORS[1], 0.95)])
Cells = Sequence[tuple[int, int]]


def plot_heatmap(
    error: ArrayLike,  # [n, n], row: index of t_64, column: index of t_32; index 0 is noise
    t_grid: ArrayLike,  # [n], timesteps of the grid lines
    log_snr_grid: ArrayLike,  # [n], their log SNR
    file: str | os.PathLike,
    title: str,
    colorbar_label: str,
    paths: Mapping[str, Cells] | None = None,  # name -> cells (i, j)
) -> None:
    """Draw one n x n map on a logarithmic colour scale, with paths over it.

    Cell (i, j) is centred at x = j, y = i, noise at the lower left; timesteps are on the lower and left axis,
    log SNR on the upper and right one. Raises ValueError for shapes that disagree and for paths that leave the map.
    """
    save_figure(_heatmap_figure(error, t_grid, log_snr_grid, title, colorbar_label, paths), file)


def plot_heatmap_pair(
    error_64: ArrayLike,  # [n, n], as in `plot_heatmap`
    error_total: ArrayLike,  # [n, n]
    t_grid: ArrayLike,
    log_snr_grid: ArrayLike,
    cells_64: Cells,
    cells_total: Cells,
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw the fine error with its path DP-64, and beside it the total error with its path DP-Total.

    Both panels share one colour scale, so that they compare. Conventions and errors as in `plot_heatmap`.
    """
    figure = _heatmap_pair_figure(error_64, error_total, t_grid, log_snr_grid, cells_64, cells_total, title)
    save_figure(figure, file)


def plot_maps(
    maps: Mapping[str, ArrayLike],  # name -> [n, n]
    log_snr_grid: ArrayLike,  # [n], log SNR of the grid lines, rising
    t_grid: ArrayLike,  # [n], their timesteps
    file: str | os.PathLike,
    title: str = "",
    of: str = "eps",  # the blocks are derivatives of the noise predicted, or of the image ("x0")
    shared: Mapping[str, Sequence[str]] = SHARED_SCALES,  # label of a colour bar -> maps that share its scale
) -> None:
    """Draw maps over log SNR, one panel each, one column for those that share a logarithmic colour scale.

    The cell of line i lies around its log SNR and ends half way to the next one; timesteps are on the upper and
    right axes. By default these are the four Jacobian blocks (mean ‖J‖²_F) and the denoising errors mse_64 and
    mse_32 of `planning.error_map.error_map`; those that are absent leave no gap. Raises ValueError for no map, a map
    that `shared` does not name, an unknown `of`, shapes that disagree, n below 2, and log SNRs that are not finite
    and rising.
    """
    save_figure(_maps_figure(maps, log_snr_grid, t_grid, title, of, shared), file)


def plot_path_density(
    error: ArrayLike,  # [n, n]
    density: ArrayLike,  # [n, n], in 0..1: share of bootstrap replicates whose path has a point in the cell
    log_snr_grid: ArrayLike,  # [n], rising
    t_grid: ArrayLike,  # [n]
    cells: Cells,  # the path itself
    cost: float,
    cost_interval: tuple[float, float],  # ends of its 95 % interval
    file: str | os.PathLike,
    title: str = "",
    colorbar_label: str = "error per unit of log SNR",
) -> None:
    """Draw how certain a path is: over a grey map the cells it visits when resampled, and the path of all data.

    Axes as in `plot_maps`. The cost and its interval are in the legend. Raises ValueError as `plot_maps` does, for
    a path that leaves the map, a density outside 0..1, and an interval that is not finite and ascending.
    """
    figure = _path_density_figure(
        error, density, log_snr_grid, t_grid, cells, cost, cost_interval, title, colorbar_label
    )
    save_figure(figure, file)


@rc_context(STYLE)
def _heatmap_figure(error, t_grid, log_snr_grid, title, colorbar_label, paths) -> Figure:
    figure = Figure(figsize=(6.0, 5.6), layout="compressed")
    axes = figure.subplots()
    error, t_grid, log_snr_grid = check_map("error", error, t_grid, log_snr_grid)
    image = _draw_map(axes, error, t_grid, log_snr_grid, log_norm(error))
    for k, (name, cells) in enumerate((paths or {}).items()):
        _draw_cells(axes, name, cells, np.arange(len(t_grid)), k)
    figure.colorbar(image, ax=axes, label=colorbar_label, pad=0.03, aspect=28)
    if paths:
        figure.legend(loc="outside lower center", ncols=even_columns(len(paths)))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _heatmap_pair_figure(error_64, error_total, t_grid, log_snr_grid, cells_64, cells_total, title) -> Figure:
    error_64, t_grid, log_snr_grid = check_map("error_64", error_64, t_grid, log_snr_grid)
    error_total, _, _ = check_map("error_total", error_total, t_grid, log_snr_grid)
    norm = log_norm(np.stack([error_64, error_total]))
    figure = Figure(figsize=(10.6, 5.4), layout="compressed")
    panels = figure.subplots(1, 2)
    contents = (
        ("fine error", error_64, "DP-64", cells_64),
        ("total error, fine + coarse", error_total, "DP-Total", cells_total),
    )
    for k, (axes, (heading, error, name, cells)) in enumerate(zip(panels, contents, strict=True)):
        image = _draw_map(axes, error, t_grid, log_snr_grid, norm)
        axes.set_title(heading)
        _draw_cells(axes, name, cells, np.arange(len(t_grid)), k)
    figure.colorbar(image, ax=panels[-1], label="error per unit of log SNR", pad=0.02, aspect=28)
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _maps_figure(maps, log_snr_grid, t_grid, title, of, shared) -> Figure:
    if not maps:
        raise ValueError("there is no map to draw; pass at least one")
    unknown = maps.keys() - {name for names in shared.values() for name in names}
    if unknown:
        raise ValueError(f"no colour scale is given for {', '.join(sorted(unknown))}; name every map in shared")
    if of not in PREDICTIONS:
        raise ValueError(f"there is no prediction '{of}'; name one of {', '.join(PREDICTIONS)}")
    maps = {name: check_log_snr_map(name, values, t_grid, log_snr_grid) for name, values in maps.items()}
    columns = {label: [name for name in names if name in maps] for label, names in shared.items()}
    columns = {label: names for label, names in columns.items() if names}
    num_rows = max(map(len, columns.values()))
    figure = Figure(figsize=(1.1 + 2.95 * len(columns), 2.9 + 2.4 * num_rows), layout="compressed")
    slots = figure.add_gridspec(num_rows, len(columns))
    panels = np.full((num_rows, len(columns)), None)  # Of axes, None where there is no map.
    for column, (label, names) in enumerate(columns.items()):
        norm = log_norm(np.stack([maps[name][0] for name in names]))
        for row, name in enumerate(names):
            panels[row, column] = axes = figure.add_subplot(slots[row, column])
            mesh = draw_log_snr_map(axes, *maps[name], norm)
            axes.set_title(MAP_TITLES.get(name, name).replace("PREDICTION", PREDICTIONS[of]))
        figure.colorbar(
            mesh, ax=list(panels[: len(names), column]), label=label, location="bottom", pad=0.03, aspect=28
        )
    label_outside_only(panels)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _path_density_figure(
    error, density, log_snr_grid, t_grid, cells, cost, cost_interval, title, colorbar_label
) -> Figure:
    error, t_grid, log_snr_grid = check_log_snr_map("error", error, t_grid, log_snr_grid)
    density, _, _ = check_map("density", density, t_grid, log_snr_grid)
    if not ((density >= 0) & (density <= 1)).all():
        raise ValueError(f"density spans {density.min():g} to {density.max():g}; pass shares of replicates in 0..1")
    low, high = cost_interval
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"the interval of the cost is {low:g} to {high:g}; pass its finite lower and upper end")
    figure = Figure(figsize=(7.4, 5.8), layout="compressed")
    axes = figure.subplots()
    mesh = draw_log_snr_map(axes, error, t_grid, log_snr_grid, log_norm(error), PALE_GREYS)
    visited = axes.pcolormesh(
        log_snr_grid,
        log_snr_grid,
        np.ma.masked_equal(density, 0),
        shading="nearest",
        cmap=DENSITY_COLORS,
        vmin=0,
        vmax=1,
    )
    name = f"path of all data, cost {cost:.4g} (95 % interval {low:.4g} to {high:.4g})"
    _draw_cells(axes, name, cells, log_snr_grid, 0)
    figure.colorbar(visited, ax=axes, label="share of resampled paths with a point here", pad=0.02, aspect=28)
    figure.colorbar(mesh, ax=axes, label=colorbar_label, pad=0.02, aspect=28)
    figure.legend(loc="outside lower center")
    figure.suptitle(title)
    return figure


def _draw_map(axes: Axes, values: np.ndarray, t_grid: np.ndarray, log_snr_grid: np.ndarray, norm: LogNorm) -> AxesImage:
    axes.set_facecolor(NO_LOGARITHM)
    # Without an extent, imshow centres cell (i, j) at x = j, y = i.
    image = axes.imshow(with_logarithm(values), cmap="viridis", norm=norm, origin="lower", interpolation="nearest")
    n = len(t_grid)
    stride = max(1, math.ceil((n - 1) / 6))
    lines = [*(i for i in range(0, n, stride) if n - 1 - i > stride / 2), n - 1]
    axes.set_xticks(lines, [str(t) for t in t_grid[lines]])
    axes.set_yticks(lines, [str(t) for t in t_grid[lines]])
    axes.set_xlabel(COARSE_LABEL)
    axes.set_ylabel(FINE_LABEL)
    log_snr_labels = [log_snr_label(value) for value in log_snr_grid[lines]]
    top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    top.set_xticks(lines, log_snr_labels)
    right.set_yticks(lines, log_snr_labels)
    top.set_xlabel(COARSE_LOG_SNR_LABEL)
    right.set_ylabel(FINE_LOG_SNR_LABEL)
    return image


def _draw_cells(axes: Axes, name: str, cells: Cells, positions: np.ndarray, k: int) -> None:
    # positions [n] are those of the grid lines on either axis.
    n = len(positions)
    outside = [tuple(cell) for cell in cells if not all(0 <= index < n for index in cell)]
    if outside:
        raise ValueError(f"path {name} visits cell {outside[0]} but the map has indices 0 to {n - 1}")
    fine, coarse = positions[np.asarray(cells)].T
    # Drawn on its own, because a path effect would outline markers and line alike and cut the line up.
    axes.plot(coarse, fine, color="white", linewidth=4.5, solid_joinstyle="round", zorder=3)
    axes.plot(
        coarse,
        fine,
        label=name,
        linewidth=2,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        clip_on=False,  # Half of the first and of the last marker would be lost at a border.
        zorder=3,
        **curve_style(k),
    )
