"""Figures of scores: against the epoch, against network evaluations, and of a factorial comparison.

Each `plot_*` function takes numbers and the name of a PNG file, which appears complete or not at all.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from figures.style import (
    ERROR_BARS,
    NFE_LABEL,
    STYLE,
    WEIGHTS_TITLES,
    check_positive,
    curve_style,
    even_columns,
    log_axis,
    nfe_axis,
    save_figure,
)

METRIC_TITLES = {"fid": "FID", "swd": "sliced Wasserstein distance"} | {
    f"swd_{size}": f"sliced Wasserstein distance, level {size} px" for size in (64, 32, 16)
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
    "fd": "Fréchet distance by a judge",
    "fd_real": "Fréchet distance of real images by a judge",
    "class_score": "class score",
    "class_score_real": "class score of real images",
    "class_accuracy": "class accuracy",
    "class_accuracy_real": "class accuracy of real images",
}
# Scores that differ in one of these must not share a figure.
COMPARABLE = ("dataset", "num_images", "nfe", "metric_features", "resize", "reference_fingerprint", "precision")


def plot_scores(
    rows: Sequence[Mapping[str, Any]],  # means over seeds, one row per series, weights and epoch
    metric: str,  # such as "fid"
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw a metric against the epoch, one colour per series, raw weights solid and EMA dashed.

    A row has `name` (of its series, in the legend), `weights` ("raw" or "ema"), `epoch`, `{metric}_mean`, and may have
    `{metric}_sd` (an error bar unless None), `num_images` and `nfe` (named on the axis); numbers may be text.
    If all rows are of one epoch, each is a dot with its value, grouped by series in the order given,
    raw weights filled and EMA open. Rows whose mean is None are skipped. Raises ValueError if nothing is left
    to draw, if rows differ in one of `COMPARABLE`, and if two rows are the same point of the same curve.
    """
    save_figure(_scores_figure(rows, metric, title), file)


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


@rc_context(STYLE)
def _scores_figure(rows: Sequence[Mapping[str, Any]], metric: str, title: str) -> Figure:
    rows = [row for row in rows if row.get(f"{metric}_mean") is not None]
    if not rows:
        raise ValueError(f"no row has a {metric}_mean to draw; evaluate first or name another metric")
    check_comparable(rows)
    series: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for row in rows:
        name = row["name"]
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
        series = {textwrap.fill(name, 44): by_weights for name, by_weights in series.items()}
        # A dot has the height of a line, or of the longest name beside it.
        num_lines = max(1, *(0.6 * (1 + name.count("\n")) for name in series))
        figure = Figure(figsize=(7.4, 1.5 + 0.32 * num_lines * num_dots), layout="constrained")
        axes = figure.subplots()
        _draw_score_dots(axes, series)
        axes.set_xlabel(label)
        axes.set_title(f"epoch {epochs.pop()}", loc="left")
    else:
        names = [textwrap.fill(name, 80) for name in series]
        columns = even_columns(len(names), max(1, min(4, 80 // max(map(len, names)))))
        num_lines = sum(1 + name.count("\n") for name in names) / columns
        figure = Figure(figsize=(7.6, 5.2 + 0.2 * max(0, num_lines - 3)), layout="constrained")
        axes = figure.subplots()
        _draw_score_curves(axes, series)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(FixedLocator(sorted(epochs), nbins=12))
        axes.set_ylabel(label)
        handles = [Line2D([], [], label=name, **curve_style(k)) for k, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
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


@rc_context(STYLE)
def _score_bands_figure(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float | None]]]], title: str, ylabel: str, xlabel: str
) -> Figure:
    if not panels or not all(panels.values()):
        raise ValueError("there is no score to draw, or a panel without any; pass at least one curve per panel")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = {name: curve_style(k) for k, name in enumerate(names)}
    labels = {name: textwrap.fill(name, 22) for name in names}
    height = sum(0.24 + 0.17 * label.count("\n") for label in labels.values())  # Of the legend.
    figure = Figure(figsize=(4.2 * len(panels) + 2.4, max(4.4, 0.3 + height)), layout="constrained")
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
        check_positive("an NFE", xs)
        nfe_axis(row[0], sorted(set(xs)), gap=0.085)
    else:
        row[0].xaxis.set_major_locator(FixedLocator(sorted(set(xs)), nbins=6))
    row[0].set_ylabel(ylabel)
    ends = {name: points[max(points)][0] for curves in panels.values() for name, points in curves.items()}
    shown = sorted(names, key=lambda name: -ends[name])
    handles = [Line2D([], [], label=labels[name], linewidth=1.5, **styles[name]) for name in shown]
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
        check_positive(f"the NFE or the value of {where}", [nfe, float(row["value"])])
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
    nfe_axis(panels[0, 0], nfes, gap=0.085)
    for axes in panels[:, 0]:
        axes.set_ylabel(ylabel)
    for axes in panels[-1]:
        axes.set_xlabel(NFE_LABEL)
    shown = [*offsets, *(["baseline"] if any("baseline" in curves for curves in series.values()) else [])]
    handles = [Line2D([], [], label=name, linewidth=1.5, **styles[name]) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(shown)))
    figure.suptitle(title)
    return figure
