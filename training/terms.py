"""Further terms of the loss, which compare the clean image that a prediction stands for with the true one.

A term is a class with a `name`, the `weight` it has in what is minimised, the frozen `network` it looks through by
calling `look`, which may be compiled, and one method, `distance`. Every distance is weighed by abar at the timestep of
the fine scale, alpha^2 / (alpha^2 + sigma^2), which is alpha^2 where variance is preserved: of a little signal the
clean image is predicted with errors sigma / alpha times those of the noise, which would be all that is learnt.

The clean image x̂0 is that of the fine scale, composed of both scales in the residual representation, so that there
both predictions have a gradient. It is clamped to [-1, 1]. Beyond that the gradient of a value is zero, as that of any
clamp: there the squared error of the prediction alone says where to go. With two clocks the weight is that of the fine
one, as three quarters and more of the image are.

Shapes: B images, C channels, H x W pixels of the fine scale.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from images.representation import Images
from model import ScaleModel
from scheduler import DDIMScheduler
from training.vgg import VGG


class Compared(NamedTuple):
    """What terms look at: the clean image as predicted and as it is, and how the true one was noised."""

    predicted: torch.Tensor  # [B, C, H, W], float, in [-1, 1]; with the gradient of the prediction
    true: torch.Tensor  # [B, C, H, W]
    noise: Images  # [B, C, H, W] and [B, C, H/2, W/2], those of the representation
    shown: Images  # Likewise, what the network was shown of the noisy true image.
    ts: Images  # [B] each
    labels: torch.Tensor | None = None  # [B], the classes that the network was told


class Term(Protocol):
    """What `Denoising` asks of a term."""

    name: str
    weight: float
    network: nn.Module
    look: Callable[..., Any]

    def distance(self, images: Compared) -> torch.Tensor:
        """How far the predicted images are from the true ones, float32 `[B]`, each from its own."""


def compare(
    scheduler: DDIMScheduler,
    predictions: Images,  # [B, C or 2C, H, W], of learned variance twice the channels; one tensor per predicted scale
    clean: Images,  # [B, C, H, W] and [B, C, H/2, W/2]
    noise: Images,
    noisy: Images,
    shown: Images,
    ts: Images,  # [B] each
    labels: torch.Tensor | None = None,  # [B]
) -> Compared:
    """The clean image of predictions of any type, clamped, beside the true one; what is not predicted is true."""
    x0s = tuple(
        scheduler.predict_x0(prediction[:, : x.shape[1]].to(x), t, x)
        for prediction, t, x in zip(predictions, ts, noisy, strict=False)
    )
    predicted, true = map(scheduler.representation.compose, ((*x0s, *clean[len(x0s) :]), clean))
    return Compared(predicted.clamp(-1, 1), true, noise, shown, ts, labels)


def mean_square(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of features `[B, ...]`, of whatever precision, image by image: `[B]`."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) - other.to(wide)).square().flatten(1).mean(1)


class Perceptual:
    """The mean squared difference of features of VGG19, up to its fourth convolution (arXiv 1603.08155, eq. 2)."""

    name = "perceptual"

    def __init__(self, weight: float, network: VGG):
        self.weight, self.network, self.look = weight, network, network

    def distance(self, images: Compared) -> torch.Tensor:
        """Of the features `[B, 128, H/2, W/2]` of both: `[B]`."""
        with torch.no_grad():
            true = self.look(images.true)
        return mean_square(self.look(images.predicted), true)


class FeatureMatching:
    """The mean squared difference of intermediate features of the EMA network, a mean over its levels.

    Both images are noised alike: the predicted one, split into its scales, with the noise and at the timesteps that the
    step has drawn, so that the true one is what the step has shown the network. Neither fresh numbers nor further
    clocks come in, and an exact prediction has the distance 0. The EMA weights have no gradient.
    """

    name = "features"

    def __init__(self, weight: float, network: ScaleModel, scheduler: DDIMScheduler):
        self.weight, self.network, self.scheduler = weight, network, scheduler
        self.look = network.features

    def distance(self, images: Compared) -> torch.Tensor:
        """Of the outputs `[B, d, h, w]` of every level of the encoder and of the middle: `[B]`."""
        scheduler = self.scheduler
        clean = scheduler.representation.split(images.predicted)
        noisy = map(scheduler.add_noise, clean, images.noise, images.ts)
        shown = tuple(map(scheduler.shown, noisy, images.ts))
        with torch.no_grad():
            true = self.look(images.shown, images.ts, images.labels)
        levels = zip(self.look(shown, images.ts, images.labels), true, strict=True)
        return torch.stack([mean_square(*level) for level in levels]).mean(0)


def terms_of(
    config: dict[str, Any], scheduler: DDIMScheduler, ema: ScaleModel | None, vgg: VGG | None
) -> Sequence[Term]:
    """The terms that a config asks for by `perceptual_weight` and `feature_weight`; 0, or none said, is no term.

    ema, vgg: frozen, on the device of the run; each may be None where no term looks through it.
    """
    terms: list[Term] = []
    if config.get("perceptual_weight"):
        terms.append(Perceptual(config["perceptual_weight"], vgg))
    if config.get("feature_weight"):
        terms.append(FeatureMatching(config["feature_weight"], ema, scheduler))
    return terms
