"""Figures over the plane of a fine and a coarse timestep: error maps, Jacobian blocks, and paths through the plane.

Each `plot_*` function takes data (numpy arrays, CPU tensors, nested lists) and the name of a PNG file, which
appears complete or not at all. A map `[n, n]` has the index of t_64 along its rows and that of t_32 along its
columns; index 0 is noise. Noise is at the lower left of every figure. Cells whose value has no logarithm, because
it is not positive and finite, stay light grey. Colours and markers are those of `plots`.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from figures.plots import COLORS, STYLE, WEIGHTS_TITLES, curve_style, even_columns, log_axis, save_figure, spread_out
from paths.path import Path

COARSE_LABEL = r"coarse timestep $t_{32}$  (noise $\rightarrow$ clean)"
FINE_LABEL = r"fine timestep $t_{64}$  (noise $\rightarrow$ clean)"
SHORT_COARSE_LABEL = r"coarse timestep $t_{32}$"
SHORT_FINE_LABEL = r"fine timestep $t_{64}$"
COARSE_LOG_SNR_LABEL = r"$\lambda_{32}$ = log SNR"
FINE_LOG_SNR_LABEL = r"$\lambda_{64}$ = log SNR"
PREDICTIONS = {"eps": r"\varepsilon", "x0": r"\hat{x}"}  # Symbols of what may be differentiated.
MAP_TITLES = {
    "HH": r"$J_{HH} = \partial PREDICTION_{64}\,/\,\partial x_{64}$",
    "HL": r"$J_{HL} = \partial PREDICTION_{64}\,/\,\partial x_{32}$",
    "LH": r"$J_{LH} = \partial PREDICTION_{32}\,/\,\partial x_{64}$",
    "LL": r"$J_{LL} = \partial PREDICTION_{32}\,/\,\partial x_{32}$",
    "mse_64": r"fine error, $\|x_{64} - \hat{x}_{64}\|^2$",
    "mse_32": r"coarse error, $\|x_{32} - \hat{x}_{32}\|^2$",
}
# Label of a colour bar -> the maps under it, fine prediction first. The cross blocks are orders of magnitude below
# the others, so that on one scale for all blocks nothing of them would show.
SHARED_SCALES = {
    r"squared norm $\|J\|_F^2$ within a scale": ("HH", "LL"),
    r"squared norm $\|J\|_F^2$ across scales": ("HL", "LH"),
    r"squared error of an image, units of $x^2$": ("mse_64", "mse_32"),
}
RATIO_TITLES = {
    "ratio_HL": r"$\|J_{HL}\|_F^2\,/\,\|J_{HH}\|_F^2$",
    "ratio_LH": r"$\|J_{LH}\|_F^2\,/\,\|J_{LL}\|_F^2$",
}
# Of coupling.CONDITIONS but the first, with which they are compared.
CONDITION_TITLES = {
    "own_at_0": r"own, $t_{32} = 0$",
    "clean": r"own without noise, $t_{32} = 0$",
    "noise": r"pure noise, $t_{32}$ noisiest",
    "shuffled": r"another image's, $t_{32} = t_{64}$",
    "shuffled_at_0": r"another image's, $t_{32} = 0$",
}
# A map in these greys stays lighter than whatever lies over it.
PALE_GREYS = LinearSegmentedColormap.from_list("pale greys", ["1.0", "0.62"])
DENSITY_COLORS = LinearSegmentedColormap.from_list("density", [to_rgba(COLORS[1], 0.2), to_rgba(COLORS[1], 0.95)])

PAIR_COLORS = LinearSegmentedColormap.from_list("pairs", ["0.88", COLORS[0], "0.05"])

NO_LOGARITHM = "0.85"  # Colour of cells whose value has none.

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
    mse_32 of `error_map.error_map`; those that are absent leave no gap. Raises ValueError for no map, a map
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


def plot_cross_jacobian(
    panels: Mapping[str, Mapping[str, ArrayLike]],  # label -> {"ratio_HL": [n, n], "ratio_LH": [n, n]}
    log_snr_grid: ArrayLike,  # [n], rising
    t_grid: ArrayLike,  # [n]
    file: str | os.PathLike,
    title: str = "",
    published: Mapping[tuple[int, int], float] | None = None,  # (t_64, t_32) -> ratio_HL
) -> None:
    """Draw how much each prediction depends on the other scale, over the plane and along its noisiest line.

    ratio_HL is ‖J_HL‖²_F / ‖J_HH‖²_F and ratio_LH is ‖J_LH‖²_F / ‖J_LL‖²_F: ratios of squared norms. The published
    ratios are read as the same quantity: at t_64 = t_32 = 999 the published J_HL = 2.9e-7 and J_HL/J_HH = 0.04 %
    give J_HH = 7.3e-4, which is ‖I‖²_F/(1 - ᾱ) / (64·64)² = 3·64·64/0.9968 / (64·64)², the squared norm of the
    trivial prediction over the divisor of the error map. The divisor of J_HL is not known: were it 64²·32² instead
    of (64·64)², the published numbers would be 4 times the ratios of squared norms.

    Every label is a row of two maps, axes as in `plot_maps`, all on one colour scale. Below, ratio_HL at t_64 =
    t_grid[0] is drawn against t_32, one curve per label, with the published values as stars. Raises ValueError
    for no label, a missing ratio, published values at another t_64, and as `plot_maps` does.
    """
    save_figure(_cross_jacobian_figure(panels, log_snr_grid, t_grid, title, published or {}), file)


def plot_coupling(
    panels: Mapping[tuple[str, str], Mapping[str, tuple[ArrayLike, ArrayLike]]],  # condition -> ratio, its error, [n]
    log_snr_64: ArrayLike,  # [n], rising
    t_64: ArrayLike,  # [n], the fine timesteps
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw what other coarse inputs do to the error of the fine image, against the log SNR of the fine one.

    A panel is named by its column and its row, and all share their axes. Ratios are those of a condition of
    `coupling.CONDITIONS` to "own", which is the line at 1 and no curve; errors are standard errors. Raises ValueError
    for no panel, a missing one, an unknown condition, shapes that disagree, or a ratio that is not positive and finite.
    """
    save_figure(_coupling_figure(panels, log_snr_64, t_64, title), file)


