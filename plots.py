"""Every figure of LIFT: error maps with paths, Jacobian blocks, path comparisons, losses, samples, scores.

Each `plot_*` function takes data (numpy arrays, CPU tensors, nested lists) and the name of a PNG file, which
appears complete or not at all. Colours are safe for colour-blind readers, and every curve also has its own
marker, so that figures survive grey print.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike
from PIL import Image

from path import Path
from safe_write import replacing

DPI = 150
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.titlesize": 12,
    "grid.color": "0.88",
    "axes.axisbelow": True,
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 9 and 8 colours pair up differently 72 times.
COARSE_LABEL = r"coarse timestep $t_{32}$  (noise $\rightarrow$ clean)"
FINE_LABEL = r"fine timestep $t_{64}$  (noise $\rightarrow$ clean)"
BLOCK_TITLES = {
    "HH": r"$J_{HH} = \partial\varepsilon_{64}\,/\,\partial x_{64}$",
    "HL": r"$J_{HL} = \partial\varepsilon_{64}\,/\,\partial x_{32}$",
    "LH": r"$J_{LH} = \partial\varepsilon_{32}\,/\,\partial x_{64}$",
    "LL": r"$J_{LL} = \partial\varepsilon_{32}\,/\,\partial x_{32}$",
}
LOSS_TITLES = {"loss_64": "fine scale", "loss_32": "coarse scale"}
ERROR_BARS = {"ecolor": "0.15", "elinewidth": 1, "capsize": 3, "capthick": 1}  # Dark, to show on a marker.
WEIGHTS_TITLES = {"raw": "raw weights", "ema": "EMA"}
METRIC_TITLES = {"fid": "FID", "swd": "sliced Wasserstein distance"} | {
    f"swd_{size}": f"sliced Wasserstein distance, level {size}" for size in (64, 32, 16)
}
# Scores that differ in one of these must not share a figure.
COMPARABLE = ("dataset", "num_images", "nfe", "metric_features", "reference_fingerprint")
MAX_TRAJECTORY_COLUMNS = 10

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
    log SNR on the upper and right one. Cells that are not positive and finite stay light grey. Raises
    ValueError for shapes that disagree and for paths that leave the map.
    """
    _save(_heatmap_figure(error, t_grid, log_snr_grid, title, colorbar_label, paths), file)


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
    _save(figure, file)


