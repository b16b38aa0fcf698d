import ast
import hashlib
import inspect
import itertools

import numpy as np
import pytest

from images import breeds, drawing, synthetic
from images.synthetic import SYNTHETIC_CLASSES, synthetic_images, synthetic_label


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return synthetic_images(240)


def _box_mean(images: np.ndarray, factor: int) -> np.ndarray:
    num, channels, height, width = images.shape
    blocks = images.astype(np.float64).reshape(num, channels, height // factor, factor, width // factor, factor)
    return blocks.mean(axis=(3, 5))


def _haar_energies(images: np.ndarray, levels: int) -> list[float]:
    # Mean square of the orthonormal Haar details, finest level first, of images scaled to [-1, 1].
    x = images.astype(np.float64) / 127.5 - 1.0
    energies = []
    for _ in range(levels):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        details = np.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2.0
        energies.append(float((details**2).mean()))
        x = (a + b + c + d) / 2.0
    return energies


def _share_of_jumps(images: np.ndarray, grey_levels: float) -> float:
    grey = images.astype(np.float64).mean(axis=1)
    jumps = [np.abs(np.diff(grey, axis=axis)).ravel() for axis in (1, 2)]
    return float((np.concatenate(jumps) > grey_levels).mean())


@pytest.mark.parametrize(
    ("resolution", "digest"),
    [
        (64, "14b2702cb5162bb4c4453fe9e85fcc27a568ffd0359385e1a94935aab62de6dd"),
        (32, "98c997754d789e3567bf28771a98e296e8d01b037e4aea2ec467ddb8c2b28ba7"),
    ],
)
def test_pixels_are_the_same_on_every_machine(resolution, digest):
    images = synthetic_images(12, resolution)
    assert images.shape == (12, 3, resolution, resolution)
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == digest


def test_every_trait_is_drawn_as_ever(images):
    # Of so many images every constant of the drawing and every breed changes some pixel.
    digest = "0886295b5953b1bcad0f9457f5bddb4bbc15fe0fa7901d6fe09a84ed086ddaac"
    assert hashlib.sha256(images.tobytes()).hexdigest() == digest


def test_source_uses_only_exactly_rounded_elementwise_operations():
    # A digest re-recorded on one machine cannot reveal an operation that differs on another.
    allowed = {
        "PCG64", "SeedSequence", "abs", "arange", "array", "broadcast_to", "empty", "float64", "floor",
        "int64", "maximum", "minimum", "ndarray", "random", "sqrt", "stack", "subtract", "take", "uint64",
        "uint8", "where",
    }  # fmt: skip
    inexact_methods = {"sum", "mean", "std", "var", "dot", "prod", "cumsum", "cumprod", "trace"}
    trees = [ast.parse(inspect.getsource(module)) for module in (synthetic, drawing, breeds)]
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.BinOp):
            assert not isinstance(node.op, ast.Pow | ast.MatMult), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in inexact_methods, f"line {node.lineno}: {node.attr}"
            if isinstance(node.value, ast.Name) and node.value.id == "np":
                assert node.attr in allowed, f"line {node.lineno}: np.{node.attr}"


@pytest.mark.parametrize(("num_images", "start"), [(1, 0), (1, 37), (3, 7), (11, 5), (30, 230), (0, 4)])
def test_image_depends_on_its_index_only(images, num_images, start):
    part = synthetic_images(num_images, start=start)
    assert part.shape == (num_images, 3, 64, 64)
    overlap = min(num_images, len(images) - start)
    np.testing.assert_array_equal(part[:overlap], images[start : start + overlap])


@pytest.mark.parametrize(("resolution", "painted"), [(32, 64), (16, 64), (48, 96)])
def test_small_images_are_box_means(resolution, painted):
    small = synthetic_images(6, resolution, start=21).astype(np.float64)
    mean = _box_mean(synthetic_images(6, painted, start=21), painted // resolution)
    # Each pixel is rounded once in both, so a mean of rounded pixels is within one level.
    assert np.abs(small - mean).max() <= 1.0


def test_distinct_indices_give_distinct_images(images):
    assert len({image.tobytes() for image in images}) == len(images)
    # Even the closest pair differs visibly, so no two images share a pose and a coat.
    flat = _box_mean(images, 4).reshape(len(images), -1)
    square = (flat**2).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2.0 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    assert np.sqrt(distance.min() / flat.shape[1]) > 10.0


def test_classes_take_turns_and_differ(images):
    labels = np.array([synthetic_label(i) for i in range(len(images))])
    assert SYNTHETIC_CLASSES == ("cat", "dog", "wild")
    np.testing.assert_array_equal(np.bincount(labels), [80, 80, 80])
    np.testing.assert_array_equal(labels[:4], [0, 1, 2, 0])
    x = images / 255.0
    means = [x[labels == k].mean(axis=0) for k in range(3)]
    errors = [x[labels == k].var(axis=0, ddof=1).mean() / 80 for k in range(3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        # Means of one and the same distribution would differ by errors[i] + errors[j].
        assert ((means[i] - means[j]) ** 2).mean() > 3.0 * (errors[i] + errors[j])
    fresh = synthetic_images(90, start=len(images)) / 255.0
    guess = np.argmin([((fresh - mean) ** 2).mean(axis=(1, 2, 3)) for mean in means], axis=0)
    assert (guess == np.arange(len(images), len(images) + 90) % 3).mean() > 0.5


def test_spectrum_resembles_photographs(images):
    energies = _haar_energies(images, levels=4)
    # Real 64x64 cat faces have 0.0195, 0.093, 0.52 and 3.1: a factor of about five per octave.
    assert 0.01 < energies[0] < 0.04
    for fine, coarse in zip(energies, energies[1:], strict=False):
        assert 3.0 < coarse / fine < 9.0
    # Every single image has fine texture.
    assert min(_haar_energies(image[None], levels=1)[0] for image in images) > 0.002
    assert 80 < images.mean() < 160
    assert images.min() == 0 and images.max() == 255


def test_edges_are_antialiased(images, monkeypatch):
    # Painting at twice the size and averaging is the reference for the analytic edges.
    reference = _box_mean(synthetic_images(24, 128), 2)

    def error(candidate: np.ndarray) -> float:
        return float(np.sqrt(((candidate[:24] - reference) ** 2).mean()))

    assert _share_of_jumps(images, 90.0) < 0.025
    assert error(images) < 12.0
    monkeypatch.setattr(synthetic, "inside", lambda distance, width: (distance + 0.0 * width < 0.0) * 1.0)
    hard = synthetic_images(24)
    assert _share_of_jumps(hard, 90.0) > 0.025
    assert error(hard) > 14.0


@pytest.mark.parametrize("resolution", [0, -16, 8, 40, 63])
def test_wrong_resolution_is_refused(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution} must be a positive multiple of 16"):
        synthetic_images(1, resolution)


@pytest.mark.parametrize(("num_images", "start"), [(-1, 0), (1, -1)])
def test_negative_counts_are_refused(num_images, start):
    with pytest.raises(ValueError, match="at least 0"):
        synthetic_images(num_images, start=start)
