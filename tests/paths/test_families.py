"""Hand-made paths against their definitions, by hand and on the published schedule."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from path_problems import cosine_clipped_log_snr
from paths.families import cascade, diagonal, fine_first, heuristic, lead, log_snr_shift
from paths.path import SPACINGS

MANY_STEPS = [*range(1, 61), 99, 100, 111, 200, 250, 333, 499, 500, 501, 700, 998, 999]


# Diagonals


@pytest.mark.parametrize("spacing", SPACINGS)
def test_diagonal_has_exactly_n_strictly_falling_steps(spacing):
    log_snr = cosine_clipped_log_snr()
    for num_steps in MANY_STEPS:
        path = diagonal(num_steps, spacing, log_snr=log_snr)
        t = np.array(path.points)
        assert path.nfe == num_steps and (t[:, 0] == t[:, 1]).all()
        assert (np.diff(t[:, 0]) < 0).all() and t[0, 0] <= 999 and t[-1, 0] == 0
        if spacing != "published":
            assert t[0, 0] == 999
        one = diagonal(num_steps, spacing, num_scales=1, log_snr=log_snr)
        assert one.points == tuple((t_64,) for t_64, _ in path.points)


def test_uniform_t_is_within_half_a_timestep_of_even():
    for num_steps in MANY_STEPS:
        t = np.array(diagonal(num_steps, num_scales=1).points)[:, 0]
        assert np.abs(t - 999 * (1 - np.arange(num_steps + 1) / num_steps)).max() <= 0.5 + 1e-9


def test_published_spacing():
    assert diagonal(18, "published", 1).points == tuple((t,) for t in [*range(990, 0, -55), 0])
    # Where N divides 1000 the first multiple is 1000, one past the last timestep.
    assert diagonal(4, "published", 1).points == ((999,), (750,), (500,), (250,), (0,))
    for num_steps in MANY_STEPS:
        t = np.array(diagonal(num_steps, "published", 1).points)[:, 0]
        assert (np.diff(t[1:]) == -(1000 // num_steps)).all()


def test_uniform_log_snr_takes_the_nearest_timestep_where_these_differ():
    log_snr = cosine_clipped_log_snr()
    for num_steps in MANY_STEPS:
        targets = np.linspace(log_snr[999], log_snr[0], num_steps + 1)
        nearest = np.abs(log_snr[None, :] - targets[:, None]).argmin(axis=1)
        t = np.array(diagonal(num_steps, "uniform_log_snr", 1, log_snr).points)[:, 0]
        if (np.diff(nearest) < 0).all():
            np.testing.assert_array_equal(t, nearest)
        else:
            assert num_steps > 18 and (t >= np.minimum(nearest, 999 - np.arange(num_steps + 1))).all()


def test_uniform_log_snr_of_a_straight_line_is_uniform_t():
    line = np.linspace(9.0, -6.0, 1000)
    # 999 = 27 · 37, so these targets fall on whole timesteps.
    for num_steps in (1, 3, 9, 27, 37, 111, 333, 999):
        assert diagonal(num_steps, "uniform_log_snr", log_snr=line).points == diagonal(num_steps).points


def test_karras_spacing_is_even_in_the_seventh_root_of_sigma():
    log_snr = cosine_clipped_log_snr()
    sigma = np.exp(-log_snr / 2)
    for num_steps in (1, 2, 6, 18, 30):
        # arXiv 2206.00364, eq. 5, as printed there.
        first, last = sigma[999], sigma[0]
        k = np.arange(num_steps + 1)
        targets = (first ** (1 / 7) + k / num_steps * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        nearest = np.abs(np.log(sigma)[None, :] - np.log(targets)[:, None]).argmin(axis=1)
        t = np.array(diagonal(num_steps, "karras", 1, log_snr).points)[:, 0]
        assert (np.diff(nearest) < 0).all()
        np.testing.assert_array_equal(t, nearest)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_diagonal_may_start_below_the_last_timestep(spacing):
    log_snr = cosine_clipped_log_snr()
    log_snr[999] = -np.inf
    for start, num_steps in [(990, 18), (899, 9), (20, 20), (20, 3), (1, 1)]:
        path = diagonal(num_steps, spacing, 1, log_snr, start=start)
        # The rest of the table does not matter.
        alone = diagonal(num_steps, spacing, 1, log_snr[: start + 1], num_train_timesteps=start + 1)
        assert path.points == alone.points and path.nfe == num_steps
        assert path.points[0] == (start,) or (spacing == "published" and (start + 1) % num_steps)
    assert path.provenance == {"spacing": spacing, "num_train_timesteps": 1000, "start": 1}


def test_diagonal_of_another_number_of_timesteps():
    assert diagonal(4, num_scales=1, num_train_timesteps=5).points == ((4,), (3,), (2,), (1,), (0,))
    with pytest.raises(ValueError, match="1 to 4"):
        diagonal(5, num_train_timesteps=5)


def test_diagonal_refuses():
    table = cosine_clipped_log_snr()
    zero_terminal = table.copy()
    zero_terminal[999] = -np.inf
    for num_steps in (-1, 0, 1000):
        with pytest.raises(ValueError, match="num_steps"):
            diagonal(num_steps)
    with pytest.raises(ValueError, match="num_scales"):
        diagonal(18, num_scales=0)
    for start in (0, -1, 1000):
        with pytest.raises(ValueError, match=f"starts at timestep {start} but .* 1 to 999"):
            diagonal(18, start=start)
    with pytest.raises(ValueError, match="18 from timestep 17 to 0"):
        diagonal(18, start=17)
    with pytest.raises(ValueError, match="zero terminal SNR.*'karras'.*start below"):
        diagonal(18, "karras", log_snr=zero_terminal)
    with pytest.raises(ValueError, match="uniform_t, published, uniform_log_snr, karras"):
        diagonal(18, "quadratic")
    with pytest.raises(ValueError, match="needs the table"):
        diagonal(18, "uniform_log_snr")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diagonal(18, "uniform_log_snr", log_snr=zero_terminal)
    with pytest.raises(ValueError, match=r"\[999\]"):
        diagonal(18, "uniform_log_snr", log_snr=table[1:])
    for wrong in (table[::-1], np.where(np.arange(1000) == 500, table[499], table), np.where(table > 3, np.inf, table)):
        with pytest.raises(ValueError, match="fall strictly"):
            diagonal(18, "uniform_log_snr", log_snr=wrong)


# Offsets between the scales


def test_log_snr_shift_by_hand():
    # log SNR 5, 4, ..., 0 at t = 0, ..., 5.
    base = diagonal(5, num_train_timesteps=6)
    line = np.arange(5.0, -1.0, -1.0)
    assert log_snr_shift(base, 1.4, line).points == ((5, 5), (4, 3), (3, 2), (2, 1), (1, 0), (0, 0))
    assert log_snr_shift(base, -1.6, line).points == ((5, 5), (4, 5), (3, 5), (2, 4), (1, 3), (0, 0))
    path = log_snr_shift(base, 2, line)
    assert path.kind == "log_snr_shift" and path.provenance == {"base": base.provenance, "shift": 2.0}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [-30.0, -2.0, 0.0, 0.5, 3.0, 30.0])
def test_log_snr_shift_takes_the_nearest_timestep(spacing, shift):
    log_snr = cosine_clipped_log_snr()
    for num_steps, start in [(1, 999), (6, 990), (18, 999), (99, 700)]:
        base = diagonal(num_steps, spacing, 1, log_snr, start=start)
        t = np.array(log_snr_shift(base, shift, log_snr).points)
        assert t[:, 0].tolist() == [point[0] for point in base.points]
        assert t[0, 0] == t[0, 1] and t[-1].tolist() == [0, 0]
        reachable = log_snr[: t[0, 0] + 1]
        nearest = np.abs(reachable[None, :] - (log_snr[t[1:-1, 0]] + shift)[:, None]).argmin(axis=1)
        np.testing.assert_array_equal(t[1:-1, 1], nearest)


def test_log_snr_shift_may_start_at_pure_noise():
    log_snr = cosine_clipped_log_snr()
    log_snr[999] = -np.inf
    path = log_snr_shift(diagonal(18), -30.0, log_snr)
    assert path.points[0] == (999, 999) and path.points[-1] == (0, 0)
    # No finite log SNR is nearer to pure noise than to the timestep before it.
    assert path.points[1][1] == 998


def test_of_two_nearest_timesteps_the_noisier_is_taken():
    base, line = diagonal(5, num_train_timesteps=6), np.arange(5.0, -1.0, -1.0)
    assert log_snr_shift(base, 0.5, line).points == ((5, 5), (4, 4), (3, 3), (2, 2), (1, 1), (0, 0))
    assert log_snr_shift(base, -0.5, line).points == ((5, 5), (4, 5), (3, 4), (2, 3), (1, 2), (0, 0))
    # Log SNRs 8, 6, 4, 2, 0; even ones from 8 to 0 in three steps are nearest to 6 - 2/3 and 2 + 2/3, in eight all.
    line = np.arange(8.0, -1.0, -2.0)
    assert diagonal(2, "uniform_log_snr", 1, np.array([3.0, 2.0, 1.0, 0.0]), 4).points == ((3,), (2,), (0,))
    assert diagonal(3, "uniform_log_snr", 1, line, 5).points == ((4,), (3,), (1,), (0,))


def test_lead_by_hand():
    base = diagonal(4, num_scales=1, num_train_timesteps=41)
    assert lead(base, 1).points == ((40, 40), (30, 20), (20, 10), (10, 0), (0, 0))
    assert lead(base, -2).points == ((40, 40), (10, 30), (0, 20), (0, 10), (0, 0))
    assert lead(base, 0).points == diagonal(4, num_train_timesteps=41).points
    assert lead(base, 99).points == ((40, 40), (30, 0), (20, 0), (10, 0), (0, 0))
    assert lead(base, 1).provenance == {"base": base.provenance, "k": 1} and lead(base, 1).kind == "lead"


def test_heuristic_by_hand():
    base = diagonal(4, num_train_timesteps=41)
    assert heuristic(base, 0.8).points == ((40, 40), (30, 24), (20, 16), (10, 8), (0, 0))
    # 7.5 and 2.5 round to even numbers.
    assert heuristic(base, 0.25).points == ((40, 40), (30, 8), (20, 5), (10, 2), (0, 0))
    assert heuristic(base, 1).points == base.points
    assert heuristic(base, 1e-9).points == ((40, 40), (30, 0), (20, 0), (10, 0), (0, 0))
    assert heuristic(base, 0.8).provenance == {"base": base.provenance, "factor": 0.8}
    assert heuristic(base, 0.8).kind == "heuristic"


def test_cascade_and_fine_first_by_hand():
    path = cascade(4, num_train_timesteps=41)
    assert path.points == ((40, 40), (40, 20), (40, 0), (20, 0), (0, 0)) and path.kind == "cascade"
    path = cascade(5, coarse_steps=2, remaining=10, start=30)
    assert path.points == ((30, 30), (30, 20), (30, 10), (20, 10), (10, 10), (0, 0))
    assert path.provenance == {
        "spacing": "uniform_t",
        "num_train_timesteps": 1000,
        "start": 30,
        "first_steps": 2,
        "remaining": 10,
    }
    mirror = fine_first(5, fine_steps=2, remaining=10, start=30)
    assert mirror.points == tuple((t_64, t_32) for t_32, t_64 in path.points) and mirror.kind == "fine_first"


@pytest.mark.parametrize("spacing", ["uniform_t", "uniform_log_snr", "karras"])
def test_the_legs_of_a_cascade_are_spaced_as_diagonals(spacing):
    log_snr = cosine_clipped_log_snr()
    points = cascade(24, log_snr, 9, 0, spacing).points
    assert points[:10] == tuple((999, t) for (t,) in diagonal(9, spacing, 1, log_snr).points)
    assert points[9:] == tuple((t, 0) for (t,) in diagonal(15, spacing, 1, log_snr).points)
    # A leg that ends above 0, with as many steps as there are timesteps.
    crowded = cascade(60, log_snr, 50, 949, spacing).points
    assert [t_32 for _, t_32 in crowded[:51]] == list(range(999, 948, -1))


def test_offsets_refuse():
    log_snr = cosine_clipped_log_snr()
    shift = functools.partial(log_snr_shift, shift=1.0, log_snr=log_snr)
    for offset in (lambda base: lead(base, 1), shift, lambda base: heuristic(base, 0.8)):
        with pytest.raises(ValueError, match="point 1 of the base path is .* must move together"):
            offset(cascade(4))
    for factor in (0.0, -0.5, 1.1, np.nan):
        with pytest.raises(ValueError, match=f"the factor of timesteps is {factor}; it must"):
            heuristic(diagonal(4), factor)
    for shift in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            log_snr_shift(diagonal(4), shift, log_snr)
    with pytest.raises(ValueError, match=r"\[999\] but the path starts at timestep 999"):
        log_snr_shift(diagonal(4), 1.0, log_snr[:999])
    with pytest.raises(ValueError, match="fall strictly"):
        log_snr_shift(diagonal(4), 1.0, log_snr[::-1])
    for family, flag in ((cascade, "coarse_steps"), (fine_first, "fine_steps")):
        for steps in (0, 4):
            with pytest.raises(ValueError, match=f"{steps} of 4 steps"):
                family(4, **{flag: steps})
        with pytest.raises(ValueError, match="waits at timestep 20; choose 0 to 19"):
            family(4, remaining=20, start=20)
        with pytest.raises(ValueError, match="2 from timestep 20 to 19"):
            family(4, remaining=19, start=20)
        with pytest.raises(ValueError, match="'published'"):
            family(4, spacing="published")
        with pytest.raises(ValueError, match="'quadratic' is unknown"):
            family(4, spacing="quadratic")
        with pytest.raises(ValueError, match="0 of 1 steps"):
            family(1)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.data())
def test_hand_made_paths_have_exactly_n_steps_and_their_ends(num_steps, data):
    log_snr = cosine_clipped_log_snr()
    start = data.draw(st.integers(num_steps, 999))
    spacing = data.draw(st.sampled_from([name for name in SPACINGS if name != "published"]))
    base = diagonal(num_steps, spacing, 2, log_snr, start=start)
    first_steps = data.draw(st.integers(1, num_steps - 1))
    remaining = data.draw(st.integers(0, start - first_steps))
    for path in (
        base,
        lead(base, data.draw(st.integers(-70, 70))),
        heuristic(base, data.draw(st.floats(0, 1, exclude_min=True))),
        log_snr_shift(base, data.draw(st.floats(-20, 20)), log_snr),
        cascade(num_steps, log_snr, first_steps, remaining, spacing, start=start),
        fine_first(num_steps, log_snr, first_steps, remaining, spacing, start=start),
    ):
        # That no point repeats and no axis rises is checked by Path itself.
        assert path.nfe == num_steps and path.points[0] == (start, start) and path.points[-1] == (0, 0)