def plot_blocks(
    jacobian: Mapping[str, ArrayLike],  # "HH", "HL", "LH", "LL" -> [n, n], mean ‖J‖²_F
    t_grid: ArrayLike,
    log_snr_grid: ArrayLike,
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw the four Jacobian blocks, each with a colour scale of its own; conventions as in `plot_heatmap`.

    The cross blocks are orders of magnitude below the others, so a shared scale would show nothing of them.
    Raises ValueError for a missing block and for shapes that disagree.
    """
    _save(_blocks_figure(jacobian, t_grid, log_snr_grid, title), file)


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
    _save(_path_comparison_figure(paths, log_snr_table, title), file)


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],  # label -> rows with step, loss_64 and maybe loss_32
    file: str | os.PathLike,
) -> None:
    """Draw training losses against the step: every logged value faintly, a running mean over it, log axis.

    There is one panel per scale that any run has. Rows without a loss, and losses that are not positive and
    finite, are skipped.
    Raises ValueError if nothing is left to draw.
    """
    _save(_losses_figure(runs), file)


def image_grid(
    images: ArrayLike,  # uint8 [N, C, H, W], C = 1 or 3
    columns: int,
    scale: int = 1,  # every pixel becomes scale x scale pixels
    padding: int = 2,  # white output pixels around and between images
) -> np.ndarray:
    """Lay images out row by row; returns uint8 [H', W', 3] with grey repeated to RGB.

    With c = min(columns, N) and r = ceil(N / c): H' = r·(H·scale + padding) + padding and
    W' = c·(W·scale + padding) + padding. Places left over are white. Raises ValueError for images of
    another type or shape, no image at all, columns or scale below 1, and a negative padding.
    """
    images = _as_images(images)  # [N, C, H, W]
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"an image grid of {columns} columns, scale {scale} and padding {padding} is impossible; give at "
            "least 1, 1 and 0"
        )
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)  # [H', W', 3]
    for k, image in enumerate(images):
        top = padding + k // columns * (height + padding)
        left = padding + k % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def save_image_grid(
    images: ArrayLike,  # uint8 [N, C, H, W], C = 1 or 3
    file: str | os.PathLike,
    columns: int,
    scale: int = 1,
    padding: int = 2,
) -> None:
    """Write `image_grid` as a PNG, pixel by pixel."""
    grid = Image.fromarray(image_grid(images, columns, scale, padding))
    with replacing(file) as temporary:
        grid.save(temporary, format="PNG", dpi=(DPI, DPI))


def plot_samples(
    rows: Mapping[str, ArrayLike],  # label -> uint8 [N, C, H, W], image k from the same seed in every row
    file: str | os.PathLike,
    title: str,
) -> None:
    """Draw labelled rows of samples under each other, so that columns compare methods at equal seeds.

    Images are enlarged by a whole factor of at least 1, towards 128 pixels, less where a row would get wider
    than 2400 pixels; rows may differ in C, H and W and are shown at the size of the first. Raises ValueError for no
    row and for rows of unequal N.
    """
    _save(_samples_figure(rows, title), file)


def plot_trajectory(
    fine: Sequence[ArrayLike],  # uint8 [C, H, W] per point
    coarse: Sequence[ArrayLike] | None,  # uint8 [C, H/2, W/2] per point, None for one scale
    points: Sequence[Sequence[int]],  # timesteps per point, fine first
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw the states of a sampler along its path: fine scale above, coarse below at the same displayed size.

    At most ten points are shown, evenly chosen, the first and the last among them, each with its timestep.
    Raises ValueError if images and points do not pair up.
    """
    _save(_trajectory_figure(fine, coarse, points, title), file)


def plot_scores(
    rows: Sequence[Mapping[str, Any]],  # means over seeds, one row per model, path, weights and epoch
    metric: str,  # such as "fid"
    file: str | os.PathLike,
    title: str = "",
    names: Mapping[tuple[str, str], str] | None = None,  # (model_type, path_type) -> name in the legend
) -> None:
    """Draw a metric against the epoch, one colour per model and path, raw weights solid and EMA dashed.

    A row has `model_type`, `path_type`, `weights` ("raw" or "ema"), `epoch`, `{metric}_mean`, and may have
    `{metric}_sd` (an error bar unless None), `num_images` and `nfe` (named on the axis); numbers may be text.
    If all rows are of one epoch, each is a dot with its value, grouped by model and path in the order given,
    raw weights filled and EMA open. Rows whose mean is None are skipped. Raises ValueError if nothing is left
    to draw, if rows differ in one of `COMPARABLE`, and if two rows are the same point of the same curve.
    """
    _save(_scores_figure(rows, metric, title, names or {}), file)


def _save(figure: Figure, file: str | os.PathLike) -> None:
    with rc_context(STYLE), replacing(file) as temporary:
        # Said outright because a user's matplotlibrc could crop or tint the page.
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", bbox_inches=figure.bbox_inches)


def _legend_columns(count: int) -> int:
    return math.ceil(count / math.ceil(count / 4))


def _style(k: int) -> dict[str, str]:
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)]}


