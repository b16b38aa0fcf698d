"""Exact log-likelihoods of images under a model by its probability-flow equation, and the noise that they come from.

A walk along a path upwards, from timestep 0 to pure noise, takes the images to their latents and adds up how volumes
change on the way (arXiv 2011.13456, eq. 39):

    log p(x) = log prior(z_T) + ∫ div u dtau + D log alpha_0,    dz = u dtau,    z_0 = alpha_0 x

with u = alpha' x0 + sigma' ε the velocity, tau = t / (T - 1), the prior N(0, size²) that sampling starts from
(`scheduler.prior`), and D dimensions. "Timestep 0" is in flow half a timestep inside, where there is noise. Of two
scales all that move on a step of the path do so at once, each at its own time, and the divergence is that of them all.

The divergence is a mean of vᵀ (J v) over random directions v, J = du/dz, E v vᵀ = 1 (Hutchinson; arXiv 1810.01367), or
a sum over all directions of a basis, which is exact.

Of the residual pair the fine scale r = x - up(c) lives in the subspace of details, of 3/4 of the dimensions D of the
image, and so do its directions. In an orthonormal Haar basis the image has the details of r, whose lengths are those of
the details themselves, and low coefficients l = 2 c. So dl = 2 dc in each of D/4 dimensions, and

    log p(x) = log p(r, c) - (D/4) log 2.

The over-complete pair says more numbers than an image has: no density of images follows from one of pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusion.adaptive import (
    LEAST_TOLERANCE,
    MOST_CALLS,
    TOLERANCE,
    Calls,
    Line,
    check_tolerance,
    solve_each,
)
from diffusion.sampler import SeededNoise
from images.representation import Images, Overcomplete
from paths.path import Path
from scheduler import DDIMScheduler, Denoiser

GREY_LEVEL = 1 / 127.5  # Between two levels of 8 bits, of images in [-1, 1].
# Streams of random numbers of an image.
DEQUANTISATION, DIRECTIONS = 0, 1


class Likelihood(NamedTuple):
    """What `log_likelihood` returns."""

    log_likelihood: torch.Tensor  # float64 [B], nats: of the density of images with pixels in [-1, 1]
    latents: Images  # as `encode` returns them
    nfe: torch.Tensor  # int64 [B], network calls for each image


class Encoded(NamedTuple):
    """What `encode` returns."""

    latents: Images  # [B, C, H, W] per scale, fine first: the standard normal noise that `sample` starts from
    nfe: torch.Tensor  # int64 [B], network calls for each image


def why_no_equation(
    num_scales: int,  # that a model reads
    num_predictions: int,  # of them
    subject: str = "Neither latents nor the likelihood of an image are",  # what there is not, and its verb
) -> str:
    """Why models of so many scales follow no equation, as a sentence about what needs one, or an empty text."""
    if num_predictions == num_scales:
        return ""
    return (
        f"{subject} defined for a model that reads {num_scales} scales and predicts {num_predictions}, because the "
        "others follow no equation; take a model that predicts all it reads."
    )


def why_undefined(num_scales: int, num_predictions: int, representation: Overcomplete) -> str:
    """Why models that read and predict so many scales give images no likelihood, as a sentence, or an empty text."""
    if reason := why_no_equation(num_scales, num_predictions):
        return reason
    if num_scales > 1 and representation.fine_share == 1:
        return (
            "The likelihood of an image is not defined for a model of the over-complete pair, whose density is one of "
            "pairs with more numbers than an image has; take a baseline or a model of the residual pair."
        )
    return ""


def dequantised(pixels: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """uint8 `[B, C, H, W]` with noise spread evenly over each grey level: float32, p/127.5 - 1 + (U - 1/2)/127.5.

    The expected log density of these images bounds the log probability of the pixels from below (arXiv 1511.01844,
    section 3.1). Image k depends on its pixels and `seeds[k]` alone.
    """
    draws = (np.random.default_rng((seed, DEQUANTISATION)).random(pixels.shape[1:]) for seed in seeds)
    uniform = torch.from_numpy(np.stack(list(draws)))
    return ((pixels.cpu().double() + uniform - 0.5) * GREY_LEVEL - 1).float()


def bits_per_dim(log_likelihood: torch.Tensor, dims: int) -> torch.Tensor:
    """Bits per dimension of 8-bit images from nats `[B]` of their density in [-1, 1]: -log2 p / D + log2(127.5)."""
    return -log_likelihood / (dims * math.log(2)) - math.log2(GREY_LEVEL)


def encode(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    scales: Images,  # clean, [B, C, H, W] each, fine first
    tolerance: float = TOLERANCE,  # relative and absolute error of a step
    max_calls: int = MOST_CALLS,  # for an image; an evaluation is `denoise.calls` of them, or one
) -> Encoded:
    """The noise of clean images: `decode` along the same path takes it back to them.

    The images come back the nearer the smaller both tolerances. Clean images of the network are not clamped. Raises
    ValueError for another number of scales than the path or the predictions have, a tolerance that float64 cannot meet,
    an image that needs more than `max_calls` calls, and a network that makes one NaN or infinite.
    """
    with torch.no_grad():
        latents, _, calls = _walk_up(denoise, scheduler, path, scales, tolerance, max_calls, None)
    return Encoded(latents, torch.from_numpy(calls.spent))


def log_likelihood(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    scales: Images,  # clean and dequantised, [B, C, H, W] each, fine first, as `representation.split` gives them
    probes: int | None = 1,  # random directions for the divergence; None: all of a basis, which is exact
    seeds: Sequence[int] | None = None,  # of the directions of each image; None: 0, 1, ...
    tolerance: float = TOLERANCE,
    max_calls: int = MOST_CALLS,
) -> Likelihood:
    """log p(image) in nats under the model that `denoise` makes of a process, by the equations of this module.

    denoise: differentiable, `(xs, ts) -> predictions`, one per scale; its clean images are not clamped. Every image
    takes steps of its own and has directions of its own, with coordinates +1 and -1 by its seed that stay the same all
    the way, so that its result depends on itself and its seed alone. A call costs a vector-Jacobian product for every
    direction.
    tolerance: relative and absolute error of a step: of the images, root mean square over their dimensions, and of the
    divergence in nats per dimension, both counted as one.

    Raises ValueError where the likelihood of an image is not defined (`why_undefined`), for fewer than one probe or
    another number of seeds, and what `encode` raises.
    """
    representation, count = scheduler.representation, len(scales[0])
    if reason := why_undefined(len(scales), len(scales), representation):
        raise ValueError(reason)
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count or (probes is not None and probes < 1):
        raise ValueError(f"A likelihood of {count} images needs so many seeds and 1 probe or more, or None for all.")
    directions = _basis(scheduler, scales) if probes is None else _random(scheduler, scales, probes, seeds)
    latents, divergence, calls = _walk_up(denoise, scheduler, path, scales, tolerance, max_calls, directions)

    shares = [representation.fine_share if k == 0 else 1.0 for k in range(len(scales))]
    dims = [round(share * x[0].numel()) for share, x in zip(shares, scales, strict=True)]
    found = torch.from_numpy(divergence) + sum(dims) * math.log(_clean_level(scheduler)[1])
    for latent, t, n in zip(latents, path.points[0], dims, strict=True):
        squares = latent.flatten(1).double().cpu().square().sum(1)
        found -= squares / 2 + n * (math.log(2 * math.pi) / 2 + math.log(prior_size(scheduler, t)))
    found -= sum(dims[1:]) * math.log(2)  # The low coefficients of the image are twice the coarse image.
    return Likelihood(found, latents, torch.from_numpy(calls.spent))


def _clean_level(scheduler: DDIMScheduler) -> tuple[float, float]:
    """The timestep where walks begin, and alpha there."""
    first = scheduler.inside(torch.zeros((), dtype=torch.float64))
    return first.item(), scheduler.to("cpu").curves(first).alpha.item()


def prior_size(scheduler: DDIMScheduler, t: int) -> float:
    """The standard deviation of the noise that sampling starts from at timestep t."""
    return scheduler.to("cpu").prior(torch.ones((), dtype=torch.float64), t).item()


# For a line and some rows of the images, directions of what moves on it, float64 [n, D], and the weight of each.
Directions = Callable[[Line, torch.Tensor], Iterator[tuple[torch.Tensor, float]]]


def _random(scheduler: DDIMScheduler, scales: Images, probes: int, seeds: Sequence[int]) -> Directions:
    source = SeededNoise([(seed, DIRECTIONS) for seed in seeds])
    signs = [tuple(1.0 - 2.0 * (source.draw(x.shape[1:]) < 0).double() for x in scales) for _ in range(probes)]
    drawn = [scheduler.representation.directions(each) for each in signs]

    def directions(line: Line, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
        for each in drawn:
            yield line.pack(tuple(x[rows] for x in each)), 1 / probes

    return directions


def _basis(scheduler: DDIMScheduler, scales: Images) -> Directions:
    def directions(line: Line, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
        for k in line.moving:
            for place in range(scales[k][0].numel()):
                unit = tuple(torch.zeros(1, *x.shape[1:], dtype=torch.float64) for x in scales)
                unit[k].view(-1)[place] = 1
                direction = line.pack(scheduler.representation.directions(unit))
                if direction.any():
                    yield direction.expand(len(rows), -1), 1.0

    return directions


def _walk_up(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    scales: Images,
    tolerance: float,
    max_calls: int,
    directions: Directions | None,  # None: no divergence
) -> tuple[Images, np.ndarray, Calls]:
    """Standard normal latents, the divergence float64 `[B]` added up, and the calls."""
    check_tolerance(tolerance)
    if path.num_scales != len(scales):
        raise ValueError(f"The path has {path.num_scales} scale(s) but the images have {len(scales)}.")
    count, device, representation = len(scales[0]), scales[0].device, scheduler.representation
    tables = scheduler.to(device).unclamped()
    calls = Calls(count, max_calls, tolerance, "An image")
    first, alpha = _clean_level(scheduler)
    xs = tuple(alpha * x for x in representation.project(scales))
    divergence, calls_each = np.zeros(count), getattr(denoise, "calls", 1)
    everyone = torch.arange(count)

    def clean(xs: Images, ts: tuple[torch.Tensor, ...]) -> Images:
        ts = tuple(t.to(device) for t in ts)
        predictions = denoise(xs, ts)
        if reason := why_no_equation(len(xs), len(predictions)):
            raise ValueError(reason)
        predictions = tuple(prediction.to(x.dtype) for prediction, x in zip(predictions, xs, strict=True))
        return representation.project(tables.predict_clean(predictions, ts, xs))

    # In flow there is no noise at timestep 0.
    points = [np.maximum(np.array(point, np.float64), first) for point in reversed(path.points)]
    for starts, ends in zip(points, points[1:], strict=False):
        line = Line(scheduler, starts, ends, xs)
        if not line.moving:
            continue
        dims = sum(xs[k][0].numel() for k in line.moving)

        def slopes(rows: np.ndarray, s: np.ndarray, states: np.ndarray, line: Line = line, dims: int = dims):
            calls.spend(rows, calls_each)
            chosen, times = torch.from_numpy(rows), line.times(s)
            states = torch.from_numpy(states[:, :dims]).clone()
            with torch.set_grad_enabled(directions is not None):
                states.requires_grad_(directions is not None)
                found = line.slopes(times, states, clean(line.images(chosen, states), times))
            if directions is None:
                return found.numpy()
            trace = torch.zeros(len(rows), dtype=torch.float64)
            for direction, weight in directions(line, chosen):
                (product,) = torch.autograd.grad(found, states, direction, retain_graph=True)
                trace += weight * (product * direction).sum(1)
            return torch.cat([found.detach(), trace[:, None] / dims], 1).numpy()

        states, allowed = line.pack(xs).numpy(), tolerance
        if directions is not None:
            states = np.concatenate([states, np.zeros((count, 1))], 1)
            # The last column weighs as much as all others, but for what rounding cannot meet.
            allowed = np.append(np.full(dims, tolerance), max(tolerance / dims**0.5, LEAST_TOLERANCE / 10))
        states = solve_each(slopes, states, allowed)
        xs = line.images(everyone, torch.from_numpy(states[:, :dims]))
        if directions is not None:
            divergence += dims * states[:, dims]
    return tuple(x / prior_size(scheduler, t) for x, t in zip(xs, path.points[0], strict=True)), divergence, calls
