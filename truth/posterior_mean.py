"""What every exact denoiser shares: the process of its noisy images, and from a mean to a prediction.

A subclass of `PosteriorMean` computes E[x_64 | both noisy images], `[S, C, H, W]`; the coarse mean is the coarse image
of it, in either representation.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from images.representation import REPRESENTATIONS
from scheduler import Curves, DDIMScheduler, prediction_from

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.


class ExactDenoiser(nn.Module):
    """A denoiser without weights: it knows its process, and what its prediction of a clean image is."""

    def __init__(self, scheduler: DDIMScheduler):
        super().__init__()
        self.prediction_type = scheduler.prediction_type
        self._scheduler = scheduler.to("cpu")
        times = torch.arange(len(scheduler.log_snr)).double()
        # Without noise, as in flow at timestep 0, there is no velocity to compute.
        whole = scheduler.curves(times.clamp(min=scheduler.inside(times)[0]))
        # A table of abar would lose 1 - abar if the module is cast to float32; log SNR does not.
        self.register_buffer("log_snr", torch.where(scheduler.alphas_cumprod == 0, -math.inf, scheduler.log_snr))
        # sqrt(alpha^2 + sigma^2), by which this process is larger than the variance-preserving one of the same SNR.
        self.register_buffer("size", torch.hypot(whole.alpha, whole.sigma))
        self.register_buffer("slopes", torch.stack(whole[2:], 1))  # [T, 2]

    def _at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # log SNR [S], size [S] and slopes [S, 2] at times that may lie between whole ones.
        if not t.is_floating_point():
            return self.log_snr[t], self.size[t], self.slopes[t]
        curves = self._scheduler.curves(t.cpu().double())
        found = 2 * (curves.alpha / curves.sigma).log(), torch.hypot(*curves[:2]), torch.stack(curves[2:], 1)
        return tuple(each.to(self.log_snr) for each in found)

    def _prediction(self, x: torch.Tensor, x0: torch.Tensor, place: tuple[torch.Tensor, ...]) -> torch.Tensor:
        log_snr, size, slopes = place
        alpha, sigma = (size * scale for scale in signal_and_noise(log_snr))
        curves = Curves(*(each[:, None, None, None] for each in (alpha, sigma, *slopes.T)))
        return prediction_from(self.prediction_type, x0, (x - curves.alpha * x0) / curves.sigma, curves)


class PosteriorMean(ExactDenoiser):
    """An optimal two-scale denoiser: subclasses give the mean of x_64 given both noisy images."""

    num_scales = 2

    def __init__(self, scheduler: DDIMScheduler, representation: str | None):
        super().__init__(scheduler)
        representation = representation or scheduler.representation.name
        self._is_residual = is_residual(representation)
        self.representation = REPRESENTATIONS[representation]

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor) -> Pair:
        xs, places = self._seen((x_64, x_32), (t_64, t_32))
        x0s = self.representation.split(self._mean_of(xs, places))  # The mean of the coarse image is the coarse mean.
        predictions = map(self._prediction, xs, x0s, places)
        return tuple(p.to(x.dtype) for p, x in zip(predictions, (x_64, x_32), strict=True))

    def _seen(self, xs: Pair, ts: Pair) -> tuple[Pair, list[tuple[torch.Tensor, ...]]]:
        xs = tuple(x.to(torch.promote_types(x.dtype, self.log_snr.dtype)) for x in xs)
        # What is outside the space of the fine scale is not seen.
        return self.representation.project(xs), [self._at(t) for t in ts]

    def _mean_of(self, xs: Pair, places: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        log_snrs = tuple(log_snr[:, None, None, None] for log_snr, *_ in places)  # [S, 1, 1, 1]
        preserving = tuple(x / size[:, None, None, None] for x, (_, size, _) in zip(xs, places, strict=True))
        return self.posterior_mean(preserving, log_snrs)  # [S, C, H, W]

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
