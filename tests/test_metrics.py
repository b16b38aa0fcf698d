"""FID against pytorch-fid and closed forms, the sliced Wasserstein distance against SciPy."""

import importlib

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

import metrics
from metrics import (
    FeatureMoments,
    SlicedWasserstein,
    fid_reference_moments,
    frechet_distance,
    inception_features,
    inception_fingerprint,
    laplacian_pyramid,
    load_inception,
    sliced_wasserstein,
    swd_levels,
)

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"


def moments_of(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def correlated_features(seed, n, d, shift=0.0):
    generator = np.random.default_rng(seed)
    spectrum = np.exp(-np.arange(d) / (d / 6))
    return generator.normal(size=(n, d)) * spectrum @ generator.normal(size=(d, d)) / np.sqrt(d) + shift


def random_images(seed, n, size, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def smooth_images(seed, n, size, sigma=1.5):
    noise = np.random.default_rng(seed).normal(size=(n, 3, size, size))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, sigma, sigma), mode="wrap")
    smooth += 0.05 * noise
    return np.clip(127 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


# Fréchet distance


@pytest.mark.parametrize("n", [400, 80], ids=["full rank", "rank deficient"])
def test_frechet_distance_equals_the_nuclear_norm_of_the_features(n):
    """tr (Σ1^½ Σ2 Σ1^½)^½ is the nuclear norm of X1 X2ᵀ / sqrt((n1 - 1)(n2 - 1)) for centred features X."""
    x_1, x_2 = correlated_features(1, n, 128), correlated_features(2, n + 10, 128, shift=0.2)
    (mean_1, cov_1), (mean_2, cov_2) = moments_of(x_1), moments_of(x_2)
    product = (x_1 - mean_1) @ (x_2 - mean_2).T / np.sqrt((n - 1) * (n + 9))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2) - 2 * np.linalg.norm(product, "nuc")
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [400, 80], ids=["full rank", "rank deficient"])
def test_frechet_distance_equals_pytorch_fid(n):
    fid_score = importlib.import_module("pytorch_fid.fid_score")
    first = moments_of(correlated_features(1, n, 128))
    second = moments_of(correlated_features(2, n + 10, 128, shift=0.2))
    try:
        expected = fid_score.calculate_frechet_distance(*first, *second)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this SciPy has no sqrtm that pytorch-fid can call: {error}")
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(40, 40)))[0]
    s_1, s_2 = generator.uniform(0, 5, 40), generator.uniform(0, 5, 40)
    s_1[:5], s_2[3:9] = 0, 0
    mean_1, mean_2 = generator.normal(size=(2, 40))
    expected = ((mean_1 - mean_2) ** 2).sum() + ((np.sqrt(s_1) - np.sqrt(s_2)) ** 2).sum()
    distance = frechet_distance(mean_1, (basis * s_1) @ basis.T, mean_2, (basis * s_2) @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_equal_and_of_degenerate_gaussians():
    mean, cov = moments_of(correlated_features(0, 30, 64))
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-12 * np.trace(cov)
    zero = np.zeros_like(cov)
    assert frechet_distance(mean, cov, mean, zero) == pytest.approx(np.trace(cov), rel=1e-14)
    assert frechet_distance(mean, zero, 3 * mean, zero) == pytest.approx(4 * (mean**2).sum(), rel=1e-14)


def test_frechet_distance_forgives_rounding_but_no_negative_variance():
    mean, cov = moments_of(correlated_features(0, 30, 64))
    rounded = cov.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
    assert frechet_distance(mean, rounded, mean, cov) < 1e-4 * np.trace(cov)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(mean, cov - 0.01 * np.eye(64), mean, cov)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mean, cov, mean * np.nan, cov)
    with pytest.raises(ValueError, match=r"\[63\]"):
        frechet_distance(mean[1:], cov, mean, cov)


# Moments


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [1, 150, 0, 49], [64, 64, 64, 8]])
def test_streamed_moments_equal_numpy_for_any_split(sizes):
    # A mean of a million times the spread leaves nothing of a variance taken as E[x²] - E[x]².
    features = correlated_features(0, 200, 12) + 1e6
    mean, cov = moments_of(features)
    moments = FeatureMoments()
    start = 0
    for size in sizes:
        moments.update(features[start : start + size])
        start += size
    assert moments.n == 200
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(moments.cov, cov, rtol=0, atol=1e-9 * np.abs(cov).max())


