"""The figure of noise levels: what comes of a stage of a cascade by the level of the image that it is given."""

import math
import os
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from figures.style import STYLE, curve_style, save_figure


def plot_levels(
    curves: Mapping[str, Mapping[float, float]],  # stage -> log SNR -> score; inf: of the clean image
    file: str | os.PathLike,
    title: str = "",
    ylabel: str = "SWD ×1000",
) -> None:
    """Draw a score against the log SNR of the given image, a panel for each stage, the least one marked.

    That of the clean image is a line across its panel, and that of pure noise (-inf) another. Raises ValueError if
    there is no stage, for a stage without a finite level, and for a score that is not finite.
    """
    save_figure(_levels_figure(curves, title, ylabel), file)


@rc_context(STYLE)
def _levels_figure(curves: Mapping[str, Mapping[float, float]], title: str, ylabel: str) -> Figure:
    if not curves:
        raise ValueError("there is no stage to draw")
    figure = Figure(figsize=(0.8 + 4.2 * len(curves), 3.9), layout="constrained")
    handles = {}
    for axes, (stage, scores) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        levels = sorted(level for level in scores if math.isfinite(level))
        if not levels:
            raise ValueError(f"{stage} has no finite level; search some")
        if not np.isfinite(list(scores.values())).all():
            raise ValueError(f"{stage} has a score that is not finite")
        style = curve_style(0)
        axes.plot(levels, [scores[level] for level in levels], linewidth=1.5, markersize=5, **style)
        best = min(levels, key=scores.get)
        axes.plot(best, scores[best], "o", markersize=11, fillstyle="none", color=style["color"])
        axes.annotate(
            f"{best:.3g}", (best, scores[best]), textcoords="offset points", xytext=(0, 10), fontsize=8, ha="center"
        )
        for level, name, line in ((math.inf, "clean", "--"), (-math.inf, "noise", ":")):
            if level in scores:
                handles[name] = axes.axhline(scores[level], linestyle=line, linewidth=1.2, color="0.45")
        axes.margins(y=0.15)
        axes.set(title=stage, xlabel="log SNR of the given image", ylabel=ylabel)
        axes.grid(True)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title)
    return figure
