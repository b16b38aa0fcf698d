"""Nearest neighbours and the sliced Wasserstein distance against closed forms and brute force."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from evaluation import pixel_metrics
from evaluation.pixel_metrics import (
    NearestNeighbours,
    SlicedWasserstein,
    laplacian_pyramid,
    projected_distance,
    sliced_wasserstein,
    sorted_projections,
    swd_levels,
)


def random_images(seed, n, size, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def smooth_images(seed, n, size, sigma=1.5):
    noise = np.random.default_rng(seed).normal(size=(n, 3, size, size))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, sigma, sigma), mode="wrap")
    smooth += 0.05 * noise
    return np.clip(127 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


# Nearest training images


def brute_neighbours(training, generated):
    """Distance of every pair in float64 from the definition."""

    def rms(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).mean(axis=(2, 3, 4)))

    among = rms(training, training)
    np.fill_diagonal(among, np.inf)
    own, to_training = among.min(axis=1), rms(generated, training)
    nearest = to_training.argmin(axis=1)
    distance = to_training.min(axis=1)
    return np.median(distance), np.median(own), np.mean(distance > own[nearest])


@pytest.mark.parametrize("channels", [1, 3])
def test_neighbours_equal_brute_force(channels, monkeypatch):
    # Several batches of images, of pixels and of compared pairs.
    monkeypatch.setattr(pixel_metrics, "_SEARCHED_AT_ONCE", 16)
    monkeypatch.setattr(pixel_metrics, "_VALUES_PER_PRODUCT", 50)
    monkeypatch.setattr(pixel_metrics, "_VALUES_COMPARED_AT_ONCE", 500)
    training = smooth_images(0, 70, 12)[:, :channels]
    near = np.clip(training[:20] + np.random.default_rng(1).normal(0, 12, training[:20].shape), 0, 255)
    generated = np.concatenate([smooth_images(2, 25, 12)[:, :channels], near.astype(np.uint8)])
    found = NearestNeighbours(training).compare(torch.from_numpy(generated))
    assert found == pytest.approx(brute_neighbours(training, generated), rel=1e-12)
    assert 0 < found.authenticity < 1


def test_candidates_survive_the_rounding_of_the_products(monkeypatch):
    """Pairs of saturated images a single grey level apart, whose products differ by less than float32 resolves."""
    generator = np.random.default_rng(0)
    base = generator.choice(np.array([0, 255], dtype=np.uint8), (6, 3, 32, 32))
    training = np.repeat(base, 5, axis=0)
    for k, image in enumerate(training):
        # The copies of an image differ in k of their pixels, by one grey level each.
        flat = image.reshape(-1)
        flat[: k % 5] = np.where(flat[: k % 5] > 0, 254, 1)
    generated = base.copy()
    generated.reshape(6, -1)[:, -1] ^= 1
    found = NearestNeighbours(training).compare(generated)
    assert found.distance == np.sqrt(1 / 3072)
    assert found == pytest.approx(brute_neighbours(training, generated), rel=1e-12)


def test_copies_are_at_distance_zero_and_not_authentic():
    training = smooth_images(0, 40, 16)
    copied = NearestNeighbours(training).compare(training[5:30])
    assert copied.distance == 0 and copied.authenticity == 0 and copied.distance_real > 10
    # Every training image twice: the nearest other one is a copy, and what is no copy itself is farther.
    doubled = NearestNeighbours(np.concatenate([training, training]))
    assert doubled.compare(training[:10]) == (0, 0, 0)
    brighter = training[:10] ^ np.uint8(1)
    assert doubled.compare(brighter) == (1, 0, 1)


def test_two_training_images_are_each_other_s_neighbours():
    black = np.zeros((1, 1, 2, 2), np.uint8)
    training, generated = np.concatenate([black, black + 8]), np.concatenate([black + 2, black + 20])
    # Their distance is 8; the first generated image is 2 from black, and the second 12 from the other.
    assert NearestNeighbours(training).compare(generated) == (7, 8, 0.5)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_images_that_are_all_alike_are_found(value):
    # Their products have no size, and so their rounding no bound above zero.
    training = np.full((5, 3, 8, 8), value, np.uint8)
    assert NearestNeighbours(training).compare(training[:2]) == (0, 0, 0)
    assert NearestNeighbours(training).compare(training[:2] ^ np.uint8(1)) == (1, 0, 1)


def test_shift_by_grey_levels_is_the_distance():
    training = smooth_images(0, 30, 16) // 2
    assert NearestNeighbours(training).compare(training + np.uint8(3)).distance == 3


def test_authenticity_of_new_images_is_the_chance_that_neighbours_are_not_mutual():
    """Two points of a plane are each other's nearest with probability 6π / (8π + 3√3), so the rest is authentic."""
    expected = 1 - 6 * np.pi / (8 * np.pi + 3 * np.sqrt(3))
    generator = np.random.default_rng(0)
    found = []
    for _ in range(20):
        training, generated = generator.integers(0, 256, (2, 250, 1, 1, 2), dtype=np.uint8)
        found.append(NearestNeighbours(training).compare(generated).authenticity)
    # Distances of whole numbers tie at times, which counts as copied.
    assert np.mean(found) == pytest.approx(expected, abs=0.03)


