"""What every optimal two-scale denoiser shares: from the posterior mean of the fine image to both predictions.

A subclass of `PosteriorMean` computes E[x_64 | both noisy images], `[S, C, H, W]`; the coarse mean is the coarse image
of it, in either representation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from images.representation import REPRESENTATIONS
from scheduler import Curves, DDIMScheduler, prediction_from

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.


class PosteriorMean(nn.Module):
    """An optimal two-scale denoiser: subclasses give the mean of x_64 given both noisy images."""

    num_scales = 2

    def __init__(self, scheduler: DDIMScheduler, representation: str | None):
        super().__init__()
        representation = representation or scheduler.representation.name
        self._is_residual = is_residual(representation)
        self.representation = REPRESENTATIONS[representation]
        self.prediction_type = scheduler.prediction_type
        # A table of abar would lose 1 - abar if the module is cast to float32; log SNR does not.
        self.register_buffer("log_snr", scheduler.log_snr.clone())
        whole = scheduler.curves(torch.arange(len(scheduler.log_snr), dtype=torch.float64))
        # sqrt(alpha^2 + sigma^2), by which this process is larger than the variance-preserving one of the same SNR.
        self.register_buffer("size", (whole.alpha.square() + whole.sigma.square()).sqrt())
        self.register_buffer("slopes", torch.stack(whole[2:], 1))  # [T, 2]

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor) -> Pair:
        xs = tuple(x.to(torch.promote_types(x.dtype, self.log_snr.dtype)) for x in (x_64, x_32))
        xs = self.representation.project(xs)  # What is outside the space of the fine scale is not seen.
        log_snrs = tuple(self.log_snr[t][:, None, None, None] for t in (t_64, t_32))  # [S, 1, 1, 1]
        preserving = tuple(x / self.size[t][:, None, None, None] for x, t in zip(xs, (t_64, t_32), strict=True))
        x0_64 = self.posterior_mean(preserving, log_snrs)  # [S, C, H, W]
        x0s = self.representation.split(x0_64)  # The mean of the coarse image is the coarse mean.
        predictions = map(self._prediction, xs, x0s, (t_64, t_32))
        return tuple(p.to(x.dtype) for p, x in zip(predictions, (x_64, x_32), strict=True))

    def _prediction(self, x: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (self.size[t] * scale for scale in signal_and_noise(self.log_snr[t]))
        curves = Curves(*(each[:, None, None, None] for each in (alpha, sigma, *self.slopes[t].T)))
        return prediction_from(self.prediction_type, x0, (x - curves.alpha * x0) / curves.sigma, curves)

    def denoise(self, xs: Pair, ts: Pair) -> Pair:
        """Two scales, two clocks, the form the sampler and the error map call."""
        return self(*xs, *ts)


def is_residual(representation: str) -> bool:
    """Whether a representation, given by name, is the residual pair; raises ValueError for an unknown one."""
    if representation not in REPRESENTATIONS:
        raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
    return representation == "residual"


def check_images(images: torch.Tensor) -> None:
    """Raise ValueError unless images are float `[B, C, H, W]` of even height and width, at least one."""
    shape = list(images.shape)
    if images.ndim != 4 or not images.is_floating_point() or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"Images must be float [B, C, H, W] of even height and width; got {images.dtype} {shape}.")


def signal_and_noise(log_snr: torch.Tensor) -> Pair:
    """√abar and √(1 - abar) at a log SNR, with full relative accuracy and finite gradients up to both infinities."""
    return (F.logsigmoid(log_snr) / 2).exp(), (F.logsigmoid(-log_snr) / 2).exp()
