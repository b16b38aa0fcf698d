"""The figure of training losses."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator

from figures.style import COLORS, STYLE, even_columns, log_axis, save_figure

LOSS_TITLES = {
    "loss_64": "fine scale", "loss_32": "coarse scale", "perceptual": "perceptual loss", "features": "feature matching",
}  # fmt: skip
PANELS_PER_ROW = 2


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],  # label -> rows with step, loss_64 and maybe others
    file: str | os.PathLike,
) -> None:
    """Draw training losses against the step: every logged value faintly, a running mean over it, log axis.

    There is one panel per scale, and per further term of the loss, that any run has. Rows without a loss, and losses
    that are not positive and finite, are skipped.
    Raises ValueError if nothing is left to draw.
    """
    save_figure(_losses_figure(runs), file)


@rc_context(STYLE)
def _losses_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    curves = {
        key: {label: curve for label, rows in runs.items() if len((curve := _loss_curve(rows, key))[0])}
        for key in LOSS_TITLES
    }
    curves = {key: by_label for key, by_label in curves.items() if by_label}
    if not curves:
        raise ValueError("no run has a positive fine or coarse loss to draw; log some training steps first")
    columns, rows = min(len(curves), PANELS_PER_ROW), -(-len(curves) // PANELS_PER_ROW)
    figure = Figure(figsize=(5.4 * columns + 0.6, 4.1 * rows + 0.5), layout="constrained")
    colors = {label: COLORS[k % len(COLORS)] for k, label in enumerate(runs)}
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes, (key, by_label) in zip(panels, curves.items(), strict=False):
        for label, (steps, losses) in by_label.items():
            axes.plot(steps, losses, ".", color=colors[label], markersize=3, alpha=0.3)
        for label, (steps, losses) in by_label.items():
            outline = [Stroke(linewidth=3.5, foreground="white"), Normal()]
            axes.plot(steps, _running_mean(losses), color=colors[label], linewidth=1.8, path_effects=outline)
        log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("training step")
        errors = "mean squared error" if key in ("loss_64", "loss_32") else "mean squared error of features"
        axes.set_ylabel(f"training loss ({errors})")
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