def test_distances_within_the_training_set_are_computed_once(monkeypatch):
    neighbours = NearestNeighbours(smooth_images(0, 20, 12))
    searches = []
    search = neighbours._search
    monkeypatch.setattr(neighbours, "_search", lambda *a, **k: searches.append(k) or search(*a, **k))
    first = neighbours.compare(smooth_images(1, 5, 12))
    again = neighbours.compare(smooth_images(2, 5, 12))
    assert first.distance_real == again.distance_real and len(searches) == 3


def test_images_that_have_no_neighbours_are_refused():
    training = smooth_images(0, 5, 12)
    neighbours = NearestNeighbours(training)
    for generated in (smooth_images(1, 5, 16), training[:, :1], training[:0]):
        with pytest.raises(ValueError, match=r"\[N, 3, 12, 12\].*training set"):
            neighbours.compare(generated)
    with pytest.raises(ValueError, match="generated images must be uint8"):
        neighbours.compare(training / 255)
    with pytest.raises(ValueError, match="at least two training images, but there are 1"):
        NearestNeighbours(training[:1])


# Sliced Wasserstein distance


@pytest.fixture
def few_patches(monkeypatch):
    monkeypatch.setattr(pixel_metrics, "PATCHES_PER_IMAGE", 16)
    monkeypatch.setattr(pixel_metrics, "NUM_PROJECTIONS", 96)


