"""Solvers: how images get from one point of a path to the next.

A solver is asked for one step at a time. It knows the images at the point and the clean images that the denoiser sees
in them; it may ask the denoiser again, draw noise, and keep what it needs of the steps before. Every scale moves in its
own time, and one whose timestep rests keeps its image. With x̂ = x / alpha, σ̂ = sigma / alpha and λ = -log σ̂ every
process is the same diffusion, dx̂/dσ̂ = ε, so that no solver knows which one it works for.

    ddim            Euler's method in σ̂, with `eta` on the way to `ancestral` (arXiv 2010.02502)
    ancestral       the chain of DDPM, with the larger or the smaller variance (arXiv 2006.11239, section 3.2), or with
                    that in between that a network has learnt (arXiv 2102.09672, eq. 15)
    heun            the trapezoidal rule in σ̂, two calls a step (arXiv 2206.00364, algorithm 1)
    dpmpp_2m        DPM-Solver++ of second order, one call a step (arXiv 2211.01095, algorithm 2)
    dpmpp_3m        the same of third order: the clean image as a parabola in λ, integrated exactly
    unipc           a predictor of second order, corrected to third, one call a step (arXiv 2302.04867, B(h) = e^h - 1)
    euler_maruyama  the reverse stochastic equation (arXiv 2011.13456, eq. 6)
    pc              that, and a step of Langevin dynamics after it, two calls a step (arXiv 2011.13456, algorithm 1)
    langevin        Langevin dynamics at every point, and one denoising at the end (arXiv 1907.05600, algorithm 1)
    ode             the probability-flow equation to a tolerance, in steps of its own (`adaptive`)
    consistency     the image of a consistency model, and noise on it again (`consistency`)

Models of cold diffusion, which have no noise, are walked by `cold_naive` and `cold` alone (`cold`).
"""

import math
from collections.abc import Callable

import torch

from diffusion.adaptive import Ode
from diffusion.cold import Cold, ColdNaive
from diffusion.consistency import Consistency
from diffusion.multistep import Corrected, Line, Parabola, Rule, ScaleWalk
from diffusion.step import Solver, Step, exponential_step, level_of, variance_span
from images.representation import Images
from scheduler import CLEAN

LEARNED = "learned"
VARIANCES = ("beta", "beta_tilde", LEARNED)
LANGEVIN_ROUNDS = 5
LONGEST_HEUN_FALL = 10  # Of σ̂ in a step of Heun's method.
PC_SNR = 0.16  # Of the corrector of `pc` (arXiv 2011.13456, appendix G).


class Ddim(Solver):
    """DDIM with eta from 0, deterministic, to 1, ancestral with the smaller variance."""

    def __init__(self, eta: float = 0.0):
        self.eta, self.draws = eta, eta > 0
        self.rule = None if self.draws else Rule()

    def step(self, step: Step) -> Images:
        fresh = step.draw() if self.draws else (None,) * len(step.x0s)
        return step.each(
            lambda _, x, x0, t, t_next, noise: step.scheduler.step_from(x0, t, t_next, x, self.eta, noise), fresh
        )


class Ancestral(Solver):
    """The chain of DDPM on the points of a path: its posterior mean, and noise of variance beta or beta tilde.

    These are of the step between two points, however far apart; "learned" lies between their logarithms, where v says.
    """

    name, draws = "ancestral", True

    def __init__(self, variance: str = "beta"):
        if variance not in VARIANCES:
            raise ValueError(f"Unknown variance '{variance}'; choose one of {', '.join(VARIANCES)}.")
        self.variance, self.reads_variance = variance, variance == LEARNED

    def step(self, step: Step) -> Images:
        scheduler = step.scheduler

        def move(scale, x, x0, t, t_next, noise):
            now, after = level_of(scheduler, t), level_of(scheduler, t_next)
            if self.variance == "beta_tilde" or not after.sigma:  # Where no noise is left, none is drawn.
                return scheduler.step_from(x0, t, t_next, x, 1.0, noise)
            if self.variance == LEARNED:
                smallest = after.sigma * math.sqrt(1 - (after.ratio / now.ratio) ** 2)
                span = variance_span(*(torch.tensor(level.ratio, dtype=torch.float64) ** -2 for level in (now, after)))
                deviation = smallest * (step.variances[scale] * (span.item() / 2)).exp()
            else:
                # 1 - abar / abar' where variance is preserved, and as much larger as alpha^2 + sigma^2 is.
                abar, abar_next = (1 / (1 + level.ratio**2) for level in (now, after))
                deviation = math.sqrt(1 - abar / abar_next) * math.hypot(after.alpha, after.sigma)
            return scheduler.step_from(x0, t, t_next, x, 1.0, torch.zeros_like(x)) + deviation * noise

        return step.each(move, step.draw())


