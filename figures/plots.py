"""Figures of losses, samples, scores and costs; `map_plots` has those of maps and paths in the plane of timesteps.

Each `plot_*` function takes data (numpy arrays, CPU tensors, nested lists) and the name of a PNG file, which
appears complete or not at all. Colours are safe for colour-blind readers, and every curve also has its own
marker, so that figures survive grey print.
"""

import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike
from PIL import Image

from runtime.safe_write import replacing

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
LOSS_TITLES = {"loss_64": "fine scale", "loss_32": "coarse scale"}
ERROR_BARS = {"ecolor": "0.15", "elinewidth": 1, "capsize": 3, "capthick": 1}  # Dark, to show on a marker.
WEIGHTS_TITLES = {"raw": "raw weights", "ema": "EMA"}
METRIC_TITLES = {"fid": "FID", "swd": "sliced Wasserstein distance"} | {
    f"swd_{size}": f"sliced Wasserstein distance, level {size}" for size in (64, 32, 16)
}
METRIC_TITLES |= {
    "fid_infinity": "FID∞",
    "kid": "KID",
    "inception_score": "Inception score",
    "manifold_precision": "manifold precision",
    "manifold_recall": "manifold recall",
    "nn_distance": "distance to the nearest training image",
    "nn_distance_real": "distance of real images to the nearest training image",
    "authenticity": "authenticity",
}
NFE_LABEL = "network evaluations (NFE)"
# Scores that differ in one of these must not share a figure.
COMPARABLE = ("dataset", "num_images", "nfe", "metric_features", "resize", "reference_fingerprint", "precision")
MAX_TRAJECTORY_COLUMNS = 10


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],  # label -> rows with step, loss_64 and maybe loss_32
    file: str | os.PathLike,
) -> None:
    """Draw training losses against the step: every logged value faintly, a running mean over it, log axis.

    There is one panel per scale that any run has. Rows without a loss, and losses that are not positive and
    finite, are skipped.
    Raises ValueError if nothing is left to draw.
    """
    save_figure(_losses_figure(runs), file)


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
    save_figure(_samples_figure(rows, title), file)


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
    save_figure(_trajectory_figure(fine, coarse, points, title), file)


def plot_super_resolution(
    columns: Mapping[str, ArrayLike],  # name -> uint8 [N, C, H, W], the originals last, H and W any of each column
    file: str | os.PathLike,
    title: str = "",
    captions: Mapping[str, Sequence[str]] | None = None,  # name -> one line per image, such as its PSNR
) -> None:
    """Draw each image as every method has it side by side, and under that the part of it with the most detail.

    Pixels are enlarged without smoothing, so that an original of up to 64 pixels takes 192 a side. The part is 3/8 of
    a side, where the squared differences of neighbouring pixels of the original add up to most; a frame shows where.
    Raises ValueError for no column and for columns of unequal N.
    """
    save_figure(_super_resolution_figure(columns, title, captions or {}), file)


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
    save_figure(_scores_figure(rows, metric, title, names or {}), file)


def check_comparable(rows: Sequence[Mapping[str, Any]], but: Sequence[str] = ()) -> None:
    """Raise ValueError if rows of scores differ in one of `COMPARABLE`, those named in `but` left out."""
    for field in COMPARABLE:
        values = sorted({str(row[field]) for row in rows if field in row})
        if field not in but and len(values) > 1:
            raise ValueError(f"scores with {field} {' and '.join(values)} do not compare; draw one figure for each")


def plot_scores_against_nfe(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]],
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "FID",
) -> None:
    """Draw a score against the network evaluations it took, mean and band of ± sd, one curve per model and path.

    `panels` is weights ("raw", "ema" or any name) -> curve -> NFE -> (mean, sd over seeds or None). Panels stand side
    by side and share their axes. NFE is on a logarithmic axis, the score too if every mean - sd is positive and the
    means span more than a factor of 5. A curve looks the same in every panel, and the legend lists curves from top to
    bottom as they end at the right of the last panel. Raises ValueError for no panel, no curve in a panel, no point on
    a curve, an NFE that is not positive, and a mean or deviation that is not finite.
    """
    save_figure(_score_bands_figure(panels, title, ylabel, NFE_LABEL), file)


def plot_scores_against_epoch(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]],
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "FID",
) -> None:
    """Draw a score against the epoch as `plot_scores_against_nfe` does against NFE, with epochs on a linear axis."""
    save_figure(_score_bands_figure(panels, title, ylabel, "epoch"), file)


