"""Figures of what paths cost: against the network evaluations they take, and against their distance to the truth.

Each `plot_*` function takes numbers and the name of a PNG file, which appears complete or not at all.
"""

import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from figures.style import NFE_LABEL, STYLE, check_positive, curve_style, even_columns, log_axis, nfe_axis, save_figure


def plot_cost_against_nfe(
    curves: Mapping[str, Mapping[int, float]],  # family of paths -> NFE -> cost
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "cost of the path",
    optimum: str | None = None,  # the family drawn thick
) -> None:
    """Draw the cost of paths against the network evaluations they take, one curve per family.

    Axes are logarithmic, that of costs only if all are positive: where a network's errors fall with the noise of the
    other scale, a path may cost less than nothing. Every NFE that occurs has a tick, and a number where there is room.
    Raises ValueError if there is no curve or an empty one, for an NFE that is not positive, a cost that is not finite,
    and for an optimum that is not among the curves.
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


def plot_distance_against_nfe(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],  # panel -> curve -> NFE -> distance
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "distance",
    least: float = 1e-3,  # where the axis of distances ends; what lies below leaves the panel
) -> None:
    """Draw distances against network evaluations, panels side by side, four in a row at most, on the same axes.

    A curve has the same colour in every panel. Both axes are logarithmic. Raises ValueError for no panel, a panel
    without curves, and an NFE or a distance that is not positive.
    """
    save_figure(_distance_against_nfe_figure(panels, title, ylabel, least), file)


@rc_context(STYLE)
def _distance_against_nfe_figure(panels, title, ylabel, least) -> Figure:
    if not panels or not all(panels.values()):
        raise ValueError("there is no distance to draw, or a panel without curves")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = even_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(0.8 + 3.0 * columns, 1.4 + 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (panel, curves) in zip(grid, panels.items(), strict=False):
        nfes = sorted({nfe for curve in curves.values() for nfe in curve})
        check_positive(f"an NFE of {panel}", nfes)
        for name, curve in curves.items():
            distances = check_positive(f"a distance of {panel}, {name}", [curve[nfe] for nfe in sorted(curve)])
            axes.plot(
                sorted(curve), distances, label=name, linewidth=1.4, markersize=5, **curve_style(names.index(name))
            )
        nfe_axis(axes, nfes, gap=0.12)
        axes.set_title(panel)
        axes.grid(True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    largest = max(value for curves in panels.values() for curve in curves.values() for value in curve.values())
    grid[0].set_yscale("log")
    grid[0].set_ylim(least, largest * (largest / least) ** 0.05)
    log_axis(grid[0])
    for k, axes in enumerate(grid[: len(panels)]):
        if k + columns >= len(panels):
            axes.set_xlabel(NFE_LABEL)
        if k % columns == 0:
            axes.set_ylabel(ylabel)
    handles = [Line2D([], [], label=name, **curve_style(k)) for k, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(names), most=min(3, columns)))
    figure.suptitle(title)
    return figure


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
    labelled = nfe_axis(axes, sorted(counts, key=lambda nfe: (-counts[nfe], nfe)), gap=0.05)
    for k, (name, curve) in enumerate(curves.items()):
        nfes = sorted(curve)
        check_positive(f"an NFE of {name}", nfes)
        costs = [curve[nfe] for nfe in nfes]
        bad = [cost for cost in costs if not math.isfinite(cost)]
        if bad:
            raise ValueError(f"a cost of {name} is {bad[0]:g}; leave that path out")
        # Dozens of markers would hide the curve.
        marked = [m for m, nfe in enumerate(nfes) if len(nfes) <= 12 or nfe in labelled]
        look = (
            {"linewidth": 3, "markersize": 8, "zorder": 3} if name == optimum else {"linewidth": 1.4, "markersize": 5}
        )
        axes.plot(nfes, costs, label=name, markevery=marked, **look, **curve_style(k))
    if min(cost for curve in curves.values() for cost in curve.values()) > 0:
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
        costs = check_positive(f"a cost of {criterion}", costs)
        distances = check_positive(f"a distance of {criterion}", distances)
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
