"""Weights of the rules against quadrature, and the walk of one scale against steps written out."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusion.multistep import Corrected, Line, Parabola, Rule, ScaleWalk
from diffusion.step import Level, level_of_log_snr

PLACES = [0.3, -0.1, -0.75]  # Of half the log SNR, newest first; unequal distances.
STEPS = [1e-3, 0.07, 0.9, 6.0]
RULES = (Rule, Line, Parabola, Corrected)


def integral(function, start, h):
    """Of e^(u-h) function(start + u) over u from 0 to h."""
    return quad(lambda u: math.exp(u - h) * function(start + u), 0, h, epsabs=0, epsrel=1e-12)[0]


def lagrange(nodes):
    """The polynomials that are 1 at one of the nodes and 0 at the others."""
    return [
        lambda place, k=k: math.prod((place - other) / (nodes[k] - other) for j, other in enumerate(nodes) if j != k)
        for k in range(len(nodes))
    ]


def exact(nodes, start, h):
    """Weights of values at the nodes, of which the polynomial through them is integrated."""
    return [integral(function, start, h) for function in lagrange(nodes)]


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("rule, count", [(Rule, 1), (Line, 1), (Parabola, 1), (Parabola, 2), (Parabola, 3)])
def test_weights_are_integrals_of_the_polynomial_through_the_places(rule, count, h):
    found = rule().predictor(PLACES[:count], PLACES[0] + h)
    # Of short steps a difference of powers of h is left, which has fewer digits.
    np.testing.assert_allclose(found, exact(PLACES[:count], PLACES[0], h), rtol=2e-6 if h < 0.01 else 1e-10)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("rule", [Line, Corrected])
def test_the_line_is_the_published_one_and_not_its_integral(rule, h):
    """2M takes the line through the last two clean images at the middle of the step, for all of it.

    The integral of the line differs from that by slope · ∫ e^(u-h) (u - h/2) du = slope · (h - (1 - e^-h) (1 + h/2)),
    which is slope · h³/12 for short steps: of third order in a step, so that both are of second order.
    """
    start, before = PLACES[:2]
    found = rule().predictor([start, before], start + h)
    middle = [function(start + h / 2) for function in lagrange([start, before])]
    np.testing.assert_allclose(found, [value * integral(lambda _: 1.0, start, h) for value in middle], rtol=1e-10)
    slope = 1 / (start - before)  # Of the line that is 1 at the start and 0 before.
    apart = exact([start, before], start, h)[0] - found[0]
    by_hand = slope * (h - (1 - math.exp(-h)) * (1 + h / 2))
    assert apart == pytest.approx(by_hand, rel=1e-9, abs=1e-13)
    if h < 0.1:
        assert apart == pytest.approx(slope * h**3 / 12, rel=0.1, abs=1e-13)
    else:
        assert apart > 0.05 * found[0]


@pytest.mark.parametrize("h", STEPS)
def test_a_corrected_step_is_the_parabola_through_its_end(h):
    start, before = PLACES[:2]
    found = Corrected().corrector([start, before], start + h)
    assert len(found) == 3
    np.testing.assert_allclose(found, exact([start + h, start, before], start, h), rtol=1e-6 if h < 0.01 else 1e-9)


@pytest.mark.parametrize("h", STEPS)
def test_a_corrected_first_step_takes_the_mean_of_both_ends(h):
    found = Corrected().corrector(PLACES[:1], PLACES[0] + h)
    np.testing.assert_allclose(found, [integral(lambda _: 0.5, PLACES[0], h)] * 2, rtol=1e-12)


@pytest.mark.parametrize("rule", [Rule, Line, Parabola])
def test_other_rules_take_no_step_again(rule):
    assert rule().corrector(PLACES[: rule.order], 1.0) is None


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("rule", RULES)
def test_weights_add_up_to_those_of_a_constant(rule, h):
    for count in range(1, rule.order + 1):
        places = PLACES[:count]
        found = [rule().predictor(places, places[0] + h), rule().corrector(places, places[0] + h)]
        for weights in found:
            assert weights is None or sum(weights) == pytest.approx(1 - math.exp(-h), rel=1e-12)


# The same as tensors


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_tensors_have_the_weights_of_numbers(rule):
    for count in range(1, rule.order + 1):
        grid = doubles(*PLACES[:count])[:, None] + doubles(0.0, 0.2, -1.0)  # [count, 3]
        after = grid[0] + doubles(0.05, 1.0, 4.0)
        for weights in (rule().predictor, rule().corrector):
            found = weights(list(grid), after)
            for k in range(3):
                expected = weights(grid[:, k].tolist(), after[k].item())
                if expected is not None:
                    np.testing.assert_allclose([w[k].item() for w in found], expected, rtol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_weights_differentiate_in_the_places(rule):
    for count in range(1, rule.order + 1):
        inputs = [each.requires_grad_() for each in doubles(*PLACES[:count], 0.8)]

        def weights(*values):
            places, end = list(values[:-1]), values[-1]
            return tuple(rule().predictor(places, end) + (rule().corrector(places, end) or []))

        assert torch.autograd.gradcheck(weights, inputs)


# The walk of a scale


def level(half):
    """Of a variance-preserving process at half a log SNR, as numbers."""
    alpha, sigma = (
        math.sqrt(1 / (1 + math.exp(-sign * 2 * half))) if half != -sign * math.inf else 0.0 for sign in (1, -1)
    )
    return Level(alpha, sigma, half)


def by_hand(x, x0s, nodes, start, end):
    """The exact step, if the clean image is the polynomial through x0s at the nodes."""
    now, after = level(start), level(end)
    weights = exact(nodes, start, end - start)
    return after.sigma / now.sigma * x + after.alpha * sum(w * x0 for w, x0 in zip(weights, x0s, strict=True))


def number(value):
    return torch.full((1,), value, dtype=torch.float64)


CLEANS = [0.7, -0.4, 1.1, 0.2]
POINTS = [-1.0, -0.3, 0.1, 0.8, 1.5]


def walked(rule, points=POINTS, cleans=CLEANS, x=0.9, between=lambda walk, k, x: x):
    walk, states = ScaleWalk(rule()), [number(x)]
    for k, x0 in enumerate(cleans):
        x = between(walk, k, states[-1])
        states.append(walk.advance(x, number(x0), level(points[k]), level(points[k + 1])))
    return [state.item() for state in states]


def test_a_parabola_goes_through_as_many_points_as_there_are():
    expected = [0.9]
    for k in range(4):
        back = range(k, max(k - 3, -1), -1)
        nodes, x0s = [POINTS[j] for j in back], [CLEANS[j] for j in back]
        expected.append(by_hand(expected[-1], x0s, nodes, POINTS[k], POINTS[k + 1]))
    np.testing.assert_allclose(walked(Parabola), expected, rtol=1e-12)


def test_a_walk_by_no_line_is_ddim():
    expected = [0.9]
    for k in range(4):
        now, after = level(POINTS[k]), level(POINTS[k + 1])
        noise = (expected[-1] - now.alpha * CLEANS[k]) / now.sigma
        expected.append(after.alpha * CLEANS[k] + after.sigma * noise)
    np.testing.assert_allclose(walked(Rule), expected, rtol=1e-13)


def predicted(x, k, points=POINTS, fresh=False):
    """A step of 2M as published, from the k-th point; of DDIM where nothing before it counts."""
    now, after = level(points[k]), level(points[k + 1])
    h = points[k + 1] - points[k]
    seen = CLEANS[k]
    if k and not fresh:
        ratio = (points[k] - points[k - 1]) / h
        seen = (1 + 1 / (2 * ratio)) * seen - CLEANS[k - 1] / (2 * ratio)
    return after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * seen


def test_a_line_goes_through_the_last_two():
    expected = [0.9]
    for k in range(4):
        expected.append(predicted(expected[-1], k))
    np.testing.assert_allclose(walked(Line), expected, rtol=1e-13)


def corrected_walk(painted=None):
    """States of UniPC by hand: each is predicted from the state before it once that has been corrected."""
    states, before = [0.9], None
    for k in range(4):
        x = states[-1]
        if k == painted:
            x = 2.0
        elif k == 1:
            now, after = level(POINTS[0]), level(POINTS[1])
            mean = (CLEANS[0] + CLEANS[1]) / 2
            x = after.sigma / now.sigma * before - after.alpha * math.expm1(POINTS[0] - POINTS[1]) * mean
        elif k > 1:
            x0s, nodes = CLEANS[k : k - 3 : -1] if k > 2 else CLEANS[2::-1], POINTS[k - 2 : k + 1][::-1]
            x = by_hand(before, x0s, nodes, POINTS[k - 1], POINTS[k])
        states.append(predicted(x, k))
        before = x
    return states


def test_every_step_is_corrected_once_its_end_is_seen():
    np.testing.assert_allclose(walked(Corrected), corrected_walk(), rtol=1e-11)


@pytest.mark.parametrize("painted", [1, 2, 3])
def test_what_is_painted_into_is_not_corrected(painted):
    found = walked(Corrected, between=lambda walk, k, x: number(2.0) if k == painted else x)
    np.testing.assert_allclose(found, corrected_walk(painted), rtol=1e-11)
    # Not even if it is painted as it was: only the state itself is known to be where the step led.
    same = walked(Corrected, between=lambda walk, k, x: x.clone() if k == painted else x)
    assert same[painted + 1] != pytest.approx(walked(Corrected)[painted + 1], rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_that_rests_forgets(rule):
    def rest(walk, k, x):
        if k == 2:
            walk.rest()
        return x

    states = walked(rule, between=rest)
    anew = walked(rule, POINTS[2:], CLEANS[2:], states[2])
    assert states[2:] == anew
    if rule is not Rule:
        assert states[3] != pytest.approx(walked(rule)[3], rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_pure_noise_is_at_no_distance(rule):
    """The first step from it is αʹ x0 + σʹ x, and what was seen there counts no more in the second."""
    points = [-math.inf, *POINTS[1:]]
    states = walked(rule, points)
    first = level(POINTS[1])
    assert states[1] == pytest.approx(first.alpha * CLEANS[0] + first.sigma * 0.9, rel=1e-14)
    assert states[1:] == walked(rule, POINTS[1:], CLEANS[1:], states[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_clean_end_is_the_clean_image(rule):
    assert walked(rule, [*POINTS[:4], math.inf])[-1] == CLEANS[3]
    # Of a process whose images are no clean ones there, such as one that scales them.
    walk = ScaleWalk(rule())
    end = walk.advance(number(0.3), number(0.5), level(0.0), Level(0.25, 0.0, math.inf))
    assert end.item() == 0.125
    assert ScaleWalk(rule()).advance(number(0.3), number(0.5), level(-math.inf), level(math.inf)).item() == 0.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("end", [1.5, math.inf])
def test_many_walks_at_once_are_each_by_itself(rule, end):
    starts = [-1.0, -1.2, -0.9]
    grid = [doubles(*starts), *(doubles(0, 0.05, -0.02) + point for point in POINTS[1:4]), doubles(end, end, end)]
    walk, state = ScaleWalk(rule()), doubles(0.9, -0.2, 0.4)
    for k, x0 in enumerate(CLEANS):
        state = walk.advance(state, doubles(x0, -x0, 2 * x0), *(level_of_log_snr(2 * each) for each in grid[k : k + 2]))
    for k, (x, sign) in enumerate(((0.9, 1), (-0.2, -1), (0.4, 2))):
        alone = walked(rule, [each[k].item() for each in grid], [sign * x0 for x0 in CLEANS], x)
        assert state[k].item() == pytest.approx(alone[-1], rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_walk_differentiates_in_all_it_is_given(rule):
    inputs = [doubles(*POINTS).requires_grad_(), doubles(0.9).requires_grad_(), doubles(*CLEANS).requires_grad_()]

    def end(points, x, cleans):
        walk, levels = ScaleWalk(rule()), [level_of_log_snr(2 * point) for point in points]
        for k, x0 in enumerate(cleans):
            x = walk.advance(x, x0, levels[k], levels[k + 1])
        return x

    assert torch.autograd.gradcheck(end, inputs)