def brute_pyramid(image, num_levels):
    """Pyramid of one plane by two-dimensional convolution in SciPy."""
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    levels = []
    for _ in range(num_levels - 1):
        low = scipy.ndimage.convolve(image, taps, mode="mirror")[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = low
        levels.append(image - scipy.ndimage.convolve(spread, 4 * taps, mode="mirror"))
        image = low
    return [*levels, image]


def test_pyramid_equals_convolution():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pyramid = laplacian_pyramid(images, (64, 32, 16))
    assert [tuple(band.shape) for band in pyramid] == [(2, 3, s, s) for s in (64, 32, 16)]
    for b in range(2):
        for c in range(3):
            for band, expected in zip(pyramid, brute_pyramid(images[b, c].double().numpy(), 3), strict=True):
                np.testing.assert_allclose(band[b, c], expected, atol=1e-5)


def test_levels():
    assert swd_levels(64) == (64, 32, 16)
    assert swd_levels(32) == (32, 16)
    assert [swd_levels(size) for size in (28, 16, 7)] == [(28,), (16,), (7,)]
    assert swd_levels(96) == (96, 48, 24)
    with pytest.raises(ValueError, match="at least 7"):
        swd_levels(6)


def test_distance_equals_one_dimensional_wasserstein_of_every_projection(few_patches):
    """Patches cut and normalised in NumPy, distances by SciPy; only places and directions are shared."""
    real, fake = smooth_images(0, 9, 32), smooth_images(1, 9, 32, sigma=3)
    swd = SlicedWasserstein(real, 9)
    distances = swd.distance(fake)
    assert list(distances) == [32, 16]
    for level, size in enumerate((32, 16)):
        projected = []
        for images in (real, fake):
            patches = np.empty((9, 16, 3, 7, 7))
            for k, image in enumerate(images):
                bands = [brute_pyramid(plane.astype(np.float64), 2)[level] for plane in image]
                for p, (top, left) in enumerate(swd._corners[level][k].tolist()):
                    assert 0 <= top <= size - 7 and 0 <= left <= size - 7
                    patches[k, p] = [band[top : top + 7, left : left + 7] for band in bands]
            flat = patches.transpose(2, 0, 1, 3, 4).reshape(3, -1)
            mean, std = flat.mean(axis=1), flat.std(axis=1)
            patches = (patches - mean[:, None, None]) / std[:, None, None]
            directions = swd._directions[level].double().numpy()
            np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
            projected.append(patches.reshape(9 * 16, 147) @ directions.T)
        expected = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(*(p.T for p in projected), strict=True)]
        assert len(expected) == 96
        # A deviation of the sample, divided by one value less, would be off by 7e-5.
        assert distances[size] == pytest.approx(1000 * np.mean(expected), rel=1e-5)


def test_places_reach_every_pixel_and_directions_are_independent():
    swd = SlicedWasserstein(random_images(0, 40, 64), 40)
    for size, corners in zip(swd.levels, swd._corners, strict=True):
        assert corners.shape == (40, 128, 2)
        assert corners.min() == 0 and corners.max() == size - 7
        assert corners.double().mean().item() == pytest.approx((size - 7) / 2, rel=0.03)
    for directions in swd._directions:
        # The Gram matrix of independent unit vectors in 147 dimensions has entries of variance 1/147.
        gram = directions @ directions.T
        off = gram[~torch.eye(512, dtype=torch.bool)]
        assert off.square().mean().item() == pytest.approx(1 / 147, rel=0.02)


def test_equal_sets_are_at_distance_zero(few_patches):
    images = smooth_images(0, 12, 64)
    assert sliced_wasserstein(images, images.copy()) == {64: 0.0, 32: 0.0, 16: 0.0}
    assert sliced_wasserstein(images, torch.from_numpy(images)) == {64: 0.0, 32: 0.0, 16: 0.0}


def test_brightness_and_contrast_per_channel_do_not_count(few_patches):
    images = random_images(0, 10, 32) // 4
    scaled = images * np.array([1, 2, 3], dtype=np.uint8)[:, None, None] + np.uint8(20)
    assert max(sliced_wasserstein(images, scaled).values()) < 1e-2


def test_blur_shows_most_at_the_finest_level(few_patches):
    real = smooth_images(0, 60, 64)
    swd = SlicedWasserstein(real, 60)
    blurred = [scipy.ndimage.gaussian_filter(real, (0, 0, sigma, sigma)) for sigma in (0.4, 0.6, 0.8, 1.0)]
    distances = [swd.distance(images) for images in blurred]
    for weak, strong in zip(distances[:-1], distances[1:], strict=True):
        assert strong[64] > 1.1 * weak[64]
    for distance in distances:
        assert distance[64] > 1.7 * distance[32] > 1.7 * 1.4 * distance[16] > 0


def test_order_of_the_images_is_noise(few_patches):
    real, fake = smooth_images(0, 100, 32), smooth_images(1, 100, 32, sigma=2.5)
    reference = sliced_wasserstein(real, fake)
    shuffled = sliced_wasserstein(real[::-1], fake)
    for size in (32, 16):
        assert shuffled[size] != reference[size]
        assert shuffled[size] == pytest.approx(reference[size], rel=0.15)


