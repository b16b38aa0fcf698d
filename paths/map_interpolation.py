"""Interpolation of positive maps over the plane of two log SNRs.

Maps of errors and of squared Jacobian norms span orders of magnitude and vary slowly with the log SNR of each
scale, so that they are interpolated as logarithms over log SNR.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator


def interpolate_map(
    values: ArrayLike,  # [..., m, m], > 0 or all zero, at the pairs of `known`
    known: ArrayLike,  # [m], log SNR of the lines of both axes, rising
    wanted: ArrayLike,  # [n], log SNR, within those of `known`
    wanted_32: ArrayLike | None = None,  # [k], of the last axis; None for those of `wanted`
) -> np.ndarray:
    """Maps `[..., m, m]` at every pair of `wanted` and `wanted_32`, float64 `[..., n, k]`.

    Piecewise cubic Hermite interpolation (Fritsch and Carlson 1980) of the logarithm along one axis after the
    other: smooth, equal to the map on its own lines, and without extrema that the map does not have. A map of
    zeros stays zero. Raises ValueError for other shapes, lines that do not rise, a wanted log SNR outside the
    known ones, and values that are negative, not finite, or zero beside positive ones.
    """
    values, known, *axes = (
        np.asarray(v, dtype=np.float64) for v in (values, known, wanted, wanted if wanted_32 is None else wanted_32)
    )
    if known.ndim != 1 or len(known) < 2 or values.shape[-2:] != (len(known),) * 2:
        raise ValueError(f"values have shape {list(values.shape)} but known has {list(known.shape)}; pass [..., m, m]")
    if not (np.diff(known) > 0).all():
        raise ValueError("known must rise strictly from noise to clean")
    tolerance = 1e-9 * (known[-1] - known[0])
    if min(map(np.min, axes)) < known[0] - tolerance or max(map(np.max, axes)) > known[-1] + tolerance:
        asked, there = (f"{v.min():.4g} to {v.max():.4g}" for v in (np.concatenate(axes), known))
        raise ValueError(f"a map of log SNR {there} cannot tell {asked}; stay within its lines")
    zero = ~values.any((-2, -1), keepdims=True)  # [..., 1, 1]
    if not np.isfinite(values).all() or (~zero & (values <= 0)).any():
        raise ValueError("a map must be positive and finite everywhere, or zero everywhere, to be interpolated")
    logs = np.log(np.where(zero, 1.0, values))
    for axis, lines in zip((-2, -1), axes, strict=True):
        logs = PchipInterpolator(known, logs, axis=axis)(np.clip(lines, known[0], known[-1]))
    return np.where(zero, 0.0, np.exp(logs))


def nearest_in_row(
    known: ArrayLike,  # [n, n] bool, at least one in every row
    log_snr: ArrayLike,  # [n], of the lines
) -> np.ndarray:
    """For every cell the column of the nearest known one of its row, in log SNR, int64 `[n, n]`; of two the noisier."""
    log_snr = np.asarray(log_snr, dtype=np.float64)
    distances = np.abs(log_snr[:, None] - log_snr)  # [n, n], between columns
    return np.where(np.asarray(known)[:, None], distances, np.inf).argmin(-1)
