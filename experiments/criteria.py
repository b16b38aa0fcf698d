"""Every criterion for paths, evaluated at the points of any path, as `experiments/rank_criteria.py` ranks them.

Points are log SNRs `[N + 1, 2]`, fine first. What a criterion reads there comes from maps that are exact (Gaussian
images) or measured on a grid (a network); both are of one kind here, `Maps`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from images.representation import OVERCOMPLETE
from paths.map_interpolation import interpolate_map
from paths.optimal import Readings, kl_cost, trapezoid_cost
from planning.error_map import CHAIN_RULE_FACTORS, MSES, NORMALISATIONS
from planning.map_paths import KLProblem, path_mses, representation_of
from truth.gaussian import Spectrum, jacobian, mse

KL_WEIGHTS = (0.25, 0.5, 0.75, 1.0)


class Maps(NamedTuple):
    """At the points of a path, `[N + 1]` each: squared Jacobian norms and denoising errors, totals per image."""

    norm_64: np.ndarray  # ‖J_HH‖²_F
    norm_32: np.ndarray  # ‖J_LL‖²_F
    mse_64: np.ndarray
    mse_32: np.ndarray
    mse_64_low: np.ndarray  # The part of mse_64 in the low band.


Reader = Callable[[np.ndarray], Maps]


class Sizes(NamedTuple):
    """What the maps sum over, per scale, fine first: pixels H·W and dimensions C·H·W."""

    pixels: tuple[int, int]
    dims: tuple[int, int]


def gaussian_reader(spectrum: Spectrum) -> Reader:
    """The exact maps of Gaussian images."""

    def read(points: np.ndarray) -> Maps:
        fine, coarse = torch.from_numpy(points).T
        blocks = jacobian(spectrum, fine, coarse)
        mse_64, mse_32 = mse(spectrum, fine, coarse)
        return Maps(*(v.numpy() for v in (blocks["HH"], blocks["LL"], mse_64, mse_32, 4 * mse_32)))

    return read


def measured_reader(heatmap: dict, log_snr: np.ndarray) -> Reader:
    """The maps of a heatmap file, interpolated between its lines; log_snr `[num_train_timesteps]`.

    Between timesteps the nearest one counts: paths of a network have none. Raises ValueError for a heatmap without
    Jacobians or denoising errors, and for one of residuals.
    """
    if representation_of(heatmap) is not OVERCOMPLETE:
        raise ValueError("Criteria are ranked for over-complete pairs; pass a heatmap of such a model.")
    if not {"jacobian", *MSES} <= heatmap.keys() or "LL" not in heatmap["jacobian"]:
        raise ValueError("This heatmap lacks Jacobians or errors of a scale; compute that of a dual model, --maps all.")
    known = heatmap["log_snr_grid"].numpy()
    start = int(heatmap["t_grid"][0])
    maps = [heatmap["jacobian"]["HH"], heatmap["jacobian"]["LL"], *(heatmap[name] for name in path_mses(heatmap))]
    wanted = log_snr[start::-1]  # Rising.
    tables = interpolate_map(np.stack([m.numpy() for m in maps]), known, wanted)

    def read(points: np.ndarray) -> Maps:
        fine, coarse = (np.abs(wanted - points[:, s, None]).argmin(1) for s in (0, 1))
        return Maps(*tables[:, fine, coarse])

    return read


def sizes(num_dims: int, channels: int = 3) -> Sizes:
    """Of fine images of so many dimensions and their 2x2 means."""
    dims = (num_dims, num_dims // 4)
    return Sizes((dims[0] // channels, dims[1] // channels), dims)


def _published(maps: Maps, points: np.ndarray, size: Sizes, factor: str, normalisation: str, coarse: bool) -> float:
    weight = CHAIN_RULE_FACTORS[factor](np.exp(points))  # [N+1, 2]
    divide = NORMALISATIONS[normalisation]
    errors = [
        norm / divide(pixels, dims) * weight[:, s]
        for s, (norm, pixels, dims) in enumerate(zip(maps[:2], size.pixels, size.dims, strict=True))
    ]
    return _sum(trapezoid_cost, Readings(errors[0], errors[1] * coarse, points[:, 0], points[:, 1]))


def _kl(maps: Maps, points: np.ndarray, weight: float, symmetric: bool, bands: bool) -> float:
    if bands:
        problem = KLProblem.of_maps(maps.mse_64, maps.mse_32, maps.mse_64_low, np.exp(points), weight)
        maps = maps._replace(mse_64=problem.mse_64, mse_32=problem.mse_32)
    readings = Readings(maps.mse_64, maps.mse_32, *np.exp(points).T)
    return _sum(functools.partial(kl_cost, weight=weight, symmetric=symmetric, bands=bands), readings)


def _sum(step: Callable, readings: Readings) -> float:
    start, end = (Readings(*(values[part] for values in readings)) for part in (slice(None, -1), slice(1, None)))
    return float(np.sum(step(start, end)))


def content_free(points: np.ndarray, size: Sizes) -> Maps:
    """Maps of a network with J = I/√(1-ᾱ), which has learnt nothing about images: ‖J‖²_F = C·H·W (1 + SNR)."""
    norms = np.array(size.dims) * (1 + np.exp(points))  # [N+1, 2]
    return Maps(norms[:, 0], norms[:, 1], *np.full((3, len(points)), math.nan))


def evaluate(points: np.ndarray, read: Reader, size: Sizes) -> dict[str, float]:
    """Cost of a path by every criterion.

    Published: DP-64 and DP-Total with factors A to D, DP-Total in three normalisations; the same of factor B for the
    content-free network; KL by weight p, over scales and over bands, and the second form of p = 0.
    """
    maps, empty = read(points), content_free(points, size)
    costs = {}
    for factor in CHAIN_RULE_FACTORS:
        costs[f"DP-64 {factor}"] = _published(maps, points, size, factor, "published", coarse=False)
        for normalisation in NORMALISATIONS:
            name = f"DP-Total {factor} {normalisation}"
            costs[name] = _published(maps, points, size, factor, normalisation, coarse=True)
    costs["J = I DP-64 B"] = _published(empty, points, size, "B", "published", coarse=False)
    for normalisation in NORMALISATIONS:
        name = f"J = I DP-Total B {normalisation}"
        costs[name] = _published(empty, points, size, "B", normalisation, coarse=True)
    costs["KL p=0"] = _kl(maps, points, 0.0, symmetric=False, bands=False)
    costs["KL p=0 symmetric"] = _kl(maps, points, 0.0, symmetric=True, bands=False)
    for weight in KL_WEIGHTS:
        costs[f"KL p={weight:g} scales"] = _kl(maps, points, weight, symmetric=True, bands=False)
        costs[f"KL p={weight:g} bands"] = _kl(maps, points, weight, symmetric=True, bands=True)
    return costs
