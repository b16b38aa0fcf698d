"""Small models whose truth is known, with the dense matrices that say it again: images [B, C, H, W] and their modes."""

import itertools
import math

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F

from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser, Spectrum

C, H, W = 2, 4, 6
N_64, N_32 = C * H * W, C * H * W // 4
INF = math.inf
REPRESENTATIONS = ("overcomplete", "residual")
LOG_4 = math.log(4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def variances(*shape, seed=1):
    """Spread over three decades, so that every noise level resolves some modes and not others."""
    return 10 ** (3 * torch.rand(shape, generator=rng(seed), dtype=torch.float64) - 2)


def parts():
    rotation = torch.linalg.qr(torch.randn(C, C, generator=rng(3), dtype=torch.float64)).Q
    mean = torch.randn(C, H, W, generator=rng(4), dtype=torch.float64)
    return variances(C, H // 2, W // 2), variances(3, C, H // 2, W // 2, seed=2), rotation, mean


def small_spectrum():
    return Spectrum(torch.tensor([8.0, 0.7, 0.05]), torch.tensor([0.3, 0.02]))


def dense_basis(rotation):
    """Rows are modes as flat images, low band first: DCT of SciPy, Haar patterns by Kronecker product."""
    patterns = [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]
    rows = []
    for pattern, c, i, j in itertools.product(patterns, range(C), range(H // 2), range(W // 2)):
        coefficients = np.zeros((H // 2, W // 2))
        coefficients[i, j] = 1
        band = np.kron(scipy.fft.idctn(coefficients, norm="ortho"), np.array(pattern) / 2)
        rows.append(np.multiply.outer(rotation[c].numpy(), band).ravel())
    return torch.from_numpy(np.array(rows))


def pooling():
    eye = torch.eye(N_64, dtype=torch.float64).view(N_64, C, H, W)
    return F.avg_pool2d(eye, 2).flatten(1).T  # [N_32, N_64]


def fine_of(representation):
    """The matrix [N_64, N_64] that takes an image to its fine scale; 4 poolingᵀ copies a coarse pixel to its block."""
    eye = torch.eye(N_64, dtype=torch.float64)
    return eye if representation == "overcomplete" else eye - 4 * pooling().T @ pooling()


def compose(images, representation):
    """Fine images [B, N_64] of both scales."""
    fine, coarse = (x.flatten(1) for x in images)
    return fine if representation == "overcomplete" else fine + 4 * coarse @ pooling()


def model(scheduler=None, centred=False, representation="overcomplete"):
    """The denoiser, its dense basis and variances [N_64]."""
    low, high, rotation, mean = parts()
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(
        scheduler, low, high, rotation, None if centred else mean, representation=representation
    )
    return denoiser, dense_basis(rotation), torch.cat([low.flatten(), high.flatten()])


def noisy(scheduler, t_64, t_32, count=3):
    x = torch.randn(count, C, H, W, generator=rng(7), dtype=torch.float64)
    y = torch.randn(count, C, H // 2, W // 2, generator=rng(8), dtype=torch.float64)
    return (x, y), (torch.full((count,), t_64), torch.full((count,), t_32))


def tied(line):
    """The points at which both scales of the residual pair are parts of one image with isotropic noise."""
    return torch.stack([line, line + LOG_4], 1)


def data_set(count=7):
    return torch.rand(count, C, H, W, generator=rng(12), dtype=torch.float64) * 2 - 1


class Mixture:
    """Images of K classes, each about a mean of its own with independent pixels of one deviation, in one scale or two.

    `denoise` is the posterior mean of such a class, or of all for the null class K, as a prediction; `log_probability`
    the Bayes classifier of the noisy images. In float64, with the dense covariance of both scales.
    """

    def __init__(self, scheduler, num_scales=2, num_classes=3, deviation=0.4):
        self.scheduler, self.num_scales, self.null = scheduler, num_scales, num_classes
        fine = fine_of(scheduler.representation.name if num_scales > 1 else "overcomplete")
        parts = torch.cat([fine, pooling()][:num_scales])  # [N, N_64]
        means = torch.randn(num_classes, N_64, generator=rng(21), dtype=torch.float64) / 8
        self.means = means @ parts.T  # [K, N]
        self.cov = deviation**2 * parts @ parts.T  # [N, N]
        self.log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:num_classes].log()
        self.noise = torch.block_diag(fine, torch.eye(N_32, dtype=torch.float64))[: len(parts), : len(parts)]
        self.shapes = [(C, H, W), (C, H // 2, W // 2)][:num_scales]

    def draw(self, ts, count=4):
        """Noisy images at timesteps, one each, and their classes."""
        labels = torch.arange(count) % self.null
        root = torch.linalg.cholesky(self.cov + 1e-12 * torch.eye(len(self.cov), dtype=torch.float64))
        z = torch.randn(count, len(root), generator=rng(22), dtype=torch.float64)
        alpha, sigma = self._scales(ts)
        noise = torch.randn(z.shape, generator=rng(23), dtype=torch.float64) @ self.noise
        return self._split((self.means[labels] + z @ root.T) * alpha + sigma * noise), labels

    def _split(self, flat):
        parts = flat.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))

    def _scales(self, ts):
        """alpha and sigma of every dimension, [N] each."""
        sizes = torch.tensor([math.prod(shape) for shape in self.shapes])
        one = torch.ones(1, dtype=torch.float64)
        pairs = (torch.cat(self.scheduler.scales(t[:1], one)) for t in ts)
        return torch.stack(list(pairs), 1).repeat_interleave(sizes, 1)

    def _residuals(self, xs, ts):
        """x - alpha mean [B, K, N], the inverse of the covariance of x [N, N], and alpha [N]."""
        alpha, sigma = self._scales(ts)
        covariance = alpha[:, None] * self.cov * alpha + sigma[:, None] * self.noise * sigma
        flat = torch.cat([x.flatten(1) for x in xs], 1)
        return flat[:, None] - alpha * self.means, torch.linalg.pinv(covariance, rtol=1e-13, hermitian=True), alpha

    def log_posterior(self, xs, ts):
        """log p(class | noisy images) [B, K]."""
        away, inverse, _ = self._residuals(xs, ts)
        return (self.log_prior - (away @ inverse * away).sum(2) / 2).log_softmax(1)

    def log_probability(self, xs, ts, labels):
        return self.log_posterior(xs, ts).gather(1, labels[:, None])[:, 0]

    def clean(self, xs, ts, labels=None):
        """E[x0 | noisy images, class], by scale; of the null class and without labels whatever the class."""
        away, inverse, alpha = self._residuals(xs, ts)
        by_class = self.means + away @ inverse @ (alpha[:, None] * self.cov)  # [B, K, N]
        weights = self.log_posterior(xs, ts).exp()  # [B, K]
        if labels is not None:
            known = F.one_hot(labels, self.null + 1)[:, : self.null].double()
            weights = torch.where((labels == self.null)[:, None], weights, known)
        return self._split((weights[:, :, None] * by_class).sum(1))

    def denoise(self, xs, ts, labels=None):
        predictions = []
        for x, x0, t in zip(xs, self.clean(xs, ts, labels), ts, strict=True):
            alpha, sigma = self.scheduler.scales(t, x)
            predictions.append(self.scheduler.target(x0, (x - alpha * x0) / sigma, t))
        return tuple(predictions)


class Correlated:
    """Grey images of side x side pixels with any covariance [N, N] and mean 0, in one scale or two.

    `denoise` is the posterior mean, as a prediction, by a dense matrix for every pair of timesteps; all images of a
    call have the same ones. With `consistent`, for scales with one clock, the clean image is that of which
    `consistency_function` makes the end of the ordinary equation at timestep 0, and no mean.
    """

    def __init__(self, scheduler, covariance, num_scales=1, consistent=False):
        self.scheduler, self.consistent, self.gains = scheduler, consistent, {}
        side = math.isqrt(len(covariance))
        self.shapes = [(1, side, side), (1, side // 2, side // 2)][:num_scales]
        unit = torch.eye(len(covariance), dtype=torch.float64).view(-1, 1, side, side)
        split = scheduler.representation.split(unit)[:num_scales] if num_scales == 2 else (unit,)
        parts = torch.cat([each.flatten(1) for each in split], 1).T  # [N, pixels]
        self.sizes = torch.tensor([math.prod(shape) for shape in self.shapes])
        self.cov = parts @ covariance @ parts.T
        fine = parts[: len(unit)]
        self.noise = torch.block_diag(fine @ fine.T, torch.eye(len(parts) - len(fine), dtype=torch.float64))

    def _gain(self, point):
        if point not in self.gains:
            t = torch.tensor(point, dtype=torch.float64)
            whole = [int(each) for each in point]
            exact = all(k == each for k, each in zip(whole, point, strict=True))
            curves = (self.scheduler.alphas[whole], self.scheduler.sigmas[whole]) if exact else self.scheduler.curves(t)
            alpha, sigma = (each.repeat_interleave(self.sizes) for each in curves[:2])
            noisy = alpha[:, None] * self.cov * alpha + sigma[:, None] * self.noise * sigma
            if self.consistent:
                level, least = (sigma / alpha)[0], self.scheduler.sigmas[0] / self.scheduler.alphas[0]
                values, vectors = torch.linalg.eigh(self.cov)
                end = (vectors * ((values + least**2) / (values + level**2)).sqrt()) @ vectors.T
                unit = torch.eye(len(self.cov), dtype=torch.float64)
                self.gains[point] = (unit - (unit - end) / (1 - least / level)) / alpha
            else:
                self.gains[point] = self.cov * alpha @ torch.linalg.pinv(noisy, rtol=1e-13, hermitian=True)
        return self.gains[point]

    def denoise(self, xs, ts):
        gain = self._gain(tuple(t[0].item() for t in ts))
        x0s = (torch.cat([x.flatten(1) for x in xs], 1) @ gain.T).split(self.sizes.tolist(), 1)
        predictions = []
        for x, x0, t in zip(xs, x0s, ts, strict=True):
            alpha, sigma = self.scheduler.scales(t, x)
            x0 = x0.view(x.shape)
            predictions.append(self.scheduler.target(x0, (x - alpha * x0) / sigma, t))
        return tuple(predictions)
