"""Refinement of an optimal path off the lines of its grid.

A path optimised on a grid has its points on grid lines. Here every point moves freely: the maps are interpolated
between the lines, and the points are improved by a Viterbi search that chooses the best chain through small sets of
candidates around the present points, on ever finer sets.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from paths.map_interpolation import interpolate_map
from paths.optimal import Readings, kl_cost, trapezoid_cost
from paths.path import Path, path_from_cells

CRITERIA = ("kl", "published")
# Candidates of a point lie at -REACH..REACH times the spacing on each axis.
REACH = 4
# Points closer than this, in timesteps or grid cells, are taken as equal in the rules for a step.
SLACK = 1e-9
# A chain counts as better if its cost is lower by this fraction.
GAIN = 1e-7


class Refined(NamedTuple):
    """A refined path: at real timesteps, and at the integer ones that a model can be run at.

    All costs are values of one functional, that of the grid: grid_cost is the cost of the path that was refined;
    cost <= path_cost <= grid_cost.
    """

    points: np.ndarray  # float64 [N + 1, 2], timesteps (t_64, t_32)
    cost: float  # of points
    path: Path  # integer timesteps
    path_cost: float
    grid_cost: float


def cost_off_grid(
    t_grid: ArrayLike,  # as for `refine_path`, as are all the others
    map_64: ArrayLike,
    map_32: ArrayLike,
    log_snr: ArrayLike,
    criterion: str = "kl",
    weight: float = 0.0,
    symmetric: bool = False,
    bands: bool = False,
) -> Callable[[ArrayLike], float]:
    """The cost that `refine_path` lowers, as a function of any points `[N + 1, 2]` in (fractional) timesteps.

    Raises ValueError for an unknown criterion and what the maps are refused for.
    """
    read = _reader(np.asarray(t_grid), map_64, map_32, log_snr, criterion)
    step = _step_cost(criterion, weight, symmetric, bands)

    def cost(points: ArrayLike) -> float:
        readings = read(np.asarray(points, dtype=np.float64))
        ends = (Readings(*(values[part] for values in readings)) for part in (slice(None, -1), slice(1, None)))
        return float(np.sum(step(*ends)))

    return cost


def refine_path(
    cells: Sequence[Sequence[int]],  # N + 1 pairs, such as an optimum of `kl_path`
    t_grid: ArrayLike,  # [n], timesteps of the grid lines, falling to 0
    map_64: ArrayLike,  # [n, n], > 0, or all zero
    map_32: ArrayLike,  # [n, n], > 0, or all zero
    log_snr: ArrayLike,  # [num_train_timesteps], log SNR of every timestep
    criterion: str = "kl",  # one of CRITERIA
    weight: float = 0.0,  # of `kl_cost`
    symmetric: bool = False,  # of `kl_cost`
    bands: bool = False,  # of `kl_cost`
    max_jump: int | None = None,  # grid cells that a step may move per axis; needed for "published"
    diagonal: bool = False,  # keep t_64 = t_32
    log_snr_32: ArrayLike | None = None,  # log SNR of the coarse scale at every timestep; None for `log_snr`
    tolerance: float = 0.01,  # timesteps; the finest spacing of candidates
    allowed: Callable[[np.ndarray], np.ndarray] | None = None,  # points [..., 2] -> bool: may a path call there?
) -> Refined:
    """Improve a path of grid cells at real timesteps, its ends fixed, and find integer timesteps for it.

    The maps at integer timesteps come from `interpolate_map`, exact on the grid lines; between integer timesteps
    their logarithms are interpolated bilinearly, and log SNR linearly. A step costs `kl_cost` (maps: denoising
    errors) or `trapezoid_cost` (maps: published errors). On grid cells this is the cost that `kl_path` or
    `find_optimal_path_n_steps_lambda` reports.

    Every inner point has 9 x 9 candidates around it (9 along the diagonal), and the best chain through all sets is
    found exactly by dynamic programming (Viterbi 1967). This is repeated until it no longer gains; then the spacing
    of the candidates, at first a quarter of a grid cell, is halved, down to the tolerance. The present path is
    among the candidates, so that the cost never rises. The optimum is local: no chain of nearby points is better.
    The integer path is the best of the same search at spacing 1 from the rounded points and from the grid path.

    No axis ever falls back to noise, every step moves at least one timestep in some axis, and where max_jump is
    given no step moves an axis by more, counted in (fractional) grid cells. `allowed` is asked about timesteps, but
    not about the two ends.

    Raises ValueError for an unknown criterion, "published" without max_jump, a tolerance that is not positive, cells
    that `path_from_cells` refuses (a path must end at timestep 0), that jump too far or leave the diagonal, a table
    too short for the grid, and for what `interpolate_map` and `kl_cost` refuse.
    """
    cost = _step_cost(criterion, weight, symmetric, bands)
    if criterion == "published" and max_jump is None:
        raise ValueError("the published cost is a line integral, best in one step without a limit; pass its max_jump")
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance} timesteps; it must be positive")
    t_grid = np.asarray(t_grid)
    grid_points = np.array(path_from_cells(cells, t_grid, "grid", {}).points, dtype=np.float64)  # [N+1, 2]
    if diagonal and (grid_points[:, 0] != grid_points[:, 1]).any():
        raise ValueError("the path to refine leaves the diagonal; pass one with equal indices or diagonal=False")

    read = _reader(t_grid, map_64, map_32, log_snr, criterion, log_snr_32)
    best_chain = functools.partial(_best_chain, read=read, cost=cost, t_grid=t_grid, max_jump=max_jump, allowed=allowed)
    steps = np.arange(-REACH, REACH + 1.0)
    offsets = np.stack([steps, steps], -1) if diagonal else np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)

    grid_cost = best_chain(grid_points[:, None])[1]
    if math.isinf(grid_cost) and allowed is not None:
        raise ValueError("the path to refine visits what is not allowed; pass one that keeps to it")
    if math.isinf(grid_cost):
        raise ValueError(f"a step of the path to refine moves more than max_jump = {max_jump} cells; raise max_jump")
    points, refined_cost = grid_points, grid_cost
    spacing = (t_grid[0] - t_grid[-1]) / (len(t_grid) - 1) / REACH
    while spacing >= tolerance:
        points, refined_cost = _improve(points, refined_cost, spacing * offsets, best_chain)
        spacing /= 2

    # Half up, because points at least 1 apart must stay apart.
    rounded = np.floor(points + 0.5)
    starts = ((rounded, best_chain(rounded[:, None])[1]), (grid_points, grid_cost))
    integer_points, path_cost = min(
        (_improve(*start, offsets, best_chain) for start in starts), key=lambda found: found[1]
    )
    if path_cost < refined_cost:
        points, refined_cost = integer_points, path_cost
    provenance = {"criterion": criterion, "weight": weight, "symmetric": symmetric, "bands": bands}
    provenance |= {"max_jump": max_jump, "diagonal": diagonal}
    provenance |= {"grid_path": grid_points.astype(int).tolist(), "cost": path_cost}
    path = Path(integer_points.astype(int).tolist(), "refined", provenance)
    return Refined(points, refined_cost, path, path_cost, grid_cost)


def _step_cost(
    criterion: str, weight: float, symmetric: bool, bands: bool
) -> Callable[[Readings, Readings], np.ndarray]:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
    if criterion == "published":
        return trapezoid_cost
    return functools.partial(kl_cost, weight=weight, symmetric=symmetric, bands=bands)


def _reader(
    t_grid: np.ndarray,
    map_64: ArrayLike,
    map_32: ArrayLike,
    log_snr: ArrayLike,
    criterion: str,
    log_snr_32: ArrayLike | None = None,
) -> Callable[[np.ndarray], Readings]:
    # A function from points [..., 2] to what a step cost reads there.
    high = int(t_grid.max())
    table = np.asarray(log_snr, dtype=np.float64)
    if table.ndim != 1 or len(table) <= high or not np.isfinite(table[: high + 1]).all():
        raise ValueError(
            f"log_snr must be [num_train_timesteps] and finite up to timestep {high}, where the grid starts; pass the "
            "table of all timesteps, or start the grid below the timestep of zero SNR"
        )
    maps = interpolate_map(np.stack([map_64, map_32]), table[t_grid], table[high::-1])
    maps = maps[:, ::-1, ::-1]  # [2, T, T], by timestep
    present = maps.any((1, 2))
    logs = np.log(np.where(present[:, None, None], maps, 1.0))
    clock = np.exp if criterion == "kl" else np.asarray
    tables = [table[: high + 1], table[: high + 1] if log_snr_32 is None else np.asarray(log_snr_32)[: high + 1]]

    def read(points: np.ndarray) -> Readings:
        below = np.minimum(np.floor(points).astype(int), high - 1)
        (u, v), (i, j) = np.moveaxis(points - below, -1, 0), np.moveaxis(below, -1, 0)
        left = (1 - u) * logs[:, i, j] + u * logs[:, i + 1, j]
        right = (1 - u) * logs[:, i, j + 1] + u * logs[:, i + 1, j + 1]
        values = np.exp((1 - v) * left + v * right)  # [2, ...]
        clocks = [clock(np.interp(points[..., s], np.arange(high + 1), tables[s])) for s in (0, 1)]
        return Readings(values[0] * present[0], values[1] * present[1], *clocks)

    return read


def _best_chain(
    candidates: np.ndarray,  # [N+1, C, 2], timesteps
    read: Callable[[np.ndarray], Readings],
    cost: Callable[[Readings, Readings], np.ndarray],
    t_grid: np.ndarray,
    max_jump: int | None,
    allowed: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[np.ndarray, float]:
    # The cheapest legal chain of one candidate per point, [N+1, 2], and its cost, inf if there is none.
    readings = read(candidates)
    costs = cost(
        Readings(*(values[:-1, :, None] for values in readings)), Readings(*(values[1:, None] for values in readings))
    )  # [N, C, C]
    moves_64, moves_32 = _pairwise_moves(candidates)  # [N, C, C] each
    legal = (np.minimum(moves_64, moves_32) >= 0) & (np.maximum(moves_64, moves_32) >= 1 - SLACK)
    if max_jump is not None:
        jumps_64, jumps_32 = _pairwise_moves(np.interp(-candidates, -t_grid, -np.arange(len(t_grid))))
        legal &= np.maximum(jumps_64, jumps_32) <= max_jump + SLACK
    if allowed is not None:
        # A step to an inner point; none leaves one that no step reaches.
        legal[:-1] &= allowed(candidates[1:-1])[:, None]
    costs = np.where(legal, costs, np.inf)
    totals = np.zeros(candidates.shape[1])
    origins = []
    for step_costs in costs:
        through = totals[:, None] + step_costs
        origins.append(through.argmin(0))
        totals = through.min(0)
    chain = [int(totals.argmin())]
    for origin in reversed(origins):
        chain.append(int(origin[chain[-1]]))
    return candidates[np.arange(len(candidates)), chain[::-1]], float(totals.min())


def _pairwise_moves(candidates: np.ndarray) -> list[np.ndarray]:
    return [candidates[:-1, :, None, s] - candidates[1:, None, :, s] for s in (0, 1)]


def _improve(
    points: np.ndarray,  # [N+1, 2]
    cost: float,
    offsets: np.ndarray,  # [C, 2]
    best_chain: Callable[[np.ndarray], tuple[np.ndarray, float]],
) -> tuple[np.ndarray, float]:
    inner = np.ones((len(points), 1, 1))
    inner[[0, -1]] = 0.0
    while True:
        candidates = np.clip(points[:, None] + inner * offsets, points[-1], points[0])
        chain, chain_cost = best_chain(candidates)
        if chain_cost >= cost or math.isclose(chain_cost, cost, rel_tol=GAIN):
            return points, cost
        points, cost = chain, chain_cost
