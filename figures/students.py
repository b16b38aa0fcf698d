"""The figure of students: what few calls are worth, and what it took to learn them."""

import math
import os
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.guidance import number_points
from figures.style import (
    ERROR_BARS,
    NFE_LABEL,
    STYLE,
    check_positive,
    curve_style,
    even_columns,
    log_axis,
    nfe_axis,
    save_figure,
)


class StudentScore(NamedTuple):
    """One student, or its teacher, at a number of calls."""

    mean: float
    sd: float | None  # over seeds, if there are several
    cost: int | None  # images shown to students and calls of their teachers; None for what was not distilled


def plot_students(
    curves: Mapping[str, Mapping[int, StudentScore]],  # curve -> calls -> score
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "FID",
) -> None:
    """Draw a score against the network calls that an image takes, and beside it against what was spent on learning.

    Points of the right panel have their number of calls beside them; curves without a cost are in the left one alone.
    Calls and costs are on logarithmic axes, the score too if every mean - sd is positive and the means span more than a
    factor of 5. Raises ValueError without a curve, for one without a point, for calls or costs that are not positive,
    and for a mean or deviation that is not finite.
    """
    save_figure(_students_figure(curves, title, ylabel), file)


@rc_context(STYLE)
def _students_figure(curves: Mapping[str, Mapping[int, StudentScore]], title: str, ylabel: str) -> Figure:
    if not curves or not all(curves.values()):
        raise ValueError("there is no curve, or one without a point; leave it out")
    styles = {name: curve_style(k) for k, name in enumerate(curves)}
    wrapped = [textwrap.fill(name, 92) for name in curves]
    columns = even_columns(len(curves), max(1, min(4, 92 // max(map(len, curves)))))
    lines = sum(1 + name.count("\n") for name in wrapped) / columns
    figure = Figure(figsize=(9.6, 4.7 + 0.2 * max(0, lines - 1)), layout="constrained")
    has_costs = any(score.cost is not None for points in curves.values() for score in points.values())
    left, *others = np.atleast_1d(figure.subplots(1, 1 + has_costs, sharey=True))
    points: list[tuple[str, float, np.ndarray, np.ndarray]] = []
    means, lows, costs = [], [], []
    for name, by_calls in curves.items():
        calls = sorted(by_calls)
        check_positive(f"the number of calls of {name}", calls)
        mean = np.array([by_calls[k].mean for k in calls], np.float64)
        sd = np.array([math.nan if by_calls[k].sd is None else by_calls[k].sd for k in calls], np.float64)
        if not np.isfinite(mean).all() or np.isinf(sd).any():
            raise ValueError(f"{name} has a score that is not finite; scores are finite")
        look = {"linewidth": 1.5, "markersize": 5, **ERROR_BARS, **styles[name]}
        left.errorbar(calls, mean, sd, **look)
        known = [k for k, call in enumerate(calls) if by_calls[call].cost is not None]
        if known:
            spent = check_positive(f"the cost of {name}", [by_calls[calls[k]].cost for k in known])
            others[0].errorbar(spent, mean[known], sd[known], **look)
            bars = np.stack([np.zeros(len(known)), np.nan_to_num(sd[known])], 1)
            points += zip([name] * len(known), [calls[k] for k in known], np.stack([spent, mean[known]], 1), bars,
                          strict=True)  # fmt: skip
            costs += spent.tolist()
        means += mean.tolist()
        lows += (mean - np.nan_to_num(sd)).tolist()
    if min(lows) > 0 and max(means) > 5 * min(means):
        log_axis(left)
    nfe_axis(left, sorted({call for by_calls in curves.values() for call in by_calls}), gap=0.085)
    left.set(xlabel=NFE_LABEL, ylabel=ylabel)
    for axes in (left, *others):
        axes.grid(True)
    if others:
        others[0].margins(0.12)  # Room for the numbers of points at the edge.
        log_axis(others[0], "x")
        others[0].set_xlabel("images shown to students + calls of teachers")
    handles = [
        Line2D([], [], label=text, linewidth=1.5, **styles[name]) for name, text in zip(curves, wrapped, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.suptitle(title)
    if others:
        FigureCanvasAgg(figure).draw()  # Where a number stands depends on where the points are on the page.
        number_points(others[0], points, {name: str(style["color"]) for name, style in styles.items()})
    return figure
