"""Straightness against sums by hand and its closed form."""

import math

import numpy as np
import pytest
import torch

from diffusion.sampler import SeededNoise, sample
from diffusion.straightness import divided, straightness
from paths.families import cascade, diagonal
from paths.path import Path
from scheduler import DDIMScheduler

LAST = 999
FLOW = DDIMScheduler(beta_schedule="flow", prediction_type="velocity")


def coefficient(tau, deviation=1.0):
    """u / z of N(0, s^2) images and independent noise."""
    return (tau - deviation**2 * (1 - tau)) / (tau**2 + deviation**2 * (1 - tau) ** 2)


def independent(xs, ts, labels=None):
    return tuple(
        (x.double() * coefficient(t.double() / LAST).view(-1, 1, 1, 1)).float() for x, t in zip(xs, ts, strict=True)
    )


def reflowed(xs, ts, deviation=0.4):
    """The velocity (1 - s) eps of the lines from eps to x = s eps, on which z = (s + (1 - s) tau) eps."""
    sizes = (deviation + (1 - deviation) * t.double().view(-1, 1, 1, 1) / LAST for t in ts)
    return tuple((x.double() * (1 - deviation) / size).float() for x, size in zip(xs, sizes, strict=True))


def by_hand(times):
    """S of N(0, 1) by Euler's steps over falling tau, for noise of mean square 1: the same number for all z."""
    size, squares = 1.0, 0.0
    for tau, after in zip(times, times[1:], strict=False):
        velocity = coefficient(tau) * size
        squares += (tau - after) * velocity**2
        size -= (tau - after) * velocity
    return squares - (1 - size) ** 2


def mean_square(seeds, shapes, scale):
    noise = SeededNoise(seeds)
    return [noise.draw(shape) for shape in shapes][scale].double().square().mean().item()


@pytest.mark.parametrize("num_steps", [100, 999])
def test_gaussian_noise_to_gaussian_images_has_the_known_straightness(num_steps):
    path, shapes, seeds = diagonal(num_steps, "uniform_t", 1), [(1, 8, 8)], range(40)
    found = straightness(independent, FLOW, path, seeds, shapes, 16)
    expected = by_hand([t / LAST for (t,) in path.points])
    assert found.values[0] == pytest.approx(expected * mean_square(seeds, shapes, 0), rel=1e-5)
    assert expected == pytest.approx(2 - math.pi / 2, abs=1 / num_steps)
    # The law of the noise has mean square 1, of which this is a sample.
    assert abs(found.values[0] - (2 - math.pi / 2)) < 1 / num_steps + 4 * found.errors[0]


def test_each_scale_is_measured_by_its_own_clock():
    path = cascade(8, coarse_steps=5, remaining=300)
    shapes, seeds = [(2, 8, 8), (2, 4, 4)], range(20)
    found = straightness(independent, FLOW, path, seeds, shapes, 7)
    for scale, value in enumerate(found.values):
        times = [point[scale] / LAST for point in path.points]
        assert value == pytest.approx(by_hand(times) * mean_square(seeds, shapes, scale), rel=1e-5)
    assert len({tuple(point[scale] for point in path.points) for scale in (0, 1)}) == 2


def test_of_a_residual_it_is_for_each_of_its_dimensions():
    flow = DDIMScheduler(beta_schedule="flow", prediction_type="velocity", representation="residual")
    path = diagonal(50, "uniform_t", 2)
    found = straightness(independent, flow, path, range(400), [(1, 8, 8), (1, 4, 4)], 400)
    expected = by_hand([t / LAST for t, _ in path.points])
    for value, error in zip(*found, strict=True):
        assert abs(value - expected) < 4 * error < 0.1


@pytest.mark.parametrize("num_scales", [1, 2])
def test_straight_lines_have_none_and_one_step_is_exact(num_scales):
    shapes = [(1, 8, 8), (1, 4, 4)][:num_scales]
    found = straightness(reflowed, FLOW, diagonal(50, "uniform_t", num_scales), range(6), shapes, 4)
    assert all(abs(value) < 1e-9 for value in found.values)
    noise = [x.clamp(-2, 2) for x in map(torch.randn, shapes)]
    one, many = (
        sample(reflowed, FLOW, diagonal(n, "uniform_t", num_scales), [x[None] for x in noise]).images for n in (1, 40)
    )
    for x, ours, theirs in zip(noise, one, many, strict=True):
        torch.testing.assert_close(ours[0], 0.4 * x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_clamp_is_in_the_way():
    """Noise as large as this makes images beyond [-1, 1], where a clamp would bend the lines."""
    found = straightness(
        lambda xs, ts: reflowed(xs, ts, 3.0), FLOW, diagonal(20, "uniform_t", 1), range(6), [(1, 8, 8)], 6
    )
    assert abs(found.values[0]) < 1e-9


@pytest.mark.parametrize("steps", [3, 40, 5000])
def test_a_divided_path_goes_the_same_way(steps):
    path = cascade(6, coarse_steps=4, remaining=500)
    fine = divided(path, steps)
    assert set(path.points) <= set(fine.points)
    assert fine.nfe >= min(steps, 1998 // 2) and fine.nfe >= path.nfe
    for start, end in zip(path.points, path.points[1:], strict=False):
        between = fine.points[fine.points.index(start) : fine.points.index(end) + 1]
        # On the straight line from one to the other, but for the rounding of timesteps.
        line = np.linspace(start, end, 2001)
        assert all(np.abs(line - point).max(1).min() <= 1 for point in between)


def test_other_processes_and_late_starts_are_refused():
    path = diagonal(4, "uniform_t", 1)
    with pytest.raises(ValueError, match="which the process flow has, not vp cosine_clipped"):
        straightness(independent, DDIMScheduler(), path, range(2), [(1, 4, 4)], 2)
    with pytest.raises(ValueError, match=r"the path starts at \(990,\), and a line of noise and image at timestep 999"):
        straightness(independent, FLOW, Path([(990,), (0,)], "late", {}), range(2), [(1, 4, 4)], 2)
