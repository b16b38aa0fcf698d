"""Figures of how much one scale depends on the other: cross-Jacobians, and errors under other coarse inputs.

Each `plot_*` function takes data (numpy arrays, CPU tensors, nested lists) and the name of a PNG file, which
appears complete or not at all. Rows and columns of a map are those of `figures.plane`.
"""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from figures.plane import (
    COARSE_LABEL,
    FINE_LOG_SNR_LABEL,
    SHORT_FINE_LABEL,
    check_log_snr_map,
    draw_log_snr_map,
    label_outside_only,
    log_norm,
)
from figures.style import STYLE, curve_style, even_columns, log_axis, save_figure, spread_out

RATIO_TITLES = {
    "ratio_HL": r"$\|J_{HL}\|_F^2\,/\,\|J_{HH}\|_F^2$",
    "ratio_LH": r"$\|J_{LH}\|_F^2\,/\,\|J_{LL}\|_F^2$",
}
# Of planning.coupling.CONDITIONS but the first, with which they are compared.
CONDITION_TITLES = {
    "own_at_0": r"own, $t_\mathrm{coarse} = 0$",
    "clean": r"own without noise, $t_\mathrm{coarse} = 0$",
    "noise": r"pure noise, $t_\mathrm{coarse}$ noisiest",
    "shuffled": r"another image's, $t_\mathrm{coarse} = t_\mathrm{fine}$",
    "shuffled_at_0": r"another image's, $t_\mathrm{coarse} = 0$",
}


def plot_cross_jacobian(
    panels: Mapping[str, Mapping[str, ArrayLike]],  # label -> {"ratio_HL": [n, n], "ratio_LH": [n, n]}
    log_snr_grid: ArrayLike,  # [n], rising
    t_grid: ArrayLike,  # [n]
    file: str | os.PathLike,
    title: str = "",
    published: Mapping[tuple[int, int], float] | None = None,  # (t_64, t_32) -> ratio_HL
) -> None:
    """Draw how much each prediction depends on the other scale, over the plane and along its noisiest line.

    ratio_HL is ‖J_HL‖²_F / ‖J_HH‖²_F and ratio_LH is ‖J_LH‖²_F / ‖J_LL‖²_F: ratios of squared norms. The published
    ratios are read as the same quantity: at t_64 = t_32 = 999 the published J_HL = 2.9e-7 and J_HL/J_HH = 0.04 %
    give J_HH = 7.3e-4, which is ‖I‖²_F/(1 - ᾱ) / (64·64)² = 3·64·64/0.9968 / (64·64)², the squared norm of the
    trivial prediction over the divisor of the error map. The divisor of J_HL is not known: were it 64²·32² instead
    of (64·64)², the published numbers would be 4 times the ratios of squared norms.

    Every label is a row of two maps, axes as in `plot_maps`, all on one colour scale. Below, ratio_HL at t_64 =
    t_grid[0] is drawn against t_32, one curve per label, with the published values as stars. Raises ValueError
    for no label, a missing ratio, published values at another t_64, and as `plot_maps` does.
    """
    save_figure(_cross_jacobian_figure(panels, log_snr_grid, t_grid, title, published or {}), file)


