"""Figures of windows: how far machines of the theory look along a path, and networks by their gradients."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from figures.style import STYLE, curve_style, even_columns, save_figure

Shares = Mapping[int, float]  # Side of a window in pixels -> share of the squared gradient, in [0, 1].


def plot_windows(
    curves: Mapping[str, Sequence[float]],  # what looks -> side in pixels at every point of a path
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw sides of windows along a path, from noise on the left to the image, on a logarithmic axis of pixels.

    Raises ValueError if there is no curve, for curves of unequal length or of none, and for a side that is not positive
    and finite.
    """
    save_figure(_windows_figure(curves, title), file)


def plot_window_shares(
    panels: Mapping[str, Mapping[str, Shares]],  # network -> noise level, as the legend has it -> shares
    file: str | os.PathLike,
    title: str = "",
    marks: tuple[float, ...] = (0.9, 0.99),  # shares at which a line goes across
    limits: Mapping[str, int] | None = None,  # network -> side that it cannot look beyond
) -> None:
    """Draw shares against sides, a panel for each network and a curve for each noise level, on shared axes.

    The first marker of a curve on or above a mark is the window that holds that share. A limit is a line upright.
    Raises ValueError if there is no network, for one without a level, for a side that is not odd and positive, and for
    a share outside [0, 1].
    """
    save_figure(_window_shares_figure(panels, title, marks, limits or {}), file)


@rc_context(STYLE)
def _windows_figure(curves: Mapping[str, Sequence[float]], title: str) -> Figure:
    lengths = {len(curve) for curve in curves.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("there is no window to draw; pass curves, one side for each of the same points")
    sides = np.array(list(curves.values()), dtype=float)
    if not (np.isfinite(sides).all() and (sides > 0).all()):
        raise ValueError("sides of windows must be positive and finite")
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for k, (name, curve) in enumerate(curves.items()):
        # Curves that meet stay apart to the eye.
        axes.plot(curve, label=name, linewidth=1.5, markersize=8 - 1.5 * k, fillstyle="none", **curve_style(k))
    axes.set_yscale("log")
    ticks = [side for side in (1, 3, 5, 9, 17, 33, 65, 127) if sides.min() <= side <= sides.max()]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="point of the path, from noise to image", ylabel="side of the window in pixels", title=title)
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=len(curves))
    return figure


@rc_context(STYLE)
def _window_shares_figure(
    panels: Mapping[str, Mapping[str, Shares]], title: str, marks: tuple[float, ...], limits: Mapping[str, int]
) -> Figure:
    if not panels:
        raise ValueError("there is no receptive field to draw")
    for name, levels in panels.items():
        if not levels:
            raise ValueError(f"{name} has no noise level; measure some")
        for level, shares in levels.items():
            bad = {side: share for side, share in shares.items() if side < 1 or side % 2 == 0 or not 0 <= share <= 1}
            if bad or not shares:
                raise ValueError(
                    f"{name}, {level}: windows have odd sides and shares from 0 to 1, not {bad or 'none at all'}"
                )
    columns = even_columns(len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.0 + 3.9 * columns, 1.1 + 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    # A level looks the same in every panel.
    styles = {
        level: curve_style(k) for k, level in enumerate(dict.fromkeys(key for each in panels.values() for key in each))
    }
    handles = {}
    for axes, (name, levels) in zip(grid.flat, panels.items(), strict=False):
        for mark in marks:
            axes.axhline(mark, color="0.45", linewidth=1, linestyle=":")
        if name in limits:
            handles["receptive field"] = axes.axvline(limits[name], color="0.45", linewidth=1.2, linestyle="--")
        for level, shares in levels.items():
            sides = sorted(shares)
            values = [shares[side] for side in sides]
            [handles[level]] = axes.plot(sides, values, linewidth=1.5, markersize=4, **styles[level])
        axes.set(title=name, ylim=(0, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for k, axes in enumerate(grid.flat[: len(panels)]):
        axes.tick_params(labelbottom=k + columns >= len(panels))
        axes.set(
            xlabel="side of the window in pixels" if k + columns >= len(panels) else "",
            ylabel="share of the squared gradient" if k % columns == 0 else "",
        )
    order = [*(level for level in styles), *(["receptive field"] if "receptive field" in handles else [])]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=even_columns(len(order), 1 + 2 * columns),
    )
    figure.suptitle(title)
    return figure