@rc_context(STYLE)
def _heatmap_figure(error, t_grid, log_snr_grid, title, colorbar_label, paths) -> Figure:
    figure = Figure(figsize=(6.0, 5.6), layout="compressed")
    axes = figure.subplots()
    error, t_grid, log_snr_grid = _check_map("error", error, t_grid, log_snr_grid)
    image = _draw_map(axes, error, t_grid, log_snr_grid, _log_norm(error))
    for k, (name, cells) in enumerate((paths or {}).items()):
        _draw_cells(axes, name, cells, len(t_grid), k)
    figure.colorbar(image, ax=axes, label=colorbar_label, pad=0.03, aspect=28)
    if paths:
        figure.legend(loc="outside lower center", ncols=_legend_columns(len(paths)))
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
        _draw_cells(axes, name, cells, len(t_grid), k)
    figure.colorbar(image, ax=panels[-1], label="error per unit of log SNR", pad=0.02, aspect=28)
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _blocks_figure(jacobian, t_grid, log_snr_grid, title) -> Figure:
    missing = [block for block in BLOCK_TITLES if block not in jacobian]
    if missing:
        raise ValueError(f"the Jacobian blocks lack {', '.join(missing)}; pass all of HH, HL, LH and LL")
    figure = Figure(figsize=(10.6, 9.4), layout="compressed")
    for axes, (block, heading) in zip(figure.subplots(2, 2).flat, BLOCK_TITLES.items(), strict=True):
        values, t, log_snr = _check_map(f"block {block}", jacobian[block], t_grid, log_snr_grid)
        image = _draw_map(axes, values, t, log_snr, _log_norm(values))
        axes.set_title(heading)
        figure.colorbar(image, ax=axes, label=rf"$\|J_{{{block}}}\|_F^2$", pad=0.03, aspect=28)
    figure.suptitle(title)
    return figure


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


def _log_norm(values: np.ndarray) -> LogNorm:
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    # A constant map still needs a range, and at least half a decade keeps tick labels apart.
    widen = max(1.0, math.sqrt(10**0.5 * low / high))
    return LogNorm(low / widen, high * widen)


def _draw_map(axes: Axes, values: np.ndarray, t_grid: np.ndarray, log_snr_grid: np.ndarray, norm: LogNorm) -> AxesImage:
    shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    axes.set_facecolor("0.85")
    # Without an extent, imshow centres cell (i, j) at x = j, y = i.
    image = axes.imshow(shown, cmap="viridis", norm=norm, origin="lower", interpolation="nearest")
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
    top.set_xlabel(r"$\lambda_{32}$ = log SNR")
    right.set_ylabel(r"$\lambda_{64}$ = log SNR")
    return image


def _log_snr_label(value: float) -> str:
    return ("∞" if value > 0 else "−∞") if np.isinf(value) else f"{value:.1f}".replace("-", "−")


def _draw_cells(axes: Axes, name: str, cells: Cells, n: int, k: int) -> None:
    outside = [tuple(cell) for cell in cells if not all(0 <= index < n for index in cell)]
    if outside:
        raise ValueError(f"path {name} visits cell {outside[0]} but the map has indices 0 to {n - 1}")
    rows, columns = [i for i, _ in cells], [j for _, j in cells]
    # Drawn on its own, because a path effect would outline markers and line alike and cut the line up.
    axes.plot(columns, rows, color="white", linewidth=4.5, solid_joinstyle="round", zorder=3)
    axes.plot(
        columns,
        rows,
        label=name,
        linewidth=2,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        clip_on=False,  # Half of the first and of the last marker would be lost at a border.
        zorder=3,
        **_style(k),
    )


@rc_context(STYLE)
def _path_comparison_figure(paths: Mapping[str, Path], log_snr_table: ArrayLike, title: str) -> Figure:
    table = np.asarray(log_snr_table, dtype=np.float64)
    if not paths:
        raise ValueError("there is no path to compare; pass at least one")
    for name, path in paths.items():
        if path.num_scales > 2:
            raise ValueError(f"path {name} has {path.num_scales} scales; only paths of 1 or 2 can be drawn")
        if table.ndim != 1 or max(path.points[0]) >= len(table):
            raise ValueError(
                f"log_snr_table has shape {list(table.shape)} but path {name} starts at timestep "
                f"{max(path.points[0])}; pass the table of all training timesteps"
            )
    last = len(table) - 1
    if any(path.num_scales == 2 for path in paths.values()):
        figure = Figure(figsize=(11.0, 5.4), layout="constrained")
        plane, curves = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_plane(plane, paths, last)
    else:
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        curves = figure.subplots()
    _draw_timesteps(curves, paths, table)
    handles = [Line2D([], [], label=name, markersize=5, **_style(k)) for k, name in enumerate(paths)]
    figure.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(len(paths)))
    figure.suptitle(title)
    return figure


