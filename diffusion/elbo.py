"""The variational bound of the likelihood of images under the chain of DDPM along a path.

The chain of `Ancestral` takes noisy images from each point of a path to the next, and a last step takes those of
timestep 0 to the image. With the true chain q as the proposal, log p(x) is at least

    - KL(q(z_T | x) || prior) - Σ KL(q(z_s | z_t, x) || p(z_s | z_t)) + log p(x | z_0)

in expectation over q (arXiv 2006.11239, eq. 5). True steps are Gaussians of variance beta tilde. With γ = alpha² /
sigma², r = beta tilde / (variance of the step) = 1, or for beta (1 + γ_t) / (1 + γ_s), and d dimensions,

    KL = [d (r - 1 - log r) + r (γ_s - γ_t) |x0 - x̂0|²] / 2,

x̂0 the clean image that the network sees in z_t, clamped where sampling clamps it (for r = 1: arXiv 2107.00630, eq. 14).
Scaled images have the same KL, so that every process is the same chain. Two scales take their steps at once, each at
its own time: their noise is independent, the KL is the sum, and one that rests adds nothing.

A learned variance is beta_tilde (beta / beta_tilde)^v, with a v of every number (arXiv 2102.09672, eq. 15): then r =
((1 + γ_t) / (1 + γ_s))^v is one too, and d (r - 1 - log r) a sum over them. Of the residual pair v is one for a block
of 2x2 pixels of the fine scale, on which the noise has three dimensions: each pixel counts three quarters.

The last step has the mean x̂0 and the variance beta (arXiv 2006.11239, eq. 13), or for beta tilde, which is 0 there,
that of the step before (as the code of arXiv 2102.09672); a learned one lies between the two. Of 8-bit images
p(x | z_0) is the probability of their grey levels, a Gaussian integrated over the width of each, to infinity at both
ends; of others its density. The steps of the residual pair (r, c) leave on a block of 2x2 pixels of x = r + up(c) the
covariance

    v_r (I - 1 1ᵀ / 4) + v_c 1 1ᵀ,

whose density is a product over the four pixels, each given those before it. So is the probability of grey levels here:
each is given the values of those before it. It sums to 1 over all images.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import to_float
from diffusion.likelihood import GREY_LEVEL, prior_size, why_undefined
from diffusion.sampler import SeededNoise
from diffusion.solvers import LEARNED, VARIANCES
from diffusion.step import variance_span
from images.representation import Images
from paths.path import Path
from scheduler import NO_VARIANCE, DDIMScheduler, Denoiser

LAST_DRAWS = 2  # Of the noise of the last step, so that there is a difference to estimate an error from.
# Of pixels in [-1, 1], for the guess of how much a step counts.
GUESSED_VARIANCE = 0.25
# Streams of random numbers of an image, beside those of `diffusion.likelihood`.
TIMESTEPS, NOISE = 2, 3


class Chain(NamedTuple):
    """The chain of DDPM along a path of N steps: what of its steps the bound needs, by scale, fine first."""

    points: tuple[tuple[int, ...], ...]  # N + 1 points of timesteps
    snr: torch.Tensor  # float64 [N + 1, scales]
    ratios: torch.Tensor  # float64 [N, scales]: variance of the true step to that of the chain, 1 where a scale rests
    last: tuple[float, ...]  # variances of the last step, from timestep 0 to the image
    # Of a learned variance what is said so far is of beta tilde, and exp(v span) times that is the variance.
    spans: torch.Tensor | None = None  # float64 [N + 1, scales], those of the last step at the end

    @property
    def gains(self) -> torch.Tensor:
        """SNR at the end of each step less that at its start, float64 `[N, scales]`."""
        return self.snr.diff(dim=0)


class Bound(NamedTuple):
    """What `elbo` returns, float64 `[B]` in nats but for the calls; `elbo` is -(prior + steps + last)."""

    elbo: torch.Tensor  # at most log p(image), in expectation
    error: torch.Tensor  # standard error by the draws of timesteps and noise, rather too large than too small
    prior: torch.Tensor
    steps: torch.Tensor
    last: torch.Tensor
    nfe: torch.Tensor  # int64, network calls for each image


def ddpm_chain(scheduler: DDIMScheduler, path: Path, variance: str = "beta") -> Chain:
    """The chain along a path with the variance "beta", "beta_tilde" or "learned", which the network says.

    The chain of T steps of the paper is that of all timesteps, which a diagonal of T - 1 steps visits. Raises
    ValueError for another variance, a process without noise at timestep 0, and for a scale that never moves unless the
    variance is beta.
    """
    if variance not in VARIANCES:
        raise ValueError(f"Unknown variance '{variance}'; choose one of {', '.join(VARIANCES)}.")
    alphas, sigmas = scheduler.alphas.cpu(), scheduler.sigmas.cpu()
    if not sigmas[0]:
        raise ValueError(
            f"The process '{scheduler.process_name}' has no chain of DDPM, because there is no noise at timestep 0 for "
            "a last step to take away; use --method ode."
        )
    points = torch.tensor(path.points)  # [N + 1, scales]
    snr = (alphas / sigmas).square()[points]
    before, after = snr[:-1], snr[1:]
    ratios = (1 + before) / (1 + after) if variance == "beta" else torch.ones_like(before)
    last = []
    for scale in range(path.num_scales):
        if variance == "beta":
            last.append(1 / (1 + snr[-1, scale].item()))  # 1 - abar.
            continue
        moves = (before[:, scale] != after[:, scale]).nonzero()
        if not len(moves):
            raise ValueError(
                "A scale that never moves has no step before the last, whose beta tilde it could have; use beta."
            )
        k = moves[-1].item()
        last.append((sigmas[0].square() * (1 - before[k, scale] / after[k, scale])).item())
    if variance != LEARNED:
        return Chain(path.points, snr, ratios, tuple(last))
    spans = torch.cat(
        [variance_span(before, after), -torch.log1p(snr[-1:]) - torch.tensor([last], dtype=torch.float64).log()]
    )
    return Chain(path.points, snr, ratios, tuple(last), spans)


def check_timesteps(num_timesteps: int, chain: Chain) -> None:
    """Raise ValueError unless so many steps of a chain can be drawn."""
    most = len(chain.ratios) - 1
    if not 2 <= num_timesteps <= most:
        refusal = f"--timesteps {num_timesteps} cannot be drawn of a chain of {most + 1} step{'s' if most else ''}"
        if most < 2:
            raise ValueError(f"{refusal}: a chain of so many steps is computed whole; pass --timesteps all.")
        raise ValueError(f"{refusal}; choose 2 to {most}, or all.")


@torch.no_grad()
def elbo(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    chain: Chain,
    images: torch.Tensor,  # [B, C, H, W]: uint8, or floats in [-1, 1]
    num_timesteps: int | None = None,  # steps drawn for each image, 2 to N - 1; None: all N
    seeds: Sequence[int] | None = None,  # of what is random for each image; None: 0, 1, ...
) -> Bound:
    """An unbiased estimate of the bound of the log probability of bytes, or of the log density of floats.

    denoise: `(xs, ts) -> predictions`, one for each scale of the chain, called at timesteps int64 `[B]` by scale; of 2C
    channels if the chain has a learned variance, which else is left aside. Every
    term has noise of its own. Steps are drawn in strata of equal shares of what they count for white images of variance
    GUESSED_VARIANCE, mixed with an even share of all; each is divided by its chance. The noise of the last step is
    drawn LAST_DRAWS times. What is random for an image depends on its seed alone.

    Raises ValueError where the likelihood of an image is not defined (`why_undefined`), for another number of seeds or
    of timesteps, for a network that says no variance where the chain has a learned one, and for one that makes an image
    NaN or infinite.
    """
    count, num_scales, representation = len(images), len(chain.points[0]), scheduler.representation
    if reason := why_undefined(num_scales, num_scales, representation):
        raise ValueError(reason)
    num_steps = len(chain.ratios)
    if num_timesteps is not None:
        check_timesteps(num_timesteps, chain)
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise ValueError(f"A bound of {count} images needs so many seeds, not {len(seeds)}.")

    values, decoder = (to_float(images), log_probability) if images.dtype == torch.uint8 else (images, log_density)
    scales = representation.split(values) if num_scales > 1 else (values,)
    parts = [representation.fine_share if k == 0 else 1.0 for k in range(num_scales)]
    dims = torch.tensor([round(part * x[0].numel()) for part, x in zip(parts, scales, strict=True)])
    tables, noise = scheduler.to(values.device), SeededNoise([(seed, NOISE) for seed in seeds])
    points = torch.tensor(chain.points)

    def see(at: torch.Tensor) -> tuple[Images, Images | None]:
        """The clean images seen at points `[B]` of the chain, with fresh noise, and logs of variances by beta tilde."""
        ts = tuple(points[at].T.to(values.device))
        drawn = representation.project(tuple(noise.draw(x.shape[1:], x.device).to(x.dtype) for x in scales))
        xs = tuple(tables.add_noise(x, n, t) for x, n, t in zip(scales, drawn, ts, strict=True))
        predictions, shares = tables.split_variance(denoise(xs, ts), xs)
        if len(predictions) < num_scales:
            raise ValueError(why_undefined(num_scales, len(predictions), representation))
        predictions = tuple(each.to(x.dtype) for each, x in zip(predictions, xs, strict=True))
        x0s = representation.project(tables.predict_clean(predictions, ts, xs))
        if chain.spans is None:
            return x0s, None
        if shares is None:
            raise ValueError(NO_VARIANCE)
        spans = chain.spans[at].T[..., None, None, None]  # [scales, B, 1, 1, 1]
        return x0s, tuple(span * share.double().cpu() for span, share in zip(spans, shares, strict=True))

    constants = (dims * (chain.ratios - 1 - chain.ratios.log())).sum() / 2  # Without a network, and so never drawn.
    weights = chain.ratios * chain.gains / 2  # [N, scales]
    shares = _shares(chain, dims)
    if num_timesteps is None:
        chosen, chances = torch.arange(num_steps).expand(count, -1), torch.ones(count, num_steps, dtype=torch.float64)
    else:
        chosen = _draw_steps(shares, num_timesteps, seeds)  # [B, K]
        chances = num_timesteps * shares[chosen]  # How often each is drawn in expectation, [B, K].
    terms = torch.zeros(chosen.shape, dtype=torch.float64)
    for k, at in enumerate(chosen.T):
        x0s, logs = see(at)
        if logs is None:
            errors = torch.stack([_squares(x - x0) for x, x0 in zip(scales, x0s, strict=True)], 1)  # [B, scales]
            terms[:, k] = (weights[at] * errors).sum(1) / chances[:, k]
            continue
        for part, x, x0, log, gain in zip(parts, scales, x0s, logs, chain.gains[at].T, strict=True):
            errors = gain[:, None, None, None] * (x - x0).double().square().cpu()  # [B, C, H, W]
            terms[:, k] += kl_of_step(log, errors, part).flatten(1).sum(1) / chances[:, k]

    exact = (images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()).cpu()
    ends = torch.full((count,), num_steps)
    ends_drawn = []
    for _ in range(LAST_DRAWS):
        x0s, logs = see(ends)
        variances = chain.last
        if logs is not None:
            variances = tuple(smallest * log.exp() for smallest, log in zip(chain.last, logs, strict=True))
        ends_drawn.append(-_last_step(exact, representation.compose(x0s).double().cpu(), variances, decoder))
    lasts = torch.stack(ends_drawn, 1)  # [B, LAST_DRAWS]
    prior, steps, last = _prior(scheduler, chain, scales, dims), constants + terms.sum(1), lasts.mean(1)
    bound = -(prior + steps + last)
    if not bound.isfinite().all():
        raise ValueError(
            "The network makes an image NaN or infinite on its way; use another checkpoint, or --precision fp32."
        )
    # Neighbours for their shares differ by their noise, and a little by where they are, which makes this too large.
    level = shares[chosen] / chances
    drawn = ((terms / level).diff(dim=1).square() * level[:, 1:] * level[:, :-1]).sum(1) / 2
    error = (drawn * terms.shape[1] / max(terms.shape[1] - 1, 1) + lasts.var(1) / LAST_DRAWS).sqrt()
    nfe = torch.full((count,), terms.shape[1] + LAST_DRAWS)
    return Bound(bound, error, prior, steps, last, nfe)


def bits_of_grey_levels(log_probability: torch.Tensor, dims: int) -> torch.Tensor:
    """Bits per dimension from nats of the probability of grey levels of images of so many dimensions: -log2 P / D."""
    return -log_probability / (dims * math.log(2))


def kl_of_step(log: torch.Tensor, errors: torch.Tensor, part: float = 1.0) -> torch.Tensor:
    """KL of the true step from one whose variance is exp(log) times as large, number by number, in nats.

    errors: (γ_s - γ_t) (x0 - x̂0)². part: dimensions of a scale by its numbers. `[B, C, H, W]` all.
    """
    return (part * (torch.expm1(-log) + log) + (-log).exp() * errors) / 2


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).double().square().sum(1).cpu()  # [B]


def _shares(chain: Chain, dims: torch.Tensor) -> torch.Tensor:
    """What share of the sum each step is guessed to have, `[N]`."""
    guessed = (dims * chain.ratios * chain.gains / (1 / GUESSED_VARIANCE + chain.snr[:-1])).sum(1)
    return (guessed / guessed.sum() + 1 / len(guessed)) / 2  # The even half keeps every step within reach.


def _draw_steps(shares: torch.Tensor, count: int, seeds: Sequence[int]) -> torch.Tensor:
    """Indices of steps `[B, count]` in order, one in each stratum of equal shares."""
    edges = shares.cumsum(0).numpy()
    rows = []
    for seed in seeds:
        places = np.arange(count) + np.random.default_rng((seed, TIMESTEPS)).random(count)
        rows.append(np.searchsorted(edges[:-1], places / count, side="right"))
    return torch.from_numpy(np.stack(rows))


def _prior(scheduler: DDIMScheduler, chain: Chain, scales: Images, dims: torch.Tensor) -> torch.Tensor:
    """KL(q(z_T | x) || prior) in nats `[B]`."""
    total = torch.zeros(len(scales[0]), dtype=torch.float64)
    for x, t, n in zip(scales, chain.points[0], dims.tolist(), strict=True):
        size = prior_size(scheduler, t)
        alpha, variance = scheduler.alphas[t].item() / size, (scheduler.sigmas[t].item() / size) ** 2
        total += (n * (variance - 1 - math.log(variance)) + alpha**2 * _squares(x)) / 2
    return total


# log p of values given means and deviations, of one shape or one number.
Decoder = Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], torch.Tensor]


def _last_step(
    images: torch.Tensor, means: torch.Tensor, variances: tuple[float | torch.Tensor, ...], decoder: Decoder
) -> torch.Tensor:
    """log p(x | z_0) in nats `[B]`; images, means: float64 `[B, C, H, W]`; variances: one, or one each, by scale."""
    if len(variances) == 1:
        return decoder(images, means, variances[0] ** 0.5).flatten(1).sum(1)
    fine, coarse = variances
    if isinstance(fine, torch.Tensor):
        fine = fine[..., ::2, ::2]  # One for a block, [B, C, H/2, W/2].
    own, shared = 0.75 * fine + coarse, coarse - fine / 4  # Of a pixel, and between two of a block.
    x, mean = (F.pixel_unshuffle(each, 2).unflatten(1, (-1, 4)) for each in (images, means))  # [B, C, 4, H/2, W/2]
    total = torch.zeros(len(images), dtype=torch.float64)
    for k in range(4):
        gain = shared / (own + (k - 1) * shared)
        given = mean[:, :, k] + gain * (x[:, :, :k] - mean[:, :, :k]).sum(2)
        total += decoder(x[:, :, k], given, (own - k * gain * shared) ** 0.5).flatten(1).sum(1)
    return total


def log_density(x: torch.Tensor, mean: torch.Tensor, deviation: float | torch.Tensor) -> torch.Tensor:
    """log of the Gaussian density in nats, number by number."""
    log = deviation.log() if isinstance(deviation, torch.Tensor) else math.log(deviation)
    return -((x - mean) / deviation).square() / 2 - log - math.log(2 * math.pi) / 2


def log_probability(x: torch.Tensor, mean: torch.Tensor, deviation: float | torch.Tensor) -> torch.Tensor:
    """log probability in nats of the grey levels at x in [-1, 1], number by number: a Gaussian over the width of each.

    Those at both ends reach to infinity (arXiv 2006.11239, eq. 13). Differentiable in mean and deviation.
    """
    half = GREY_LEVEL / 2
    low = torch.where(x < half - 1, -math.inf, (x - half - mean) / deviation)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) / deviation)
    # Mirrored to the lower tail, where small probabilities are not differences of numbers near 1.
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
    below, above = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return above + (-torch.expm1(below - above)).log()