def plot_coupling(
    panels: Mapping[tuple[str, str], Mapping[str, tuple[ArrayLike, ArrayLike]]],  # condition -> ratio, its error, [n]
    log_snr_64: ArrayLike,  # [n], rising
    t_64: ArrayLike,  # [n], the fine timesteps
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw what other coarse inputs do to the error of the fine image, against the log SNR of the fine one.

    A panel is named by its column and its row, and all share their axes. Ratios are those of a condition of
    `planning.coupling.CONDITIONS` to "own", which is the line at 1 and no curve; errors are standard errors. Raises
    ValueError for no panel, a missing one, an unknown condition, shapes that disagree, or a ratio that is not positive
    and finite.
    """
    save_figure(_coupling_figure(panels, log_snr_64, t_64, title), file)


@rc_context(STYLE)
def _cross_jacobian_figure(panels, log_snr_grid, t_grid, title, published) -> Figure:
    if not panels:
        raise ValueError("there is no cross-Jacobian ratio to draw; pass at least one")
    maps = {}
    for label, ratios in panels.items():
        for name in RATIO_TITLES:
            if name not in ratios:
                raise ValueError(f"{label} lacks {name}; pass both ratio_HL and ratio_LH")
            maps[label, name] = check_log_snr_map(f"{name} of {label}", ratios[name], t_grid, log_snr_grid)
    noisiest = int(np.asarray(t_grid)[0])
    elsewhere = sorted(t_64 for t_64, _ in published if t_64 != noisiest)
    if elsewhere:
        raise ValueError(f"a published ratio is at fine timestep {elsewhere[0]} but the line drawn is at {noisiest}")
    norm = log_norm(np.stack([values for values, _, _ in maps.values()]))
    num_rows = len(panels)
    figure = Figure(figsize=(8.2, 3.9 + 3.6 * num_rows), layout="compressed")
    slots = figure.add_gridspec(num_rows + 1, 2, height_ratios=[*[1.0] * num_rows, 0.8])
    plane = np.array([[figure.add_subplot(slots[row, column]) for column in range(2)] for row in range(num_rows)])
    for axes, (label, name) in zip(plane.flat, maps, strict=True):
        mesh = draw_log_snr_map(axes, *maps[label, name], norm)
        axes.set_title(f"{label}\n{RATIO_TITLES[name]}", fontsize=10)
    label_outside_only(plane)
    figure.colorbar(mesh, ax=list(plane.flat), label="ratio of squared norms", pad=0.02, aspect=28)
    line = figure.add_subplot(slots[num_rows, :])
    for k, label in enumerate(panels):
        values, timesteps, _ = maps[label, "ratio_HL"]
        line.plot(timesteps, values[0], label=label, linewidth=1.5, markersize=4.5, **curve_style(k))
    if published:
        _, coarse = zip(*published, strict=True)
        stars = {"linestyle": "none", "marker": "*", "markersize": 12, "color": "black", "markeredgecolor": "white"}
        line.plot(coarse, list(published.values()), label="published, AFHQ 64×64", **stars)
    line.invert_xaxis()
    log_axis(line)
    line.set_xlabel(COARSE_LABEL)
    line.set_ylabel(RATIO_TITLES["ratio_HL"])
    line.set_title(f"along fine timestep {noisiest}", loc="left")
    line.grid(True, which="both")
    figure.legend(loc="outside lower center", ncols=even_columns(num_rows + bool(published)))
    figure.suptitle(title)
    return figure


@rc_context(STYLE)
def _coupling_figure(panels, log_snr_64, t_64, title) -> Figure:
    if not panels:
        raise ValueError("there is no coupling to draw; pass at least one panel")
    columns, rows = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    log_snr_64, t_64 = np.asarray(log_snr_64, dtype=np.float64), np.asarray(t_64)
    figure = Figure(figsize=(1.0 + 4.4 * len(columns), 1.3 + 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    styles = {condition: curve_style(k) | {"linestyle": "-"} for k, condition in enumerate(CONDITION_TITLES)}
    # An open marker lets the curve beneath show, with which this one all but coincides.
    styles["clean"] |= {"linestyle": "--", "markerfacecolor": "none", "markersize": 8}
    for (row, column), axes in np.ndenumerate(grid):
        name = columns[column], rows[row]
        if name not in panels:
            raise ValueError(f"there is no panel of {name[0]} and {name[1]}; pass one for each column and row")
        axes.axhline(1, color="0.35", linewidth=1.2, linestyle=":")
        for condition, values in panels[name].items():
            if condition != "own":
                ratio, error = _check_coupling(f"{condition} of {', '.join(name)}", condition, values, log_snr_64, t_64)
                look = {"markersize": 5, "capsize": 2} | styles[condition]
                axes.errorbar(log_snr_64, ratio, error, linewidth=1.5, **look)
        axes.set_title(", ".join(name), loc="left")
        axes.grid(True)
    log_axis(grid[0, 0])
    for axes in grid[-1]:
        axes.set_xlabel(FINE_LOG_SNR_LABEL + r"  (noise $\rightarrow$ clean)")
    for axes in grid[:, 0]:
        axes.set_ylabel("fine error, relative to own")
    for axes in grid[0]:
        top = axes.secondary_xaxis("top")
        shown = spread_out(log_snr_64, 0.07 * np.ptp(log_snr_64))
        top.set_xticks(log_snr_64[shown], [str(t) for t in t_64[shown]])
        top.set_xlabel(SHORT_FINE_LABEL)
    handles = [Line2D([], [], color="0.35", linestyle=":", label=r"own, $t_\mathrm{coarse} = t_\mathrm{fine}$")]
    for condition, label in CONDITION_TITLES.items():
        if any(condition in curves for curves in panels.values()):
            handles.append(Line2D([], [], label=label, linewidth=1.5, **styles[condition]))
    figure.legend(handles=handles, loc="outside lower center", ncols=even_columns(len(handles), most=1 + len(columns)))
    figure.suptitle(title)
    return figure


def _check_coupling(where: str, condition: str, values, log_snr_64, t_64) -> tuple[np.ndarray, np.ndarray]:
    if condition not in CONDITION_TITLES:
        raise ValueError(f"{where} is unknown; name conditions of {', '.join(CONDITION_TITLES)}")
    ratio, error = (np.asarray(part, dtype=np.float64) for part in values)
    if not ratio.shape == error.shape == log_snr_64.shape == t_64.shape or ratio.ndim != 1:
        raise ValueError(
            f"{where} has ratios {list(ratio.shape)}, errors {list(error.shape)}, log SNRs {list(log_snr_64.shape)} "
            f"and timesteps {list(t_64.shape)}; pass [n] of each"
        )
    if not (np.isfinite(ratio) & (ratio > 0)).all():
        raise ValueError(f"{where} has a ratio that is not positive and finite")
    return ratio, error
