"""What a training step shows the network, and what it minimises.

Shapes: B images of a step, C channels, H x W pixels of the fine scale.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from images.representation import OVERCOMPLETE, Overcomplete
from planning.regimes import TimestepPairs
from scheduler import DDIMScheduler

SCALES = ("64", "32")
LOSS_NAMES = {"loss_64": "fine loss", "loss_32": "coarse loss"}  # Key in files: what people read.


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one training step, a function of seed and step only."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(mixed)


class TrainingBatch(NamedTuple):
    """What one step shows the network: clean images in [-1, 1], their noise and their timesteps, image by image."""

    x_64: torch.Tensor  # [B, C, H, W], in the residual representation the residual, and so the noise
    x_32: torch.Tensor  # [B, C, H/2, W/2]
    noise_64: torch.Tensor  # [B, C, H, W]
    noise_32: torch.Tensor  # [B, C, H/2, W/2]
    t_64: torch.Tensor  # [B]
    t_32: torch.Tensor  # [B]

    def rows(self, rows: slice) -> "TrainingBatch":
        """Some of the images."""
        return TrainingBatch(*(field[rows] for field in self))


def draw_batch(
    pairs: TimestepPairs,
    x_64: torch.Tensor,
    x_32: torch.Tensor,
    generator: torch.Generator,
    representation: Overcomplete = OVERCOMPLETE,
) -> TrainingBatch:
    """Noise and timesteps for clean images x_64 `[B, C, H, W]` and x_32 `[B, C, H/2, W/2]`, their 2x2 mean.

    Each scale has its own noise, and the timesteps are pairs of the regime. Images and noise of the fine scale are
    those of the representation.
    """
    device = x_64.device
    t_64, t_32 = pairs.draw(len(x_64), generator)  # [B] twice
    noise_64 = torch.randn(x_64.shape, generator=generator, device=device)  # [B, C, H, W]
    noise_32 = torch.randn(x_32.shape, generator=generator, device=device)  # [B, C, H/2, W/2]
    clean, noise = map(representation.project, ((x_64, x_32), (noise_64, noise_32)))
    return TrainingBatch(*clean, *noise, t_64, t_32)


def diffusion_loss(
    network: nn.Module, model_type: str, scheduler: DDIMScheduler, batch: TrainingBatch
) -> dict[str, torch.Tensor]:
    """Squared error of every image per predicted scale, `loss_64` and where predicted `loss_32`, float32 `[B]`.

    Each is a mean over the dimensions of its scale: a residual has three for every four pixels.
    """
    x_64, x_32, noise_64, noise_32, t_64, t_32 = batch
    z_64 = scheduler.shown(scheduler.add_noise(x_64, noise_64, t_64), t_64)  # [B, C, H, W]
    inputs = {
        "baseline": lambda z_32: (z_64, t_64),
        "dual": lambda z_32: (z_64, z_32, t_64, t_32),
        "shared_t": lambda z_32: (z_64, z_32, t_64),
        "single_t": lambda z_32: (z_64, z_32, t_64),
        "no_t": lambda z_32: (z_64, z_32),
    }[model_type](scheduler.shown(scheduler.add_noise(x_32, noise_32, t_32), t_32))
    predictions = network(*inputs)
    targets = [scheduler.target(x_64, noise_64, t_64)]
    if isinstance(predictions, tuple):
        targets.append(scheduler.target(x_32, noise_32, t_32))
    else:
        predictions = (predictions,)
    shares = (scheduler.representation.fine_share, 1.0)
    return {
        f"loss_{scale}": F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1) / share  # [B]
        for scale, prediction, target, share in zip(SCALES, predictions, targets, shares, strict=False)
    }


def weighted_loss(
    losses: dict[str, torch.Tensor],  # of `diffusion_loss`
    batch: TrainingBatch,
    scheduler: DDIMScheduler,
    loss_weights: Sequence[float],  # one for each predicted scale
    min_snr_gamma: float | None = None,  # None: all timesteps alike
) -> torch.Tensor:
    """What a step minimises: the means of the losses over images, weighed by scale and by timestep.

    With `min_snr_gamma` timesteps are weighed by `DDIMScheduler.min_snr_weight`.
    """
    total = torch.zeros((), device=batch.x_64.device)
    for weight, values, t in zip(loss_weights, losses.values(), (batch.t_64, batch.t_32), strict=False):
        by_image = values if min_snr_gamma is None else values * scheduler.min_snr_weight(min_snr_gamma, t).to(values)
        total = total + weight * by_image.mean()
    return total
