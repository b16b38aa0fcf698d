"""A path through the timesteps of one or more scales, and the timesteps and grids that it may be made of.

A path is a list of N + 1 points, one timestep per scale (fine first), from noise to clean. Sampling along
it costs N network evaluations, one at every point but the last. A grid is n timesteps whose index 0 is noise
and whose index n - 1 is clean; a pair of grid indices is called a cell.
"""

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

SPACINGS = ("uniform_t", "published", "uniform_log_snr", "karras")
BY_LOG_SNR = SPACINGS[2:]
GRID_SPACINGS = ("uniform_t", "uniform_log_snr")
KARRAS_RHO = 7.0


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
        points = as_points(self.points)
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
    start = check_start(start, num_train_timesteps)
    if not 2 <= n <= start + 1:
        raise ValueError(f"a grid of {n} timesteps is impossible; choose between 2 and {start + 1}")
    if spacing not in GRID_SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(GRID_SPACINGS)}")
    if spacing == "uniform_t":
        return np.arange(n - 1, -1, -1, dtype=np.int64) * start // (n - 1)
    return np.array(spaced(n - 1, spacing, start, 0, log_snr, num_train_timesteps), dtype=np.int64)


def path_from_cells(cells: Sequence[Sequence[int]], t_grid: ArrayLike, kind: str, provenance: dict[str, Any]) -> Path:
    """Path whose points are the timesteps t_grid[index] of the given grid cells, one index per scale.

    Raises ValueError for an index outside the grid and for whatever `Path` refuses.
    """
    t_grid = np.asarray(t_grid)
    cells = as_points(cells)
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


def as_points(points: Any) -> tuple[tuple[int, ...], ...]:
    """Points, or cells, as tuples of Python integers; raises ValueError unless all are integers."""
    try:
        points = tuple(tuple(point) for point in points)
        # bool is an integer to Python, but True as a timestep is a mistake.
        if any(isinstance(t, bool) for point in points for t in point):
            raise TypeError("got a bool")
        return tuple(tuple(operator.index(t) for t in point) for point in points)
    except TypeError as error:
        raise ValueError(f"a path needs points of one integer per scale ({error})") from error


def check_start(start: int | None, num_train_timesteps: int) -> int:
    """Timestep of the first point, the last one for None; raises ValueError outside 1..num_train_timesteps - 1."""
    last = num_train_timesteps - 1
    if start is None:
        return last
    if not 1 <= start <= last:
        raise ValueError(f"the path starts at timestep {start} but the schedule has 1 to {last}; choose within")
    return operator.index(start)


def check_log_snr_table(log_snr: ArrayLike, start: int) -> np.ndarray:
    """The part of a table that a path from `start` can visit, float64 [start + 1].

    Raises ValueError unless it is one-dimensional, long enough, finite but for the start, which may be pure noise, and
    strictly falling.
    """
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


def spaced(
    num_steps: int, spacing: str, start: int, end: int, log_snr: ArrayLike | None, num_train_timesteps: int
) -> list[int]:
    """Timesteps of num_steps steps from start to end, spaced as `paths.families.diagonal` says; it refuses the same."""
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
    table = check_log_snr_table(log_snr, start)
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
    return _move_apart(nearest_timesteps(table, targets), start).tolist()


def timestep_of_level(level: float, log_snr: ArrayLike) -> int:
    """The timestep of a noise level, a log SNR: the nearest one by a table [S]; inf, clean, is 0, and -inf the last."""
    if math.isinf(level):
        return 0 if level > 0 else len(log_snr) - 1
    return int(np.abs(np.asarray(log_snr, dtype=np.float64) - level).argmin())


def nearest_timesteps(table: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The timestep of nearest log SNR for each of the targets [N], by a table [S] that falls and spans them."""
    upper = np.clip(np.searchsorted(-table, -targets), 1, len(table) - 1)
    return np.where(table[upper - 1] - targets < targets - table[upper], upper - 1, upper)


def _move_apart(timesteps: np.ndarray, last: int) -> np.ndarray:
    k = np.arange(len(timesteps))
    # t_k + k must not rise with k: lift what lies too low, then push back what rose above the noisy end.
    lifted = np.maximum.accumulate((timesteps + k)[::-1])[::-1]
    return np.minimum(lifted, last) - k
