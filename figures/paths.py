"""Figures of paths through the plane of timesteps, and of the pairs of timesteps that a training draws.

Each `plot_*` function takes data and the name of a PNG file, which appears complete or not at all.
"""

import math
import os
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from figures.images import image_grid
from figures.plane import (
    COARSE_LABEL,
    COARSE_LOG_SNR_LABEL,
    FINE_LABEL,
    FINE_LOG_SNR_LABEL,
    SHORT_COARSE_LABEL,
    SHORT_FINE_LABEL,
    label_outside_only,
    log_snr_label,
)
from figures.style import COLORS, STYLE, WEIGHTS_TITLES, curve_style, even_columns, save_figure, spread_out
from paths.path import Path

SAMPLE_COLUMNS = 6  # Beside a path.
PAIR_COLORS = LinearSegmentedColormap.from_list("pairs", ["0.88", COLORS[0], "0.05"])


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


def plot_path_and_samples(
    path: Path,  # of two scales
    samples: ArrayLike,  # uint8 [N, C, H, W], C = 1 or 3
    num_train_timesteps: int,
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw a path in the plane of timesteps, beside the diagonal, and to its right images that were sampled along it.

    Raises ValueError for a path of another number of scales or beyond the timesteps, and for no image.
    """
    save_figure(_path_and_samples_figure(path, samples, num_train_timesteps, title), file)


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
def _path_and_samples_figure(path: Path, samples: ArrayLike, num_train_timesteps: int, title: str) -> Figure:
    _check_path(path.kind, path, np.zeros(num_train_timesteps), allowed_scales=(2,))
    grid = image_grid(samples, SAMPLE_COLUMNS, scale=4, padding=4)  # [H', W', 3]
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    plane, pictures = figure.subplots(1, 2, width_ratios=(1, 1.9))
    _draw_plane(plane, {path.kind: path}, num_train_timesteps - 1, {path.kind: curve_style(1)})
    plane.set_title(f"a path of {path.nfe} steps", loc="left")
    pictures.imshow(grid, interpolation="nearest")
    pictures.set_axis_off()
    pictures.set_title("what is sampled along it", loc="left")
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
    label_outside_only(plane)
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
    axes.set_ylabel("timestep")
    axes.grid(True)
    axes.set_title("timesteps along the path", loc="left")
    scales = [
        Line2D([], [], color="0.3", marker="o", label="fine"),
        Line2D([], [], color="0.3", linestyle="--", marker="o", markerfacecolor="white", label="coarse"),
    ]
    if any(path.num_scales == 2 for path in paths.values()):
        axes.legend(handles=scales, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=3.5)
    ticks = _log_snr_ticks(table)
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(ticks), list(ticks.values()))
    right.set_ylabel("log SNR")


def _log_snr_ticks(table: np.ndarray, gap: float = 0.045) -> dict[float, str]:
    """Positions (in timesteps) and labels of even log SNRs, gap or more of the axis apart, and of both ends."""
    last = len(table) - 1
    finite = np.flatnonzero(np.isfinite(table))
    low, high = table[finite].min(), table[finite].max()
    even = np.array(sorted(np.arange(2 * math.ceil(low / 2), high, 2), key=abs))
    # The table falls with t, and np.interp wants it rising.
    positions = [0.0, float(last), *np.interp(even, table[finite][::-1], finite[::-1]).tolist()]
    labels = [log_snr_label(table[0]), log_snr_label(table[-1])]
    labels += [f"{log_snr:.0f}".replace("-", "−") for log_snr in even]
    return {positions[k]: labels[k] for k in spread_out(positions, gap * last)}