def _draw_plane(axes: Axes, paths: Mapping[str, Path], last: int) -> None:
    axes.plot([last, 0], [last, 0], color="0.6", linewidth=1, linestyle=(0, (1, 1.5)))
    for k, path in enumerate(paths.values()):
        if path.num_scales == 2:
            fine, coarse = zip(*path.points, strict=True)
            axes.plot(coarse, fine, linewidth=1.5, markersize=4.5, clip_on=False, **_style(k))
    axes.set_aspect("equal", adjustable="box")
    # Reversed like the error maps: noise at the lower left, clean at the upper right.
    axes.set_xlim(last * 1.03, -last * 0.03)
    axes.set_ylim(last * 1.03, -last * 0.03)
    axes.set_xlabel(COARSE_LABEL)
    axes.set_ylabel(FINE_LABEL)
    axes.grid(True)
    axes.set_title("paths in the plane of timesteps", loc="left")


def _draw_timesteps(axes: Axes, paths: Mapping[str, Path], table: np.ndarray) -> None:
    for k, path in enumerate(paths.values()):
        style = _style(k)
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


def _log_snr_ticks(table: np.ndarray) -> dict[float, str]:
    """Positions (in timesteps) and labels of even log SNRs that are far enough apart to be read."""
    last = len(table) - 1
    ticks = {0.0: _log_snr_label(table[0]), float(last): _log_snr_label(table[-1])}
    finite = np.flatnonzero(np.isfinite(table))
    low, high = table[finite].min(), table[finite].max()
    for log_snr in sorted(np.arange(2 * math.ceil(low / 2), high, 2), key=abs):
        # The table falls with t, and np.interp wants it rising.
        t = float(np.interp(log_snr, table[finite][::-1], finite[::-1]))
        if all(abs(t - other) > 0.045 * last for other in ticks):
            ticks[t] = f"{log_snr:.0f}".replace("-", "−")
    return ticks


