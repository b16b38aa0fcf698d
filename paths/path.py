"""Paths through the timesteps of one or more scales: what they are, and how to make them by hand or as optima.

A path is a list of N + 1 points, one timestep per scale (fine first), from noise to clean. Sampling along
it costs N network evaluations, one at every point but the last. The optimisers work on a grid of n timesteps
whose index 0 is noise and whose index n - 1 is clean; a pair of grid indices is called a cell.

Hand-made paths are a spacing, made by `diagonal`, and an offset between the scales, which `log_snr_shift`, `lead` and
`heuristic` add to any diagonal; `cascade` and `fine_first` take one scale after the other. The optimisers find the
exact optimum of a sum of step costs: the published trapezoid of an error map, or the KL divergence of the sampled
chain from a map of denoising errors.
"""

import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

SPACINGS = ("uniform_t", "published", "uniform_log_snr", "karras")
GRID_SPACINGS = ("uniform_t", "uniform_log_snr")
KARRAS_RHO = 7.0
# Up to this many cells per step it is faster to hold the costs of all steps: 13 MB on a grid of 100 x 100.
LARGEST_WINDOWED_JUMP = 12

Cells = list[tuple[int, int]]
CellAt = Callable[[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]]
# Costs of steps from cells to cells, each a pair of indices or of index arrays, which broadcast.
StepCost = Callable[[tuple[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]], np.ndarray]


@dataclass(frozen=True)
class Path:
    """Points of a sampling path, with how they came about.

    points: N + 1 tuples of timesteps, one entry per scale, fine first: (t_64, t_32), or (t,) for one scale.
    kind: short name of the family, such as "diagonal" or "dp_total".
    provenance: JSON types only (tuples become lists); whatever is needed to make the path again.

    Raises ValueError unless there are at least two points of equal arity, timesteps are integers >= 0 that
    never rise in any scale, every step moves some scale, and the last point is 0 in every scale.
    """

    points: tuple[tuple[int, ...], ...]
    kind: str
    provenance: dict[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        points = _as_points(self.points)
        if len(points) < 2:
            raise ValueError(f"a path needs at least 2 points but has {len(points)}; add the start or the clean end")
        num_scales = len(points[0])
        if num_scales == 0:
            raise ValueError("point 0 of the path holds no timestep; give one timestep per scale")
        for k, point in enumerate(points):
            if len(point) != num_scales:
                raise ValueError(
                    f"point {k} of the path has {len(point)} timesteps but point 0 has {num_scales}; "
                    "give every point one timestep per scale"
                )
            if min(point) < 0:
                raise ValueError(f"point {k} of the path is {point}; timesteps must be 0 or larger")
        for k, (start, end) in enumerate(zip(points, points[1:], strict=False)):
            if any(after > before for before, after in zip(start, end, strict=True)):
                raise ValueError(
                    f"step {k} of the path goes from {start} to {end}; timesteps must not rise in any scale"
                )
            if start == end:
                raise ValueError(f"step {k} of the path stays at {start}; remove the repeated point")
        if any(points[-1]):
            raise ValueError(f"the path ends at {points[-1]}; its last point must be 0 in every scale")
        if not isinstance(self.kind, str):
            raise ValueError(f"the kind of a path must be a string, not {self.kind!r}")
        if not isinstance(self.provenance, dict):
            raise ValueError(f"the provenance of a path must be a dict, not {type(self.provenance).__name__}")
        try:
            provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the provenance of a path must hold finite JSON types only ({error})") from error
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "provenance", provenance)

    @property
    def nfe(self) -> int:
        """Network evaluations that one sample along the path costs: one per step."""
        return len(self.points) - 1

    @property
    def num_scales(self) -> int:
        """Timesteps per point."""
        return len(self.points[0])

    def fingerprint(self) -> str:
        """16 hex digits of the sha256 of the points alone: kind and provenance do not change a sample."""
        return hashlib.sha256(json.dumps(self.points, separators=(",", ":")).encode()).hexdigest()[:16]


