"""The figure of guidance: what a scale does to precision, recall and a distance."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from figures.style import ERROR_BARS, STYLE, curve_style, even_columns, log_axis, save_figure, spread_out

Score = tuple[float, float | None]  # mean, and deviation over seeds if there are several
# Where the number of a point may stand: how far from it in points, and which of its corners is there.
PLACES = [
    (x, y, across, along)
    for far in (6, 11, 17, 24)
    for x, y, across, along in (
        (far, 0, "left", "center"),
        (0, far, "center", "bottom"),
        (-far, 0, "right", "center"),
        (0, -far, "center", "top"),
        (0.7 * far, 0.7 * far, "left", "bottom"),
        (-0.7 * far, 0.7 * far, "right", "bottom"),
        (-0.7 * far, -0.7 * far, "right", "top"),
        (0.7 * far, -0.7 * far, "left", "top"),
    )
]


def plot_guidance(
    quality: Mapping[str, Mapping[float, tuple[Score, Score]]],  # curve -> scale -> recall, precision
    distances: Mapping[str, Mapping[float, Score]],  # curve -> scale -> distance
    file: str | os.PathLike,
    title: str = "",
    labels: Sequence[str] = ("recall", "precision", "FID"),
) -> None:
    """Draw precision against recall, the points of a curve joined in the order of their scale, which each one has
    beside it, and next to it a distance against the scale. Bars are deviations over seeds.

    A curve looks the same in both panels, and need not be in both. Of points so near to each other that numbers would
    overlap, the later ones have none. The distance is on a logarithmic axis if every mean - sd is positive and the
    means span more than a factor of 5. Raises ValueError for a panel without a curve, a curve without a point, a scale
    that is negative or not finite, and a mean or deviation that is not finite.
    """
    save_figure(_guidance_figure(quality, distances, title, labels), file)


@rc_context(STYLE)
def _guidance_figure(
    quality: Mapping[str, Mapping[float, tuple[Score, Score]]],
    distances: Mapping[str, Mapping[float, Score]],
    title: str,
    labels: Sequence[str],
) -> Figure:
    if not quality or not distances:
        raise ValueError("there is no curve to draw in one of the panels; score precision, recall and a distance")
    names = list(dict.fromkeys((*quality, *distances)))
    styles = {name: curve_style(k) for k, name in enumerate(names)}
    wrapped = [textwrap.fill(name, 92) for name in names]
    columns = even_columns(len(names), max(1, min(4, 92 // max(map(len, names)))))
    lines = sum(1 + name.count("\n") for name in wrapped) / columns
    figure = Figure(figsize=(9.6, 4.7 + 0.2 * max(0, lines - 1)), layout="constrained")
    left, right = figure.subplots(1, 2)
    points: list[tuple[str, float, np.ndarray, np.ndarray]] = []
    for name, by_scale in quality.items():
        scales = _scales(name, by_scale)
        recall, precision = (_column(name, scales, [by_scale[s][k] for s in scales]) for k in (0, 1))
        look = {"linewidth": 1.5, "markersize": 5, **ERROR_BARS, **styles[name]}
        left.errorbar(recall[0], precision[0], precision[1], recall[1], **look)
        centres, deviations = (np.stack(pair, 1) for pair in zip(recall, precision, strict=True))  # [n, 2]
        points += zip([name] * len(scales), scales, centres, np.nan_to_num(deviations), strict=True)
    means, lows = [], []
    for name, by_scale in distances.items():
        scales = _scales(name, by_scale)
        mean, sd = _column(name, scales, [by_scale[s] for s in scales])
        right.errorbar(scales, mean, sd, linewidth=1.5, markersize=5, **ERROR_BARS, **styles[name])
        means += mean.tolist()
        lows += (mean - np.nan_to_num(sd)).tolist()
    if min(lows) > 0 and max(means) > 5 * min(means):
        log_axis(right)
    _number_scales(right, sorted({scale for by_scale in distances.values() for scale in by_scale}))
    left.set(xlabel=labels[0], ylabel=labels[1])
    left.margins(0.12)  # Room for the numbers of points at the edge.
    right.set(xlabel="guidance scale", ylabel=labels[2])
    for axes in (left, right):
        axes.grid(True)
    handles = [
        Line2D([], [], label=text, linewidth=1.5, **styles[name]) for name, text in zip(names, wrapped, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.suptitle(title)
    FigureCanvasAgg(figure).draw()  # Where a number stands depends on where the points are on the page.
    number_points(left, points, {name: str(style["color"]) for name, style in styles.items()})
    return figure


def _scales(name: str, by_scale: Mapping[float, object]) -> list[float]:
    if not by_scale:
        raise ValueError(f"the curve {name} has no point; leave it out")
    bad = [scale for scale in by_scale if not 0 <= scale < math.inf]
    if bad:
        raise ValueError(f"{name} has the guidance scale {bad[0]:g}; scales are finite and at least 0")
    return sorted(by_scale)


def _column(name: str, scales: Sequence[float], scores: Sequence[Score]) -> tuple[np.ndarray, np.ndarray]:
    mean = np.array([score[0] for score in scores], np.float64)
    sd = np.array([math.nan if score[1] is None else score[1] for score in scores], np.float64)
    bad = ~np.isfinite(mean) | np.isinf(sd)
    if bad.any():
        where = f"at guidance scale {np.array(scales)[bad][0]:g}"
        raise ValueError(f"{name} has the score {mean[bad][0]:g} ± {sd[bad][0]:g} {where}; scores are finite")
    return mean, sd


def _number_scales(axes: Axes, scales: Sequence[float]) -> None:
    """A tick at every scale, with a number where there is room; the ends come first."""
    order = list(dict.fromkeys([scales[0], scales[-1], *scales]))
    width = (scales[-1] - scales[0]) or 1.0
    numbered = sorted(order[k] for k in spread_out([scale / width for scale in order], 0.08))
    axes.set_xticks(numbered, [f"{scale:g}" for scale in numbered])
    axes.set_xticks([scale for scale in scales if scale not in numbered], minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())


def number_points(
    axes: Axes, points: Sequence[tuple[str, float, np.ndarray, np.ndarray]], colours: Mapping[str, str]
) -> None:
    """The scale of each point (name of its curve, scale, centre, deviations) beside it, where nothing else stands."""
    renderer = axes.figure.canvas.get_renderer()
    pixels = 3 * axes.figure.dpi / 72  # Half a marker, or half a cap.
    taken = []
    for _, _, centre, deviations in points:
        for bar in np.diag(deviations):
            low, high = axes.transData.transform([centre - bar, centre + bar])
            taken.append(Bbox.from_extents(*(low - pixels), *(high + pixels)))
    for name, scale, centre, _ in points:
        text = axes.annotate(
            f"{scale:g}", centre, textcoords="offset points", xytext=(0, 0), fontsize=8, color=colours[name]
        )
        text.set_path_effects([Stroke(linewidth=2.5, foreground="white"), Normal()])  # A line may pass behind it.
        for right, up, across, along in PLACES:
            text.set(position=(right, up), horizontalalignment=across, verticalalignment=along)
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()
