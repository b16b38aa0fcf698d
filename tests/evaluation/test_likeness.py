"""Likeness of images against NumPy's correlation, and medians whose intervals are counted out."""

import math

import numpy as np
import pytest
import torch

from evaluation.likeness import correlation, median_of


def test_correlation_is_that_of_numpy():
    first, second = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    second += first
    by_hand = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(correlation(first, second), by_hand, rtol=1e-6)
    np.testing.assert_allclose(correlation(first, 0.1 - 3 * first), -1, rtol=1e-12)


def test_constant_images_have_none_and_other_shapes_are_refused():
    images = torch.randn(2, 1, 2, 2)
    images[0] = 0.5
    found = correlation(images, torch.randn(2, 1, 2, 2))
    assert math.isnan(found[0]) and math.isfinite(found[1])
    with pytest.raises(ValueError, match="alike"):
        correlation(images, images[:1])


def test_the_interval_is_of_order_statistics():
    """Of 10 values: from the 2nd to the 9th 1 - 2 (1 + 10) / 2^10 = 97.9 %, from the 3rd to the 8th 89.1 %."""
    values = np.array([7.0, 1, 10, 4, 2, 9, 3, 8, 5, 6, math.nan])
    assert median_of(values) == (5.5, 2.0, 9.0)
    assert median_of(values, 0.85) == (5.5, 3.0, 8.0)


def test_few_values_have_no_interval_and_none_have_no_median():
    few = median_of(np.array([1.0, 2, 3]))
    assert few.value == 2 and math.isnan(few.low) and math.isnan(few.high)
    with pytest.raises(ValueError, match="no finite value"):
        median_of(np.array([math.nan]))