@rc_context(STYLE)
def _losses_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    curves = {
        key: {label: curve for label, rows in runs.items() if len((curve := _loss_curve(rows, key))[0])}
        for key in LOSS_TITLES
    }
    curves = {key: by_label for key, by_label in curves.items() if by_label}
    if not curves:
        raise ValueError("no run has a positive loss_64 or loss_32 to draw; log some training steps first")
    figure = Figure(figsize=(5.4 * len(curves) + 0.6, 4.6), layout="constrained")
    colors = {label: COLORS[k % len(COLORS)] for k, label in enumerate(runs)}
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (key, by_label) in zip(panels, curves.items(), strict=True):
        for label, (steps, losses) in by_label.items():
            axes.plot(steps, losses, ".", color=colors[label], markersize=3, alpha=0.3)
        for label, (steps, losses) in by_label.items():
            outline = [Stroke(linewidth=3.5, foreground="white"), Normal()]
            axes.plot(steps, _running_mean(losses), color=colors[label], linewidth=1.8, path_effects=outline)
        _log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss (mean squared error)")
        axes.set_title(LOSS_TITLES[key])
        axes.grid(True, which="both")
    handles = [Line2D([], [], color=color, linewidth=1.8, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(len(runs)))
    return figure


def _loss_curve(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    pairs = [(step, loss) for step, loss in pairs if math.isfinite(loss) and loss > 0]
    steps, losses = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, losses


def _running_mean(values: np.ndarray) -> np.ndarray:
    reach = max(2, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    k = np.arange(len(values))
    # The window shrinks on both sides at the start, where losses are steep and a lopsided one would mislead.
    reach = np.minimum(reach, k)
    first, stop = k - reach, np.minimum(k + reach + 1, len(values))
    return (sums[stop] - sums[first]) / (stop - first)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Losses often span less than a decade, where decades alone would leave the axis without a number.
    subs = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _as_images(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images are {images.dtype} of shape {list(images.shape)}; pass at least one as uint8 "
            "[N, C, H, W] with 1 or 3 channels"
        )
    return np.broadcast_to(images, (images.shape[0], 3, *images.shape[2:]))


@rc_context(STYLE)
def _samples_figure(rows: Mapping[str, ArrayLike], title: str) -> Figure:
    if not rows:
        raise ValueError("there is no row of samples to draw; pass at least one")
    strips = {label: _as_images(images) for label, images in rows.items()}
    counts = {label: len(images) for label, images in strips.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"rows of samples must be equally long but hold {counts}; pass the same seeds in each")
    count, _, height, width = next(iter(strips.values())).shape
    scale = max(1, min(math.ceil(128 / height), 2400 // (count * width)))
    size = (height * scale, width * scale)
    cells = [[_tile(image, size) for image in images] for images in strips.values()]
    labels = ["\n".join(textwrap.wrap(label, 16)) for label in strips]
    return _picture_table(cells, labels, title)


@rc_context(STYLE)
def _trajectory_figure(
    fine: Sequence[ArrayLike],
    coarse: Sequence[ArrayLike] | None,
    points: Sequence[Sequence[int]],
    title: str,
) -> Figure:
    lengths = [len(points), len(fine)] + ([] if coarse is None else [len(coarse)])
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"a trajectory of {lengths[0]} points came with {lengths[1:]} images per scale; pass one per point"
        )
    columns = min(len(points), MAX_TRAJECTORY_COLUMNS)
    shown = np.rint(np.linspace(0, len(points) - 1, columns)).astype(int)
    scales = [[np.asarray(states[k]) for k in shown] for states in (fine, coarse) if states is not None]
    scales = [_as_images(np.stack(states)) for states in scales]
    height, width = scales[0].shape[2:]
    factor = math.ceil(128 / height)
    size = (height * factor, width * factor)
    cells = [[_tile(image, size) for image in images] for images in scales]
    names = ("fine", "coarse")
    labels = [f"{name}\n{images.shape[2]} × {images.shape[3]}" for name, images in zip(names, scales, strict=False)]
    symbols = ("t_{64}", "t_{32}") if coarse is not None else ("t",)
    captions = [[f"${symbol} = {points[k][s]}$" for k in shown] for s, symbol in enumerate(symbols)]
    return _picture_table(cells, labels, title, headings=[f"point {k}" for k in shown], captions=captions)


def _tile(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # [3, H, W] to [*size, 3] by nearest neighbour.
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))


def _text_width(text: str, size_points: float) -> int:
    # A blank text has no outline to measure.
    return math.ceil(TextPath((0, 0), text + ".", size=size_points).get_extents().width * DPI / 72)


def _picture_table(
    cells: Sequence[Sequence[np.ndarray]],  # rows of equally large [H, W, 3]
    labels: Sequence[str],  # one per row, at its left
    title: str,
    headings: Sequence[str] | None = None,  # one per column
    captions: Sequence[Sequence[str]] | None = None,  # one per picture, under it
) -> Figure:
    # Laid out in output pixels, so that every image pixel covers a whole number of them.
    height, width, _ = cells[0][0].shape
    gap, line = 6, 30
    margin_left = 24 + max(_text_width(part, 10) for label in labels for part in label.split("\n"))
    margin_top = gap + (line + 10 if title else 0) + (line if headings else 0)
    pitch_x, pitch_y = width + gap, height + gap + (line if captions else 0)
    total_width = max(margin_left + len(cells[0]) * pitch_x, _text_width(title, 12) + 2 * gap)
    total_height = margin_top + len(cells) * pitch_y
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, **style) -> None:
        figure.text(x / total_width, 1 - y / total_height, text, va="center", **style)

    if title:
        write(total_width / 2, gap + line / 2, title, ha="center", fontsize=12)
    for row, (label, pictures) in enumerate(zip(labels, cells, strict=True)):
        y = margin_top + row * pitch_y
        write(margin_left - 12, y + height / 2, label, ha="right")
        for column, picture in enumerate(pictures):
            x = margin_left + column * pitch_x
            # figimage counts pixels from the lower edge.
            figure.figimage(picture, x, total_height - y - height, origin="upper")
            if headings and row == 0:
                write(x + width / 2, y - line / 2, headings[column], ha="center", fontsize=9)
            if captions:
                write(x + width / 2, y + height + line / 2, captions[row][column], ha="center", fontsize=9)
    return figure


@rc_context(STYLE)
def _scores_figure(
    rows: Sequence[Mapping[str, Any]], metric: str, title: str, names: Mapping[tuple[str, str], str]
) -> Figure:
    rows = [row for row in rows if row.get(f"{metric}_mean") is not None]
    if not rows:
        raise ValueError(f"no row has a {metric}_mean to draw; evaluate first or name another metric")
    for field in COMPARABLE:
        values = sorted({str(row[field]) for row in rows if field in row})
        if len(values) > 1:
            raise ValueError(f"scores with {field} {' and '.join(values)} do not compare; draw one figure for each")
    series: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for row in rows:
        key = (row["model_type"], row["path_type"])
        name = names.get(key, " ".join(filter(None, key)))
        scores = series.setdefault(name, {}).setdefault(row["weights"], {})
        epoch, deviation = int(row["epoch"]), row.get(f"{metric}_sd")
        if epoch in scores:
            raise ValueError(
                f"{name} has two values of {metric} with {row['weights']} weights at epoch {epoch}; "
                "pass the rows of one checkpoint and path each"
            )
        scores[epoch] = (float(row[f"{metric}_mean"]), math.nan if deviation is None else float(deviation))
    label = METRIC_TITLES.get(metric, metric)
    if "num_images" in rows[0]:
        label += f", {int(rows[0]['num_images']):,} images"
    if "nfe" in rows[0]:
        label += f", NFE {rows[0]['nfe']}"
    epochs = {int(row["epoch"]) for row in rows}
    if len(epochs) == 1:
        num_dots = sum(len(by_weights) for by_weights in series.values())
        figure = Figure(figsize=(7.4, 1.5 + 0.32 * num_dots), layout="constrained")
        axes = figure.subplots()
        _draw_score_dots(axes, series)
        axes.set_xlabel(label)
        axes.set_title(f"epoch {epochs.pop()}", loc="left")
    else:
        figure = Figure(figsize=(7.6, 5.2), layout="constrained")
        axes = figure.subplots()
        _draw_score_curves(axes, series)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(FixedLocator(sorted(epochs), nbins=12))
        axes.set_ylabel(label)
        handles = [Line2D([], [], label=name, **_style(k)) for k, name in enumerate(series)]
        figure.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(len(series)))
    handles = [
        Line2D([], [], **{"color": "0.3", "marker": "o", "label": name, **_weights_style(kind)})
        for kind, name in WEIGHTS_TITLES.items()
        if any(kind in by_weights for by_weights in series.values())
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=3.5)
    figure.suptitle(title)
    return figure


def _weights_style(weights: str) -> dict[str, str]:
    return {"linestyle": "--", "markerfacecolor": "white"} if weights == "ema" else {"linestyle": "-"}


def _draw_score_curves(axes: Axes, series: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]]) -> None:
    for k, by_weights in enumerate(series.values()):
        for weights, scores in by_weights.items():
            epochs = sorted(scores)
            means, deviations = zip(*(scores[epoch] for epoch in epochs), strict=True)
            look = {**_style(k), **_weights_style(weights)}
            axes.errorbar(epochs, means, deviations, linewidth=1.5, markersize=5, **ERROR_BARS, **look)
    axes.grid(True)


def _draw_score_dots(axes: Axes, series: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]]) -> None:
    y, centres = 0.0, []
    for k, by_weights in enumerate(series.values()):
        start = y
        for weights in filter(by_weights.get, WEIGHTS_TITLES):
            for mean, deviation in by_weights[weights].values():
                look = {**_style(k), **_weights_style(weights), "linestyle": "none"}
                axes.errorbar(mean, y, xerr=deviation, markersize=7, **ERROR_BARS, **look)
                known = math.isfinite(deviation)
                text = f"{mean:#.4g} ± {deviation:#.2g}" if known else f"{mean:#.4g}"
                edge = mean + deviation if known else mean
                axes.annotate(
                    text, (edge, y), (8, 0), textcoords="offset points", va="center", fontsize=9, annotation_clip=False
                )
                y += 0.6
        centres.append((start + y - 0.6) / 2)
        y += 0.4
    axes.set_yticks(centres, list(series))
    axes.set_ylim(y - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.02 * (high - low), high + 0.3 * (high - low))  # Room for the last value.
    axes.grid(True, axis="x")