def test_single_precision_tensors_are_summed_in_double():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1000
    moments = FeatureMoments()
    for batch in features.split(7):
        moments.update(batch)
    np.testing.assert_allclose(moments.cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


def test_moments_refuse_what_has_none():
    moments = FeatureMoments()
    with pytest.raises(ValueError, match="at least one"):
        _ = moments.mean
    moments.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least two"):
        _ = moments.cov
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        moments.update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(np.full((2, 3), np.nan))
    assert moments.n == 1


# Inception


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Random weights under the name at which the torch hub cache keeps the real ones."""
    library = importlib.import_module("pytorch_fid.inception")
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(library.torchvision.models.Inception3, "load_state_dict", lambda self, state: None)
        state = library.fid_inception_v3().state_dict()
    for value in state.values():
        if value.ndim == 4:
            # He's scale keeps the signal alive through the depth.
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    torch.save(state, folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME


@pytest.fixture(scope="module")
def inception(weights_file):
    return load_inception(weights_file, "cpu")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_features_equal_those_of_pytorch_fid(weights_file, inception, no_network, monkeypatch):
    library = importlib.import_module("pytorch_fid.inception")
    fid_score = importlib.import_module("pytorch_fid.fid_score")
    images = random_images(0, 3, 64)
    # The library finds the file in its own cache and so builds the network without any of our code.
    monkeypatch.setenv("TORCH_HOME", str(weights_file.parents[2]))
    network = library.InceptionV3([library.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    to_tensor = fid_score.TF.ToTensor()
    with torch.no_grad():
        batch = torch.stack([to_tensor(image.transpose(1, 2, 0)) for image in images])
        features = network(batch)[0].flatten(1).double().numpy()
    assert features.shape == (3, 2048) and features.std(axis=0).max() > 1e-2
    moments = inception_features(images, inception, batch_size=2)
    assert moments.n == 3
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-4, atol=1e-5)
    scale = np.abs(np.cov(features, rowvar=False)).max()
    np.testing.assert_allclose(moments.cov, np.cov(features, rowvar=False), rtol=0, atol=1e-4 * scale)


def test_fingerprint_names_the_weights(weights_file, inception):
    again = load_inception(weights_file, "cpu")
    assert inception_fingerprint(again) == inception_fingerprint(inception)
    with torch.no_grad():
        again.blocks[3][0].branch3x3_1.bn.bias[5] += 1e-3
    assert inception_fingerprint(again) != inception_fingerprint(inception)
    # It becomes part of a file name.
    assert inception_fingerprint(inception).isalnum()


def test_grey_images_enter_as_three_equal_channels(inception):
    grey = random_images(1, 2, 32, channels=1)
    coloured = torch.from_numpy(np.repeat(grey, 3, axis=1))
    np.testing.assert_array_equal(
        inception_features(grey, inception).mean, inception_features(coloured, inception).mean
    )


def test_library_keeps_its_own_download(weights_file, inception):
    library = importlib.import_module("pytorch_fid.inception")
    assert library.load_state_dict_from_url.__module__.startswith("torch.")


def test_missing_damaged_and_foreign_weights_are_named(tmp_path, weights_file):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_inception(tmp_path / "nowhere.pth", "cpu")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged.pth"):
        load_inception(damaged, "cpu")
    for name, content in (
        ("list.pth", [1, 2]),
        ("checkpoint.pth", {"model_state": {}, "epoch": 3}),
        ("other.pth", {"weight": torch.zeros(3)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_inception(tmp_path / name, "cpu")


def test_failed_download_says_what_to_pass(no_network):
    with pytest.raises(RuntimeError, match="could not be downloaded.*--inception_weights FILE.*--metrics swd"):
        load_inception(None, "cpu")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_fid.inception", None)
    with pytest.raises(RuntimeError, match="pip install pytorch-fid"):
        load_inception(None, "cpu")


class MeanColours(torch.nn.Module):
    """Stands in for Inception: six features, the mean of each channel and of its square."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return [torch.cat([images, images**2], dim=1).mean(dim=(2, 3), keepdim=True)]


def test_reference_moments_are_computed_once(tmp_path):
    images, network = random_images(0, 10, 8), MeanColours()
    arguments = ("data1", network, "weights1", tmp_path / "cache", 4)
    mean, cov = fid_reference_moments(images, *arguments)
    assert network.calls == 3
    features = np.concatenate([images / 255, (images / 255) ** 2], axis=1).mean(axis=(2, 3))
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-8)
    again = fid_reference_moments(images, *arguments)
    assert network.calls == 3
    np.testing.assert_array_equal(again[0], mean)
    np.testing.assert_array_equal(again[1], cov)
    fid_reference_moments(images, "data2", *arguments[1:])
    assert network.calls == 6
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {
        "fid_reference_data1_weights1.npz",
        "fid_reference_data2_weights1.npz",
    }


def test_reference_of_other_images_or_damaged_is_refused(tmp_path):
    images, network = random_images(0, 10, 8), MeanColours()
    fid_reference_moments(images, "data", network, "weights", tmp_path)
    with pytest.raises(ValueError, match="10 images but 9"):
        fid_reference_moments(images[:9], "data", network, "weights", tmp_path)
    file = tmp_path / "fid_reference_data_weights.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged.*delete it"):
        fid_reference_moments(images, "data", network, "weights", tmp_path)


def test_images_that_are_not_uint8_are_refused(inception):
    for images in (np.zeros((2, 3, 32, 32)), torch.zeros(2, 4, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 of shape"):
            inception_features(images, inception)
        with pytest.raises(ValueError, match="uint8 of shape"):
            SlicedWasserstein(images, 2)


# Sliced Wasserstein distance


@pytest.fixture
def few_patches(monkeypatch):
    monkeypatch.setattr(metrics, "PATCHES_PER_IMAGE", 16)
    monkeypatch.setattr(metrics, "NUM_PROJECTIONS", 96)


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
        assert distances[size] == pytest.approx(1000 * np.mean(expected), rel=1e-4)


def test_places_reach_every_pixel_and_directions_are_independent():
    swd = SlicedWasserstein(random_images(0, 40, 64), 40)
    for size, corners in zip(swd.levels, swd._corners, strict=True):
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
    monkeypatch.setattr(metrics, "_CACHED_PROJECTION_BYTES", 0)
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


def test_sets_that_cannot_be_compared_are_refused():
    real = random_images(0, 5, 16)
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