def plot_cost_against_nfe(
    curves: Mapping[str, Mapping[int, float]],  # family of paths -> NFE -> cost
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "cost of the path",
    optimum: str | None = None,  # the family drawn thick
) -> None:
    """Draw the cost of paths against the network evaluations they take, on logarithmic axes, one curve per family.

    Every NFE that occurs has a tick, and a number where there is room. Raises ValueError if there is no curve or an
    empty one, for an NFE or a cost that is not positive and finite, and for an optimum that is not among the curves.
    """
    save_figure(_cost_against_nfe_figure(curves, title, ylabel, optimum), file)


def plot_criteria(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],  # criterion -> (cost [m], distance [m]) of m paths
    groups: Sequence[str],  # [m], family of each path
    file: str | os.PathLike,
    title: str = "",
    rho: Mapping[str, float] | None = None,  # criterion -> Spearman correlation of cost and distance
    distance_label: str = "exact distance",
) -> None:
    """Draw what each criterion says of many paths against their exact distance to the truth, one panel each.

    Axes are logarithmic and distances share one; a family has the same colour and marker everywhere. Panels come
    in the order given, four in a row at most, with ρ in the title. Raises ValueError for no criterion, arrays
    that differ in length from `groups`, values that are not positive and finite, and a criterion without its ρ.
    """
    save_figure(_criteria_figure(points, groups, title, rho, distance_label), file)


def plot_factorial(
    table: Sequence[Mapping[str, Any]],  # rows with schedule, spacing, offset, nfe, model, value, and maybe sd
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "FID",
) -> None:
    """Draw a score against NFE for every schedule (rows of panels), spacing (columns) and offset (curves).

    Every offset is a curve; rows whose model is "baseline" are a dashed one, whatever their offset. If there are
    several other models, each has its own curves. Axes are logarithmic and shared, sd is an error bar unless it is
    None or absent, and numbers may be text. Panels and curves come in the order of their first row. Raises
    ValueError for no row, a value or NFE that is not positive and finite, and two rows that are the same point.
    """
    save_figure(_factorial_figure(table, title, ylabel), file)


def save_figure(figure: Figure, file: str | os.PathLike) -> None:
    """Write a figure as a PNG that appears complete or not at all."""
    with rc_context(STYLE), replacing(file) as temporary:
        # Said outright because a user's matplotlibrc could crop or tint the page.
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", bbox_inches=figure.bbox_inches)


def even_columns(count: int, most: int = 4) -> int:
    """How many columns, at most `most`, spread count entries evenly over as few rows as that allows."""
    return math.ceil(count / math.ceil(count / most))


def curve_style(k: int) -> dict[str, str]:
    """Colour and marker of curve k of a figure."""
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)]}


def spread_out(positions: Sequence[float], gap: float) -> list[int]:
    """Indices of the positions that are gap or more from every earlier one kept: the first counts most."""
    kept: list[int] = []
    for k, position in enumerate(positions):
        if all(abs(position - positions[other]) >= gap for other in kept):
            kept.append(k)
    return kept


def log_axis(axes: Axes, name: str = "y") -> None:
    """Make axis "x" or "y" logarithmic, with numbers whether its data span many decades or a part of one.

    Call it once everything is drawn: the numbers are those that fit the axis as it is.
    """
    axes.set(**{f"{name}scale": "log"})
    axis, gap = (axes.yaxis, 0.09) if name == "y" else (axes.xaxis, 0.18)  # Numbers are wider than high.
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Rounder numbers first, because they take the room of others.
    round_numbers = ((1,), (2, 5), (1.5, 3, 4, 7), (6, 8, 9))
    ticks = [factor * 10.0**k for factors in round_numbers for k in decades for factor in factors]
    ticks = _spread_ticks([tick for tick in ticks if low <= tick <= high], low, high, gap)
    if len(ticks) < 3:
        even = MaxNLocator(5 if name == "y" else 4).tick_values(low, high)
        ticks = _spread_ticks([tick for tick in even if low <= tick <= high], low, high, gap)
    plain = all(1e-4 < tick < 99_999 for tick in ticks)
    axis.set_ticks(ticks, [f"{tick:g}" if plain else _scientific(tick) for tick in ticks])
    axis.set_minor_formatter(NullFormatter())


