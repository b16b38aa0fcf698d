"""The ramp-up against the formula of EDM in images, and what is left of the start against the recursion itself."""

import math

import numpy as np
import pytest

from networks.ema import LARGEST_SHARE, ema_decay_after, ema_note, initial_share


def decays(steps, decay, ratio):
    return [ema_decay_after(done, decay, ratio) for done in range(steps)]


@pytest.mark.parametrize(
    ("batch", "decay", "ratio"), [(64, 0.9999, 0.05), (2048, 0.999, 0.05), (7, 0.9, 1), (1, 0.5, 0.3)]
)
def test_the_ramp_up_is_that_of_edm_counted_in_images(batch, decay, ratio):
    halflife_images = batch * math.log(0.5) / math.log(decay)
    for done in (0, 1, 2, 5, 19, 20, 21, 333, 10**4, 10**6):
        # NVlabs/edm, training_loop.py, whose cur_nimg counts the images before this step.
        halflife = min(halflife_images, done * batch * ratio)
        expected = 0.5 ** (batch / max(halflife, 1e-8))
        assert ema_decay_after(done, decay, ratio) == pytest.approx(expected, rel=1e-12)


def test_the_decay_rises_to_that_of_the_flag_and_stays_there():
    found = decays(3000, 0.99, 0.05)
    assert found[0] == 0 and (np.diff(found) >= 0).all() and max(found) == 0.99
    # Its half-life of 69 steps is a twentieth of 1379.
    assert found.index(0.99) == math.ceil(math.log(0.5) / math.log(0.99) / 0.05)
    assert decays(5, 0.99, 0) == [0.99] * 5
    assert decays(3, 1.0, 0) == [1.0] * 3 and decays(3, 0.9, 1e-300) == [0.0] * 3


@pytest.mark.parametrize("ratio", [0, 0.05, 1])
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 17, 400])
def test_what_is_left_of_the_start_is_what_the_recursion_leaves(ratio, decay, steps):
    # The average is linear in the weights: with 1 at the start and 0 later it is the share of the start.
    average = 1.0
    for d in decays(steps, decay, ratio):
        average = d * average + (1 - d) * 0.0
    assert initial_share(steps, decay, ratio) == pytest.approx(average, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("decay", "steps", "said"),
    [
        (0.9999, 1000, "90% of the initial weights after 1,000 steps at decay 0.9999"),
        (0.5, 4, "6% of the initial weights after 4 steps at decay 0.5"),
        (0.5, 5, None),
        (LARGEST_SHARE, 1, None),  # No more than that.
        (LARGEST_SHARE + 1e-12, 1, "5% of the initial weights after 1 steps"),
        (1.0, 10**6, "100% of"),
        (0.9999, 10**6, None),
        (0.0, 3, None),
        (0.9, 0, "100% of"),
    ],
)
def test_averages_of_short_runs_are_pointed_out(decay, steps, said):
    note = ema_note({"ema_decay": decay}, steps)
    assert note is None if said is None else said in note
    assert ema_note({"ema_decay": decay, "ema_rampup_ratio": 0.0}, steps) == note
    if steps:
        assert ema_note({"ema_decay": decay, "ema_rampup_ratio": 0.05}, steps) is None


def test_a_config_that_does_not_say_is_not_judged():
    assert ema_note({}, 10) is None