def plot_path_comparison(
    paths: Mapping[str, Path],
    log_snr_table: ArrayLike,  # [num_train_timesteps], log SNR of every timestep
    file: str | os.PathLike,
    title: str,
) -> None:
    """Draw paths of one or two scales: in the (t_32, t_64) plane, and as timesteps against the point index.

    Paths of one scale appear in the second panel only, which stands alone if there is no other path. Raises
    ValueError for no path, a path of more than two scales, or a table shorter than a path needs.
    """
    save_figure(_path_comparison_figure(paths, log_snr_table, title), file)


def plot_paths_across_epochs(
    panels: Mapping[tuple[int, str], Mapping[str, Path]],  # (epoch, "raw" or "ema") -> name -> path of two scales
    log_snr_table: ArrayLike,  # [num_train_timesteps], log SNR of every timestep
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw the paths of every epoch in the plane of timesteps: epochs from left to right, raw weights above EMA.

    Five epochs at most stand side by side, later ones below. A name has the same colour in every panel. Raises
    ValueError for no path, other weights, a path of another number of scales, and a table shorter than a path needs.
    """
    save_figure(_paths_across_epochs_figure(panels, log_snr_table, title), file)


def plot_timestep_pairs(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]],  # title -> timesteps t_64 and t_32 that were drawn, [B] each
    num_train_timesteps: int,
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw how often pairs of timesteps occur: a histogram of 40 x 40 bins per panel, on one logarithmic scale.

    The unit is the share of a bin where both timesteps are uniform and independent; bins without a pair stay white.
    Raises ValueError for no panel and for timesteps outside the schedule.
    """
    save_figure(_timestep_pairs_figure(panels, num_train_timesteps, title), file)


@rc_context(STYLE)
def _heatmap_figure(error, t_grid, log_snr_grid, title, colorbar_label, paths) -> Figure:
    figure = Figure(figsize=(6.0, 5.6), layout="compressed")
    axes = figure.subplots()
    error, t_grid, log_snr_grid = _check_map("error", error, t_grid, log_snr_grid)
    image = _draw_map(axes, error, t_grid, log_snr_grid, _log_norm(error))
    for k, (name, cells) in enumerate((paths or {}).items()):
        _draw_cells(axes, name, cells, np.arange(len(t_grid)), k)
    figure.colorbar(image, ax=axes, label=colorbar_label, pad=0.03, aspect=28)
    if paths:
        figure.legend(loc="outside lower center", ncols=even_columns(len(paths)))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _heatmap_pair_figure(error_64, error_total, t_grid, log_snr_grid, cells_64, cells_total, title) -> Figure:
    error_64, t_grid, log_snr_grid = _check_map("error_64", error_64, t_grid, log_snr_grid)
    error_total, _, _ = _check_map("error_total", error_total, t_grid, log_snr_grid)
    norm = _log_norm(np.stack([error_64, error_total]))
    figure = Figure(figsize=(10.6, 5.4), layout="compressed")
    panels = figure.subplots(1, 2)
    contents = (
        ("fine error $E_{64}$", error_64, "DP-64", cells_64),
        ("total error $E_{64} + E_{32}$", error_total, "DP-Total", cells_total),
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
    maps = {name: _check_log_snr_map(name, values, t_grid, log_snr_grid) for name, values in maps.items()}
    columns = {label: [name for name in names if name in maps] for label, names in shared.items()}
    columns = {label: names for label, names in columns.items() if names}
    num_rows = max(map(len, columns.values()))
    figure = Figure(figsize=(1.1 + 2.95 * len(columns), 2.9 + 2.4 * num_rows), layout="compressed")
    slots = figure.add_gridspec(num_rows, len(columns))
    panels = np.full((num_rows, len(columns)), None)  # Of axes, None where there is no map.
    for column, (label, names) in enumerate(columns.items()):
        norm = _log_norm(np.stack([maps[name][0] for name in names]))
        for row, name in enumerate(names):
            panels[row, column] = axes = figure.add_subplot(slots[row, column])
            mesh = _draw_log_snr_map(axes, *maps[name], norm)
            axes.set_title(MAP_TITLES.get(name, name).replace("PREDICTION", PREDICTIONS[of]))
        figure.colorbar(
            mesh, ax=list(panels[: len(names), column]), label=label, location="bottom", pad=0.03, aspect=28
        )
    _label_outside_only(panels)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _path_density_figure(
    error, density, log_snr_grid, t_grid, cells, cost, cost_interval, title, colorbar_label
) -> Figure:
    error, t_grid, log_snr_grid = _check_log_snr_map("error", error, t_grid, log_snr_grid)
    density, _, _ = _check_map("density", density, t_grid, log_snr_grid)
    if not ((density >= 0) & (density <= 1)).all():
        raise ValueError(f"density spans {density.min():g} to {density.max():g}; pass shares of replicates in 0..1")
    low, high = cost_interval
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"the interval of the cost is {low:g} to {high:g}; pass its finite lower and upper end")
    figure = Figure(figsize=(7.4, 5.8), layout="compressed")
    axes = figure.subplots()
    mesh = _draw_log_snr_map(axes, error, t_grid, log_snr_grid, _log_norm(error), PALE_GREYS)
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


@rc_context(STYLE)
def _cross_jacobian_figure(panels, log_snr_grid, t_grid, title, published) -> Figure:
    if not panels:
        raise ValueError("there is no cross-Jacobian ratio to draw; pass at least one")
    maps = {}
    for label, ratios in panels.items():
        for name in RATIO_TITLES:
            if name not in ratios:
                raise ValueError(f"{label} lacks {name}; pass both ratio_HL and ratio_LH")
            maps[label, name] = _check_log_snr_map(f"{name} of {label}", ratios[name], t_grid, log_snr_grid)
    noisiest = int(np.asarray(t_grid)[0])
    elsewhere = sorted(t_64 for t_64, _ in published if t_64 != noisiest)
    if elsewhere:
        raise ValueError(f"a published ratio is at t_64 = {elsewhere[0]} but the line drawn is t_64 = {noisiest}")
    norm = _log_norm(np.stack([values for values, _, _ in maps.values()]))
    num_rows = len(panels)
    figure = Figure(figsize=(8.2, 3.9 + 3.6 * num_rows), layout="compressed")
    slots = figure.add_gridspec(num_rows + 1, 2, height_ratios=[*[1.0] * num_rows, 0.8])
    plane = np.array([[figure.add_subplot(slots[row, column]) for column in range(2)] for row in range(num_rows)])
    for axes, (label, name) in zip(plane.flat, maps, strict=True):
        mesh = _draw_log_snr_map(axes, *maps[label, name], norm)
        axes.set_title(f"{label}\n{RATIO_TITLES[name]}", fontsize=10)
    _label_outside_only(plane)
    figure.colorbar(mesh, ax=list(plane.flat), label="ratio of squared norms", pad=0.02, aspect=28)
    line = figure.add_subplot(slots[num_rows, :])
    for k, label in enumerate(panels):
        values, timesteps, _ = maps[label, "ratio_HL"]
        line.plot(timesteps, values[0], label=label, linewidth=1.5, markersize=4.5, **curve_style(k))
    if published:
        _, coarse = zip(*published, strict=True)
        stars = {"linestyle": "none", "marker": "*", "markersize": 12, "color": "black", "markeredgecolor": "white"}
        line.plot(coarse, list(published.values()), label="published, AFHQ 64×64", **stars)
    line.invert_xaxis()
    log_axis(line)
    line.set_xlabel(COARSE_LABEL)
    line.set_ylabel(RATIO_TITLES["ratio_HL"])
    line.set_title(f"along $t_{{64}} = {noisiest}$", loc="left")
    line.grid(True, which="both")
    figure.legend(loc="outside lower center", ncols=even_columns(num_rows + bool(published)))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _coupling_figure(panels, log_snr_64, t_64, title) -> Figure:
    if not panels:
        raise ValueError("there is no coupling to draw; pass at least one panel")
    columns, rows = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    log_snr_64, t_64 = np.asarray(log_snr_64, dtype=np.float64), np.asarray(t_64)
    figure = Figure(figsize=(1.0 + 4.4 * len(columns), 1.3 + 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    styles = {condition: curve_style(k) | {"linestyle": "-"} for k, condition in enumerate(CONDITION_TITLES)}
    # An open marker lets the curve beneath show, with which this one all but coincides.
    styles["clean"] |= {"linestyle": "--", "markerfacecolor": "none", "markersize": 8}
    for (row, column), axes in np.ndenumerate(grid):
        name = columns[column], rows[row]
        if name not in panels:
            raise ValueError(f"there is no panel of {name[0]} and {name[1]}; pass one for each column and row")
        axes.axhline(1, color="0.35", linewidth=1.2, linestyle=":")
        for condition, values in panels[name].items():
            if condition != "own":
                ratio, error = _check_coupling(f"{condition} of {', '.join(name)}", condition, values, log_snr_64, t_64)
                look = {"markersize": 5, "capsize": 2} | styles[condition]
                axes.errorbar(log_snr_64, ratio, error, linewidth=1.5, **look)
        axes.set_title(", ".join(name), loc="left")
        axes.grid(True)
    log_axis(grid[0, 0])
    for axes in grid[-1]:
        axes.set_xlabel(FINE_LOG_SNR_LABEL + r"  (noise $\rightarrow$ clean)")
    for axes in grid[:, 0]:
        axes.set_ylabel("fine error, relative to own")
    for axes in grid[0]:
        top = axes.secondary_xaxis("top")
        shown = spread_out(log_snr_64, 0.07 * np.ptp(log_snr_64))
        top.set_xticks(log_snr_64[shown], [str(t) for t in t_64[shown]])
        top.set_xlabel(SHORT_FINE_LABEL)
    handles = [Line2D([], [], color="0.35", linestyle=":", label=r"own, $t_{32} = t_{64}$")]
    for condition, label in CONDITION_TITLES.items():
        if any(condition in curves for curves in panels.values()):
            handles.append(Line2D([], [], label=label, linewidth=1.5, **styles[condition]))
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(handles), most=1 + len(columns)))
    figure.suptitle(title)
    return figure


def _check_coupling(where: str, condition: str, values, log_snr_64, t_64) -> tuple[np.ndarray, np.ndarray]:
    if condition not in CONDITION_TITLES:
        raise ValueError(f"{where} is unknown; name conditions of {', '.join(CONDITION_TITLES)}")
    ratio, error = (np.asarray(part, dtype=np.float64) for part in values)
    if not ratio.shape == error.shape == log_snr_64.shape == t_64.shape or ratio.ndim != 1:
        raise ValueError(
            f"{where} has ratios {list(ratio.shape)}, errors {list(error.shape)}, log_snr_64 {list(log_snr_64.shape)} "
            f"and t_64 {list(t_64.shape)}; pass [n] of each"
        )
    if not (np.isfinite(ratio) & (ratio > 0)).all():
        raise ValueError(f"{where} has a ratio that is not positive and finite")
    return ratio, error


def _check_map(name: str, values, t_grid, log_snr_grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.asarray(values, dtype=np.float64)
    t_grid, log_snr_grid = np.asarray(t_grid), np.asarray(log_snr_grid, dtype=np.float64)
    n = t_grid.size
    if values.shape != (n, n) or t_grid.shape != (n,) or log_snr_grid.shape != (n,):
        raise ValueError(
            f"{name} has shape {list(values.shape)}, t_grid {list(t_grid.shape)} and log_snr_grid "
            f"{list(log_snr_grid.shape)}; pass [n, n], [n] and [n]"
        )
    return values, t_grid, log_snr_grid


def _check_log_snr_map(name: str, values, t_grid, log_snr_grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, t_grid, log_snr_grid = _check_map(name, values, t_grid, log_snr_grid)
    if len(t_grid) < 2 or not np.isfinite(log_snr_grid).all() or not (np.diff(log_snr_grid) > 0).all():
        raise ValueError("log_snr_grid must hold at least 2 finite values that rise from noise to clean")
    return values, t_grid, log_snr_grid


def _log_norm(values: np.ndarray) -> LogNorm:
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    # A constant map still needs a range, and at least half a decade keeps tick labels apart.
    widen = max(1.0, math.sqrt(10**0.5 * low / high))
    return LogNorm(low / widen, high * widen)


def _with_logarithm(values: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)


def _draw_map(axes: Axes, values: np.ndarray, t_grid: np.ndarray, log_snr_grid: np.ndarray, norm: LogNorm) -> AxesImage:
    axes.set_facecolor(NO_LOGARITHM)
    # Without an extent, imshow centres cell (i, j) at x = j, y = i.
    image = axes.imshow(_with_logarithm(values), cmap="viridis", norm=norm, origin="lower", interpolation="nearest")
    n = len(t_grid)
    stride = max(1, math.ceil((n - 1) / 6))
    lines = [*(i for i in range(0, n, stride) if n - 1 - i > stride / 2), n - 1]
    axes.set_xticks(lines, [str(t) for t in t_grid[lines]])
    axes.set_yticks(lines, [str(t) for t in t_grid[lines]])
    axes.set_xlabel(COARSE_LABEL)
    axes.set_ylabel(FINE_LABEL)
    log_snr_labels = [_log_snr_label(value) for value in log_snr_grid[lines]]
    top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    top.set_xticks(lines, log_snr_labels)
    right.set_yticks(lines, log_snr_labels)
    top.set_xlabel(COARSE_LOG_SNR_LABEL)
    right.set_ylabel(FINE_LOG_SNR_LABEL)
    return image


def _draw_log_snr_map(
    axes: Axes,
    values: np.ndarray,
    t_grid: np.ndarray,
    log_snr_grid: np.ndarray,
    norm: LogNorm,
    cmap: str | Colormap = "viridis",
) -> QuadMesh:
    axes.set_facecolor(NO_LOGARITHM)
    # "nearest" puts the edges of cells half way between the lines, and the outermost as far beyond the last ones.
    mesh = axes.pcolormesh(log_snr_grid, log_snr_grid, _with_logarithm(values), shading="nearest", cmap=cmap, norm=norm)
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


def _label_outside_only(panels: np.ndarray) -> None:
    # Panels [rows, columns] show the same plane, so that inner numbers and labels would only repeat the outer ones.
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


def _log_snr_label(value: float) -> str:
    return ("∞" if value > 0 else "−∞") if np.isinf(value) else f"{value:.1f}".replace("-", "−")


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


@rc_context(STYLE)
def _path_comparison_figure(paths: Mapping[str, Path], log_snr_table: ArrayLike, title: str) -> Figure:
    table = np.asarray(log_snr_table, dtype=np.float64)
    if not paths:
        raise ValueError("there is no path to compare; pass at least one")
    for name, path in paths.items():
        _check_path(name, path, table, allowed_scales=(1, 2))
    styles = {name: curve_style(k) for k, name in enumerate(paths)}
    if any(path.num_scales == 2 for path in paths.values()):
        figure = Figure(figsize=(11.0, 5.4), layout="constrained")
        plane, curves = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_plane(plane, paths, len(table) - 1, styles)
        plane.set_title("paths in the plane of timesteps", loc="left")
    else:
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        curves = figure.subplots()
    _draw_timesteps(curves, paths, table, styles)
    _add_legend(figure, styles)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _paths_across_epochs_figure(panels, log_snr_table, title) -> Figure:
    table = np.asarray(log_snr_table, dtype=np.float64)
    names = list(dict.fromkeys(name for paths in panels.values() for name in paths))
    if not names:
        raise ValueError("there is no path to draw; pass at least one")
    for (epoch, weights), paths in panels.items():
        if weights not in WEIGHTS_TITLES:
            raise ValueError(f"epoch {epoch} has weights '{weights}'; name them {' or '.join(WEIGHTS_TITLES)}")
        for name, path in paths.items():
            _check_path(f"{name} of epoch {epoch}", path, table, allowed_scales=(2,))
    epochs = sorted({epoch for epoch, _ in panels})
    kinds = [weights for weights in WEIGHTS_TITLES if any(weights == other for _, other in panels)]
    num_columns = even_columns(len(epochs), most=5)
    num_rows = math.ceil(len(epochs) / num_columns) * len(kinds)
    figure = Figure(figsize=(1.7 + 2.15 * num_columns, 1.7 + 2.3 * num_rows), layout="compressed")
    slots = figure.add_gridspec(num_rows, num_columns)
    plane = np.full((num_rows, num_columns), None)  # Of axes, None where there are no paths.
    styles = {name: curve_style(k) for k, name in enumerate(names)}
    ticks = _log_snr_ticks(table, gap=0.17)
    for (epoch, weights), paths in panels.items():
        block, column = divmod(epochs.index(epoch), num_columns)
        row = block * len(kinds) + kinds.index(weights)
        plane[row, column] = axes = figure.add_subplot(slots[row, column])
        _draw_plane(axes, paths, len(table) - 1, styles, markersize=3)
        axes.set_xlabel(SHORT_COARSE_LABEL)
        axes.set_ylabel(SHORT_FINE_LABEL)
        top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
        top.set_xticks(list(ticks), list(ticks.values()))
        right.set_yticks(list(ticks), list(ticks.values()))
        top.set_xlabel(COARSE_LOG_SNR_LABEL)
        right.set_ylabel(FINE_LOG_SNR_LABEL)
        axes.set_title(f"epoch {epoch}, {WEIGHTS_TITLES[weights]}", fontsize=10)
    _label_outside_only(plane)
    _add_legend(figure, styles)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _timestep_pairs_figure(panels, num_train_timesteps, title) -> Figure:
    if not panels:
        raise ValueError("there are no pairs to draw; pass at least one regime")
    bins, last = 40, num_train_timesteps - 1
    edges = np.linspace(0, num_train_timesteps, bins + 1) - 0.5
    shares = {}
    for name, pairs in panels.items():
        pairs = np.stack([np.asarray(timesteps) for timesteps in pairs])  # [2, B]
        if pairs.min() < 0 or pairs.max() > last:
            raise ValueError(f"the timesteps of {name} are not all within 0 to {last}")
        counts = np.histogram2d(*pairs, bins=[edges, edges])[0]  # [t_64, t_32]
        shares[name] = np.ma.masked_equal(counts / counts.sum() * bins**2, 0)
    norm = LogNorm(min(s.min() for s in shares.values()), max(s.max() for s in shares.values()))
    columns = even_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.6 + 2.3 * columns, 1.1 + 2.4 * rows), layout="compressed")
    plane = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(plane.flat, shares, strict=False):
        mesh = axes.pcolormesh(edges, edges, shares[name], norm=norm, cmap=PAIR_COLORS)
        axes.set_aspect("equal", adjustable="box")
        # Reversed like the error maps: noise at the lower left, clean at the upper right.
        axes.set_xlim(last, 0)
        axes.set_ylim(last, 0)
        axes.set_xlabel(SHORT_COARSE_LABEL)
        axes.set_ylabel(SHORT_FINE_LABEL)
        axes.set_title(name, fontsize=10)
    used = list(plane.flat[: len(panels)])
    for axes in plane.flat[len(panels) :]:
        axes.remove()
    figure.colorbar(mesh, ax=used, label="pairs, independent = 1", shrink=0.8)
    figure.suptitle(title)
    return figure


def _check_path(name: str, path: Path, table: np.ndarray, allowed_scales: tuple[int, ...]) -> None:
    if path.num_scales not in allowed_scales:
        allowed = " or ".join(map(str, allowed_scales))
        raise ValueError(f"path {name} has {path.num_scales} scales; only paths of {allowed} can be drawn")
    if table.ndim != 1 or max(path.points[0]) >= len(table):
        raise ValueError(
            f"log_snr_table has shape {list(table.shape)} but path {name} starts at timestep "
            f"{max(path.points[0])}; pass the table of all training timesteps"
        )


def _draw_plane(
    axes: Axes, paths: Mapping[str, Path], last: int, styles: Mapping[str, dict[str, str]], markersize=4.5
) -> None:
    axes.plot([last, 0], [last, 0], color="0.6", linewidth=1, linestyle=(0, (1, 1.5)))
    for name, path in paths.items():
        if path.num_scales == 2:
            fine, coarse = zip(*path.points, strict=True)
            axes.plot(coarse, fine, linewidth=1.5, markersize=markersize, clip_on=False, **styles[name])
    axes.set_aspect("equal", adjustable="box")
    # Reversed like the error maps: noise at the lower left, clean at the upper right.
    axes.set_xlim(last * 1.03, -last * 0.03)
    axes.set_ylim(last * 1.03, -last * 0.03)
    axes.set_xlabel(COARSE_LABEL)
    axes.set_ylabel(FINE_LABEL)
    axes.grid(True)


def _add_legend(figure: Figure, styles: Mapping[str, dict[str, str]]) -> None:
    handles = [Line2D([], [], label=name, markersize=5, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(styles)))


def _draw_timesteps(
    axes: Axes, paths: Mapping[str, Path], table: np.ndarray, styles: Mapping[str, dict[str, str]]
) -> None:
    for name, path in paths.items():
        style = styles[name]
        fine = [point[0] for point in path.points]
        axes.plot(fine, linewidth=1.4, markersize=4.5, **style)
        if path.num_scales == 2:
            # Open markers let a fine curve that coincides show through.
            coarse = [point[1] for point in path.points]
            axes.plot(coarse, linewidth=1.4, markersize=4.5, linestyle="--", markerfacecolor="white", **style)
    last = len(table) - 1
    axes.set_ylim(-last * 0.03, last * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("point of the path (network calls so far)")
    axes.set_ylabel("timestep $t$")
    axes.grid(True)
    axes.set_title("timesteps along the path", loc="left")
    scales = [
        Line2D([], [], color="0.3", marker="o", label="$t_{64}$"),
        Line2D([], [], color="0.3", linestyle="--", marker="o", markerfacecolor="white", label="$t_{32}$"),
    ]
    if any(path.num_scales == 2 for path in paths.values()):
        axes.legend(handles=scales, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=3.5)
    ticks = _log_snr_ticks(table)
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(ticks), list(ticks.values()))
    right.set_ylabel(r"$\lambda$ = log SNR")


def _log_snr_ticks(table: np.ndarray, gap: float = 0.045) -> dict[float, str]:
    """Positions (in timesteps) and labels of even log SNRs, gap or more of the axis apart, and of both ends."""
    last = len(table) - 1
    finite = np.flatnonzero(np.isfinite(table))
    low, high = table[finite].min(), table[finite].max()
    even = np.array(sorted(np.arange(2 * math.ceil(low / 2), high, 2), key=abs))
    # The table falls with t, and np.interp wants it rising.
    positions = [0.0, float(last), *np.interp(even, table[finite][::-1], finite[::-1]).tolist()]
    labels = [_log_snr_label(table[0]), _log_snr_label(table[-1])]
    labels += [f"{log_snr:.0f}".replace("-", "−") for log_snr in even]
    return {positions[k]: labels[k] for k in spread_out(positions, gap * last)}
