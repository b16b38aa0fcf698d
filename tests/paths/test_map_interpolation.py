"""Interpolated maps against closed forms, a formula written out, and what the interpolation promises."""

import numpy as np
import pytest

from paths.map_interpolation import interpolate_map, nearest_in_row

KNOWN = np.array([-5.7, -3.0, -2.5, 0.0, 1.5, 4.0, 9.2])
WANTED = np.linspace(-5.7, 9.2, 61)


def random_map(*shape, seed=0):
    """Over six decades, rough, and not symmetrical."""
    return 10 ** np.random.default_rng(seed).uniform(-3, 3, (*shape, len(KNOWN), len(KNOWN)))


def test_the_map_is_kept_on_its_own_lines():
    values = random_map(3)
    np.testing.assert_allclose(interpolate_map(values, KNOWN, KNOWN), values, rtol=1e-13)
    # And among further lines: every line that is known stands where it is wanted, rows first.
    wanted = np.sort(np.concatenate([KNOWN, WANTED[1:-1]]))
    at = np.searchsorted(wanted, KNOWN)
    whole = interpolate_map(values, KNOWN, wanted)
    assert whole.shape == (3, len(wanted), len(wanted)) and whole.dtype == np.float64
    np.testing.assert_allclose(whole[:, at[:, None], at], values, rtol=1e-13)


