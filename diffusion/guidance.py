"""Guidance: denoisers round a denoiser that lean towards a class.

    classifier-free  p_u + γ (p_c - p_u), with the predictions of the null class and of the class (arXiv 2207.12598);
                     γ = 0 is unconditional, 1 conditional. Others count w = γ - 1.
    classifier       the score plus γ ∇ log p(class | noisy images), of a classifier of noisy images, by which the noise
                     changes by -σ γ ∇ (arXiv 2105.05233, algorithm 2). In the step of DDPM the mean moves by
                     β / √(1 - β) γ ∇: its algorithm 1 but for the root, with the gradient taken at the noisy image.

Every prediction is affine in the noise, so that the first is the same for all of them. An evaluation counts as `calls`
network calls: two of a batch twice as large are one evaluation, and a classifier is a network too.

Shapes: B images `[B, C, H, W]` per scale, labels int64 `[B]`, the last of which is the null class.
"""

from collections.abc import Callable

import torch

from images.representation import Images
from scheduler import DDIMScheduler, Denoiser, parts_of

# log p(label | noisy images) float `[B]` of noisy images, timesteps and labels; differentiable in the images.
LogProbability = Callable[[Images, Images, torch.Tensor], torch.Tensor]


def _wide(prediction: torch.Tensor) -> torch.Tensor:
    """In single precision or better."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


class ClassifierFree:
    """`denoise` guided by the difference of its own predictions, by the factor `scale` (γ)."""

    calls = 2

    def __init__(self, denoise: Denoiser, null: int, scale: float):
        self.denoise, self.null, self.scale = denoise, null, scale

    def __call__(self, xs: Images, ts: Images, labels: torch.Tensor) -> Images:
        both = torch.cat([torch.full_like(labels, self.null), labels])  # [2B]
        twice = (tuple(torch.cat([each, each]) for each in group) for group in (xs, ts))
        predictions = self.denoise(*twice, both)
        halves = [_wide(each).chunk(2) for each in predictions]
        return tuple(without + self.scale * (told - without) for without, told in halves)


class Unconditional:
    """`denoise` told of no class: γ = 0 at the cost of one call."""

    calls = 1

    def __init__(self, denoise: Denoiser):
        self.denoise = denoise

    def __call__(self, xs: Images, ts: Images, labels: torch.Tensor) -> Images:
        return self.denoise(xs, ts)


class OfClass:
    """`denoise`, which takes labels, told that all images are of one class; itself it takes none."""

    def __init__(self, denoise: Denoiser, label: int):
        self.denoise, self.label = denoise, label
        self.calls = getattr(denoise, "calls", 1)

    def __call__(self, xs: Images, ts: Images) -> Images:
        return self.denoise(xs, ts, torch.full((len(xs[0]),), self.label, device=xs[0].device))  # int64 [B]


class ClassifierGuided:
    """`denoise`, which is told the classes or not, guided by a classifier of noisy images by the factor `scale` (γ).

    log_probability: of the labels, given what the process of `scheduler` makes of images at timesteps; a scale that it
    does not read is left as it is. What a prediction holds beyond the channels of the image is, too.
    """

    def __init__(self, denoise: Denoiser, log_probability: LogProbability, scheduler: DDIMScheduler, scale: float):
        self.denoise, self.log_probability, self.scale = denoise, log_probability, scale
        self.calls = getattr(denoise, "calls", 1) + 1
        self._tables = {}
        self._scheduler = scheduler

    def __call__(self, xs: Images, ts: Images, labels: torch.Tensor) -> Images:
        device = xs[0].device
        if device not in self._tables:
            self._tables[device] = self._scheduler.to(device)
        scheduler = self._tables[device]
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in xs)
            total = self.log_probability(leaves, ts, labels).sum()
            gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        # Noise of the fine scale has no other directions than its subspace, and neither has its score.
        gradients = scheduler.representation.project(gradients)
        shifts = (scheduler.shift(self.scale * each, t, x) for each, t, x in zip(gradients, ts, xs, strict=True))
        outputs = self.denoise(xs, ts, labels)
        predictions, said = parts_of(outputs, xs)
        moved = tuple(_wide(prediction) + shift for prediction, shift in zip(predictions, shifts, strict=False))
        # What is said of variances is of the step, whose mean alone is moved.
        if said is None:
            return moved
        return tuple(torch.cat([one, v.to(one)], 1) for one, v in zip(moved, said, strict=True))
