"""Consistency functions: from a noisy image straight to the one at timestep 0 on its path of the equation.

In x̂ = x / alpha and σ̂ = sigma / alpha, with D(x, t) the clean image that the prediction of a network stands for,

    f(x, t) = x̂ - (1 - σ̂_0 / σ̂_t) (x̂ - D(x, t)),

DDIM's step from t to timestep 0. It is c_skip x̂ + c_out F of a network F of any prediction, and f(x, 0) = x̂ whatever
the network says. Predictions of v in the process vp have

    c_skip = 1 - σ̂ (σ̂ - σ̂_0) / (1 + σ̂^2),    c_out = -(σ̂ - σ̂_0) / sqrt(1 + σ̂^2).

With images of deviation 1 arXiv 2303.01469 (appendix C) has that c_out, but for its sign, which v has, and
c_skip = 1 / (1 + (σ̂ - σ̂_0)^2), which differs by no more than about σ̂_0. Both are 1 and 0 at σ̂_0, and not at 0. In
flow there is no noise at timestep 0, and f is the clean image that is seen, everywhere but there.
"""

import math

import torch

from diffusion.step import Solver, Step, level_of
from images.representation import Images
from scheduler import CLEAN, DDIMScheduler


def consistency_function(
    scheduler: DDIMScheduler,
    x0: torch.Tensor,
    t: int | torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    """f(x, t), in x̂, of noisy images x at t whose clean images are seen as x0; both `[B, C, H, W]`.

    t: a timestep, or int64 or float64 `[B]`. Finite wherever x0 is, also where alpha is 0.
    """
    wide = torch.empty([0] * x.ndim, dtype=torch.float64)
    alpha, sigma = scheduler.scales(t, wide)
    least = (scheduler.sigmas[0] / scheduler.alphas[0]).to(sigma.device)
    ended = torch.as_tensor(t == 0, device=sigma.device).view(alpha.shape)
    # x̂ is infinite where alpha is 0, and its share is not: σ̂_0 / σ̂ x̂ = x / (sigma / σ̂_0).
    divisor = torch.where(ended, alpha, sigma / least)
    share = torch.where(ended, 0.0, 1 - least * alpha / sigma)
    return x / divisor.to(x.dtype) + share.to(x.dtype) * x0


class Consistency(Solver):
    """Multistep sampling of a consistency model (arXiv 2303.01469, algorithm 1): its image, and noise on it again.

    A step lands on f + sqrt(σ̂'^2 - σ̂_0^2) z in x̂, as f has the noise of timestep 0; the last one on f. One step is
    DDIM's from its point to timestep 0.
    """

    name, draws = "consistency", True

    def step(self, step: Step) -> Images:
        scheduler = step.scheduler
        least = level_of(scheduler, 0).ratio

        def move(_, x, x0, t, t_next, noise):
            found, after = consistency_function(scheduler, x0, t, x), level_of(scheduler, t_next)
            if t_next == CLEAN:
                return found
            deviation = math.sqrt(max(0.0, after.sigma**2 - (after.alpha * least) ** 2))
            return after.alpha * found + deviation * noise

        return step.each(move, step.draw())
