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
