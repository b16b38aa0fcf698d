"""The figure of windows: how far networks and local score machines look, at each noise level."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from figures.style import STYLE, curve_style, save_figure


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
