"""What a step of a solver loses on Gaussian images, against its expansion, and how losses add up to the output."""

import math

import numpy as np
import pytest
import torch

from diffusion.solvers import make_solver, with_rule
from diffusion.step import level_of_log_snr
from truth.gaussian import Spectrum
from truth.linear_sampler import ddim_output, solver_output

VARIANCE = 0.3


def seen(place, variance=VARIANCE):
    """The clean image of a mode on its exact trajectory from a unit, at a place l = λ / 2: s / sqrt(s + e^(-2 l))."""
    return variance / np.sqrt(variance + np.exp(-2 * place))


def state(place, variance=VARIANCE):
    """x / alpha there."""
    return np.sqrt(variance + np.exp(-2 * place))


def loss(solver, places, after):
    """Of a step from places[0] to `after`, in x / alpha, when all clean images lie on the trajectory."""
    weights = make_solver(solver).rule.predictor(places, after)
    step = math.exp(places[0] - after) * state(places[0])
    return step + sum(w * seen(place) for w, place in zip(weights, places, strict=True)) - state(after)


def derivatives(place, size=1e-3):
    ahead, here, behind = (seen(place + k * size) for k in (1, 0, -1))
    return (ahead - behind) / (2 * size), (ahead - 2 * here + behind) / size**2


@pytest.mark.parametrize("place", [-1.5, 0.2, 1.0])
@pytest.mark.parametrize("before", [0.5, 1.0, 2.0])
def test_a_step_loses_what_its_expansion_says(place, before):
    slope, bend = derivatives(place)
    ratios = []
    for h in (0.02, 0.01):
        expected = {
            "ddim": -(h**2) / 2 * slope,
            "dpmpp_2m": -(h**2) / 12 * (h * slope + (2 * h + 3 * before * h) * bend),
        }
        found = {
            "ddim": loss("ddim", [place], place + h),
            "dpmpp_2m": loss("dpmpp_2m", [place, place - before * h], place + h),
        }
        ratios.append([found[name] / expected[name] - 1 for name in expected])
    # What is left is of the next order: halved with h.
    np.testing.assert_allclose(ratios[1], np.array(ratios[0]) / 2, rtol=0.15, atol=2e-3)
    assert np.abs(ratios[1]).max() < 0.1


def test_a_line_loses_less_than_a_constant_and_a_parabola_less_still():
    places = [0.1, 0.0, -0.1]
    losses = [abs(loss(name, places[:n], 0.2)) for n, name in enumerate(("ddim", "dpmpp_2m", "dpmpp_3m"), 1)]
    assert losses[0] > 5 * losses[1] > 10 * losses[2]


@pytest.mark.parametrize("solver", with_rule())
def test_carried_losses_are_the_output_of_the_solver(solver):
    # Of one mode: the losses of the steps of the real run, each carried to the end by the exact flow.
    log_snr = np.array([-7.0, -3.0, -1.0, 0.5, 2.0, 3.5, math.inf])
    spectrum = Spectrum(*torch.full((2, 1), VARIANCE, dtype=torch.float64))
    found = solver_output(spectrum, torch.from_numpy(log_snr), solver).high.sqrt().item()
    rule, x, images, places, carried = make_solver(solver).rule, 1.0, [], [], 0.0
    start = level_of_log_snr(torch.tensor(-7.0, dtype=torch.float64))
    x = 1 / start.alpha.item()
    exact = x / state(-3.5)  # The exact trajectory from there is this times `state`.
    last = None
    for k, value in enumerate(log_snr[:-1]):
        place, after = value / 2, log_snr[k + 1] / 2
        image = seen(place) / state(place) * x
        if last is not None and (again := rule.corrector(last[1], place)) is not None:
            corrected = math.exp(last[1][0] - place) * last[0]
            corrected += sum(w * each for w, each in zip(again, [image, *last[2]], strict=True))
            carried += (corrected - x) * math.sqrt(VARIANCE) / state(place)
            x = corrected
        images, places = [image, *images][: rule.order], [place, *places][: rule.order]
        if math.isinf(after):
            end = images[0]
            carried += end - math.sqrt(VARIANCE) / state(place) * x
            break
        weights = rule.predictor(places, after)
        moved = math.exp(place - after) * x + sum(w * each for w, each in zip(weights, images, strict=True))
        last = (x, list(places), list(images))
        carried += (moved - x * state(after) / state(place)) * math.sqrt(VARIANCE) / state(after)
        x = moved
    assert exact * math.sqrt(VARIANCE) + carried == pytest.approx(end, rel=1e-12)
    assert found == pytest.approx(end, rel=1e-12)


def test_solver_output_of_ddim_is_its_old_name():
    spectrum = Spectrum.power_law(8)
    points = torch.tensor([[-6.0, -5.0], [0.0, 1.0], [math.inf, math.inf]])
    one, other = ddim_output(spectrum, points), solver_output(spectrum, points, "ddim")
    assert torch.equal(one.low, other.low) and torch.equal(one.high, other.high)
