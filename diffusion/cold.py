"""Cold diffusion: degradations in place of noise (arXiv 2208.09392). Its process, and how a walk undoes one.

A network R is shown x_t = D(x, s(t)) and says x. From the most severe image, at t = T - 1, a walk goes on to t' < t by

    cold_naive  x_t' = D(R(x_t, t), s(t'))                              (algorithm 1)
    cold        x_t' = x_t - D(R(x_t, t), s(t)) + D(R(x_t, t), s(t'))   (algorithm 2)

A perfect R is exact by both. Where D(x, s) = x + s e, with one e for all images, algorithm 2 is exact whatever R says,
as its errors cancel. Where D is linear in x, and R always wrong by d, d - D(d, s) of the first point is what remains by
algorithm 2, and d by algorithm 1: what the degradation leaves in an image is made good.

Severities by tau = t / (T - 1), all from 0 to 1:

    linear       tau
    cosine       (1 - cos(pi tau)) / 2
    exponential  (A^tau - 1) / (A - 1) with A = 100: fine steps where little is lost yet
"""

import math
from collections.abc import Callable

import torch

from diffusion.degradations import Degradation
from diffusion.step import Solver, Step
from images.representation import REPRESENTATIONS, Images
from scheduler import CLEAN, COLD, Curves, DDIMScheduler

GROWTH = 100.0  # Of the exponential schedule.
SEVERITY_SCHEDULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda tau: tau,
    "cosine": lambda tau: (1 - (math.pi * tau).cos()) / 2,
    "exponential": lambda tau: torch.expm1(math.log(GROWTH) * tau) / (GROWTH - 1),
}


class ColdScheduler(DDIMScheduler):
    """A process of degraded images. It has no noise level, and says so where one is asked for.

    Attributes: `degradation`, and `severities` float64 `[num_train_timesteps]`, rising from 0 to 1. `log_snr` is NaN
    throughout. Networks say the clean image, of one scale. input_noise: the deviation of noise that `add_noise` adds to
    degraded images. Raises ValueError for an unknown schedule.
    """

    noise_levels = False
    tables = ("log_snr", "severities")

    def __init__(
        self,
        degradation: Degradation,
        severity_schedule: str = "linear",
        input_noise: float = 0.0,
        num_train_timesteps: int = 1000,
        clip_sample: bool = True,
    ):
        if severity_schedule not in SEVERITY_SCHEDULES:
            known = ", ".join(SEVERITY_SCHEDULES)
            raise ValueError(f"Unknown severity schedule '{severity_schedule}'; choose one of {known}.")
        self.degradation, self.input_noise, self._schedule = degradation, input_noise, severity_schedule
        self.num_train_timesteps, self.clip_sample = num_train_timesteps, clip_sample
        self.process = self.beta_schedule = COLD
        self.prediction_type = "x0"
        self.representation = REPRESENTATIONS["overcomplete"]
        self._nodes = self._slopes = None
        self.log_snr = torch.full((num_train_timesteps,), math.nan, dtype=torch.float64)
        self.severities = self.severity(torch.arange(num_train_timesteps, dtype=torch.float64))

    def severity(self, t: int | torch.Tensor) -> float | torch.Tensor:
        """s(t) of an int as a number, of int64 or float64 `[B]` as float64 `[B]`; CLEAN has 0."""
        if isinstance(t, int):
            return 0.0 if t == CLEAN else self.severities[t].item()
        if t.is_floating_point():
            return SEVERITY_SCHEDULES[self._schedule](t / (self.num_train_timesteps - 1)).clamp(0, 1)
        return torch.where(t == CLEAN, 0.0, self.severities[t])

    def timestep_of(self, severity: float) -> int:
        """The timestep from 1 on of the nearest severity. Raises ValueError outside [0, 1]."""
        if not 0 <= severity <= 1:
            raise ValueError(f"Severity {severity:g} lies outside [0, 1], which the model was trained on.")
        return max(1, int((self.severities - severity).abs().argmin()))

    def degrade(self, x: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """D(x, s(t)) of clean images `[B, C, H, W]`; t as in `severity`."""
        return self.degradation(x, self.severity(t))

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """`D(x, s(t)) + input_noise noise`: what a network is shown of clean images x `[B, C, H, W]` in training."""
        degraded = self.degrade(x, t)
        return degraded + self.input_noise * noise if self.input_noise else degraded

    def prior(self, noise: torch.Tensor, t: int) -> torch.Tensor:
        """What sampling starts from: what it is given."""
        return noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean images."""
        return x

    def curves(self, t: torch.Tensor) -> Curves:
        """Raises ValueError: there are none."""
        raise ValueError("Cold diffusion degrades images without noise, and has no noise level to be asked for.")

    def scales(self, t: int | torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ValueError, as `curves`."""
        return self.curves(t)


class ColdNaive(Solver):
    """Algorithm 1: the clean image that is seen, degraded as far as the next point has it."""

    name = "cold_naive"

    def step(self, step: Step) -> Images:
        return step.each(lambda _, x, x0, t, t_next: step.scheduler.degrade(x0, t_next))


class Cold(Solver):
    """Algorithm 2: what the next point takes away from the degradation of the clean image that is seen."""

    name = "cold"

    def step(self, step: Step) -> Images:
        degrade = step.scheduler.degrade
        return step.each(lambda _, x, x0, t, t_next: x - degrade(x0, t) + degrade(x0, t_next))
