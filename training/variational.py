"""The variational bound as an objective, and the variances of steps that are learnt with it (arXiv 2102.09672).

A network of 2C outputs a scale says the clean image and, by v, the variance of the step from each timestep to the next:
log variance = v log beta + (1 - v) log beta_tilde (eq. 15; `DDIMScheduler.split_variance`). The bound of a scale is

    L_vlb = L_0 + L_1 + ... + L_(T-1),    L_t = KL(q(z_(t-1) | z_t, x) || p(z_(t-1) | z_t)),    L_0 = -log p(x | z_0)

without the KL of the prior, of which nothing can be learnt. It is estimated by T L_t of the timestep that was drawn, in
bits per dimension: the losses `vlb_64` and `vlb_32`. Drawn evenly, their mean is the sum over the chain;
a clock that follows another (`band`, `follow`) is not, and its loss is weighed by how often its timesteps come.

    hybrid  squared error + `vlb_weight` L_vlb (eq. 16), by L_vlb with respect to the variances alone
    vlb     L_vlb, with respect to both

The weight, 1/1000, is that of the sum: of one term L_t it is T / 1000.

The steps are those of `diffusion.elbo`, where KL = [(r - 1 - log r) + r (γ_s - γ_t)(x - x̂)²] / 2 for each dimension;
the error of a clean image is that of the prediction by `error_ratio`, so that every prediction type has the same bound.
Clean images are not clamped. L_0 of fine images of 8 bits is their discretised probability. Coarse images and residuals
are not of 8 bits: their L_0 is the density, times the width of a grey level in an orthonormal basis, in which the
coarse one is twice as large. So the bounds of both scales of the residual pair, weighed by dimensions, are that of the
image but for this; each scale has the chain of its own clock, with the other scale as it is. Of the residual pair
variances are even over blocks, and dimensions three for every four pixels. Latents, which are no bytes, have the
density on both scales.

Shapes: B images of a step, T training timesteps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from diffusion.elbo import kl_of_step, log_density, log_probability
from diffusion.likelihood import GREY_LEVEL
from diffusion.step import variance_span
from images.representation import Images
from scheduler import NO_VARIANCE, DDIMScheduler, Denoiser
from training.objective import SCALE_LOSSES, Denoising, Networks, TrainingBatch
from training.terms import Term

VLB_NAMES = ("vlb_64", "vlb_32")
VLB_WEIGHT = 0.001  # Of the bound in the hybrid (arXiv 2102.09672, section 3.1).


class StepTables:
    """What the bound needs of the steps of all timesteps, float64 `[T]`; at 0 it is the step to the clean image.

    beta and beta_tilde are those of neighbouring timesteps. Of the last step, from timestep 0, beta is 1 - abar_0, and
    beta_tilde, which is 0 there, that of the step from timestep 1, as in the code of arXiv 2102.09672.
    """

    def __init__(self, scheduler: DDIMScheduler):
        snr, sigmas = scheduler.snr, scheduler.sigmas
        times = torch.arange(len(snr), device=snr.device)
        smallest = sigmas[0].square() * (1 - snr[1] / snr[0])
        span_of_last = -torch.log1p(snr[:1]) - smallest.log()
        self.spans = torch.cat([span_of_last, variance_span(snr[1:], snr[:-1])])  # log(beta / beta_tilde)
        # Of squared errors of the prediction, those of the clean image times what the SNR gains.
        gains = torch.cat([torch.zeros_like(snr[:1]), -snr.diff()])
        self.gains = gains / scheduler.error_ratio(times)
        self.smallest_of_last = smallest


class Hybrid(Denoising):
    """Squared errors for the predictions, and the bound for the variances (arXiv 2102.09672, eq. 16).

    config: also `vlb_weight`. With `t_law` importance it is the bound that says which timesteps are drawn how often;
    both parts are divided by it. Raises ValueError for a process other than vp, and for real times.
    """

    learned_variance = True
    trains_mean = False  # Whether the bound says anything about the predictions.

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: DDIMScheduler,
        terms: Sequence[Term] = (),
        networks: Networks | None = None,
    ):
        super().__init__(config, scheduler, terms, networks)
        check_chain(config.get("objective", "hybrid"), scheduler.process, config.get("times", "whole"))
        self._vlb_weight = config.get("vlb_weight") or VLB_WEIGHT
        self._steps = StepTables(scheduler)
        self._bytes = config.get("latents") is None

    def losses(self, denoise: Denoiser, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Those of `Denoising`, and the bound of every image per predicted scale, `vlb_64` and maybe `vlb_32`, `[B]`.

        denoise: a network that returns 2C channels. The bound is T times a term of the chain, in bits per dimension.
        Raises ValueError for a network that says no variance.
        """
        noisy, shown = self.noised(batch)
        outputs = self._outputs(denoise, shown, batch)
        predictions, shares = self.scheduler.split_variance(outputs, (batch.x_64, batch.x_32))
        if shares is None:
            raise ValueError(NO_VARIANCE)
        bounds = zip(VLB_NAMES, self._bounds(predictions, shares, batch), strict=False)
        return self._errors(predictions, batch) | dict(bounds) | self._further(predictions, noisy, shown, batch)

    def _bounds(self, predictions: Images, shares: Images, batch: TrainingBatch) -> list[torch.Tensor]:
        scheduler, found = self.scheduler, []
        for scale, (prediction, v, (x, noise, t)) in enumerate(zip(predictions, shares, batch.scales, strict=False)):
            prediction = prediction if self.trains_mean else prediction.detach()
            prediction, v = (each if each.dtype == torch.float64 else each.float() for each in (prediction, v))
            part = scheduler.representation.fine_share if scale == 0 else 1.0
            spans, gains = (
                table[t].to(v.dtype)[:, None, None, None] for table in (self._steps.spans, self._steps.gains)
            )  # [B, 1, 1, 1] each
            log = v * spans  # [B, C, H, W], of the variance over beta_tilde
            steps = kl_of_step(log, gains * (prediction - scheduler.target(x, noise, t)).square(), part)
            # Images at other timesteps have no last step: what is computed of them is finite and is left out.
            is_last = (t == 0)[:, None, None, None]
            seen = scheduler.predict_x0(prediction, t, scheduler.add_noise(x, noise, t))
            mean = torch.where(is_last, seen, x)
            deviation = self._steps.smallest_of_last.sqrt().to(v.dtype) * (torch.where(is_last, log, 0) / 2).exp()
            terms = torch.where(is_last, -self._log_last(scale, x, mean, deviation, part), steps)
            found.append(len(scheduler.snr) / math.log(2) * terms.flatten(1).mean(1) / part)
        return found

    def _log_last(
        self, scale: int, x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, part: float
    ) -> torch.Tensor:
        if scale == 0 and part == 1 and self._bytes:
            return log_probability(x, mean, deviation)
        width = GREY_LEVEL if scale == 0 else GREY_LEVEL / 2
        own = log_density(x, mean, deviation)
        # Log of the deviation, of 2 pi and of the width count for each dimension, and not for each number.
        return own + (1 - part) * (deviation.log() + math.log(2 * math.pi) / 2) + part * math.log(width)

    def minimised(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """The mean over images of squared errors, terms and, `vlb_weight` times, bounds, weighed as they are."""
        errors = {name: values for name, values in losses.items() if name not in VLB_NAMES}
        return super().minimised(errors, batch) + self._vlb_weight * self._mean_bound(losses, batch)

    def _mean_bound(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        by_image = self.drives(losses, batch)
        return (by_image if batch.share is None else by_image * batch.share.to(by_image)).mean()

    def drives(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        weights = zip(VLB_NAMES, SCALE_LOSSES, strict=True)
        return sum(self._loss_weights[scale] * losses[name] for name, scale in weights if name in losses)


class Variational(Hybrid):
    """The bound alone, for predictions and variances; squared errors are in the log beside it."""

    trains_mean = True

    def minimised(self, losses: dict[str, torch.Tensor], batch: TrainingBatch) -> torch.Tensor:
        """The mean over images of bounds, in bits per dimension, weighed by scale."""
        return self._mean_bound(losses, batch)


def check_chain(objective: str, process: str, times: str) -> None:
    """Raise ValueError unless a process at such times has the chain of DDPM that the bound is of."""
    if process != "vp" or times != "whole":
        raise ValueError(
            f"--objective {objective} is the bound of the chain of DDPM, which the process 'vp' has at whole "
            "timesteps; pass --process vp --times whole, or --objective denoising."
        )
