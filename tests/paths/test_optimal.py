"""Costs against closed forms, and what holds of every optimum; test_dynamic_programme.py has the enumerations."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from path_problems import (
    CRITERIA,
    assert_legal,
    cosine_clipped_log_snr,
    kl_problem,
    random_problem,
    total_cost,
)
from paths.families import cascade, diagonal, fine_first, lead, log_snr_shift
from paths.optimal import (
    Readings,
    band_readings,
    best_cascade,
    find_optimal_path_n_steps_lambda,
    find_optimal_paths_all_steps,
    kl_cost,
    kl_path,
    kl_paths_all_steps,
    kl_step_cost,
    path_cost,
    step_cost,
)
from paths.path import timestep_grid

# Published cost


def test_step_cost_by_hand():
    e64, e32, lam = (
        np.array([[1.0, 2.0], [3.0, 5.0]]),
        np.array([[10.0, 20.0], [30.0, 60.0]]),
        np.array([-1.0, 3.0]),
    )
    assert step_cost(e64, e32, lam, (0, 0), (1, 1)) == (1 + 5) / 2 * 4 + (10 + 60) / 2 * 4
    assert step_cost(e64, e32, lam, (0, 0), (0, 1)) == (10 + 20) / 2 * 4
    assert step_cost(e64, e32, lam, (0, 1), (1, 1)) == (2 + 5) / 2 * 4


def test_constant_maps_cost_the_distance_in_log_snr():
    log_snr = cosine_clipped_log_snr()[timestep_grid()]
    distance = log_snr[-1] - log_snr[0]
    ones, zeros = np.ones((30, 30)), np.zeros((30, 30))
    for num_steps in (6, 18, 58):
        assert find_optimal_path_n_steps_lambda(ones, 3 * ones, log_snr, num_steps)[1] == pytest.approx(4 * distance)
        assert find_optimal_path_n_steps_lambda(ones, zeros, log_snr, num_steps)[1] == pytest.approx(distance)


def test_coarse_goes_first_where_the_fine_error_falls_with_it():
    # E_64 vanishes once the coarse scale is clean, so moving the coarse scale first is free.
    e64 = np.ones((6, 6))
    e64[:, -1] = 0.0
    cells, cost = find_optimal_path_n_steps_lambda(e64, np.zeros((6, 6)), np.arange(6.0), 10, 1)
    assert cost == 0.0
    assert cells == [(0, j) for j in range(6)] + [(i, 5) for i in range(1, 6)]


@st.composite
def problems(draw):
    n = draw(st.integers(2, 12))
    max_jump = draw(st.integers(1, n + 2))
    num_steps = draw(st.integers(-(-(n - 1) // max_jump), 2 * (n - 1)))
    return *random_problem(n, draw(st.integers(0, 2**32 - 1))), num_steps, max_jump


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(-20, 20))
def test_optimum_is_legal_scales_and_never_loses_to_the_diagonal(problem, exponent):
    e64, e32, lam, num_steps, max_jump = problem
    n = len(lam)
    cells, cost = find_optimal_path_n_steps_lambda(*problem)
    assert_legal(cells, n, num_steps, max_jump)
    assert cost == pytest.approx(total_cost(e64, e32, lam, cells), rel=1e-12)

    scale = 2.0**exponent
    assert find_optimal_path_n_steps_lambda(scale * e64, scale * e32, lam, num_steps, max_jump) == (
        cells,
        scale * cost,
    )

    # Swapping the scales mirrors the path.
    mirrored, mirrored_cost = find_optimal_path_n_steps_lambda(e32.T, e64.T, lam, num_steps, max_jump)
    assert mirrored == [(j, i) for i, j in cells] and mirrored_cost == pytest.approx(cost, rel=1e-12)

    if num_steps <= n - 1:
        diagonal_cells = [(k, k) for k in np.linspace(0, n - 1, num_steps + 1).astype(int).tolist()]
        if max(b[0] - a[0] for a, b in zip(diagonal_cells, diagonal_cells[1:], strict=False)) <= max_jump:
            assert cost <= total_cost(e64, e32, lam, diagonal_cells) * (1 + 1e-12)


def test_infeasible_numbers_of_steps_raise():
    e64, e32, lam = random_problem(30, 0)
    with pytest.raises(ValueError, match="5 steps of at most 5 cells.*29 cells.*at least 6 steps"):
        find_optimal_path_n_steps_lambda(e64, e32, lam, 5, 5)
    with pytest.raises(ValueError, match="at least 6 steps"):
        find_optimal_paths_all_steps(e64, e32, lam, 5, 5)
    for num_steps in (0, -3):
        with pytest.raises(ValueError, match="at least 6 steps"):
            find_optimal_path_n_steps_lambda(e64, e32, lam, num_steps, 5)
    with pytest.raises(ValueError, match="59 steps.*58"):
        find_optimal_path_n_steps_lambda(e64, e32, lam, 59, 5)
    with pytest.raises(ValueError, match="max_jump is 0"):
        find_optimal_path_n_steps_lambda(e64, e32, lam, 18, 0)
    assert list(find_optimal_paths_all_steps(e64, e32, lam, 1000, 5)) == list(range(6, 59))


def test_max_jump_beyond_the_grid_is_the_whole_grid():
    problem = random_problem(6, 3)
    assert find_optimal_path_n_steps_lambda(*problem, 1, 5)[0] == [(0, 0), (5, 5)]
    for num_steps in (1, 4, 10):
        assert find_optimal_path_n_steps_lambda(*problem, num_steps, 10**9) == find_optimal_path_n_steps_lambda(
            *problem, num_steps, 5
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-9])
@pytest.mark.parametrize("name", ["error_64", "error_32"])
def test_bad_errors_are_named(name, value):
    arguments = dict(zip(("error_64", "error_32", "log_snr"), random_problem(6, 0), strict=True))
    arguments[name][2, 3] = value
    with pytest.raises(ValueError, match=rf"{name} is .* at cell \(2, 3\)"):
        find_optimal_path_n_steps_lambda(**arguments, num_steps=4)


def test_bad_shapes_and_log_snr_are_named():
    e64, e32, lam = random_problem(6, 0)
    for bad, message in [
        ((e64[:5], e32, lam), r"error_64 has shape \[5, 6\]"),
        ((e64, e32[:, :5], lam), r"error_32 has shape \[6, 5\]"),
        ((e64, e32, lam[:5]), "error_64 has shape"),
        ((e64, e32, lam[:, None]), "log_snr has shape"),
        ((e64[:1, :1], e32[:1, :1], lam[:1]), "n >= 2"),
        ((e64, e32, lam[::-1]), "rise strictly"),
        ((e64, e32, lam[[0, 1, 1, 3, 4, 5]]), "rise strictly"),
        ((e64, e32, np.r_[-np.inf, lam[1:]]), "log_snr is -inf at grid index 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_optimal_path_n_steps_lambda(*bad, num_steps=4)


def test_optimiser_takes_torch_maps_and_leaves_them_alone():
    arrays = random_problem(6, 0)
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    assert find_optimal_path_n_steps_lambda(*tensors, 4) == find_optimal_path_n_steps_lambda(*arrays, 4)
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


# KL


def test_a_cascade_needs_a_step_for_each_scale():
    for num_steps in (1, 9):
        with pytest.raises(ValueError, match=f"{num_steps} steps are no cascade on a grid of 5.*2 to 8"):
            best_cascade(*kl_problem(5, 0), num_steps)


def test_kl_ends_may_be_single_indices_and_default_to_the_whole_grid():
    problem = kl_problem(5, 0)
    assert kl_path(*problem, 4) == kl_path(*problem, 4, start=(0, 0), end=(4, 4))
    assert kl_path(*problem, 2, start=1, end=np.int64(3)) == kl_path(*problem, 2, start=(1, 1), end=(3, 3))
    assert kl_path(*map(torch.from_numpy, problem), 4) == kl_path(*problem, 4)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_weight_is_integrated(weight):
    drop = 3.0
    for low, high in [(0.1, 0.2), (0.5, 40.0)]:
        integral = quad(lambda snr: snr**-weight, low, high)[0]
        fine = kl_cost(Readings(5.0, 1.0, low, 2.0), Readings(5.0 - drop, 0.5, high, 2.0), weight, symmetric=True)
        coarse = kl_cost(Readings(1.0, 5.0, 2.0, low), Readings(0.5, 5.0 - drop, 2.0, high), weight, symmetric=True)
        assert fine == coarse == pytest.approx(drop * integral / 2)


def gaussian_maps(snr, s):
    """Posterior covariance of (x_64, x_32) for one low mode of variance s: s / (1 + s(a + b/4)) [[1, ½], [½, ¼]]."""
    posterior = s / (1 + s * (snr[:, None] + snr[None, :] / 4))
    return posterior, posterior / 4


def test_left_riemann_sum_less_the_information_is_the_kl_of_gaussians_on_any_path():
    snr, s = np.geomspace(1e-3, 50.0, 12), 3.0
    m64, m32 = gaussian_maps(snr, s)
    step = functools.partial(kl_step_cost, m64, m32, snr)
    information = np.log((1 + s * snr[-1] * 1.25) / (1 + s * snr[0] * 1.25)) / 2
    rng = np.random.default_rng(0)
    for num_steps in (1, 2, 7):
        inner = np.sort(rng.integers(0, 12, (num_steps - 1, 2)), axis=0)
        cells = [(0, 0), *map(tuple, inner.tolist()), (11, 11)]
        divergence = 0.0
        for a, b in itertools.pairwise(cells):
            delta = np.diag([snr[b[0]] - snr[a[0]], snr[b[1]] - snr[a[1]]])
            product = delta @ (m64[a] * np.array([[1.0, 0.5], [0.5, 0.25]]))
            divergence += (np.trace(product) - np.linalg.slogdet(np.eye(2) + product)[1]) / 2
        assert path_cost(step, cells) - information == pytest.approx(divergence, rel=1e-9)
        # The second form bounds the divergence, on any path.
        assert path_cost(functools.partial(step, symmetric=True), cells) >= divergence


def test_second_form_at_weight_0_is_twice_the_kl_to_leading_order_and_its_sum_of_both_directions():
    s, low = 3.0, 0.7

    def gaussian_kl(v, w):
        return (v / w - 1 - np.log(v / w)) / 2

    for high, close in [(0.7007, True), (70.0, False)]:
        start, end = (Readings(s / (1 + s * g), 0.0, g, 0.0) for g in (low, high))
        error = (high - low) * start.map_64
        divergence, reverse = gaussian_kl(1 + error, 1.0), gaussian_kl(1.0, 1 + error)
        information = np.log((1 + s * high) / (1 + s * low)) / 2
        assert kl_cost(start, end) - information == pytest.approx(divergence, rel=1e-6)
        second = kl_cost(start, end, symmetric=True)
        assert second == pytest.approx(divergence + reverse, rel=1e-6)
        assert (second == pytest.approx(2 * divergence, rel=2e-3)) == close


@st.composite
def kl_problems(draw, falling):
    n = draw(st.integers(2, 9))
    weight, symmetric = draw(st.sampled_from(CRITERIA))
    start = draw(st.integers(0, n - 2))
    options = {"weight": weight, "symmetric": symmetric, "bands": draw(st.booleans())}
    options |= {"start": start, "diagonal": draw(st.booleans())}
    return kl_problem(n, draw(st.integers(0, 2**32 - 1)), falling), options


@settings(max_examples=60, deadline=None)
@given(kl_problems(falling=True))
def test_kl_never_rises_with_the_number_of_steps_on_falling_maps(problem):
    maps, options = problem
    costs = [cost for _, cost in kl_paths_all_steps(*maps, 99, **options).values()]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(costs))


def test_kl_may_rise_with_the_number_of_steps_on_other_maps():
    rising = np.ones((3, 3))
    rising[0, 0] = 0.0
    costs = [cost for _, cost in kl_paths_all_steps(rising, rising, np.arange(3.0), 3).values()]
    assert costs[0] == 0 < costs[1] < costs[2]


@settings(max_examples=60, deadline=None)
@given(kl_problems(falling=False), st.integers(-20, 20))
def test_kl_optimum_scales_mirrors_and_the_diagonal_never_beats_it(problem, exponent):
    (m64, m32, snr), options = problem
    scale = 2.0**exponent
    all_steps = kl_paths_all_steps(m64, m32, snr, 99, **options)
    for num_steps, (cells, cost) in kl_paths_all_steps(scale * m64, scale * m32, snr, 99, **options).items():
        assert cells == all_steps[num_steps][0] and cost == scale * all_steps[num_steps][1]
    mirrored = kl_paths_all_steps(m32.T, m64.T, snr, 99, **options)
    for num_steps, (cells, cost) in all_steps.items():
        assert_legal(cells, len(snr), num_steps, len(snr), options["start"])
        if not options["bands"]:
            assert mirrored[num_steps][0] == [(j, i) for i, j in cells]
            assert mirrored[num_steps][1] == pytest.approx(cost, rel=1e-9, abs=1e-9)
        # A scale of SNR that is common to the grid is a scale of W, which log SNR does not even see.
        power = 1 - options["weight"]
        assert kl_path(m64, m32, 16 * snr, num_steps, **options)[1] == pytest.approx(16**power * cost, abs=1e-9)
    free = kl_paths_all_steps(m64, m32, snr, 99, **options | {"diagonal": False})
    assert all(free[num_steps][1] <= cost + 1e-9 * abs(cost) for num_steps, (_, cost) in all_steps.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.integers(0, 2**32 - 1), st.data())
def test_optima_never_lose_to_a_hand_made_path_on_the_same_grid(num_steps, seed, data):
    n = 12
    map_64, map_32, rising = random_problem(n, seed)
    table = rising[::-1]  # Every timestep is a grid line, so that any path is a path of cells.
    base = diagonal(num_steps, data.draw(st.sampled_from(("uniform_t", "uniform_log_snr", "karras"))), 2, table, n)
    paths = [
        base,
        lead(base, data.draw(st.integers(-4, 4))),
        log_snr_shift(base, data.draw(st.floats(-4, 4)), table),
        cascade(num_steps, table, remaining=data.draw(st.integers(0, 5)), num_train_timesteps=n),
        fine_first(num_steps, table, remaining=data.draw(st.integers(0, 5)), num_train_timesteps=n),
    ]
    weight, symmetric = data.draw(st.sampled_from(CRITERIA))
    options = {"weight": weight, "symmetric": symmetric, "bands": data.draw(st.booleans())}
    optimum = kl_path(map_64, map_32, np.exp(rising), num_steps, **options)[1]
    kl_step = functools.partial(kl_step_cost, map_64, map_32, np.exp(rising), **options)
    published = find_optimal_path_n_steps_lambda(map_64, map_32, rising, num_steps, n - 1)[1]
    published_step = functools.partial(step_cost, map_64, map_32, rising)
    for path in paths:
        cells = [(n - 1 - t_64, n - 1 - t_32) for t_64, t_32 in path.points]
        assert optimum <= path_cost(kl_step, cells) + 1e-9 * abs(optimum)
        assert published <= path_cost(published_step, cells) * (1 + 1e-9)
        assert path_cost(published_step, cells) == pytest.approx(total_cost(map_64, map_32, rising, cells))


def test_infeasible_kl_paths_raise():
    problem = kl_problem(5, 0)
    for num_steps in (-1, 0, 9):
        with pytest.raises(ValueError, match=f"{num_steps} steps .* allow 1 to 8"):
            kl_path(*problem, num_steps)
    with pytest.raises(ValueError, match="allow 1 to 4"):
        kl_path(*problem, 5, diagonal=True)
    with pytest.raises(ValueError, match="max_steps is 0"):
        kl_paths_all_steps(*problem, 0)
    assert kl_paths_all_steps(*problem, 1) == {1: kl_path(*problem, 1)}
    ends = [(0, (4, 5)), (0, (5, 4)), ((-1, 0), 4), ((0, -1), 4), ((3, 0), (2, 4))]
    for start, end in [(0, 5), (-1, 4), (3, 2), (2, 2), ((0, 3), (4, 2)), (4, None), *ends]:
        with pytest.raises(ValueError, match="no path leads from cell"):
            kl_path(*problem, 1, start=start, end=end)
    for start, end in [((0, 1), 4), (0, (3, 4))]:
        with pytest.raises(ValueError, match="do not both lie on the diagonal"):
            kl_path(*problem, 1, start=start, end=end, diagonal=True)
    with pytest.raises(ValueError, match="one integer per scale"):
        kl_path(*problem, 1, start=0.5)
    for weight in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="exponent from 0 to 1"):
            kl_path(*problem, 1, weight)


def test_the_coarse_lines_may_be_others_and_stand_still_but_never_fall():
    m64, m32, snr = kl_problem(4, 0)
    coarse = np.array([0.3, 0.9, 5.0, 5.0])
    cells, cost = kl_path(m64, m32, snr, 2, snr_32=coarse)

    def by_hand(a, b):
        return (m64[a] * (snr[b[0]] - snr[a[0]]) + m32[a] * (coarse[b[1]] - coarse[a[1]])) / 2

    costs = {
        (i, j): by_hand((0, 0), (i, j)) + by_hand((i, j), (3, 3)) for i in range(4) for j in range(4) if 0 < i + j < 6
    }
    assert cells == [(0, 0), min(costs, key=costs.get), (3, 3)] and cost == pytest.approx(min(costs.values()))
    for wrong in (coarse[::-1], coarse[:3], np.array([0.3, 0.9, 5.0, np.inf])):
        with pytest.raises(ValueError, match=r"snr_32 must be finite, \[4\] like snr, and never fall"):
            kl_path(m64, m32, snr, 2, snr_32=wrong)


def test_a_path_may_move_one_axis_alone():
    m64, m32, snr = kl_problem(4, 1)
    for start, end, cells in (((1, 2), (3, 2), [(1, 2), (3, 2)]), ((0, 0), (0, 3), [(0, 0), (0, 3)])):
        assert kl_path(m64, m32, snr, 1, start=start, end=end)[0] == cells


def test_bad_kl_maps_are_named():
    m64, m32, snr = kl_problem(5, 0)
    negative = m32.copy()
    negative[1, 2] = -1.0
    for bad, weight, message in [
        ((m64, negative, snr), 0.0, r"mmse_32 is -1.0 at cell \(1, 2\)"),
        ((m64[:4], m32, snr), 0.0, r"mmse_64 has shape \[4, 5\]"),
        ((m64, m32, snr[::-1]), 0.0, "snr must rise"),
        ((m64, m32, np.r_[snr[:4], np.inf]), 0.0, "snr is inf at grid index 4"),
        ((m64, m32, snr - 1), 0.0, "at least 0"),
        ((m64, m32, np.r_[0.0, snr[1:]]), 1.0, "above 0 for weight 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            kl_path(*bad, 3, weight)
    assert np.isfinite(kl_path(m64, m32, np.r_[0.0, snr[1:]], 3, 0.5)[1])


# Bands


def test_band_readings_by_hand():
    # a = 3, b = 8, and a cell where the maps contradict each other.
    details = band_readings(Readings(np.array([10.0, 5.0]), np.array([2.0, 2.0]), 3.0, 8.0))
    np.testing.assert_array_equal(details.map_64, [2.0, 0.0])
    np.testing.assert_array_equal(details.map_32, [8.0, 8.0])
    assert (details.clock_64, details.clock_32) == (3.0, 5.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_bands_and_scales_cost_the_same_at_weight_0_alone(symmetric):
    m64, m32, snr = kl_problem(7, 0, falling=True)
    assert (m64 >= 4 * m32).all()
    i = np.arange(7)
    start, end = (i[:, None, None, None], i[:, None, None]), (i[:, None], i)
    by_scale, by_band = (
        kl_step_cost(m64, m32, snr, start, end, symmetric=symmetric, bands=bands) for bands in (False, True)
    )
    np.testing.assert_allclose(by_band, by_scale, rtol=1e-9, atol=1e-9 * np.abs(by_scale).max())
    for num_steps in range(1, 13):
        scales, bands = (kl_path(m64, m32, snr, num_steps, symmetric=symmetric, bands=bands) for bands in (False, True))
        assert scales[0] == bands[0] and scales[1] == pytest.approx(bands[1])
        weighted = [kl_path(m64, m32, snr, num_steps, 1.0, bands=bands)[1] for bands in (False, True)]
        assert weighted[0] != pytest.approx(weighted[1], rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_bands_charge_for_the_low_band_alike_whichever_clock_resolves_it(weight):
    # One low mode and no details, at SNR q = a + b / 4 = 1; either clock takes it to 3.
    s = 3.0

    def at(a, b):
        error = s / (1 + s * (a + b / 4))
        return Readings(error, error / 4, a, b)

    drop = s / (1 + s) - s / (1 + 3 * s)
    integral = quad(lambda snr: snr**-weight, 1, 3)[0]
    for end in (at(2.5, 2.0), at(0.5, 10.0), at(1.5, 6.0)):
        cost = kl_cost(at(0.5, 2.0), end, weight, symmetric=True, bands=True)
        assert cost == pytest.approx(drop * integral / 2)
    # Weights on scales charge a quarter of the fall, against a gain of SNR that is four times as large.
    by_scale = kl_cost(at(0.5, 2.0), at(0.5, 10.0), weight, symmetric=True)
    assert by_scale == pytest.approx(drop / 4 * quad(lambda snr: snr**-weight, 2, 10)[0] / 2)
    assert by_scale == pytest.approx(drop * integral / 2) if weight == 0 else by_scale < 0.75 * drop * integral / 2
