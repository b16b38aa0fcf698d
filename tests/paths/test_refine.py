import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from paths.families import diagonal
from paths.map_interpolation import interpolate_map
from paths.optimal import (
    Readings,
    find_optimal_path_n_steps_lambda,
    kl_cost,
    kl_path,
    kl_step_cost,
    path_cost,
    step_cost,
)
from paths.path import timestep_grid
from paths.refine import CRITERIA, cost_off_grid, refine_path
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, mse_maps
from truth.linear_sampler import ddim_output, w2_squared

KL_FORMS = [
    {"weight": weight, "symmetric": symmetric, "bands": bands}
    for weight, symmetric in [(0.0, False), (0.0, True), (0.5, False), (1.0, False)]
    for bands in (False, True)
]


def gaussian_maps(snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Denoising errors of a Gaussian image with low and detail modes, closed form, [n, n] each."""
    variances = 30.0 / np.arange(1, 9) ** 2
    low = (variances / (1 + variances * (snr[:, None, None] + snr[None, :, None] / 4))).sum(-1)
    detail = (variances / 50 / (1 + variances / 50 * snr[:, None, None])).sum(-1)
    return low + 3 * detail, low / 4


def fine_table(num_train_timesteps: int) -> np.ndarray:
    """Log SNR, falling from 4 to -4, convex and concave in turn."""
    return 4 * np.cos(np.linspace(0, np.pi, num_train_timesteps)) - 0.01 * np.arange(num_train_timesteps)


def assert_legal(points, num_steps, start):
    assert points.shape == (num_steps + 1, 2)
    assert points[0].tolist() == [start, start] and points[-1].tolist() == [0, 0]
    moves = -np.diff(points, axis=0)
    assert (moves >= 0).all() and (moves.max(axis=1) >= 1 - 1e-9).all()


def on_all_timesteps(maps, t_grid, log_snr):
    """Maps and SNR on a grid whose lines are all timesteps, from noise to clean."""
    full = interpolate_map(np.stack(maps), log_snr[t_grid], log_snr[: t_grid[0] + 1][::-1])
    return *full, np.exp(log_snr[: t_grid[0] + 1][::-1])


@pytest.mark.parametrize("num_steps", [2, 3, 8])
@pytest.mark.parametrize("form", KL_FORMS)
def test_integer_diagonal_is_the_exact_optimum_over_all_timesteps(form, num_steps):
    log_snr = DDIMScheduler().log_snr.numpy()
    t_grid = timestep_grid()
    snr = np.exp(log_snr[t_grid])
    maps = gaussian_maps(snr)
    cells, _ = kl_path(*maps, snr, num_steps, diagonal=True, **form)
    refined = refine_path(cells, t_grid, *maps, log_snr, diagonal=True, **form)
    full = on_all_timesteps(maps, t_grid, log_snr)
    best_cells, best = kl_path(*full, num_steps, diagonal=True, **form)
    assert refined.path_cost == pytest.approx(best, rel=1e-6)
    assert refined.cost <= best * (1 + 1e-12)
    assert (refined.points[:, 0] == refined.points[:, 1]).all()
    assert np.abs(np.array(refined.path.points)[:, 0] - (999 - np.array(best_cells)[:, 0])).max() <= 1


@pytest.mark.parametrize("num_steps", [2, 4])
def test_integer_path_reaches_the_optimum_over_all_pairs_of_timesteps(num_steps):
    log_snr, t_grid = fine_table(41), timestep_grid(9, 41)
    snr = np.exp(log_snr[t_grid])
    maps = gaussian_maps(snr)
    full = on_all_timesteps(maps, t_grid, log_snr)
    for form in KL_FORMS:
        cells, _ = kl_path(*maps, snr, num_steps, **form)
        refined = refine_path(cells, t_grid, *maps, log_snr, **form)
        best = kl_path(*full, num_steps, **form)[1]
        assert best * (1 - 1e-12) <= refined.path_cost == pytest.approx(best, rel=1e-3)


def test_one_free_point_is_where_a_scalar_minimiser_puts_it():
    log_snr = fine_table(1000)
    t_grid = timestep_grid(30)
    maps = gaussian_maps(np.exp(log_snr[t_grid]))
    cells, _ = kl_path(*maps, np.exp(log_snr[t_grid]), 2, 1.0, diagonal=True)
    refined = refine_path(cells, t_grid, *maps, log_snr, weight=1.0, diagonal=True, tolerance=1e-4)

    def fall(t):
        # ½ (m(k) - m(k + 1)) Δλ, summed over two steps, with the closed-form map.
        lines = np.interp([999, t, 0], np.arange(1000), log_snr)
        m64, m32 = (np.diagonal(m) for m in gaussian_maps(np.exp(lines)))
        return -(np.diff(m64 + m32) * np.diff(lines)).sum() / 2

    best = minimize_scalar(fall, bounds=(1, 998), method="bounded")
    # The map is known on 30 lines only, hence the tolerances.
    assert refined.cost == pytest.approx(best.fun, rel=1e-3)
    assert refined.points[1, 0] == pytest.approx(best.x, abs=2)


def test_cost_on_the_grid_is_that_of_the_optimisers():
    log_snr, t_grid = DDIMScheduler().log_snr.numpy(), timestep_grid()
    grid_log_snr = log_snr[t_grid]
    maps = gaussian_maps(np.exp(grid_log_snr))
    for form in KL_FORMS:
        cells, cost = kl_path(*maps, np.exp(grid_log_snr), 6, **form)
        refined = refine_path(cells, t_grid, *maps, log_snr, "kl", tolerance=10, **form)
        assert refined.grid_cost == pytest.approx(cost, rel=1e-10)
    for error_32 in (maps[1], np.zeros_like(maps[1])):
        cells, cost = find_optimal_path_n_steps_lambda(maps[0], error_32, grid_log_snr, 6)
        refined = refine_path(cells, t_grid, maps[0], error_32, log_snr, "published", max_jump=5, tolerance=10)
        assert refined.grid_cost == pytest.approx(cost, rel=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 7), st.integers(0, 2**32 - 1), st.data())
def test_refinement_is_legal_and_never_worse(n, seed, data):
    rng = np.random.default_rng(seed)
    num_train_timesteps = data.draw(st.integers(2 * n, 60))
    log_snr = np.cumsum(rng.uniform(-0.4, -0.02, num_train_timesteps)) + 3
    t_grid = timestep_grid(n, num_train_timesteps)
    grid_log_snr = log_snr[t_grid]
    maps = rng.lognormal(sigma=1.0, size=(2, n, n))
    criterion = data.draw(st.sampled_from(CRITERIA))
    options = {"tolerance": 0.2}
    if criterion == "kl":
        options["diagonal"] = data.draw(st.booleans())
        form = data.draw(st.sampled_from(KL_FORMS))
        options |= form
        num_steps = data.draw(st.integers(1, n - 1))
        snr = np.exp(grid_log_snr)
        cells, cost = kl_path(*maps, snr, num_steps, **{k: v for k, v in options.items() if k != "tolerance"})
    else:
        options["max_jump"] = data.draw(st.integers(2, n))
        num_steps = data.draw(st.integers(-(-(n - 1) // options["max_jump"]), n))
        cells, cost = find_optimal_path_n_steps_lambda(*maps, grid_log_snr, num_steps, options["max_jump"])

    refined = refine_path(cells, t_grid, *maps, log_snr, criterion, **options)
    assert refined.grid_cost == pytest.approx(cost, rel=1e-9, abs=1e-9)
    assert refined.cost <= refined.path_cost <= refined.grid_cost
    integer_points = np.array(refined.path.points)
    assert refined.path.nfe == num_steps and refined.path.kind == "refined"
    for points in (refined.points, integer_points):
        assert_legal(points, num_steps, num_train_timesteps - 1)
        if options.get("diagonal"):
            assert (points[:, 0] == points[:, 1]).all()
        if criterion == "published":
            index = np.interp(-points, -t_grid, np.arange(n))
            assert np.diff(index, axis=0).max() <= options["max_jump"] + 1e-6

    # The cost that is stated is the cost of the path, by the functions of the grid.
    m64, m32, snr = on_all_timesteps(maps, t_grid, log_snr)
    cells_of_all = num_train_timesteps - 1 - integer_points
    if criterion == "kl":
        again = path_cost(lambda a, b: kl_step_cost(m64, m32, snr, a, b, **form), cells_of_all)
    else:
        again = path_cost(lambda a, b: step_cost(m64, m32, np.log(snr), a, b), cells_of_all)
    assert again == pytest.approx(refined.path_cost, rel=1e-9, abs=1e-9)


def test_finer_candidates_never_cost_more():
    log_snr, t_grid = DDIMScheduler().log_snr.numpy(), timestep_grid(15)
    snr = np.exp(log_snr[t_grid])
    maps = gaussian_maps(snr)
    cells, cost = kl_path(*maps, snr, 5, 1.0)
    costs = [refine_path(cells, t_grid, *maps, log_snr, weight=1.0, tolerance=t).cost for t in (10, 1, 0.1, 0.01)]
    assert costs[-1] < costs[0] < cost
    assert all(after <= before for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize("num_steps", [6, 18])
def test_weights_on_bands_give_better_images_than_weights_on_scales(num_steps):
    # 1/SNR is the weight for DDIM; its exact output for Gaussian images is the judge (docs/theory.md, section 5).
    spectrum = Spectrum.power_law()
    log_snr = DDIMScheduler(beta_schedule="cosine").log_snr.double().numpy()
    t_grid = timestep_grid(30, spacing="uniform_log_snr", start=int(np.abs(log_snr + 10).argmin()), log_snr=log_snr)
    maps = [m.numpy() for m in mse_maps(spectrum, torch.from_numpy(log_snr[t_grid]))]

    def distance(**options):
        cells, _ = kl_path(*maps, np.exp(log_snr[t_grid]), num_steps, 1.0, **options)
        path = refine_path(cells, t_grid, *maps, log_snr, weight=1.0, **options).path
        points = torch.from_numpy(log_snr[np.array(path.points)])  # [N+1, 2]
        points[-1] = torch.inf
        return w2_squared(spectrum, ddim_output(spectrum, points)).item()

    scales, bands, diagonal_bands = distance(), distance(bands=True), distance(bands=True, diagonal=True)
    assert bands < 0.6 * scales
    assert bands < 1.05 * diagonal_bands


def test_candidates_are_spaced_down_to_the_tolerance_and_it_is_among_them():
    # Lines five timesteps apart: the first spacing is a quarter of that, 1.25, and then halves.
    log_snr, t_grid = fine_table(41), timestep_grid(9, 41)
    maps = gaussian_maps(np.exp(log_snr[t_grid]))
    options = {"weight": 1.0, "bands": True}
    cells, _ = kl_path(*maps, np.exp(log_snr[t_grid]), 5, **options)
    tolerances = (1.25, 0.63, 0.625, 0.32, 0.3125)
    found = [refine_path(cells, t_grid, *maps, log_snr, **options, tolerance=tolerance) for tolerance in tolerances]
    assert found[0].cost == found[1].cost > found[2].cost == found[3].cost > found[4].cost
    for k, spacing in ((2, 0.625), (4, 0.3125)):
        np.testing.assert_array_equal(found[k].points % spacing, 0)
        assert (found[k].points % (2 * spacing)).any() and found[k].path_cost > found[k].cost


def test_as_many_steps_as_timesteps_leave_no_freedom():
    log_snr, t_grid = fine_table(9), timestep_grid(9, 9)
    maps = gaussian_maps(np.exp(log_snr[t_grid]))
    refined = refine_path([(k, k) for k in range(9)], t_grid, *maps, log_snr, diagonal=True)
    assert refined.path.points == diagonal(8, num_train_timesteps=9).points
    assert refined.cost == refined.path_cost == refined.grid_cost


@pytest.mark.parametrize("form", KL_FORMS)
def test_the_cost_off_the_grid_is_what_refinement_states_and_that_of_the_closed_form(form):
    log_snr = DDIMScheduler().log_snr.numpy()
    t_grid = timestep_grid(30, spacing="uniform_log_snr", log_snr=log_snr)
    snr = np.exp(log_snr[t_grid])
    maps = gaussian_maps(snr)
    cost = cost_off_grid(t_grid, *maps, log_snr, **form)
    cells, on_grid = kl_path(*maps, snr, 5, **form)
    assert cost(t_grid[np.array(cells)]) == pytest.approx(on_grid, rel=1e-9)
    refined = refine_path(cells, t_grid, *maps, log_snr, **form)
    assert cost(refined.points) == pytest.approx(refined.cost, rel=1e-12)
    assert cost(refined.path.points) == pytest.approx(refined.path_cost, rel=1e-12)
    # At timesteps between the lines and between integers, by the formula of the maps.
    points = np.array([[999.0, 999.0], [700.25, 801.0], [700.25, 420.5], [90.0, 155.75], [12.5, 0.0], [0.0, 0.0]])
    clocks = np.exp(np.interp(points, np.arange(1000), log_snr))  # [6, 2]
    # The map of two lines, fine and coarse, has the errors of the point in cell (0, 1).
    readings = [Readings(*(m[0, 1] for m in gaussian_maps(clock)), *clock) for clock in clocks]
    expected = sum(kl_cost(*ends, **form) for ends in itertools.pairwise(readings))
    assert cost(points) == pytest.approx(expected, rel=0.01)


def test_log_snr_is_linear_between_timesteps():
    # Where errors are the same everywhere, the left Riemann sum is half the SNR gained.
    log_snr, t_grid = fine_table(41), timestep_grid(9, 41)
    cost = cost_off_grid(t_grid, np.full((9, 9), 3.0), np.full((9, 9), 5.0), log_snr)
    (a, b), (c, d) = np.exp(np.interp([[30.25, 20.5], [7.75, 3.125]], np.arange(41), log_snr))
    assert cost([(30.25, 20.5), (19.0, 3.125), (7.75, 3.125)]) == pytest.approx((3 * (c - a) + 5 * (d - b)) / 2)


def test_the_published_cost_off_the_grid():
    log_snr, t_grid = fine_table(41), timestep_grid(9, 41)
    maps = gaussian_maps(np.exp(log_snr[t_grid]))
    for error_32 in (maps[1], np.zeros_like(maps[1])):
        cost = cost_off_grid(t_grid, maps[0], error_32, log_snr, "published")
        cells, on_grid = find_optimal_path_n_steps_lambda(maps[0], error_32, log_snr[t_grid], 4)
        assert cost(t_grid[np.array(cells)]) == pytest.approx(on_grid, rel=1e-10)
        # A point between two steps of one scale changes a trapezoid by no more than its curvature.
        once, twice = [(40, 20), (35, 20)], [(40, 20), (37.5, 20), (35, 20)]
        assert cost(twice) == pytest.approx(cost(once), rel=0.02) and cost(twice) != cost(once)
    # One scale standing still costs nothing, whatever its error.
    fine_only = cost_off_grid(t_grid, maps[0], np.zeros_like(maps[1]), log_snr, "published")
    both = cost_off_grid(t_grid, *maps, log_snr, "published")
    assert both([(40, 20), (35, 20)]) == fine_only([(40, 20), (35, 20)])
    with pytest.raises(ValueError, match="'w2' is unknown"):
        cost_off_grid(t_grid, *maps, log_snr, "w2")


def test_refine_refuses():
    log_snr, t_grid = fine_table(41), timestep_grid(9, 41)
    maps = gaussian_maps(np.exp(log_snr[t_grid]))
    cells = [(0, 0), (3, 4), (8, 8)]
    terminal = log_snr.copy()
    terminal[-1] = -np.inf
    for changes, message in [
        ({"criterion": "w2"}, "'w2' is unknown; choose one of kl, published"),
        ({"criterion": "published"}, "pass its max_jump"),
        ({"max_jump": 4}, "moves more than max_jump = 4"),
        ({"tolerance": 0}, "must be positive"),
        ({"diagonal": True}, "leaves the diagonal"),
        ({"cells": [(0, 0), (3, 9), (8, 8)]}, r"cell 1 of the path is \(3, 9\)"),
        ({"cells": [(0, 0), (7, 8)]}, "last point must be 0"),
        ({"log_snr": log_snr[:40]}, "finite up to timestep 40"),
        ({"log_snr": terminal}, "below the timestep of zero SNR"),
        ({"map_64": -maps[0]}, "positive"),
        ({"weight": 2.0}, "exponent from 0 to 1"),
        ({"allowed": lambda points: points[..., 0] <= points[..., 1]}, "visits what is not allowed"),
    ]:
        arguments = {"cells": cells, "t_grid": t_grid, "map_64": maps[0], "map_32": maps[1], "log_snr": log_snr}
        with pytest.raises(ValueError, match=message):
            refine_path(**arguments | changes)