def test_log_linear_maps_are_exact():
    def exact(x):
        return np.exp(1.3 - 0.9 * x[:, None] + 0.4 * x)

    np.testing.assert_allclose(interpolate_map(exact(KNOWN), KNOWN, WANTED), exact(WANTED), rtol=1e-12)
    # Two lines hold nothing but a log-linear map along each axis.
    ends = KNOWN[[0, -1]]
    bilinear = np.exp(1 + 0.2 * WANTED[:, None] - 0.3 * WANTED + 0.05 * WANTED[:, None] * WANTED)
    corners = bilinear[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(2, 2)
    np.testing.assert_allclose(interpolate_map(corners, ends, WANTED), bilinear, rtol=1e-11)


def fritsch_carlson(x, y, at):
    """Cubic Hermite with weighted harmonic means of the slopes, written out; ends by SciPy's three points."""
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    d = np.zeros(len(x))
    for k in range(1, len(x) - 1):
        if slope[k - 1] * slope[k] > 0:
            w1, w2 = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
            d[k] = (w1 + w2) / (w1 / slope[k - 1] + w2 / slope[k])
    for end, h0, h1, s0, s1 in ((0, h[0], h[1], slope[0], slope[1]), (-1, h[-1], h[-2], slope[-1], slope[-2])):
        d[end] = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        if d[end] * s0 <= 0:
            d[end] = 0
        elif s0 * s1 <= 0 and abs(d[end]) > 3 * abs(s0):
            d[end] = 3 * s0
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    u = (at - x[k]) / h[k]
    value = y[k] * (1 + 2 * u) * (1 - u) ** 2 + y[k + 1] * u**2 * (3 - 2 * u)
    return value + h[k] * (d[k] * u * (1 - u) ** 2 + d[k + 1] * u**2 * (u - 1))


def test_it_is_the_formula_of_fritsch_and_carlson_along_one_axis_after_the_other():
    logs = np.log(random_map(seed=4))
    columns = np.stack([fritsch_carlson(KNOWN, logs[:, j], WANTED) for j in range(len(KNOWN))], 1)
    whole = np.stack([fritsch_carlson(KNOWN, row, WANTED) for row in columns])
    np.testing.assert_allclose(np.log(interpolate_map(np.exp(logs), KNOWN, WANTED)), whole, rtol=0, atol=1e-11)


def test_no_new_extrema():
    values = random_map(20, seed=1)
    whole = interpolate_map(values, KNOWN, WANTED)
    cell = np.clip(np.searchsorted(KNOWN, WANTED, side="right") - 1, 0, len(KNOWN) - 2)
    corners = np.stack([values[:, cell[:, None] + a, cell + b] for a in (0, 1) for b in (0, 1)])
    assert (whole >= corners.min(0) * (1 - 1e-12)).all() and (whole <= corners.max(0) * (1 + 1e-12)).all()


def test_monotonic_maps_stay_monotonic_along_the_last_axis():
    values = np.exp(-np.cumsum(np.random.default_rng(2).random((7, 7)), 1))
    assert (np.diff(interpolate_map(values, KNOWN, WANTED), axis=1) < 0).all()


def test_maps_of_zeros_stay_zero_beside_others():
    values = random_map(3, seed=3)
    values[1] = 0
    whole = interpolate_map(values, KNOWN, WANTED)
    assert (whole[1] == 0).all() and (whole[[0, 2]] > 0).all()
    np.testing.assert_array_equal(whole[0], interpolate_map(values[0], KNOWN, WANTED))
    assert (interpolate_map(np.zeros((7, 7)), KNOWN, WANTED) == 0).all()


def test_lines_may_miss_the_ends_by_rounding():
    values = random_map()
    beside = WANTED + np.r_[-1e-12, np.zeros(59), 1e-12]
    np.testing.assert_allclose(interpolate_map(values, KNOWN, beside), interpolate_map(values, KNOWN, WANTED))
    # A billionth of their range is rounding, and no more.
    most = 1e-9 * (KNOWN[-1] - KNOWN[0])
    for end, sign in ((KNOWN[0], -1), (KNOWN[-1], 1)):
        assert interpolate_map(values, KNOWN, [end + sign * most]).shape == (1, 1)
        with pytest.raises(ValueError, match="cannot tell"):
            interpolate_map(values, KNOWN, [end + 1.01 * sign * most])


def test_the_nearest_known_cell_of_every_row_is_that_of_brute_force():
    generator = np.random.default_rng(5)
    known = generator.random((7, 7)) < 0.3
    known[np.arange(7), generator.integers(0, 7, 7)] = True
    expected = [
        [min(np.flatnonzero(row), key=lambda k: abs(KNOWN[k] - KNOWN[column])) for column in range(7)] for row in known
    ]
    np.testing.assert_array_equal(nearest_in_row(known, KNOWN), expected)
    # Of two as near the noisier, which comes first.
    np.testing.assert_array_equal(
        nearest_in_row([[1, 0, 1], [0, 1, 0], [0, 1, 1]], [-1, 0, 1]), [[0, 0, 2], [1] * 3, [1, 1, 2]]
    )


def changed(value, at=(2, 3)):
    values = random_map()
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("values", "known", "wanted", "message"),
    [
        (random_map()[:-1], KNOWN, WANTED, r"shape \[6, 7\] but known has \[7\]"),
        (random_map()[0], KNOWN, WANTED, r"shape \[7\] but known has \[7\]"),
        ([[1.0]], [0.0], [0.0], r"shape \[1, 1\] but known has \[1\]"),
        (random_map(), KNOWN[None], WANTED, r"known has \[1, 7\]"),
        (random_map(), KNOWN[::-1], WANTED, "known must rise strictly"),
        (random_map(), KNOWN[[0, 1, 1, 3, 4, 5, 6]], WANTED, "known must rise strictly"),
        (random_map(), KNOWN, [-5.8, 0], "log SNR -5.7 to 9.2 cannot tell -5.8 to 0"),
        (random_map(), KNOWN, [0, 9.3], "cannot tell 0 to 9.3"),
        (changed(0), KNOWN, WANTED, "positive and finite everywhere, or zero everywhere"),
        (changed(-1), KNOWN, WANTED, "positive and finite"),
        (changed(np.nan), KNOWN, WANTED, "positive and finite"),
        (changed(np.inf), KNOWN, WANTED, "positive and finite"),
        (-np.eye(7), KNOWN, WANTED, "positive and finite"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(values, known, wanted, message):
    with pytest.raises(ValueError, match=message) as caught:
        interpolate_map(values, known, wanted)
    assert "\n" not in str(caught.value)
