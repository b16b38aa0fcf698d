"""The ordinary equation of a process, solved to a tolerance by SciPy, every image at steps of its own.

An image that shared its steps with others would depend on its company. So SciPy solves one equation per image, each in
a thread, and where all of them wait for the network it is called once for all.
"""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.integrate import solve_ivp
from threadpoolctl import threadpool_limits

from diffusion.step import Solver, Step
from images.representation import Images
from scheduler import CLEAN, Curves, DDIMScheduler

METHOD = "RK45"  # Dormand and Prince's pair, as in arXiv 2011.13456, appendix D.4.
CALLS_PER_STEP = 6
TOLERANCE, LEAST_TOLERANCE, MOST_CALLS = 1e-4, 1e-12, 1000
MOST_THREADS = 256
# Slopes of rows [n] of the equations at their own times s [n] and states [n, D]: [n, D].
Slopes = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class _Ended(Exception):
    """What a thread is told when nobody answers it any more."""


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError for a tolerance that float64 cannot meet."""
    if not tolerance >= LEAST_TOLERANCE:
        raise ValueError(f"--tolerance {tolerance:g} is too small; choose {LEAST_TOLERANCE:g} or more.")


def solve_each(slopes: Slopes, states: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    """Every row of states `[N, D]` at s = 1 if it is there at s = 0: float64 `[N, D]`.

    tolerance: the relative and absolute error of a step, of all columns or of each, `[D]`: the root mean square over
    the columns of errors for each one allowed is at most 1. `slopes` is called in this thread alone, for all rows that
    wait for it at a time, of MOST_THREADS. Raises ValueError for slopes that are not finite, and what `slopes` raises.
    """
    parts = []
    # SciPy's sums of a few vectors are done by one thread sooner than several agree on it.
    with threadpool_limits(1, user_api="blas"):
        for first in range(0, len(states), MOST_THREADS):
            rows = np.arange(first, min(first + MOST_THREADS, len(states)))
            parts.append(_solve_together(slopes, states, rows, tolerance))
    return np.concatenate(parts)


def _solve_together(slopes: Slopes, states: np.ndarray, rows: np.ndarray, tolerance: float | np.ndarray) -> np.ndarray:
    asked: queue.SimpleQueue = queue.SimpleQueue()
    answers = {row: queue.SimpleQueue() for row in rows.tolist()}

    def solve(row: int) -> None:
        def slope(s: float, state: np.ndarray) -> np.ndarray:
            asked.put((row, s, state))
            if (answer := answers[row].get()) is None:
                raise _Ended
            return answer

        try:
            found = solve_ivp(slope, (0.0, 1.0), states[row], method=METHOD, rtol=tolerance, atol=tolerance)
            asked.put((row, None, found.y[:, -1]))
        except BaseException as error:  # Whoever waits for this row must hear of it.
            asked.put((row, None, error))

    solved, waiting = {}, {}
    with ThreadPoolExecutor(len(answers)) as pool:
        try:
            for row in answers:
                pool.submit(solve, row)
            while len(solved) < len(answers):
                row, s, value = asked.get()
                if s is not None:
                    waiting[row] = s, value
                elif isinstance(value, BaseException):
                    raise value
                else:
                    solved[row] = value
                if waiting and len(waiting) + len(solved) == len(answers):
                    asking = sorted(waiting)
                    times, values = (np.stack(each) for each in zip(*(waiting[row] for row in asking), strict=True))
                    found = slopes(np.array(asking), times, values)
                    if not np.isfinite(found).all():  # SciPy would look for smaller steps without end.
                        raise ValueError(
                            "The network makes an image NaN or infinite on its way; use another checkpoint, or "
                            "--precision fp32."
                        )
                    for row, answer in zip(asking, found, strict=True):
                        answers[row].put(answer)
                    waiting = {}
        finally:
            # Threads that still wait would never end, and neither would this.
            for answer in answers.values():
                answer.put(None)
    return np.stack([solved[row] for row in answers])


class Line:
    """The ordinary equation on the straight line between two points of timesteps, for the scales that move on it.

    It is dx = (alpha' x0 + sigma' ε) dtau, the probability-flow equation (arXiv 2011.13456, eq. 13), for each scale at
    its own time, which is even in s from 0 at `starts` to 1 at `ends`. Its states are rows `[n, D]`, float64 on the
    CPU, of the images of all scales that move.

    starts, ends: float64 `[scales]`. xs: the images `[B, C, H, W]` by scale at the start, whose device and dtype others
    get; a scale that waits keeps its image.
    """

    def __init__(self, scheduler: DDIMScheduler, starts: np.ndarray, ends: np.ndarray, xs: Images):
        self._tables, self._starts, self._ends, self._xs = scheduler.to("cpu"), starts, ends, xs
        self.moving = [k for k in range(len(xs)) if ends[k] != starts[k]]
        self._sizes = [xs[k][0].numel() for k in self.moving]

    def pack(self, xs: Images) -> torch.Tensor:
        """The images `[n, C, H, W]` by scale of the scales that move, as states `[n, D]`."""
        return torch.cat([xs[k].flatten(1).double().cpu() for k in self.moving], 1)

    def images(self, rows: torch.Tensor, states: torch.Tensor) -> Images:
        """The images `[n, C, H, W]` by scale of some rows `[n]` of all images, from their states `[n, D]`."""
        parts = dict(zip(self.moving, states.split(self._sizes, 1), strict=True))
        return tuple(
            parts[k].view(-1, *x.shape[1:]).to(x.device, x.dtype) if k in parts else x[rows.to(x.device)]
            for k, x in enumerate(self._xs)
        )

    def times(self, s: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The timesteps float64 `[n]` by scale at s `[n]`, on the CPU."""
        return tuple(torch.from_numpy(self._starts + s[:, None] * (self._ends - self._starts)).T)

    def slopes(self, times: tuple[torch.Tensor, ...], states: torch.Tensor, x0s: Images) -> torch.Tensor:
        """The derivatives of states by s, `[n, D]`, where the clean images are x0s; differentiable in both."""
        found = []
        for k, x in zip(self.moving, states.split(self._sizes, 1), strict=True):
            curves = Curves(*(each[:, None] for each in self._tables.curves(times[k])))
            x0 = x0s[k].flatten(1).double().cpu()
            noise = (x - curves.alpha * x0) / curves.sigma
            speed = (self._ends[k] - self._starts[k]) / (self._tables.num_train_timesteps - 1)
            found.append(speed * (curves.d_alpha * x0 + curves.d_sigma * noise))
        return torch.cat(found, 1)