def _spread_ticks(ticks: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    kept = spread_out([math.log(tick) for tick in ticks], gap * math.log(high / low))
    return sorted(ticks[k] for k in kept)


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.4e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if float(mantissa) == 1 else f"${float(mantissa):g}\\cdot{power}$"


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
        log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("training step")
        axes.set_ylabel("training loss (mean squared error)")
        axes.set_title(LOSS_TITLES[key])
        axes.grid(True, which="both")
    handles = [Line2D([], [], color=color, linewidth=1.8, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(runs)))
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


@rc_context(STYLE)
def _super_resolution_figure(
    columns: Mapping[str, ArrayLike], title: str, captions: Mapping[str, Sequence[str]]
) -> Figure:
    if not columns:
        raise ValueError("there is no column of images to draw; pass at least one")
    pictures = {name: _as_images(images) for name, images in columns.items()}
    counts = {name: len(images) for name, images in pictures.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns of images must be equally long but hold {counts}; pass the same images in each")
    originals = list(pictures.values())[-1]
    height, width = originals.shape[2:]
    # Three eighths of a side are a whole number of pixels then, too.
    scale = 3 * math.ceil(64 / height)
    size = (height * scale, width * scale)
    cells, lines = [], []
    for k, original in enumerate(originals):
        part = _most_detailed(original)
        whole = [_tile(images[k], size) for images in pictures.values()]
        cells += [[_framed(tile, part) for tile in whole], [_tile_of_part(tile, part) for tile in whole]]
        lines += [[captions[name][k] if name in captions else "" for name in pictures], [""] * len(pictures)]
    return _picture_table(cells, ["image", "detail"] * len(originals), title, headings=list(columns), captions=lines)


def _most_detailed(image: np.ndarray) -> tuple[float, float, float, float]:
    # Top, left, height and width as shares of a side; even pixels, so that it is whole pixels at half the size too.
    values = image.astype(np.float64)
    detail = np.zeros(image.shape[1:])
    detail[1:] += (np.diff(values, axis=1) ** 2).sum(0)
    detail[:, 1:] += (np.diff(values, axis=2) ** 2).sum(0)
    sides = tuple(max(2, 2 * round(3 * side / 16)) for side in detail.shape)
    sums = sliding_window_view(detail, sides)[::2, ::2].sum((2, 3))
    corner = 2 * np.array(np.unravel_index(sums.argmax(), sums.shape))
    return tuple(float(x) for x in np.concatenate([corner, sides]) / np.tile(detail.shape, 2))


def _part_of(tile: np.ndarray, part: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    return tuple(round(share * tile.shape[k % 2]) for k, share in enumerate(part))


def _framed(tile: np.ndarray, part: tuple[float, float, float, float], line: int = 2) -> np.ndarray:
    top, left, height, width = _part_of(tile, part)
    rows, columns = np.ogrid[: tile.shape[0], : tile.shape[1]]
    outside = np.maximum(abs(2 * (rows - top) + 1 - height) - height, abs(2 * (columns - left) + 1 - width) - width)
    framed = tile.copy()
    framed[(outside > 0) & (outside < 2 * line)] = np.rint(np.array(to_rgb(COLORS[4])) * 255)
    return framed


def _tile_of_part(tile: np.ndarray, part: tuple[float, float, float, float]) -> np.ndarray:
    top, left, height, width = _part_of(tile, part)
    return _tile(tile[top : top + height, left : left + width].transpose(2, 0, 1), tile.shape[:2])


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
    check_comparable(rows)
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
        handles = [Line2D([], [], label=name, **curve_style(k)) for k, name in enumerate(series)]
        figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(series)))
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
            look = {**curve_style(k), **_weights_style(weights)}
            axes.errorbar(epochs, means, deviations, linewidth=1.5, markersize=5, **ERROR_BARS, **look)
    axes.grid(True)


def _draw_score_dots(axes: Axes, series: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]]) -> None:
    y, centres = 0.0, []
    for k, by_weights in enumerate(series.values()):
        start = y
        for weights in filter(by_weights.get, WEIGHTS_TITLES):
            for mean, deviation in by_weights[weights].values():
                look = {**curve_style(k), **_weights_style(weights), "linestyle": "none"}
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


