"""What a step between two cells of a grid costs, and the paths whose sum of costs is the exact optimum.

The costs are the published trapezoid of an error map, and the KL divergence of the sampled chain from a map of
denoising errors. Maps are [n, n], indexed (index of t_64, index of t_32); index 0 is noise, n - 1 clean.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from paths.dynamic_programme import CellAt, Cells, StepCost, cheapest_paths, find_minima, trace_back
from paths.path import as_points


class Readings(NamedTuple):
    """What the cost of a step reads at one of its two ends: arrays that broadcast, maps >= 0."""

    map_64: ArrayLike
    map_32: ArrayLike
    clock_64: ArrayLike  # log SNR for `trapezoid_cost`, SNR for `kl_cost`
    clock_32: ArrayLike


def trapezoid_cost(start: Readings, end: Readings) -> np.ndarray:
    """Published cost of a step, a trapezoid in λ = log SNR for each scale, from its readings at both ends:

    (E_64[start] + E_64[end]) / 2 · |Δλ_64| + (E_32[start] + E_32[end]) / 2 · |Δλ_32|
    """
    delta_64 = np.abs(end.clock_64 - start.clock_64)
    delta_32 = np.abs(end.clock_32 - start.clock_32)
    return (start.map_64 + end.map_64) / 2 * delta_64 + (start.map_32 + end.map_32) / 2 * delta_32


def band_readings(scales: Readings) -> Readings:
    """What the low and the detail band of the fine image are to `kl_cost`, from the readings of the two scales.

    With a = γ_64 and b = γ_32, both images together show the details at SNR a and the low band at SNR q = a + b/4,
    with the denoising errors (docs/theory.md, section 7; for any law of images)

        M_low = 4 m_32,    M_detail = m_64 - 4 m_32.

    The details take the place of the fine scale (map_64, clock_64), the low band that of the coarse one. M_detail is
    0 where measured maps would make it negative. M_low Δq + M_detail Δa = m_64 Δa + m_32 Δb where they do not.
    """
    low = 4 * scales.map_32
    return Readings(np.maximum(scales.map_64 - low, 0), low, scales.clock_64, scales.clock_64 + scales.clock_32 / 4)


def kl_cost(
    start: Readings, end: Readings, weight: float = 0.0, symmetric: bool = False, bands: bool = False
) -> np.ndarray:
    """Cost in nats of a step of a sampler that keeps its estimate of x during the step (docs/theory.md, section 4).

    With m_s(k) the denoising error E‖x_s - E[x_s | z]‖² at point k, summed over dimensions in x-space:

    - weight 0: ½ Σ_s m_s(k) · (γ_s' - γ_s), the left Riemann sum. Less the information gained in the step it is
      the KL divergence of the sampled step from the true one (Girsanov); that information (I-MMSE, Guo, Shamai
      and Verdú 2005) adds up to the same on every path between the same ends, so that the best path of this
      cost is the best path of the KL, though the cost is not the KL.
    - weight p in (0, 1], or symmetric at weight 0: ½ Σ_s (m_s(k) - m_s(k + 1)) · (W(γ_s') - W(γ_s)), where W is
      the integral of w(γ) = γ^-p. The part to subtract is the integral of w · m along the path, which depends
      on the path unless p = 0, so that here it is subtracted step by step.

    The second form at p = 0 is not the first less the information. It is the left minus the right Riemann sum;
    where the maps fall along every axis the information of the step lies between the two, so that the second
    form is an upper bound of the step's KL, and to leading order in the step it is twice that KL. (For Gaussian
    x it is the KL in one direction plus that in the other.) For p > 0 it is likewise about twice the weighted
    excess of the left Riemann sum over the integral. A measured map that rises somewhere can make it negative.

    bands: sum over the two bands of the fine image in place of the two scales, s = low with M_low at SNR q and
    s = detail with M_detail at SNR a (`band_readings`). The second form is then

        ½ (M_low(k) - M_low(k + 1)) · (W(q') - W(q)) + ½ (M_detail(k) - M_detail(k + 1)) · (W(a') - W(a)).

    At weight 0 this is the same number wherever m_64 >= 4 m_32. For p > 0 it is not, and weights on scales leave a
    loophole: moving the coarse clock alone resolves the low band at the price of m_32, a quarter of its error, so
    that their optimum does little else (docs/theory.md, section 5). Weights on bands close it.

    Raises ValueError for a weight outside 0..1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the KL criterion is {weight}; choose an exponent from 0 to 1")
    if bands:
        start, end = band_readings(start), band_readings(end)
    delta_64 = _weigh(end.clock_64, weight) - _weigh(start.clock_64, weight)
    delta_32 = _weigh(end.clock_32, weight) - _weigh(start.clock_32, weight)
    if weight == 0 and not symmetric:
        return (start.map_64 * delta_64 + start.map_32 * delta_32) / 2
    return ((start.map_64 - end.map_64) * delta_64 + (start.map_32 - end.map_32) * delta_32) / 2


def step_cost(
    error_64: np.ndarray,  # [n, n]
    error_32: np.ndarray,  # [n, n]
    log_snr: np.ndarray,  # [n]
    start: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays of i and of j
    end: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays that broadcast with start
) -> np.ndarray:
    """Published cost (`trapezoid_cost`) of the step from cell start to cell end.

    A cell is (i, j) = (index of t_64, index of t_32); indices broadcast, and so does the result.
    """
    return trapezoid_cost(*(_read(error_64, error_32, log_snr, cell) for cell in (start, end)))


def kl_step_cost(
    mmse_64: np.ndarray,  # [n, n]
    mmse_32: np.ndarray,  # [n, n]
    snr: np.ndarray,  # [n]
    start: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays of i and of j
    end: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays that broadcast with start
    weight: float = 0.0,
    symmetric: bool = False,
    bands: bool = False,
    snr_32: np.ndarray | None = None,  # [n], of the coarse lines; None for `snr`
) -> np.ndarray:
    """KL cost in nats (`kl_cost`) of the step from cell start to cell end; broadcasts like `step_cost`."""
    return kl_cost(*(_read(mmse_64, mmse_32, snr, cell, snr_32) for cell in (start, end)), weight, symmetric, bands)


def path_cost(step: StepCost, cells: Sequence[Sequence[int]]) -> float:
    """Sum of step(start, end) over the steps of a path of cells, called once with arrays of indices [N]."""
    index = np.asarray(cells).T  # [2, N+1]
    return float(np.sum(step(tuple(index[:, :-1]), tuple(index[:, 1:]))))


def check_steps(n: int, num_steps: int, max_jump: int) -> None:
    """Raise ValueError unless some path of num_steps steps of at most max_jump cells crosses an n x n grid.

    Needs max_jump >= 1 and n - 1 <= num_steps · max_jump and num_steps <= 2(n - 1).
    """
    if max_jump < 1:
        raise ValueError(f"max_jump is {max_jump}; a step must be allowed to move at least 1 cell")
    if num_steps * max_jump < n - 1:
        raise ValueError(
            f"{num_steps} steps of at most {max_jump} cells (max_jump) cannot cross the {n - 1} cells of the "
            f"grid; use at least {math.ceil((n - 1) / max_jump)} steps or a larger max_jump"
        )
    if num_steps > 2 * (n - 1):
        raise ValueError(
            f"{num_steps} steps cannot all move on a grid of {n} timesteps, which allows {2 * (n - 1)} at "
            "most; lower num_steps or refine the grid"
        )


def find_optimal_path_n_steps_lambda(
    error_64: ArrayLike,  # [n, n]
    error_32: ArrayLike,  # [n, n]
    log_snr: ArrayLike,  # [n]
    num_steps: int = 18,
    max_jump: int = 5,
) -> tuple[list[tuple[int, int]], float]:
    """Cheapest path of exactly num_steps steps over an error map, as published; returns (cells, cost).

    error_64, error_32: [n, n], >= 0, indexed (index of t_64, index of t_32); index 0 is noise, n - 1 clean.
        Both maps give DP-Total, zeros for error_32 give DP-64.
    log_snr: [n], log SNR of the grid lines, rising with the index.
    cells: num_steps + 1 pairs (i, j) from (0, 0) to (n - 1, n - 1); every step moves each axis by 0..max_jump
        cells, and not both by 0. A max_jump above n - 1 means n - 1.
    cost: sum of `step_cost` over the steps, in float64.

    The optimum is exact. Among paths of equal cost it takes the one whose last step is smallest in t_64, then
    in t_32, and so on backwards.

    Raises ValueError for maps of wrong shape, infinite, NaN or negative entries, a log_snr that is not finite
    and rising, max_jump < 1, and a num_steps that no path has: num_steps · max_jump < n - 1 or
    num_steps > 2(n - 1).
    """
    maps = _check_maps("log_snr", log_snr, error_64=error_64, error_32=error_32)
    n = len(maps[-1])
    check_steps(n, num_steps, max_jump)
    return cheapest_paths(functools.partial(step_cost, *maps), _same_cell, (n, n), [num_steps], max_jump)[num_steps]


def find_optimal_paths_all_steps(
    error_64: ArrayLike,  # [n, n]
    error_32: ArrayLike,  # [n, n]
    log_snr: ArrayLike,  # [n]
    max_steps: int,
    max_jump: int = 5,
) -> dict[int, tuple[list[tuple[int, int]], float]]:
    """Cheapest path for every feasible number of steps up to max_steps, from one forward pass.

    Arguments, path and cost as in `find_optimal_path_n_steps_lambda`. Returns {N: (cells, cost)} for N from
    ceil((n - 1) / max_jump) to min(max_steps, 2(n - 1)), ascending.

    Raises ValueError for bad maps, max_jump < 1, and max_steps · max_jump < n - 1.
    """
    maps = _check_maps("log_snr", log_snr, error_64=error_64, error_32=error_32)
    n = len(maps[-1])
    max_steps = min(max_steps, 2 * (n - 1))
    check_steps(n, max_steps, max_jump)
    steps = range(math.ceil((n - 1) / max_jump), max_steps + 1)
    return cheapest_paths(functools.partial(step_cost, *maps), _same_cell, (n, n), steps, max_jump)


def kl_path(
    mmse_64: ArrayLike,  # [n, n]
    mmse_32: ArrayLike,  # [n, n]
    snr: ArrayLike,  # [n]
    num_steps: int,
    weight: float = 0.0,
    start: int | tuple[int, int] = 0,
    end: int | tuple[int, int] | None = None,
    diagonal: bool = False,
    symmetric: bool = False,
    bands: bool = False,
    snr_32: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
) -> tuple[Cells, float]:
    """Path of exactly num_steps steps with the least KL divergence (`kl_cost`); returns (cells, cost in nats).

    mmse_64, mmse_32: [n, n], >= 0, denoising error E‖x_s - x̂_s‖² summed over the dimensions of a scale, in
        x-space, indexed (index of t_64, index of t_32); index 0 is noise, n - 1 clean.
    snr: [n], SNR of the grid lines, rising with the index, >= 0, and > 0 for weight 1.
    snr_32: [n], that of the coarse lines where it is another one; never falling with the index.
    weight: exponent p of w(γ) = γ^-p, 0 to 1. symmetric: the second form of `kl_cost` at weight 0 as well.
    bands: weigh the bands of the fine image instead of the scales (`kl_cost`); for weight > 0 the sound choice.
    start, end: cells (i, j), or one index for both axes; None ends at n - 1.
    diagonal: only cells with i = j, the same cost and code, for one clock or a fair comparison.
    allowed: [n, n] bool, the cells that a path may visit; None for all. Start and end are always allowed.
    cells: num_steps + 1 pairs (i, j); no axis ever falls, and every step moves at least one of them, by any
        number of cells.
    cost: sum of `kl_step_cost` over the steps, in float64.

    The optimum is exact. Among paths of equal cost it takes the one whose last step is smallest in t_64, then
    in t_32, and so on backwards.

    Raises ValueError for maps of wrong shape, infinite, NaN or negative entries, an snr that is not finite,
    rising and in range, a weight outside 0..1, a start or end outside the grid, an end not beyond the start, a
    diagonal between cells off the diagonal, num_steps outside 1..M, M the one-cell moves from start to end, and
    more steps than the allowed cells have moves.
    """
    step, cell_at, shape = _kl_problem(mmse_64, mmse_32, snr, weight, start, end, diagonal, symmetric, bands, snr_32)
    if allowed is not None:
        free = np.array(allowed, dtype=bool)
        if free.shape != np.shape(mmse_64):
            raise ValueError(f"allowed has shape {list(free.shape)} but must be {list(np.shape(mmse_64))}, like a map")
        free[cell_at(0, 0)] = free[cell_at(shape[0] - 1, shape[1] - 1)] = True
        everywhere = step

        def step(start: tuple[ArrayLike, ArrayLike], end: tuple[ArrayLike, ArrayLike]) -> np.ndarray:
            return np.where(free[start] & free[end], everywhere(start, end), np.inf)

    most = sum(shape) - 2
    if not 1 <= num_steps <= most:
        raise ValueError(
            f"{num_steps} steps cannot all move between the start and the end cell, which allow 1 to {most}; "
            "change num_steps or refine the grid"
        )
    cells, cost = cheapest_paths(step, cell_at, shape, [num_steps])[num_steps]
    if math.isinf(cost):
        raise ValueError(f"no path of {num_steps} steps keeps to the allowed cells; change num_steps or allow more")
    return cells, cost


def kl_paths_all_steps(
    mmse_64: ArrayLike,  # [n, n]
    mmse_32: ArrayLike,  # [n, n]
    snr: ArrayLike,  # [n]
    max_steps: int,
    weight: float = 0.0,
    start: int | tuple[int, int] = 0,
    end: int | tuple[int, int] | None = None,
    diagonal: bool = False,
    symmetric: bool = False,
    bands: bool = False,
) -> dict[int, tuple[Cells, float]]:
    """Best `kl_path` for every number of steps up to max_steps, from one forward pass.

    Arguments, path and cost as in `kl_path`. Returns {N: (cells, cost)} for N from 1 to max_steps or to the
    number of one-cell moves from start to end, ascending. The cost never rises with N where both maps (or the
    errors of both bands) fall along both axes, as those of an ideal denoiser do: splitting a step then never raises
    its cost. A measured map that rises somewhere gives no such promise.

    Raises ValueError as `kl_path` does, and for max_steps < 1.
    """
    step, cell_at, shape = _kl_problem(mmse_64, mmse_32, snr, weight, start, end, diagonal, symmetric, bands)
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; a path needs at least 1 step")
    return cheapest_paths(step, cell_at, shape, range(1, min(max_steps, sum(shape) - 2) + 1))


def best_cascade(
    mmse_64: ArrayLike,  # [n, n]
    mmse_32: ArrayLike,  # [n, n]
    snr: ArrayLike,  # [n]
    num_steps: int,
    weight: float = 0.0,
    symmetric: bool = False,
    bands: bool = False,
) -> tuple[Cells, float]:
    """The cascade of exactly num_steps steps with the least KL divergence; returns (cells, cost in nats).

    Arguments and cost as in `kl_path`. A cascade goes as `cascade` does: in 1 or more steps from (0, 0) along the
    coarse axis to any grid line, then in 1 or more steps along the fine axis, of which the last one ends at
    (n - 1, n - 1). The line, the number of steps of each leg and their inner points are those of the exact optimum.
    Of equal ones it has the fewest coarse steps, then the noisiest line, then legs like those of `kl_path`.

    Raises ValueError as `kl_path` does, and for num_steps outside 2..2(n - 1).
    """
    step, _, (_, n) = _kl_problem(mmse_64, mmse_32, snr, weight, 0, None, False, symmetric, bands)
    last = n - 1
    if not 2 <= num_steps <= 2 * last:
        raise ValueError(
            f"{num_steps} steps are no cascade on a grid of {n} timesteps, which allows 2 to {2 * last}; change "
            "num_steps or refine the grid"
        )

    def first_leg(_: ArrayLike, j: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
        return 0 * j, j

    def second_leg(_: ArrayLike, i: ArrayLike, line: int) -> tuple[ArrayLike, ArrayLike]:
        # The last step takes the coarse scale along.
        return i, line + (last - line) * (i == last)

    coarse = find_minima(step, first_leg, (1, n), num_steps - 1, last)
    totals = np.full((num_steps, n), np.inf)  # By number of coarse steps and line.
    for line in range(1, n):
        fine = find_minima(step, functools.partial(second_leg, line=line), (1, n), num_steps - 1, last)
        totals[1:, line] = coarse[1:, 0, line] + fine[:0:-1, 0, last]
    steps, line = map(int, np.unravel_index(totals.argmin(), totals.shape))
    leg = functools.partial(second_leg, line=line)
    fine = find_minima(step, leg, (1, n), num_steps - steps, last)
    cells = trace_back(coarse[: steps + 1, :, : line + 1], step, first_leg, last)
    cells += trace_back(fine, step, leg, last)[1:]
    return cells, float(totals[steps, line])


def _check_maps(clock_name: str, clock: ArrayLike, **maps: ArrayLike) -> list[np.ndarray]:
    # The maps in the order given and then the clock of their grid lines, as float64.
    clock = np.asarray(clock, dtype=np.float64)
    if clock.ndim != 1 or len(clock) < 2:
        raise ValueError(f"{clock_name} has shape {list(clock.shape)} but must be [n] with n >= 2, one per grid line")
    if not np.isfinite(clock).all():
        line = int(np.flatnonzero(~np.isfinite(clock))[0])
        raise ValueError(
            f"{clock_name} is {clock[line]} at grid index {line}; start the grid below the timestep of zero SNR"
        )
    if not (np.diff(clock) > 0).all():
        raise ValueError(f"{clock_name} must rise strictly with the grid index; pass it from noise (index 0) to clean")
    n = len(clock)
    checked = []
    for name, values in maps.items():
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (n, n):
            raise ValueError(
                f"{name} has shape {list(values.shape)} but the {n} entries of {clock_name} ask for [{n}, {n}]"
            )
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            cell = tuple(int(index) for index in np.argwhere(bad)[0])
            raise ValueError(f"{name} is {values[cell]} at cell {cell}; errors must be finite and not negative")
        checked.append(values)
    return [*checked, clock]


def _read(
    map_64: np.ndarray,
    map_32: np.ndarray,
    clock: np.ndarray,
    cell: tuple[ArrayLike, ArrayLike],
    clock_32: np.ndarray | None = None,
) -> Readings:
    return Readings(map_64[cell], map_32[cell], clock[cell[0]], (clock if clock_32 is None else clock_32)[cell[1]])


def _weigh(snr: ArrayLike, weight: float) -> np.ndarray:
    # The integral of γ^-p up to a constant.
    return np.log(snr) if weight == 1 else np.power(snr, 1 - weight) / (1 - weight)


def _same_cell(i: ArrayLike, j: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    return i, j


def _kl_problem(
    mmse_64: ArrayLike,
    mmse_32: ArrayLike,
    snr: ArrayLike,
    weight: float,
    start: int | tuple[int, int],
    end: int | tuple[int, int] | None,
    diagonal: bool,
    symmetric: bool,
    bands: bool,
    snr_32: ArrayLike | None = None,
) -> tuple[StepCost, CellAt, tuple[int, int]]:
    maps = _check_maps("snr", snr, mmse_64=mmse_64, mmse_32=mmse_32)
    snr, n = maps[-1], len(maps[-1])
    if snr[0] < 0 or (weight == 1 and snr[0] == 0):
        raise ValueError(f"snr is {snr[0]} at grid index 0; it must be at least 0, and above 0 for weight 1")
    (i, j), (last_i, last_j) = (
        as_points([cell if isinstance(cell, Sequence) else (cell, cell)])[0]
        for cell in (start, n - 1 if end is None else end)
    )
    if not (0 <= i <= last_i < n and 0 <= j <= last_j < n and (i, j) != (last_i, last_j)):
        raise ValueError(
            f"no path leads from cell {(i, j)} to cell {(last_i, last_j)} on a grid with indices 0 to {n - 1}; "
            "choose an end beyond the start in one axis at least and behind it in none"
        )
    if snr_32 is not None:
        snr_32 = np.asarray(snr_32, dtype=np.float64)
        if snr_32.shape != (n,) or not np.isfinite(snr_32).all() or (np.diff(snr_32) < 0).any():
            raise ValueError(f"snr_32 must be finite, [{n}] like snr, and never fall with the grid index")
    step = functools.partial(kl_step_cost, *maps, weight=weight, symmetric=symmetric, bands=bands, snr_32=snr_32)
    if not diagonal:
        return step, lambda row, column: (i + row, j + column), (last_i - i + 1, last_j - j + 1)
    if i != j or last_i != last_j:
        raise ValueError(f"cells {(i, j)} and {(last_i, last_j)} do not both lie on the diagonal; use i = j for each")
    return step, lambda _, column: (i + column, i + column), (1, last_i - i + 1)