def diagonal(
    num_steps: int,
    spacing: str = "uniform_t",  # one of SPACINGS
    num_scales: int = 2,  # 1 for a model with a single timestep
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """Path of exactly num_steps steps on which all scales move together, from timestep S = start to 0.

    spacing:
        "uniform_t": N + 1 points, even in t, rounded.
        "published": multiples of the stride (S + 1) // N, from N strides down to 0 (990, 935, ..., 55, 0 for
            N = 18); starts at S where N divides S + 1, and well below S where the division cuts off much.
        "uniform_log_snr": N + 1 targets, even in log SNR from log_snr[S] to log_snr[0], each at the timestep
            of nearest log SNR; timesteps that coincide are moved apart towards noise, ends stay.
        "karras": targets even in σ̂^(1/ρ), σ̂ = SNR^-½ and ρ = 7 (arXiv 2206.00364, eq. 5, with the N + 1
            levels of this path, the last of them σ̂ at timestep 0), each put on a timestep as above.

    Raises ValueError for an unknown spacing, a start outside 1..num_train_timesteps - 1, num_steps outside
    1..S, num_scales < 1, and, for a spacing by log SNR, a table that is missing, of the wrong length, not
    finite up to S (zero terminal SNR) or not strictly decreasing.
    """
    start = _check_start(start, num_train_timesteps)
    if num_scales < 1:
        raise ValueError(f"num_scales is {num_scales}; a path needs at least 1 scale")
    timesteps = _spaced(num_steps, spacing, start, 0, log_snr, num_train_timesteps)
    provenance = {"spacing": spacing, "num_train_timesteps": num_train_timesteps, "start": start}
    return Path(tuple((t,) * num_scales for t in timesteps), "diagonal", provenance)


def log_snr_shift(
    base: Path,
    shift: float,  # of log SNR; > 0: the coarse scale is ahead (cleaner)
    log_snr: ArrayLike,  # [num_train_timesteps]
) -> Path:
    """Two-scale path with λ_32 = λ_64 + shift, where t_64 goes along the diagonal `base`.

    t_32 of a point is the timestep of nearest log SNR between the ends of the base. The first and the last
    point are those of the base, in both scales. No point repeats, because t_64 falls at every step.

    Raises ValueError if the scales of the base do not move together, a shift that is not finite, and a table
    that is too short or does not fall strictly; -inf is allowed at the first timestep of the base.
    """
    timesteps = _diagonal_timesteps(base)
    if not math.isfinite(shift):
        raise ValueError(f"the shift of log SNR is {shift}; it must be finite")
    table = _check_log_snr_table(log_snr, timesteps[0])
    inner = np.clip(table[timesteps[1:-1]] + shift, table[-1], table[0])
    coarse = [timesteps[0], *_nearest_timesteps(table, inner).tolist(), 0]
    points = tuple(zip(timesteps, coarse, strict=True))
    return Path(points, "log_snr_shift", {"base": base.provenance, "shift": float(shift)})


def lead(base: Path, k: int) -> Path:
    """Two-scale path whose coarse scale is k points ahead on the diagonal `base`; for k < 0 the fine one is.

    With s_0, ..., s_N the timesteps of the base, point i >= 1 is (s_i, s_min(i + k, N)), and point 0 is
    (s_0, s_0), so that the first step of the scale ahead goes k + 1 points. No point repeats, because the
    other scale falls at every step.

    Raises ValueError if the scales of the base do not move together.
    """
    timesteps = _diagonal_timesteps(base)
    ahead = [timesteps[0], *(timesteps[min(i + abs(k), base.nfe)] for i in range(1, base.nfe + 1))]
    scales = (timesteps, ahead) if k >= 0 else (ahead, timesteps)
    return Path(tuple(zip(*scales, strict=True)), "lead", {"base": base.provenance, "k": k})


def heuristic(base: Path, factor: float) -> Path:
    """Two-scale path with t_32 = factor · t_64, rounded (half to even), where t_64 goes along the diagonal `base`.

    The first point is that of the base in both scales. No point repeats, because t_64 falls at every step.

    Raises ValueError if the scales of the base do not move together, and unless 0 < factor <= 1.
    """
    timesteps = _diagonal_timesteps(base)
    if not 0 < factor <= 1:
        raise ValueError(f"the factor of timesteps is {factor}; it must lie above 0 and not above 1")
    coarse = [timesteps[0], *(round(factor * t) for t in timesteps[1:])]
    points = tuple(zip(timesteps, coarse, strict=True))
    return Path(points, "heuristic", {"base": base.provenance, "factor": float(factor)})


def cascade(
    num_steps: int,
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    coarse_steps: int | None = None,  # None for num_steps // 2
    remaining: int = 0,  # timestep at which the coarse scale waits for the fine one
    spacing: str = "uniform_t",  # of both legs; one of SPACINGS but "published"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """Path that denoises the coarse scale first, then the fine one: a cascade within one model.

    The coarse scale goes from start to `remaining` in coarse_steps steps while t_64 stays at start; then the
    fine scale goes from start to 0 in the other num_steps - coarse_steps steps while the coarse one is held.
    The last point is (0, 0), so that the last step also takes the coarse scale from `remaining` to 0. Each leg
    is spaced as a `diagonal` from its first to its last timestep; "published" is refused, because its strides
    cut off the start.

    Raises ValueError unless 1 <= coarse_steps < num_steps and 0 <= remaining < start, if a leg has more steps
    than timesteps, and for what `diagonal` refuses.
    """
    points, provenance = _one_after_the_other(
        num_steps, log_snr, coarse_steps, remaining, spacing, num_train_timesteps, start
    )
    return Path(tuple((t_64, t_32) for t_32, t_64 in points), "cascade", provenance)


def fine_first(
    num_steps: int,
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    fine_steps: int | None = None,  # None for num_steps // 2
    remaining: int = 0,  # timestep at which the fine scale waits for the coarse one
    spacing: str = "uniform_t",  # of both legs; one of SPACINGS but "published"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """The `cascade` with the scales exchanged: the fine scale first, in fine_steps steps; a control for it.

    Raises ValueError as `cascade` does.
    """
    points, provenance = _one_after_the_other(
        num_steps, log_snr, fine_steps, remaining, spacing, num_train_timesteps, start
    )
    return Path(points, "fine_first", provenance)


def timestep_grid(
    n: int = 30,
    num_train_timesteps: int = 1000,
    spacing: str = "uniform_t",  # one of GRID_SPACINGS
    start: int | None = None,  # noisiest timestep; None for num_train_timesteps - 1
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr"
) -> np.ndarray:
    """Timesteps of the n grid lines, int64 [n], from start to 0; index 0 is noise.

    "uniform_t" is even and truncated, and equals torch.linspace(999, 0, n).long() for the published n = 30. It is
    computed in integers: at some other n, float32 falls just below a whole value and would be truncated one too
    low. "uniform_log_snr" is the spacing of that name of `diagonal`.

    Raises ValueError unless 2 <= n <= start + 1, and for what `diagonal` refuses.
    """
    start = _check_start(start, num_train_timesteps)
    if not 2 <= n <= start + 1:
        raise ValueError(f"a grid of {n} timesteps is impossible; choose between 2 and {start + 1}")
    if spacing not in GRID_SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(GRID_SPACINGS)}")
    if spacing == "uniform_t":
        return np.arange(n - 1, -1, -1, dtype=np.int64) * start // (n - 1)
    return np.array(_spaced(n - 1, spacing, start, 0, log_snr, num_train_timesteps), dtype=np.int64)


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
    return _cheapest_paths(functools.partial(step_cost, *maps), _same_cell, (n, n), [num_steps], max_jump)[num_steps]


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
    return _cheapest_paths(functools.partial(step_cost, *maps), _same_cell, (n, n), steps, max_jump)


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
    cells, cost = _cheapest_paths(step, cell_at, shape, [num_steps])[num_steps]
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
    return _cheapest_paths(step, cell_at, shape, range(1, min(max_steps, sum(shape) - 2) + 1))


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

    coarse = _minima(step, first_leg, (1, n), num_steps - 1, last)
    totals = np.full((num_steps, n), np.inf)  # By number of coarse steps and line.
    for line in range(1, n):
        fine = _minima(step, functools.partial(second_leg, line=line), (1, n), num_steps - 1, last)
        totals[1:, line] = coarse[1:, 0, line] + fine[:0:-1, 0, last]
    steps, line = map(int, np.unravel_index(totals.argmin(), totals.shape))
    leg = functools.partial(second_leg, line=line)
    fine = _minima(step, leg, (1, n), num_steps - steps, last)
    cells = _trace_back(coarse[: steps + 1, :, : line + 1], step, first_leg, last)
    cells += _trace_back(fine, step, leg, last)[1:]
    return cells, float(totals[steps, line])


def path_from_cells(cells: Sequence[Sequence[int]], t_grid: ArrayLike, kind: str, provenance: dict[str, Any]) -> Path:
    """Path whose points are the timesteps t_grid[index] of the given grid cells, one index per scale.

    Raises ValueError for an index outside the grid and for whatever `Path` refuses.
    """
    t_grid = np.asarray(t_grid)
    cells = _as_points(cells)
    for k, cell in enumerate(cells):
        if any(not 0 <= index < len(t_grid) for index in cell):
            raise ValueError(f"cell {k} of the path is {cell} but the grid has indices 0 to {len(t_grid) - 1}")
    return Path(tuple(tuple(t_grid[index] for index in cell) for cell in cells), kind, provenance)


def leads(path: Path, t_grid: ArrayLike | None = None) -> dict[str, Any]:
    """How the coarse scale of a two-scale path leads the fine one.

    Returns "ahead", "behind" and "equal" (points where t_32 < t_64, t_32 > t_64 and t_32 = t_64), "points"
    (their total), "largest_lead" (how far t_32 gets ahead of t_64 at most, 0 if it never is ahead) and its
    "unit": "cells" if t_grid is given, else "timesteps".

    Raises ValueError if the path has not two scales or if one of its timesteps is not on t_grid.
    """
    if path.num_scales != 2:
        raise ValueError(f"a lead needs a path of 2 scales but this one has {path.num_scales}")
    if t_grid is None:
        lead = [t_64 - t_32 for t_64, t_32 in path.points]
    else:
        index = {int(t): k for k, t in enumerate(np.asarray(t_grid))}
        missing = sorted({t for point in path.points for t in point} - index.keys())
        if missing:
            raise ValueError(f"timestep {missing[0]} of the path is not on the grid; pass the grid it was made on")
        lead = [index[t_32] - index[t_64] for t_64, t_32 in path.points]
    return {
        "ahead": sum(d > 0 for d in lead),
        "behind": sum(d < 0 for d in lead),
        "equal": sum(d == 0 for d in lead),
        "points": len(lead),
        "largest_lead": max(lead),  # The clean end is level, so this is never negative.
        "unit": "timesteps" if t_grid is None else "cells",
    }


def _as_points(points: Any) -> tuple[tuple[int, ...], ...]:
    try:
        points = tuple(tuple(point) for point in points)
        # bool is an integer to Python, but True as a timestep is a mistake.
        if any(isinstance(t, bool) for point in points for t in point):
            raise TypeError("got a bool")
        return tuple(tuple(operator.index(t) for t in point) for point in points)
    except TypeError as error:
        raise ValueError(f"a path needs points of one integer per scale ({error})") from error


def _check_start(start: int | None, num_train_timesteps: int) -> int:
    last = num_train_timesteps - 1
    if start is None:
        return last
    if not 1 <= start <= last:
        raise ValueError(f"the path starts at timestep {start} but the schedule has 1 to {last}; choose within")
    return operator.index(start)


def _check_log_snr_table(log_snr: ArrayLike, start: int) -> np.ndarray:
    # The part of the table that a path from `start` can visit; the start itself may be pure noise.
    table = np.asarray(log_snr, dtype=np.float64)
    if table.ndim != 1 or len(table) <= start:
        raise ValueError(
            f"log_snr has shape {list(table.shape)} but the path starts at timestep {start}; "
            "pass the table of all training timesteps"
        )
    table = table[: start + 1]
    if not (np.isfinite(table[:-1]).all() and (np.diff(table) < 0).all()):
        raise ValueError("log_snr must be finite and fall strictly with t; pass the table in order of timesteps")
    return table


def _spaced(
    num_steps: int, spacing: str, start: int, end: int, log_snr: ArrayLike | None, num_train_timesteps: int
) -> list[int]:
    if not 1 <= num_steps <= start - end:
        raise ValueError(
            f"num_steps is {num_steps} from timestep {start} to {end}, which allow 1 to {start - end}; choose within"
        )
    if spacing == "uniform_t":
        return np.rint(np.linspace(start, end, num_steps + 1)).astype(int).tolist()
    if spacing == "published":
        stride = (start + 1) // num_steps
        return np.minimum(stride * np.arange(num_steps, -1, -1), start).tolist()
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
    if log_snr is None:
        raise ValueError(f"spacing {spacing!r} needs the table log_snr; pass the log_snr of the scheduler")
    if np.shape(log_snr) != (num_train_timesteps,):
        raise ValueError(f"log_snr has shape {list(np.shape(log_snr))} but must have [{num_train_timesteps}]")
    table = _check_log_snr_table(log_snr, start)
    if not np.isfinite(table[start]):
        raise ValueError(
            f"log_snr is {table[start]} at t = {start} (zero terminal SNR), so spacing {spacing!r} has no range to "
            "divide; start below it or use spacing 'uniform_t'"
        )
    if spacing == "uniform_log_snr":
        targets = np.linspace(table[start], table[end], num_steps + 1)
    else:
        # σ̂^(1/ρ) = exp(-λ / 2ρ).
        roots = np.exp(-table[[start, end]] / (2 * KARRAS_RHO))
        targets = -2 * KARRAS_RHO * np.log(np.linspace(*roots, num_steps + 1))
    return _move_apart(_nearest_timesteps(table, targets), start).tolist()


def _one_after_the_other(
    num_steps: int,
    log_snr: ArrayLike | None,
    first_steps: int | None,
    remaining: int,
    spacing: str,
    num_train_timesteps: int,
    start: int | None,
) -> tuple[tuple[tuple[int, int], ...], dict[str, Any]]:
    # Points (timestep of the scale that goes first, timestep of the other), and how they were made.
    start = _check_start(start, num_train_timesteps)
    first_steps = num_steps // 2 if first_steps is None else first_steps
    if not 1 <= first_steps < num_steps:
        raise ValueError(
            f"{first_steps} of {num_steps} steps are for the scale that goes first; give both scales at least 1"
        )
    if not 0 <= remaining < start:
        raise ValueError(f"the first scale waits at timestep {remaining}; choose 0 to {start - 1}, below the start")
    if spacing == "published":
        raise ValueError("spacing 'published' does not begin at the start of a leg; choose another spacing")
    leg = _spaced(first_steps, spacing, start, remaining, log_snr, num_train_timesteps)
    other_leg = _spaced(num_steps - first_steps, spacing, start, 0, log_snr, num_train_timesteps)
    points = (*((t, start) for t in leg), *((remaining, t) for t in other_leg[1:-1]), (0, 0))
    provenance = {
        "spacing": spacing,
        "num_train_timesteps": num_train_timesteps,
        "start": start,
        "first_steps": first_steps,
        "remaining": remaining,
    }
    return points, provenance


def _diagonal_timesteps(base: Path) -> list[int]:
    for k, point in enumerate(base.points):
        if len(set(point)) > 1:
            raise ValueError(f"point {k} of the base path is {point}; its scales must move together, as on a diagonal")
    return [point[0] for point in base.points]


def _nearest_timesteps(table: np.ndarray, targets: np.ndarray) -> np.ndarray:
    upper = np.clip(np.searchsorted(-table, -targets), 1, len(table) - 1)
    return np.where(table[upper - 1] - targets < targets - table[upper], upper - 1, upper)


def _move_apart(timesteps: np.ndarray, last: int) -> np.ndarray:
    k = np.arange(len(timesteps))
    # t_k + k must not rise with k: lift what lies too low, then push back what rose above the noisy end.
    lifted = np.maximum.accumulate((timesteps + k)[::-1])[::-1]
    return np.minimum(lifted, last) - k


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
        _as_points([cell if isinstance(cell, Sequence) else (cell, cell)])[0]
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


def _cheapest_paths(
    step: StepCost,
    cell_at: CellAt,  # cells of rows and columns
    shape: tuple[int, int],  # rows and columns, from the start in their first corner to the end in their last
    steps: Sequence[int],
    max_jump: int | None = None,  # rows and columns that a step may cross at most
) -> dict[int, tuple[Cells, float]]:
    max_jump = max(shape) - 1 if max_jump is None else min(max_jump, max(shape) - 1)
    # Only minima are kept: the moves are found again later.
    minima = _minima(step, cell_at, shape, max(steps), max_jump)
    return {n: (_trace_back(minima[: n + 1], step, cell_at, max_jump), float(minima[n, -1, -1])) for n in steps}


def _minima(step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int) -> np.ndarray:
    find = _minima_by_step if max_jump <= LARGEST_WINDOWED_JUMP else _minima_by_cell
    return find(step, cell_at, shape, num_steps, max_jump)


def _minima_by_step(
    step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int
) -> np.ndarray:
    # Least cost of reaching each cell in 0, 1, ... steps: [num_steps+1, rows, columns], inf where there is no way.
    # Costs of all steps are held at once, so that a number of steps takes two array operations.
    rows, columns = (np.arange(size) for size in shape)
    jumps = np.arange(max_jump + 1)
    # Start cells off the grid take any cost here, since the margin of inf stands for them below.
    from_rows = np.maximum(rows - jumps[:, None], 0)[:, None, :, None]  # [J, 1, rows, 1]
    from_columns = np.maximum(columns - jumps[:, None], 0)[:, None]  # [J, 1, columns]
    costs = step(cell_at(from_rows, from_columns), cell_at(rows[:, None], columns))  # [J, J, rows, columns]
    costs[0, 0] = np.inf  # A step must move.
    padded = np.full((num_steps + 1, max_jump + shape[0], max_jump + shape[1]), np.inf)
    padded[0, max_jump, max_jump] = 0.0
    minima = padded[:, max_jump:, max_jump:]
    # Entry [k, di, dj, i, j] is the cost of reaching (i - di, j - dj); a view, so it follows every update.
    before = sliding_window_view(padded, shape, axis=(1, 2))[:, ::-1, ::-1]
    for reached, before_move in zip(minima[1:], before, strict=False):
        (before_move + costs).min((0, 1), out=reached)
    return minima


def _minima_by_cell(
    step: StepCost, cell_at: CellAt, shape: tuple[int, int], num_steps: int, max_jump: int
) -> np.ndarray:
    # As `_minima_by_step`, with the costs of the steps from one row at a time, for jumps with too many to hold.
    rows, columns = shape
    reach = max_jump + 1
    every = np.arange(columns)
    minima = np.full((num_steps + 1, rows, columns), np.inf)
    minima[0, 0, 0] = 0.0
    for row in range(rows):
        to_rows = np.arange(row, min(row + reach, rows))
        start = cell_at(row, every[:, None, None])
        costs = step(start, cell_at(to_rows[:, None], every))  # [columns, to_rows, columns]
        costs[every, 0, every] = np.inf  # A step must move.
        # Every cell is complete for all numbers of steps once the cells before it have been left.
        for column in range(columns):
            ahead = slice(column, column + reach)
            reached = minima[1:, row : row + reach, ahead]
            through = minima[:-1, row, column, None, None] + costs[column, :, ahead]
            np.minimum(reached, through, out=reached)
    return minima


def _trace_back(minima: np.ndarray, step: StepCost, cell_at: CellAt, max_jump: int) -> Cells:
    row, column = minima.shape[1] - 1, minima.shape[2] - 1
    cells = [cell_at(row, column)]
    for reached in minima[-2::-1]:
        first_row, first_column = max(row - max_jump, 0), max(column - max_jump, 0)
        from_rows, from_columns = np.arange(first_row, row + 1), np.arange(first_column, column + 1)
        costs = step(cell_at(from_rows[:, None], from_columns), cells[-1])
        # Moves in order of size, the fine axis first, so that argmin takes the smallest of equal ones.
        totals = (reached[first_row : row + 1, first_column : column + 1] + costs)[::-1, ::-1]
        totals[0, 0] = np.inf
        rows_back, columns_back = divmod(int(totals.argmin()), len(from_columns))
        row, column = row - rows_back, column - columns_back
        cells.append(cell_at(row, column))
    return cells[::-1]
