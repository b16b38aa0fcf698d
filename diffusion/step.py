"""What a step of a path is, and what a solver of steps does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from images.representation import Images
from paths.path import Path
from scheduler import CLEAN, DDIMScheduler


@dataclass(frozen=True)
class Step:
    """What a solver is given: xs at `point`, the clean images x0s seen there, and where to go.

    x0s has the scales that the denoiser predicts, of which the solver returns the next images. `evaluate(xs, point)`
    calls the denoiser once more, and at real times, float64 `[B]` by scale; for some of the images with `rows`, their
    indices int64 `[n]`. `draw()` gives standard normal noise like xs, scale by scale for those that move. An evaluation
    is `calls` network calls. `variances` has the shares v of `DDIMScheduler.split_variance` where the network says
    them, for solvers that read them.
    """

    scheduler: DDIMScheduler
    point: tuple[int, ...]
    next_point: tuple[int, ...]
    xs: Images
    x0s: Images
    evaluate: Callable[..., Images]
    draw: Callable[[], Images]
    calls: int = 1
    variances: Images | None = None

    def each(self, move: Callable[..., torch.Tensor], *more: Sequence) -> Images:
        """`move(scale, x, x0, t, t_next, *more)` for the scales that move; the others keep their image."""
        groups = zip(range(len(self.x0s)), self.xs, self.x0s, self.point, self.next_point, *more, strict=False)
        return tuple(move(*group) if group[3] != group[4] else group[1] for group in groups)


class Level(NamedTuple):
    """alpha, sigma and half the log SNR of a timestep, as numbers, or of many as tensors."""

    alpha: float | torch.Tensor
    sigma: float | torch.Tensor
    log_snr: float | torch.Tensor  # log(alpha / sigma), the λ of arXiv 2211.01095

    @property
    def ratio(self) -> float:
        """sigma / alpha."""
        return self.sigma / self.alpha if self.alpha else math.inf


def level_of(scheduler: DDIMScheduler, t: int) -> Level:
    """The level of a timestep, or of CLEAN."""
    if t == CLEAN:
        return Level(1.0, 0.0, math.inf)
    alpha, sigma = scheduler.alphas[t].item(), scheduler.sigmas[t].item()
    if not alpha or not sigma:
        return Level(alpha, sigma, math.inf if alpha else -math.inf)
    return Level(alpha, sigma, math.log(alpha) - math.log(sigma))


def variance_span(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """log(beta / beta_tilde) of a step between two SNRs, at least 0: log(1 + after) - log(1 + before).

    The true step has the variance beta_tilde where the clean image is known, and beta where it is N(0, 1).
    """
    return torch.log1p(after) - torch.log1p(before)


def level_of_log_snr(log_snr: torch.Tensor) -> Level:
    """The levels of variance-preserving states at log SNRs, as tensors like them; +inf is clean."""
    return Level((F.logsigmoid(log_snr) / 2).exp(), (F.logsigmoid(-log_snr) / 2).exp(), log_snr / 2)


def exponential_step(x: torch.Tensor, x0: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
    """x at the next level if its clean image were x0 on all the way: Euler's step (arXiv 2211.01095, eq. 9)."""
    if not after.sigma:
        return x0
    keep = after.sigma / now.sigma
    return keep * x + (after.alpha - now.alpha * keep) * x0


class Solver:
    """Euler's method and what all solvers share. One object serves one walk; `start` begins another."""

    name = "ddim"
    draws = False  # Whether it needs noise on the way.
    calls_between = False  # Whether it calls the network more than once a step.
    reads_variance = False  # Whether it needs a network that has learnt the variance of a step.
    adaptive = False  # Whether the number of calls depends on the images.
    rule = None  # Of `diffusion.multistep`, by which its steps go; None for one that no such rule describes.

    def start(self) -> None:
        """Forget the walk before."""

    def calls(self, num_steps: int, end: str = "clean") -> int:
        """Network calls of a walk of so many steps that lands on the clean image, or with `end="t0"` on timestep 0."""
        return num_steps

    def steps(self, calls: int, end: str = "clean") -> int:
        """The most steps that a walk of at most so many calls takes; raises ValueError if there is none."""
        least, more = self.calls(1, end), self.calls(2, end)
        if calls < least:
            raise ValueError(
                f"--solver {self.name} needs {least} network calls or more, and --num_calls allows {calls}; raise it, "
                "or choose another --solver."
            )
        return 1 + (calls - least) // (more - least)

    def step(self, step: Step) -> Images:
        """The images at the next point."""
        raise NotImplementedError


def check_draws_nothing(solver: Solver, why: str) -> None:
    """Raise ValueError for a solver that draws noise on the way, of which `why` ends the sentence."""
    if solver.draws:
        name = f"{solver.name}{' with --eta' if solver.name == 'ddim' else ''}"
        raise ValueError(f"--solver {name} draws noise on the way, {why}")


def check_starts_at_last(path: Path, scheduler: DDIMScheduler, what: str) -> None:
    """Raise ValueError unless all scales of a path start at the last timestep, where `what` belongs."""
    last = scheduler.num_train_timesteps - 1
    if any(t != last for t in path.points[0]):
        raise ValueError(
            f"the path starts at {path.points[0]}, and {what} at timestep {last} in every scale; choose another path."
        )
