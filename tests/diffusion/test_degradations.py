"""Degradations begin at the image to the bit, are continuous, and are what a second computation makes of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from diffusion.degradations import DEGRADATIONS, make_degradation, parse_degradation

SIZES = [(3, 16, 16), (1, 16, 16), (3, 15, 9)]  # The last ones have a pixel in the middle, and no side that 2 divides.


def images(count=4, shape=(3, 16, 16), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator, dtype=dtype) * 2 - 1


def severities(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=DEGRADATIONS)
def degrade(request):
    return make_degradation(request.param, 16)


@pytest.mark.parametrize("shape", SIZES)
def test_nothing_happens_at_severity_0(degrade, shape):
    x = images(shape=shape)
    for severity in (0, 0.0, torch.zeros(4, dtype=torch.float64)):
        assert torch.equal(degrade(x, severity), x)
    half = degrade(x, severities(0, 0.5, 0, 1))
    assert torch.equal(half[[0, 2]], x[[0, 2]]) and not torch.allclose(half[[1, 3]], x[[1, 3]], atol=0.1)
    assert half.dtype == x.dtype and half.shape == x.shape


@pytest.mark.parametrize("shape", SIZES)
def test_it_is_continuous(degrade, shape):
    """A Lipschitz bound over all of [0, 1]: what a step of severity changes goes to 0 with the step."""
    x = images(1, shape, dtype=torch.float64)
    for count in (2_000, 20_000):
        steps = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        # Where changes are quickest, around the start, around the middle and at the end.
        for first in (0, count // 2 - 100, count - 200):
            some = steps[first : first + 201]
            found = degrade(x.expand(201, -1, -1, -1), some)
            assert found.diff(dim=0).abs().max() < 60 / count


def test_each_image_has_its_own_severity(degrade):
    x = images(5)
    chosen = severities(0.9, 0.1, 0.35, 0, 1)
    together = degrade(x, chosen)
    for k, severity in enumerate(chosen.tolist()):
        torch.testing.assert_close(degrade(x[k : k + 1], severity), together[k : k + 1], rtol=0, atol=1e-6)


def test_constant_images_stay_but_for_a_hole(degrade):
    x = torch.full((1, 3, 16, 16), 0.4)
    found = degrade(x, 0.7)
    assert torch.allclose(found, x, atol=1e-6) == (degrade.name != "mask")


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("severity", [0.02, 0.3, 1.0])
def test_blur_is_that_of_scipy(shape, severity):
    """Another computation: sums over the kernel, the image reflected at the outer edge of its pixels."""
    x = images(2, shape, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), sigma=(0, 0, 5 * severity, 5 * severity), mode="reflect", truncate=8)
    found = make_degradation("blur:5", 16)(x, severity)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


def test_means_are_those_of_lift():
    x = images(3)
    degrade = make_degradation("means", 16)
    assert str(degrade) == "means:4"
    for k in range(5):
        coarse = x
        for _ in range(k):
            coarse = F.avg_pool2d(coarse, 2)
        expected = F.interpolate(coarse, size=16, mode="nearest")
        torch.testing.assert_close(degrade(x, k / 4), expected, rtol=0, atol=1e-6)
        if k < 4:
            upper = F.interpolate(F.avg_pool2d(coarse, 2), size=16, mode="nearest")
            torch.testing.assert_close(degrade(x, (k + 0.3) / 4), 0.7 * expected + 0.3 * upper, rtol=0, atol=1e-6)
    assert (degrade(x, 1).flatten(2).std(2) < 1e-6).all()


def test_blocks_have_every_side():
    x = images(2, (1, 7, 10), dtype=torch.float64)
    degrade = make_degradation("pixelate:4", 7)
    for side in (1, 2, 3, 4):
        found, expected = degrade(x, (side - 1) / 3), torch.empty_like(x)
        for top in range(0, 7, side):
            for left in range(0, 10, side):
                block = (..., slice(top, top + side), slice(left, left + side))
                expected[block] = x[block].mean((2, 3), keepdim=True)
        torch.testing.assert_close(found, expected)


def test_a_hole_grows_until_all_is_gone():
    x = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    degrade = make_degradation("mask:3", 16)
    found = degrade(x.expand(6, -1, -1, -1), severities(0, 0.1, 0.3, 0.5, 0.9, 1))
    assert (found.diff(dim=0) <= 0).all() and (found[-1] == 0).all() and found.min() >= 0
    middle = 3 - 0.5  # Pixels from the middle of column 11 in row 8, and half a pixel down.
    r_squared = middle**2 + 0.25
    assert found[3, 0, 8, 10].item() == pytest.approx(1 - np.exp(-r_squared / (2 * 3**2)), rel=0.06)  # Over its area.
    np.testing.assert_allclose(found.flip(-1), found)


def test_grey_keeps_the_mean_colour():
    x = images(2)
    degrade = make_degradation("grey", 16)
    mean = x.mean((2, 3), keepdim=True)
    for severity in (0.25, 1.0):
        torch.testing.assert_close(degrade(x, severity), (1 - severity) * x + severity * mean, rtol=0, atol=1e-6)
    half = make_degradation("grey:0.5", 16)
    torch.testing.assert_close(half(x, 1.0), degrade(x, 0.5))


def test_lower_precision_around_it_rounds_nothing(degrade):
    x = images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degrade(x, 0.6), degrade(x, severities(0.6, 0.6)))
        inside = degrade(x, 0.6)
    assert torch.equal(inside, degrade(x, 0.6)) and inside.dtype == torch.float32


def test_names_say_it_all():
    assert parse_degradation("blur") == ("blur", None) and parse_degradation("means:3") == ("means", 3)
    usual = {"blur": "blur:8", "means": "means:5", "pixelate": "pixelate:8", "mask": "mask:8", "grey": "grey:1"}
    assert {name: str(make_degradation(name, 32)) for name in DEGRADATIONS} == usual
    assert str(make_degradation("means", 48)) == "means:4"
    for text in usual.values():
        assert str(make_degradation(text, 32)) == text
    assert str(make_degradation("blur:2.50", 32)) == "blur:2.5"
    for text in ("smear", "blur:", "blur:x", "blur:0", "blur:-1", "blur:inf", "blur:nan", "means:1.5", "pixelate:1"):
        with pytest.raises(ValueError, match=f"^'{text}' is no degradation .* choose one of blur"):
            parse_degradation(text)
    for text in ("means:0", "grey:1.5", "mask:-2", ""):
        with pytest.raises(ValueError, match="is no degradation"):
            parse_degradation(text)
    for text, side, says in (("means:5", 16, "more often than the 4 times"), ("pixelate:17", 16, "larger than an")):
        with pytest.raises(ValueError, match=says):
            make_degradation(text, side)


def test_severities_outside_are_refused(degrade):
    for severity in (-0.1, 1.001, float("nan"), severities(0.5, 2)):
        with pytest.raises(ValueError, match=r"Severities lie in \[0, 1\]; got"):
            degrade(images(2), severity)