class Calls:
    """Network calls so far, image by image; raises ValueError where one needs more than there may be."""

    def __init__(self, count: int, most: int, tolerance: float, what: str):
        self.spent = np.zeros(count, np.int64)
        self._most, self._tolerance, self._what = most, tolerance, what

    def spend(self, rows: np.ndarray, calls: int = 1) -> None:
        """Count so many calls for each of some images."""
        self.spent[rows] += calls
        if self.spent.max() > self._most:
            raise ValueError(
                f"{self._what} needs more than {self._most} network calls for an image at --tolerance "
                f"{self._tolerance:g}; raise --tolerance, or the limit where there is --num_calls."
            )


class Ode(Solver):
    """The equation of a `Line` between the points of a path, both scales at once, to a tolerance.

    Steps between points are its own, and so are the times of each image. The last step ends at timestep 0, or in flow
    half a timestep before, where a last call gives the clean image. Raises ValueError for a tolerance that float64
    cannot meet, and for an image that needs more than `max_calls` calls on its walk, or of a walk with jumps between
    two of them.
    """

    name, calls_between, adaptive = "ode", True, True

    def __init__(self, tolerance: float = TOLERANCE, max_calls: int = MOST_CALLS):
        check_tolerance(tolerance)
        self.tolerance, self.max_calls = tolerance, max_calls

    def start(self) -> None:
        self.spent: Calls | None = None

    def calls(self, num_steps: int, end: str = "clean") -> int:
        """The fewest; how many there are depends on the images."""
        return num_steps * (2 + CALLS_PER_STEP) + (end == "clean")  # The walk's, one for a first length, and a step.

    def step(self, step: Step) -> Images:
        scheduler, count = step.scheduler, len(step.x0s)
        landed = [t == CLEAN or not scheduler.sigmas[t] for t in step.next_point]  # In flow timestep 0 is clean.
        starts = np.array(step.point, np.float64)
        ends = np.array([max(t, 0) for t in step.next_point], np.float64)
        ends = np.where(ends < starts, scheduler.inside(torch.from_numpy(ends)).double().numpy(), starts)
        xs, device = tuple(step.xs), step.xs[0].device
        everyone = np.arange(len(xs[0]))
        if self.spent is None:
            self.spent = Calls(len(everyone), self.max_calls, self.tolerance, "--solver ode")
        self.spent.spend(everyone, step.calls)
        line = Line(scheduler, starts, ends, xs)

        def slopes(rows: np.ndarray, s: np.ndarray, states: np.ndarray) -> np.ndarray:
            chosen, times, states = torch.from_numpy(rows), line.times(s), torch.from_numpy(states)
            if s.any():
                self.spent.spend(rows, step.calls)
                x0s = step.evaluate(line.images(chosen, states), tuple(t.to(device) for t in times), chosen.to(device))
            else:  # What the walk has seen.
                x0s = tuple(x0[chosen.to(x0.device)] for x0 in step.x0s)
            return line.slopes(times, states, x0s).numpy()

        if line.moving:
            states = solve_each(slopes, line.pack(xs).numpy(), self.tolerance)
            xs = line.images(torch.from_numpy(everyone), torch.from_numpy(states))
        if not any(landed):
            return xs[:count]
        self.spent.spend(everyone, step.calls)
        x0s = step.evaluate(xs, tuple(torch.full((len(everyone),), end, device=device).double() for end in ends))
        return step.each(lambda k, x, x0, t, t_next, there, clean: clean if landed[k] else there, xs, x0s)
