"""Paths through the timesteps of one or more scales: what they are, how to make them, how to store them.

A path is a list of N + 1 points, one timestep per scale (fine first), from noise to clean. Sampling along
it costs N network evaluations, one at every point but the last. The optimiser works on a grid of n timesteps
whose index 0 is noise and whose index n - 1 is clean; a pair of grid indices is called a cell.
"""

import hashlib
import json
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from safe_write import replacing

SPACINGS = ("uniform_t", "published", "uniform_log_snr")
SCHEDULE_FORMAT_VERSION = 1
# What a schedule file says beyond the path itself; a loaded path carries it in its provenance.
SCHEDULE_DETAILS = (
    "log_snr",
    "solver",
    "criterion",
    "cost",
    "path_fingerprint",
    "model_fingerprint",
    "data_fingerprint",
    "beta_schedule",
)


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
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr"
    num_train_timesteps: int = 1000,
) -> Path:
    """Path of exactly num_steps steps on which all scales move together, with T = num_train_timesteps.

    spacing:
        "uniform_t": N + 1 points, even in t from T - 1 to 0, rounded.
        "published": multiples of the stride T // N, from N strides down to 0 (990, 935, ..., 55, 0 for
            N = 18); starts at T - 1 where N divides T, and well below T - 1 where T // N cuts off much.
        "uniform_log_snr": N + 1 targets, even in log SNR from log_snr[T - 1] to log_snr[0], each at the
            timestep of nearest log SNR; timesteps that coincide are moved apart towards noise, ends stay.

    Raises ValueError for an unknown spacing, num_steps outside 1..T - 1, num_scales < 1, and, for
    "uniform_log_snr", a table that is missing, of the wrong length, not finite (zero terminal SNR) or not
    strictly decreasing.
    """
    last = num_train_timesteps - 1
    if not 1 <= num_steps <= last:
        raise ValueError(
            f"num_steps is {num_steps} but {num_train_timesteps} timesteps allow 1 to {last}; choose within"
        )
    if num_scales < 1:
        raise ValueError(f"num_scales is {num_scales}; a path needs at least 1 scale")
    if spacing == "uniform_t":
        timesteps = np.rint(np.linspace(last, 0, num_steps + 1)).astype(np.int64)
    elif spacing == "published":
        stride = num_train_timesteps // num_steps
        timesteps = np.minimum(stride * np.arange(num_steps, -1, -1), last)
    elif spacing == "uniform_log_snr":
        table = _check_log_snr_table(log_snr, num_train_timesteps)
        targets = np.linspace(table[-1], table[0], num_steps + 1)
        timesteps = _move_apart(_nearest_timesteps(table, targets), last)
    else:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
    points = tuple((int(t),) * num_scales for t in timesteps)
    return Path(points, "diagonal", {"spacing": spacing, "num_train_timesteps": num_train_timesteps})


def timestep_grid(n: int = 30, num_train_timesteps: int = 1000) -> np.ndarray:
    """Timesteps of the n grid lines, int64 [n], even from num_train_timesteps - 1 to 0, truncated.

    Index 0 is noise. Equals torch.linspace(999, 0, n).long() for the published n = 30. It is computed in
    integers: at some other n, float32 falls just below a whole value and would be truncated one too low.

    Raises ValueError unless 2 <= n <= num_train_timesteps.
    """
    if not 2 <= n <= num_train_timesteps:
        raise ValueError(f"a grid of {n} timesteps is impossible; choose between 2 and {num_train_timesteps}")
    return np.arange(n - 1, -1, -1, dtype=np.int64) * (num_train_timesteps - 1) // (n - 1)


def step_cost(
    error_64: np.ndarray,  # [n, n]
    error_32: np.ndarray,  # [n, n]
    log_snr: np.ndarray,  # [n]
    start: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays of i and of j
    end: tuple[ArrayLike, ArrayLike],  # cell (i, j), or arrays that broadcast with start
) -> np.ndarray:
    """Published cost of the step from cell start to cell end, a trapezoid in λ = log SNR for each scale:

    (E_64[start] + E_64[end]) / 2 · |Δλ_64| + (E_32[start] + E_32[end]) / 2 · |Δλ_32|

    A cell is (i, j) = (index of t_64, index of t_32); indices broadcast, and so does the result.
    """
    delta_64 = np.abs(log_snr[end[0]] - log_snr[start[0]])
    delta_32 = np.abs(log_snr[end[1]] - log_snr[start[1]])
    return (error_64[start] + error_64[end]) / 2 * delta_64 + (error_32[start] + error_32[end]) / 2 * delta_32


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
    maps = _check_maps(error_64, error_32, log_snr)
    check_steps(len(maps[2]), num_steps, max_jump)
    return find_optimal_paths_all_steps(*maps, max_steps=num_steps, max_jump=max_jump)[num_steps]


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
    error_64, error_32, log_snr = _check_maps(error_64, error_32, log_snr)
    n = len(log_snr)
    check_steps(n, min(max_steps, 2 * (n - 1)), max_jump)
    max_jump = min(max_jump, n - 1)

    jump = np.arange(max_jump + 1)
    i, j = np.arange(n)[:, None, None, None], np.arange(n)[None, :, None, None]
    from_i, from_j = i - jump[:, None], j - jump  # [n, 1, m+1, 1], [1, n, 1, m+1]
    start = (np.maximum(from_i, 0), np.maximum(from_j, 0))
    arrival_costs = step_cost(error_64, error_32, log_snr, start, (i, j))  # [n, n, m+1, m+1]
    arrival_costs[(from_i < 0) | (from_j < 0)] = np.inf
    arrival_costs[:, :, 0, 0] = np.inf
    return _cheapest_paths(arrival_costs, min(max_steps, 2 * (n - 1)))


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


