"""What all figures share: the page, the look of curves, and numbers that stand apart on an axis.

Colours are safe for colour-blind readers, and every curve also has its own marker, so that figures survive grey
print.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from images.own import FIGURE_TEXT
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
ERROR_BARS = {"ecolor": "0.15", "elinewidth": 1, "capsize": 3, "capthick": 1}  # Dark, to show on a marker.
WEIGHTS_TITLES = {"raw": "raw weights", "ema": "EMA"}
NFE_LABEL = "network evaluations (NFE)"


def save_figure(figure: Figure, file: str | os.PathLike) -> None:
    """Write a figure as a PNG that appears complete or not at all."""
    with rc_context(STYLE), replacing(file) as temporary:
        # Said outright because a user's matplotlibrc could crop or tint the page.
        figure.savefig(
            temporary, format="png", dpi=DPI, facecolor="white", bbox_inches=figure.bbox_inches, metadata=FIGURE_TEXT
        )


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


def check_positive(what: str, values: ArrayLike) -> np.ndarray:
    """The values as float64. Raises ValueError, naming `what`, if one is not positive and finite."""
    values = np.asarray(values, dtype=np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise ValueError(f"{what} is {values[bad][0]:g}; logarithmic axes need positive, finite values")
    return values


def nfe_axis(axes: Axes, nfes: Sequence[int], gap: float) -> list[int]:
    """Make the x axis logarithmic with a tick at every NFE; returns those that have a number.

    Numbers stand `gap` of the axis apart or more, the ends and what comes first in `nfes` preferred.
    """
    axes.set_xscale("log")
    order = list(dict.fromkeys([min(nfes), max(nfes), *nfes]))
    logs = np.log(order)
    labelled = sorted(order[k] for k in spread_out(logs, gap * (logs.max() - logs.min())))
    axes.set_xticks(labelled, [str(nfe) for nfe in labelled])
    axes.set_xticks([nfe for nfe in order if nfe not in labelled], minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    return labelled