def test_a_second_set_meets_the_same_real_descriptors(few_patches, monkeypatch):
    real, fakes = smooth_images(0, 30, 32), [smooth_images(k, 20, 32, sigma=2) for k in (1, 2)]
    fresh = [SlicedWasserstein(real, 20, seed=3).distance(fake) for fake in fakes]
    kept = SlicedWasserstein(real, 20, seed=3)
    assert [kept.distance(fake) for fake in fakes] == fresh
    assert kept.distance(fakes[0]) == fresh[0]
    monkeypatch.setattr(pixel_metrics, "_CACHED_PROJECTION_BYTES", 0)
    recomputed = SlicedWasserstein(real, 20, seed=3)
    assert [recomputed.distance(fake) for fake in fakes] == fresh
    assert SlicedWasserstein(real, 20, seed=4).distance(fakes[0]) != fresh[0]


def test_subset_of_the_real_images_is_drawn_without_repetition(few_patches):
    real = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1) * np.ones((1, 1, 8, 8), dtype=np.uint8)
    chosen = SlicedWasserstein(real, 20, seed=1)._real[:, 0, 0, 0]
    assert len(set(chosen.tolist())) == 20
    np.testing.assert_array_equal(chosen, SlicedWasserstein(torch.from_numpy(real), 20, seed=1)._real[:, 0, 0, 0])
    assert set(chosen.tolist()) != set(SlicedWasserstein(real, 20, seed=2)._real[:, 0, 0, 0].tolist())


def test_grey_and_constant_images_have_a_finite_distance(few_patches):
    grey = random_images(0, 5, 16, channels=1)
    assert sliced_wasserstein(grey, grey) == {16: 0.0}
    distance = sliced_wasserstein(grey, np.full_like(grey, 7))
    assert np.isfinite(distance[16]) and distance[16] > 100


def test_projected_distance_of_shifted_gaussians_is_the_shift_along_each_direction():
    """W1 of N(m, s²) and N(m', s²) is |m - m'|, and of N(m, s²) and N(m, s'²) it is |s - s'| (2 / π)^½."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40_000, 12, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(50, 12, generator=generator), dim=1)
    directions[:12] = torch.eye(12)
    shift = torch.linspace(-3, 3, 12)

    def distance(moved, along):
        return projected_distance(sorted_projections(first, along), sorted_projections(moved, along))

    for direction in directions:
        along = (direction @ shift).abs().item()
        # Two samples of equal Gaussians are about (1 / n)^½ apart, which adds to short shifts in squares.
        assert distance(second + shift, direction[None]) == pytest.approx(along, abs=0.03)
    expected = (directions @ shift).abs().mean().item()
    assert distance(second + shift, directions) == pytest.approx(expected, abs=0.01)
    assert distance(second + 2 * shift, directions) == pytest.approx(2 * expected, abs=0.01)
    assert distance(1.5 * second, directions) == pytest.approx(0.5 * (2 / np.pi) ** 0.5, abs=0.01)
    assert distance(second, directions) < 0.02


def test_sets_that_cannot_be_compared_are_refused():
    real = random_images(0, 5, 16)
    for images in (np.zeros((2, 3, 32, 32)), torch.zeros(2, 4, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 of shape"):
            SlicedWasserstein(images, 2)
    with pytest.raises(ValueError, match="6 generated.*5 real.*--num_images"):
        sliced_wasserstein(real, random_images(1, 6, 16))
    with pytest.raises(ValueError, match="from 1 to 5"):
        SlicedWasserstein(real, 0)
    with pytest.raises(ValueError, match="equal shape"):
        SlicedWasserstein(real, 4).distance(real)
    with pytest.raises(ValueError, match="equal shape"):
        sliced_wasserstein(real, random_images(1, 5, 32))
    with pytest.raises(ValueError, match="square"):
        SlicedWasserstein(real[:, :, :8], 5)
