"""How much alike two sets of images are, image by image."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import quantile_test


class Median(NamedTuple):
    """A median with the ends of an interval for that of the population."""

    value: float
    low: float
    high: float


def correlation(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Pearson's r `[N]` over all values of each pair of images `[N, C, H, W]`; NaN where one of the two is constant."""
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"Images to compare must be [N, C, H, W] alike; got {[*first.shape]} and {[*second.shape]}.")
    a, b = (each.double().flatten(1) - each.double().flatten(1).mean(1, keepdim=True) for each in (first, second))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms, torch.nan).cpu().numpy()


def median_of(values: np.ndarray, confidence: float = 0.95) -> Median:
    """The median of values `[N]`, NaN left out, with an interval by order statistics, whatever their distribution.

    The interval is NaN where so few values have none (fewer than 6 at 95 %). Raises ValueError if no value is left.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("There is no finite value to take a median of.")
    found = quantile_test(values, q=0.0, p=0.5).confidence_interval(confidence)
    return Median(float(np.median(values)), float(found.low), float(found.high))