def save_schedule(
    path: Path,
    file: str | os.PathLike,
    log_snr: ArrayLike,  # [num_train_timesteps], log SNR of every timestep
    solver: dict[str, Any],  # such as {"name": "ddim", "eta": 0.0, "end": "clean"}
    criterion: str | None = None,  # what the path was optimised for
    cost: float | None = None,  # value of the criterion
    model_fingerprint: str | None = None,
    data_fingerprint: str | None = None,
    beta_schedule: str | None = None,
) -> None:
    """Write a path as a schedule file: JSON with the points as timesteps and as log SNR, and the solver.

    A log SNR of -inf (zero terminal SNR) is written as null. The file appears complete or not at all, and a
    failure leaves an earlier file of that name as it was. What `load_schedule` put into the provenance is not
    carried over: the arguments given here hold.

    Raises ValueError if the table is too short for the path or holds NaN or +inf, or if a value is not JSON,
    and FileNotFoundError if the folder does not exist.
    """
    file = FilePath(file)
    table = np.asarray(log_snr, dtype=np.float64)
    noisiest = max(path.points[0])
    if table.ndim != 1 or len(table) <= noisiest:
        raise ValueError(
            f"log_snr has shape {list(table.shape)} but the path for {file} starts at timestep {noisiest}; "
            "pass the table of all training timesteps"
        )
    if np.isnan(table).any() or np.isposinf(table).any():
        raise ValueError(f"log_snr holds NaN or +inf, so the schedule for {file} cannot be written; check the table")
    content = {
        "format_version": SCHEDULE_FORMAT_VERSION,
        "kind": path.kind,
        "nfe": path.nfe,
        "num_scales": path.num_scales,
        "points": path.points,
        "log_snr": [[None if np.isneginf(table[t]) else float(table[t]) for t in point] for point in path.points],
        "solver": solver,
        "criterion": criterion,
        "cost": None if cost is None else float(cost),
        "path_fingerprint": path.fingerprint(),
        "model_fingerprint": model_fingerprint,
        "data_fingerprint": data_fingerprint,
        "beta_schedule": beta_schedule,
        "provenance": {key: value for key, value in path.provenance.items() if key not in SCHEDULE_DETAILS},
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {file} must hold finite JSON types only ({error})") from error
    if not file.parent.is_dir():
        raise FileNotFoundError(f"folder {file.parent} for schedule {file.name} does not exist; create it first")
    with replacing(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_schedule(file: str | os.PathLike) -> Path:
    """Read a schedule file; the path can be replayed without the model or the map that made it.

    The provenance of the path holds what the path was saved with, plus log_snr, solver, criterion, cost,
    path_fingerprint, model_fingerprint, data_fingerprint and beta_schedule from the file.

    Raises FileNotFoundError if there is no such file, and ValueError if it is not JSON, not a schedule, of a
    later format version, or if its points are invalid or not those it was written with.
    """
    file = FilePath(file)
    if not file.is_file():
        raise FileNotFoundError(f"schedule file {file} does not exist; check the name or save a schedule first")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"schedule file {file} is not JSON ({error}); save it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{file} is not a schedule file: it has no format_version; pass a file that LIFT saved")
    if version > SCHEDULE_FORMAT_VERSION:
        raise ValueError(
            f"schedule file {file} has format version {version} but this code reads only up to "
            f"{SCHEDULE_FORMAT_VERSION}; update LIFT"
        )
    required = ("kind", "nfe", "num_scales", "points", *SCHEDULE_DETAILS, "provenance")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{file} is not a complete schedule file: it lacks {', '.join(missing)}; save it again")
    try:
        path = Path(content["points"], content["kind"], content["provenance"])
        path = Path(path.points, path.kind, path.provenance | {key: content[key] for key in SCHEDULE_DETAILS})
    except ValueError as error:
        raise ValueError(f"schedule file {file} holds no valid path: {error}") from error
    stated = (content["nfe"], content["num_scales"], content["path_fingerprint"])
    if stated != (path.nfe, path.num_scales, path.fingerprint()):
        raise ValueError(
            f"schedule file {file} was changed after it was saved: its points do not match its nfe, "
            "num_scales and path_fingerprint; save it again"
        )
    return path


def _as_points(points: Any) -> tuple[tuple[int, ...], ...]:
    try:
        points = tuple(tuple(point) for point in points)
        # bool is an integer to Python, but True as a timestep is a mistake.
        if any(isinstance(t, bool) for point in points for t in point):
            raise TypeError("got a bool")
        return tuple(tuple(operator.index(t) for t in point) for point in points)
    except TypeError as error:
        raise ValueError(f"a path needs points of one integer per scale ({error})") from error


def _check_log_snr_table(log_snr: ArrayLike | None, num_train_timesteps: int) -> np.ndarray:
    if log_snr is None:
        raise ValueError("spacing 'uniform_log_snr' needs the table log_snr; pass the log_snr of the scheduler")
    table = np.asarray(log_snr, dtype=np.float64)
    if table.shape != (num_train_timesteps,):
        raise ValueError(f"log_snr has shape {list(table.shape)} but must have [{num_train_timesteps}]")
    if not np.isfinite(table).all():
        t = int(np.flatnonzero(~np.isfinite(table))[0])
        raise ValueError(
            f"log_snr is {table[t]} at t = {t} (zero terminal SNR gives -inf at the last timestep), so "
            "'uniform_log_snr' has no range to divide; use spacing 'uniform_t'"
        )
    if not (np.diff(table) < 0).all():
        raise ValueError("log_snr must fall strictly with t; pass the table in order of timesteps")
    return table


def _nearest_timesteps(table: np.ndarray, targets: np.ndarray) -> np.ndarray:
    upper = np.clip(np.searchsorted(-table, -targets), 1, len(table) - 1)
    return np.where(table[upper - 1] - targets < targets - table[upper], upper - 1, upper)


def _move_apart(timesteps: np.ndarray, last: int) -> np.ndarray:
    k = np.arange(len(timesteps))
    # t_k + k must not rise with k: lift what lies too low, then push back what rose above the noisy end.
    lifted = np.maximum.accumulate((timesteps + k)[::-1])[::-1]
    return np.minimum(lifted, last) - k


def _check_maps(
    error_64: ArrayLike, error_32: ArrayLike, log_snr: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    log_snr = np.asarray(log_snr, dtype=np.float64)
    if log_snr.ndim != 1 or len(log_snr) < 2:
        raise ValueError(f"log_snr has shape {list(log_snr.shape)} but must be [n] with n >= 2, one per grid line")
    if not np.isfinite(log_snr).all():
        line = int(np.flatnonzero(~np.isfinite(log_snr))[0])
        raise ValueError(
            f"log_snr is {log_snr[line]} at grid index {line}; start the grid below the timestep of zero SNR"
        )
    if not (np.diff(log_snr) > 0).all():
        raise ValueError("log_snr must rise strictly with the grid index; pass it from noise (index 0) to clean")
    n = len(log_snr)
    maps = []
    for name, error in (("error_64", error_64), ("error_32", error_32)):
        error = np.asarray(error, dtype=np.float64)
        if error.shape != (n, n):
            raise ValueError(f"{name} has shape {list(error.shape)} but the {n} entries of log_snr ask for [{n}, {n}]")
        bad = ~(np.isfinite(error) & (error >= 0))
        if bad.any():
            cell = tuple(int(index) for index in np.argwhere(bad)[0])
            raise ValueError(f"{name} is {error[cell]} at cell {cell}; errors must be finite and not negative")
        maps.append(error)
    return maps[0], maps[1], log_snr


def _cheapest_paths(arrival_costs: np.ndarray, max_steps: int) -> dict[int, tuple[list[tuple[int, int]], float]]:
    # arrival_costs[i, j, di, dj] is the cost of the step (i - di, j - dj) -> (i, j), inf where forbidden.
    n, jumps = arrival_costs.shape[0], arrival_costs.shape[2]
    # Cost of reaching each cell, behind a margin of inf that stands for cells outside the grid.
    reached = np.full((n + jumps - 1, n + jumps - 1), np.inf)
    reached[jumps - 1, jumps - 1] = 0.0
    # Entry [i, j, di, dj] is the cost of reaching (i - di, j - dj); a view, so it follows every update.
    before = sliding_window_view(reached, (jumps, jumps))[:, :, ::-1, ::-1]  # [n, n, m+1, m+1]
    totals = np.empty_like(arrival_costs)
    rows = np.arange(n * n)
    best_moves = []  # Per step: di · jumps + dj of the best move into each cell.
    optima = {}
    for num_steps in range(1, max_steps + 1):
        np.add(before, arrival_costs, out=totals)
        flat = totals.reshape(n * n, jumps * jumps)
        best = flat.argmin(axis=1)
        reached[jumps - 1 :, jumps - 1 :] = flat[rows, best].reshape(n, n)
        best_moves.append(best)
        cost = float(reached[-1, -1])
        if math.isfinite(cost):
            optima[num_steps] = (_trace_back(best_moves, n, jumps), cost)
    return optima


def _trace_back(best_moves: list[np.ndarray], n: int, jumps: int) -> list[tuple[int, int]]:
    i = j = n - 1
    cells = [(i, j)]
    for best in reversed(best_moves):
        di, dj = divmod(int(best[i * n + j]), jumps)
        i, j = i - di, j - dj
        cells.append((i, j))
    return cells[::-1]