def _check_positive(what: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise ValueError(f"{what} is {values[bad][0]:g}; logarithmic axes need positive, finite values")
    return values


def _nfe_axis(axes: Axes, nfes: Sequence[int], gap: float) -> list[int]:
    # Ticks at every NFE, numbers where they are gap of the axis apart, the ends and what comes first preferred.
    axes.set_xscale("log")
    order = list(dict.fromkeys([min(nfes), max(nfes), *nfes]))
    logs = np.log(order)
    labelled = sorted(order[k] for k in spread_out(logs, gap * (logs.max() - logs.min())))
    axes.set_xticks(labelled, [str(nfe) for nfe in labelled])
    axes.set_xticks([nfe for nfe in order if nfe not in labelled], minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    return labelled


@rc_context(STYLE)
def _score_bands_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]], title: str, ylabel: str, xlabel: str
) -> Figure:
    if not panels or not all(panels.values()):
        raise ValueError("there is no score to draw, or a panel without any; pass at least one curve per panel")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = {name: curve_style(k) for k, name in enumerate(names)}
    figure = Figure(figsize=(4.2 * len(panels) + 2.4, 4.4), layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    means, lows = [], []
    for axes, (weights, curves) in zip(row, panels.items(), strict=True):
        for name, points in curves.items():
            x, mean, sd = _score_curve(f"{name} ({weights})", points)
            axes.fill_between(x, mean - sd, mean + sd, color=styles[name]["color"], alpha=0.18, linewidth=0)
            # A band between two points vanishes where a neighbour has no deviation, the bar stays.
            axes.errorbar(x, mean, sd, linewidth=1.5, markersize=5, elinewidth=0.8, **styles[name])
            means += mean.tolist()
            lows += (mean - np.nan_to_num(sd)).tolist()
        axes.set_title(WEIGHTS_TITLES.get(weights, weights), loc="left")
        axes.set_xlabel(xlabel)
        axes.grid(True)
    if min(lows) > 0 and max(means) > 5 * min(means):
        log_axis(row[0])
    xs = [x for curves in panels.values() for points in curves.values() for x in points]
    if xlabel == NFE_LABEL:
        _check_positive("an NFE", xs)
        _nfe_axis(row[0], sorted(set(xs)), gap=0.085)
    else:
        row[0].xaxis.set_major_locator(FixedLocator(sorted(set(xs)), nbins=6))
    row[0].set_ylabel(ylabel)
    ends = {name: points[max(points)][0] for curves in panels.values() for name, points in curves.items()}
    shown = sorted(names, key=lambda name: -ends[name])
    handles = [Line2D([], [], label=textwrap.fill(name, 22), linewidth=1.5, **styles[name]) for name in shown]
    figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(title)
    return figure


def _score_curve(
    where: str, points: Mapping[int, tuple[float, float | None]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not points:
        raise ValueError(f"the curve {where} has no point; leave it out")
    x = np.array(sorted(points))
    mean = np.array([points[k][0] for k in x], dtype=np.float64)
    sd = np.array([math.nan if points[k][1] is None else points[k][1] for k in x], dtype=np.float64)
    bad = ~np.isfinite(mean) | np.isinf(sd)
    if bad.any():
        raise ValueError(f"{where} has the score {mean[bad][0]:g} ± {sd[bad][0]:g} at {x[bad][0]}; scores are finite")
    return x, mean, sd


@rc_context(STYLE)
def _cost_against_nfe_figure(
    curves: Mapping[str, Mapping[int, float]], title: str, ylabel: str, optimum: str | None
) -> Figure:
    if not curves or not all(curves.values()):
        raise ValueError("there is no cost to draw, or a curve without any; pass at least one per curve")
    if optimum is not None and optimum not in curves:
        raise ValueError(f"the optimum '{optimum}' is not among the curves {', '.join(curves)}")
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    axes = figure.subplots()
    counts = Counter(nfe for curve in curves.values() for nfe in curve)
    # What most curves have is labelled first.
    labelled = _nfe_axis(axes, sorted(counts, key=lambda nfe: (-counts[nfe], nfe)), gap=0.05)
    for k, (name, curve) in enumerate(curves.items()):
        nfes = sorted(curve)
        _check_positive(f"an NFE of {name}", nfes)
        costs = _check_positive(f"a cost of {name}", [curve[nfe] for nfe in nfes])
        # Dozens of markers would hide the curve.
        marked = [m for m, nfe in enumerate(nfes) if len(nfes) <= 12 or nfe in labelled]
        look = (
            {"linewidth": 3, "markersize": 8, "zorder": 3} if name == optimum else {"linewidth": 1.4, "markersize": 5}
        )
        axes.plot(nfes, costs, label=name, markevery=marked, **look, **curve_style(k))
    log_axis(axes)
    axes.set_xlabel(NFE_LABEL)
    axes.set_ylabel(ylabel)
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=even_columns(len(curves), most=3))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _criteria_figure(points, groups, title, rho, distance_label) -> Figure:
    if not points:
        raise ValueError("there is no criterion to draw; pass at least one")
    groups = np.asarray(groups)
    columns = even_columns(len(points))
    rows = math.ceil(len(points) / columns)
    figure = Figure(figsize=(0.8 + 2.6 * columns, 1.0 + 2.5 * rows), layout="constrained")
    slots = figure.add_gridspec(rows, columns)
    families = list(dict.fromkeys(groups.tolist()))
    first = None
    for k, (criterion, (costs, distances)) in enumerate(points.items()):
        costs = _check_positive(f"a cost of {criterion}", costs)
        distances = _check_positive(f"a distance of {criterion}", distances)
        if not costs.shape == distances.shape == groups.shape or groups.ndim != 1:
            raise ValueError(
                f"{criterion} has costs {list(costs.shape)} and distances {list(distances.shape)} but groups has "
                f"{list(groups.shape)}; pass [m] of each"
            )
        if rho is None or criterion not in rho:
            raise ValueError(f"the Spearman correlation of {criterion} is missing; pass it in rho")
        axes = figure.add_subplot(slots[divmod(k, columns)], sharey=first)
        first = first or axes
        for f, family in enumerate(families):
            chosen = groups == family
            look = {"linestyle": "none", "markersize": 4, "alpha": 0.7, "markeredgewidth": 0}
            axes.plot(costs[chosen], distances[chosen], **look, **curve_style(f))
        log_axis(axes, "x")
        if k % columns:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(distance_label)
        if k + columns >= len(points):
            axes.set_xlabel("cost of the path")
        name = "\n".join(textwrap.wrap(criterion, 28))
        axes.set_title(f"{name}\n$\\rho$ = {rho[criterion]:.2f}".replace("-", "−"), fontsize=10)
        axes.grid(True)
    log_axis(first)
    handles = [Line2D([], [], linestyle="none", label=name, **curve_style(f)) for f, name in enumerate(families)]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(families)))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _factorial_figure(table: Sequence[Mapping[str, Any]], title: str, ylabel: str) -> Figure:
    if not table:
        raise ValueError("there is no row to draw; pass at least one")
    several = len({row["model"] for row in table} - {"baseline"}) > 1
    series: dict[tuple[str, str], dict[str, dict[int, tuple[float, float]]]] = {}
    for row in table:
        offset = f"{row['model']}, {row['offset']}" if several else row["offset"]
        name = "baseline" if row["model"] == "baseline" else offset
        scores = series.setdefault((row["schedule"], row["spacing"]), {}).setdefault(name, {})
        nfe, sd = int(row["nfe"]), row.get("sd")
        where = f"{name} with schedule {row['schedule']}, spacing {row['spacing']} at NFE {nfe}"
        if nfe in scores:
            raise ValueError(f"{where} has two values; pass one row per point")
        _check_positive(f"the NFE or the value of {where}", [nfe, float(row["value"])])
        scores[nfe] = (float(row["value"]), math.nan if sd is None else float(sd))
    schedules, spacings = (list(dict.fromkeys(row[key] for row in table)) for key in ("schedule", "spacing"))
    offsets = list(dict.fromkeys(name for curves in series.values() for name in curves if name != "baseline"))
    styles = {name: curve_style(k) | {"linestyle": "-"} for k, name in enumerate(offsets)}
    styles["baseline"] = {"color": "0.25", "marker": "x", "linestyle": "--"}
    figure = Figure(figsize=(max(5.0, 1.0 + 3.2 * len(spacings)), 1.4 + 2.9 * len(schedules)), layout="constrained")
    panels = figure.subplots(len(schedules), len(spacings), sharex=True, sharey=True, squeeze=False)
    nfes = sorted({nfe for curves in series.values() for scores in curves.values() for nfe in scores})
    for (schedule, spacing), curves in series.items():
        axes = panels[schedules.index(schedule), spacings.index(spacing)]
        for name, scores in curves.items():
            present = sorted(scores)
            values, deviations = zip(*(scores[nfe] for nfe in present), strict=True)
            axes.errorbar(present, values, deviations, linewidth=1.5, markersize=5, **ERROR_BARS, **styles[name])
    for (row, column), axes in np.ndenumerate(panels):
        axes.set_title(f"{schedules[row]}, {spacings[column]}")
        axes.grid(True)
    log_axis(panels[0, 0])
    _nfe_axis(panels[0, 0], nfes, gap=0.085)
    for axes in panels[:, 0]:
        axes.set_ylabel(ylabel)
    for axes in panels[-1]:
        axes.set_xlabel(NFE_LABEL)
    shown = [*offsets, *(["baseline"] if any("baseline" in curves for curves in series.values()) else [])]
    handles = [Line2D([], [], label=name, linewidth=1.5, **styles[name]) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(shown)))
    figure.suptitle(title)
    return figure