class Heun(Solver):
    """Euler's step, a call at its end, and the step again with the mean of both slopes; the last is Euler's.

    Where σ̂ falls by more than LONGEST_HEUN_FALL, as from pure noise, it is the exponential step with the mean of both
    clean images, which is of second order too.
    """

    name, calls_between = "heun", True

    def calls(self, num_steps: int, end: str = "clean") -> int:
        return 2 * num_steps - (end == "clean")

    def step(self, step: Step) -> Images:
        levels = [[level_of(step.scheduler, t) for t in point] for point in (step.point, step.next_point)]

        def euler(scale, x, x0, *_):
            return exponential_step(x, x0, levels[0][scale], levels[1][scale])

        there = step.each(euler)
        if CLEAN in step.next_point:
            return there
        x0s_there = step.evaluate(there, step.next_point)

        def move(scale, x, x0, t, t_next, end, x0_end):
            now, after = levels[0][scale], levels[1][scale]
            # Over so long a step slopes in σ̂ say nothing, and the mean of both clean images does.
            if not after.sigma or now.ratio > LONGEST_HEUN_FALL * after.ratio:
                return exponential_step(x, (x0 + x0_end) / 2, now, after)
            slopes = (x / now.alpha - x0) / now.ratio + (end / after.alpha - x0_end) / after.ratio
            return after.alpha * (x / now.alpha + (after.ratio - now.ratio) / 2 * slopes)

        return step.each(move, there, x0s_there)


class Multistep(Solver):
    """Solvers that remember the clean images seen at the points before, each scale by a `ScaleWalk` of its own."""

    def start(self) -> None:
        self.walks: list[ScaleWalk] = []

    def step(self, step: Step) -> Images:
        self.walks = self.walks or [ScaleWalk(self.rule) for _ in step.x0s]
        for walk, t, t_next in zip(self.walks, step.point, step.next_point, strict=False):
            if t == t_next:
                walk.rest()

        def move(_, x, x0, t, t_next, walk):
            return walk.advance(x, x0, level_of(step.scheduler, t), level_of(step.scheduler, t_next))

        return step.each(move, self.walks)


class Dpmpp2M(Multistep):
    """DPM-Solver++(2M)."""

    name, rule = "dpmpp_2m", Line()


class Dpmpp3M(Multistep):
    """DPM-Solver++(3M), of third order."""

    name, rule = "dpmpp_3m", Parabola()


class UniPC(Multistep):
    """UniPC-2: every call first corrects the step that led to it, then serves the next.

    A scale that comes to rest keeps its image as it is, and what is painted into is not corrected: of second order.
    """

    name, rule = "unipc", Corrected()


class EulerMaruyama(Solver):
    """The reverse equation dx = (f x + g^2 ε / sigma) dt + g dw, with f dt = d log alpha, g^2 dt = -2 sigma^2 dλ.

    The last step lands on the clean image that is seen.
    """

    name, draws = "euler_maruyama", True

    def step(self, step: Step) -> Images:
        def move(_, x, x0, t, t_next, noise):
            now, after = level_of(step.scheduler, t), level_of(step.scheduler, t_next)
            if not after.sigma:
                return x0
            if not now.alpha:  # Of pure noise nothing is kept.
                return after.alpha * x0 + after.sigma * noise
            rise = 2 * (after.log_snr - now.log_snr)
            epsilon = (x - now.alpha * x0) / now.sigma
            drift = math.log(after.alpha / now.alpha) * x - now.sigma * rise * epsilon
            return x + drift + now.sigma * math.sqrt(rise) * noise

        return step.each(move, step.draw())


