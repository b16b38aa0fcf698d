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

from diffusion.step import Solver, Step
from images.representation import Images
from scheduler import CLEAN, Curves

METHOD = "RK45"  # Dormand and Prince's pair, as in arXiv 2011.13456, appendix D.4.
CALLS_PER_STEP = 6
TOLERANCE, LEAST_TOLERANCE, MOST_CALLS = 1e-4, 1e-12, 1000
MOST_THREADS = 256
# Slopes of rows [n] of the equations at their own times s [n] and states [n, D]: [n, D].
Slopes = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class _Ended(Exception):
    """What a thread is told when nobody answers it any more."""


def solve_each(slopes: Slopes, states: np.ndarray, tolerance: float) -> np.ndarray:
    """Every row of states `[N, D]` at s = 1 if it is there at s = 0: float64 `[N, D]`.

    tolerance: the relative and absolute error of a step. `slopes` is called in this thread alone, for all rows that
    wait for it at a time, of MOST_THREADS. Raises ValueError for slopes that are not finite, and what `slopes` raises.
    """
    parts = []
    for first in range(0, len(states), MOST_THREADS):
        rows = np.arange(first, min(first + MOST_THREADS, len(states)))
        parts.append(_solve_together(slopes, states, rows, tolerance))
    return np.concatenate(parts)


def _solve_together(slopes: Slopes, states: np.ndarray, rows: np.ndarray, tolerance: float) -> np.ndarray:
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


class Ode(Solver):
    """dx = (alpha' x0 + sigma' ε) dtau between the points of a path, both scales at once, to a tolerance.

    That is the probability-flow equation (arXiv 2011.13456, eq. 13). Steps between points are its own, and so are the
    times of each image. The last step ends at timestep 0, or in flow half a timestep before, where a last call gives
    the clean image. Raises ValueError for a tolerance that float64 cannot meet, and for an image that needs more than
    `max_calls` calls on its walk, or of a walk with jumps between two of them.
    """

    name, calls_between, adaptive = "ode", True, True

    def __init__(self, tolerance: float = TOLERANCE, max_calls: int = MOST_CALLS):
        if not tolerance >= LEAST_TOLERANCE:
            raise ValueError(f"--tolerance {tolerance:g} is too small; choose {LEAST_TOLERANCE:g} or more.")
        self.tolerance, self.max_calls = tolerance, max_calls

    def start(self) -> None:
        self.spent: np.ndarray | int = 0  # Calls so far, image by image.

    def calls(self, num_steps: int, end: str = "clean") -> int:
        """The fewest; how many there are depends on the images."""
        return num_steps * (2 + CALLS_PER_STEP) + (end == "clean")  # The walk's, one for a first length, and a step.

    def step(self, step: Step) -> Images:
        scheduler, count = step.scheduler, len(step.x0s)
        landed = [t == CLEAN or not scheduler.sigmas[t] for t in step.next_point]  # In flow timestep 0 is clean.
        starts = np.array(step.point, np.float64)
        ends = np.array([max(t, 0) for t in step.next_point], np.float64)
        ends = np.where(ends < starts, scheduler.inside(torch.from_numpy(ends)).double().numpy(), starts)
        tables, device, dtype = scheduler.to("cpu"), step.xs[0].device, step.xs[0].dtype
        moving = [k for k in range(count) if ends[k] != starts[k]]
        sizes = [step.xs[k][0].numel() for k in moving]
        self.spent = self.spent + np.ones(len(step.xs[0]), np.int64)

        def at(rows: torch.Tensor, states: np.ndarray) -> Images:
            parts = torch.from_numpy(states).split(sizes, 1)
            moved = {k: part.view(-1, *step.xs[k].shape[1:]) for k, part in zip(moving, parts, strict=True)}
            return tuple(moved[k].to(device, dtype) if k in moved else x[rows] for k, x in enumerate(step.xs))

        def slopes(rows: np.ndarray, s: np.ndarray, states: np.ndarray) -> np.ndarray:
            chosen = torch.from_numpy(rows).to(device)
            times = starts + s[:, None] * (ends - starts)  # [n, scales]
            xs = at(chosen, states)
            if s.any():
                self._spend(rows)
                x0s = step.evaluate(xs, tuple(torch.from_numpy(times.T).to(device)))
            else:  # What the walk has seen.
                x0s = tuple(x0[chosen] for x0 in step.x0s)
            found = []
            for k, state in zip(moving, np.split(states, np.cumsum(sizes)[:-1], 1), strict=True):
                curves = Curves(*(each[:, None] for each in tables.curves(torch.from_numpy(times[:, k]))))
                x, x0 = torch.from_numpy(state), x0s[k].flatten(1).double().cpu()
                noise = (x - curves.alpha * x0) / curves.sigma
                speed = (ends[k] - starts[k]) / (scheduler.num_train_timesteps - 1)
                found.append((speed * (curves.d_alpha * x0 + curves.d_sigma * noise)).numpy())
            return np.concatenate(found, 1)

        xs = tuple(step.xs)
        if moving:
            states = torch.cat([step.xs[k].flatten(1).double().cpu() for k in moving], 1).numpy()
            xs = at(torch.arange(len(states), device=device), solve_each(slopes, states, self.tolerance))
        if not any(landed):
            return xs[:count]
        everyone = np.arange(len(xs[0]))
        self._spend(everyone)
        x0s = step.evaluate(xs, tuple(torch.full((len(everyone),), end, device=device).double() for end in ends))
        return step.each(lambda k, x, x0, t, t_next, there, clean: clean if landed[k] else there, xs, x0s)

    def _spend(self, rows: np.ndarray) -> None:
        self.spent[rows] += 1
        if self.spent.max() > self.max_calls:
            raise ValueError(
                f"--solver ode needs more than {self.max_calls} network calls for an image at --tolerance "
                f"{self.tolerance:g}; raise --tolerance, or the limit where there is --num_calls."
            )