class PredictorCorrector(EulerMaruyama):
    """Euler-Maruyama, then a step of Langevin dynamics at the point reached, of a length set by its noise and score."""

    name, calls_between = "pc", True

    def calls(self, num_steps: int, end: str = "clean") -> int:
        return 2 * num_steps - (end == "clean")

    def step(self, step: Step) -> Images:
        there = super().step(step)
        if CLEAN in step.next_point:
            return there
        x0s = step.evaluate(there, step.next_point)

        def correct(scale, x, x0, t, t_next, reached, x0_there, noise):
            level = level_of(step.scheduler, t_next)
            if not level.sigma:
                return reached
            score = (level.alpha * x0_there - reached) / level.sigma**2
            lengths = [each.flatten(1).norm(dim=1) for each in (noise, score)]
            size = (2 * (PC_SNR * lengths[0] / lengths[1]) ** 2)[:, None, None, None]
            return reached + size * score + (2 * size).sqrt() * noise

        return step.each(correct, there, x0s, step.draw())


class Langevin(Solver):
    """At every point `rounds` steps x̂ + a score + sqrt(2 a) z with a = rate σ̂^2, then x̂ as it is at the next level."""

    name, draws, calls_between = "langevin", True, True

    def __init__(self, rounds: int = LANGEVIN_ROUNDS, rate: float = 0.1):
        self.rounds, self.rate = rounds, rate

    def calls(self, num_steps: int, end: str = "clean") -> int:
        return num_steps * self.rounds + (end == "clean")

    def step(self, step: Step) -> Images:
        scheduler, xs, x0s = step.scheduler, step.xs, step.x0s
        for k in range(self.rounds):
            if k:
                x0s = step.evaluate(xs, step.point)

            def move(_, __, ___, t, t_next, x, x0, noise):
                now = level_of(scheduler, t)
                pull = self.rate * (now.alpha * x0 - x)  # a score, times alpha
                return x + pull + math.sqrt(2 * self.rate) * now.sigma * noise

            xs = step.each(move, xs, x0s, step.draw())
        if CLEAN in step.next_point:
            x0s = step.evaluate(xs, step.point)
            return step.each(lambda _, __, ___, t, t_next, x0: x0, x0s)

        def carry(_, __, ___, t, t_next, x, x0):
            now, after = level_of(scheduler, t), level_of(scheduler, t_next)
            return x * (after.alpha / now.alpha) if now.alpha else exponential_step(x, x0, now, after)

        return step.each(carry, xs, x0s)


SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": Ddim,
    "ancestral": Ancestral,
    "heun": Heun,
    "dpmpp_2m": Dpmpp2M,
    "dpmpp_3m": Dpmpp3M,
    "unipc": UniPC,
    "euler_maruyama": EulerMaruyama,
    "pc": PredictorCorrector,
    "langevin": Langevin,
    "ode": Ode,
    "consistency": Consistency,
}
# Of images that are degraded, not noisy.
COLD_SOLVERS: dict[str, Callable[..., Solver]] = {solver.name: solver for solver in (ColdNaive, Cold)}


def make_solver(name: str, **options) -> Solver:
    """A solver by its name, with the options of its class: eta, variance, rounds and rate, tolerance and max_calls."""
    known = SOLVERS | COLD_SOLVERS
    if name not in known:
        raise ValueError(f"Unknown solver '{name}'; choose one of {', '.join(known)}.")
    return known[name](**options)


def with_rule() -> list[str]:
    """Names of the solvers that go by a rule of `diffusion.multistep` as they are: one call a step, and no noise."""
    return [name for name in SOLVERS if make_solver(name).rule is not None]
