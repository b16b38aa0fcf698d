import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from path import (
    Path,
    diagonal,
    find_optimal_path_n_steps_lambda,
    find_optimal_paths_all_steps,
    leads,
    load_schedule,
    path_from_cells,
    save_schedule,
    step_cost,
    timestep_grid,
)

MANY_STEPS = [*range(1, 61), 99, 100, 111, 200, 250, 333, 499, 500, 501, 700, 998, 999]


def cosine_clipped_log_snr() -> np.ndarray:
    t = np.arange(1001) / 1000
    curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas_cumprod = np.cumprod(1 - np.clip(1 - curve[1:] / curve[:-1], 1e-4, 0.02))
    return np.log(alphas_cumprod / (1 - alphas_cumprod))


def random_problem(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    log_snr = np.cumsum(rng.uniform(0.1, 1.0, n)) - 5.0
    return rng.lognormal(sigma=2.0, size=(n, n)), rng.lognormal(sigma=2.0, size=(n, n)), log_snr


def trapezoid(e64, e32, lam, a, b):
    fine = (e64[a[0]][a[1]] + e64[b[0]][b[1]]) / 2 * abs(lam[b[0]] - lam[a[0]])
    coarse = (e32[a[0]][a[1]] + e32[b[0]][b[1]]) / 2 * abs(lam[b[1]] - lam[a[1]])
    return fine + coarse


def total_cost(e64, e32, lam, cells):
    return sum(trapezoid(e64, e32, lam, a, b) for a, b in zip(cells, cells[1:], strict=False))


def assert_legal(cells, n, num_steps, max_jump):
    assert len(cells) == num_steps + 1
    assert cells[0] == (0, 0) and cells[-1] == (n - 1, n - 1)
    for (i, j), (k, m) in zip(cells, cells[1:], strict=False):
        assert 0 <= k - i <= max_jump and 0 <= m - j <= max_jump and (k, m) != (i, j)


def enumerate_paths(n, max_jump):
    """Every legal path of every length, by recursion."""

    def extend(cells):
        i, j = cells[-1]
        if (i, j) == (n - 1, n - 1):
            yield cells
            return
        for k in range(i, min(i + max_jump, n - 1) + 1):
            for m in range(j, min(j + max_jump, n - 1) + 1):
                if (k, m) != (i, j):
                    yield from extend([*cells, (k, m)])

    return extend([(0, 0)])


def plain_optima(e64, e32, lam, max_steps, max_jump):
    """Cost of the cheapest path for each number of steps: pushed forwards in plain loops."""
    n = len(lam)
    e64, e32, lam = e64.tolist(), e32.tolist(), lam.tolist()
    moves = [(di, dj) for di in range(max_jump + 1) for dj in range(max_jump + 1) if di or dj]
    edges = {
        (i, j): [
            (i + di, j + dj, trapezoid(e64, e32, lam, (i, j), (i + di, j + dj)))
            for di, dj in moves
            if i + di < n and j + dj < n
        ]
        for i in range(n)
        for j in range(n)
    }
    reached = {(0, 0): 0.0}
    optima = {}
    for num_steps in range(1, max_steps + 1):
        following = {}
        for cell, so_far in reached.items():
            for k, m, cost in edges[cell]:
                if so_far + cost < following.get((k, m), float("inf")):
                    following[k, m] = so_far + cost
        reached = following
        if (n - 1, n - 1) in reached:
            optima[num_steps] = reached[n - 1, n - 1]
    return optima


# Path


def test_path_counts_calls_and_takes_any_integers():
    path = Path([[np.int64(9), 9], [9, torch.tensor(4)], (0, 0)], "by_hand", {"a": (1, 2)})
    assert path.points == ((9, 9), (9, 4), (0, 0))
    assert all(type(t) is int for point in path.points for t in point)
    assert (path.nfe, path.num_scales) == (2, 2)
    assert path.provenance == {"a": [1, 2]}
    assert Path(((5,), (0,)), "one", {}).num_scales == 1


def test_fingerprint_depends_on_points_alone():
    path = Path(((9, 9), (0, 0)), "a", {})
    # sha256 of "[[9,9],[0,0]]", computed with coreutils.
    assert path.fingerprint() == "51ea774278cf4f9d"
    assert path.fingerprint() == Path(((9, 9), (0, 0)), "b", {"x": 1}).fingerprint()
    assert path.fingerprint() != Path(((9, 8), (0, 0)), "a", {}).fingerprint()
    assert path.fingerprint() != Path(((9,), (0,)), "a", {}).fingerprint()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least 2 points"),
        ([(0, 0)], "at least 2 points"),
        ([(), ()], "no timestep"),
        ([(9, 9), (0,)], "point 1"),
        ([(9, 9), (-1, 0), (0, 0)], "0 or larger"),
        ([(9, 9), (4, 5), (5, 0), (0, 0)], "must not rise"),
        ([(9, 9), (4, 4), (4, 4), (0, 0)], "stays at"),
        ([(9, 9), (0, 1)], "last point"),
        ([(9.0, 9.0), (0, 0)], "integer"),
        ([(True, 9), (0, 0)], "integer"),
        (["99", "00"], "integer"),
        ([9, 0], "integer"),
        (None, "integer"),
    ],
)
def test_path_refuses_bad_points(points, message):
    with pytest.raises(ValueError, match=message):
        Path(points, "bad", {})


@pytest.mark.parametrize("provenance", [None, [1], {"x": {1, 2}}, {"x": float("nan")}])
def test_path_refuses_provenance_that_is_not_json(provenance):
    with pytest.raises(ValueError, match="provenance"):
        Path(((1,), (0,)), "bad", provenance)


def test_path_is_frozen_and_keeps_its_own_provenance():
    provenance = {"seed": 1}
    path = Path(((1,), (0,)), "a", provenance)
    provenance["seed"] = 2
    assert path.provenance == {"seed": 1}
    with pytest.raises(AttributeError):
        path.kind = "b"


# Diagonals


@pytest.mark.parametrize("spacing", ["uniform_t", "published", "uniform_log_snr"])
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
    with pytest.raises(ValueError, match="uniform_t, published, uniform_log_snr"):
        diagonal(18, "quadratic")
    with pytest.raises(ValueError, match="needs the table"):
        diagonal(18, "uniform_log_snr")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diagonal(18, "uniform_log_snr", log_snr=zero_terminal)
    with pytest.raises(ValueError, match=r"\[999\]"):
        diagonal(18, "uniform_log_snr", log_snr=table[1:])
    with pytest.raises(ValueError, match="fall strictly"):
        diagonal(18, "uniform_log_snr", log_snr=table[::-1])


# Grid


def test_published_grid_equals_torch():
    grid = timestep_grid()
    assert grid[:5].tolist() == [999, 964, 930, 895, 861] and grid[-3:].tolist() == [68, 34, 0]
    np.testing.assert_array_equal(grid, torch.linspace(999, 0, 30).long().numpy())


def test_grid_is_the_exact_floor_for_every_n():
    for n in range(2, 201):
        grid = timestep_grid(n)
        assert len(grid) == n and grid[0] == 999 and grid[-1] == 0 and (np.diff(grid) < 0).all()
        assert all(0 <= 999 * (n - 1 - k) - int(t) * (n - 1) < n - 1 for k, t in enumerate(grid))
        float32 = torch.linspace(999, 0, n).long().numpy()
        whole = 999 * np.arange(n - 1, -1, -1) % (n - 1) == 0
        np.testing.assert_array_equal(grid[~whole], float32[~whole])
        assert set(grid[whole] - float32[whole]) <= {0, 1}


def test_grid_refuses():
    for n in (1, 1001):
        with pytest.raises(ValueError, match="between 2 and 1000"):
            timestep_grid(n)
    assert timestep_grid(1000).tolist() == list(range(999, -1, -1))


# Optimiser


def test_step_cost_by_hand():
    e64, e32, lam = (
        np.array([[1.0, 2.0], [3.0, 5.0]]),
        np.array([[10.0, 20.0], [30.0, 60.0]]),
        np.array([-1.0, 3.0]),
    )
    assert step_cost(e64, e32, lam, (0, 0), (1, 1)) == (1 + 5) / 2 * 4 + (10 + 60) / 2 * 4
    assert step_cost(e64, e32, lam, (0, 0), (0, 1)) == (10 + 20) / 2 * 4
    assert step_cost(e64, e32, lam, (0, 1), (1, 1)) == (2 + 5) / 2 * 4


@pytest.mark.parametrize("dp_64", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_optimum_equals_enumeration(n, dp_64):
    for max_jump in (1, 2, 3, 4):
        paths = list(enumerate_paths(n, max_jump))
        for seed in range(3):
            e64, e32, lam = random_problem(n, seed)
            e32 = np.zeros_like(e32) if dp_64 else e32
            best = {}
            for cells in paths:
                cost = total_cost(e64, e32, lam, cells)
                best[len(cells) - 1] = min(cost, best.get(len(cells) - 1, np.inf))
            found = find_optimal_paths_all_steps(e64, e32, lam, max_steps=3 * n, max_jump=max_jump)
            assert list(found) == sorted(best)
            for num_steps, (cells, cost) in found.items():
                assert_legal(cells, n, num_steps, max_jump)
                assert cost == pytest.approx(best[num_steps], rel=1e-12)
                assert cost == pytest.approx(total_cost(e64, e32, lam, cells), rel=1e-12)
                assert (cells, cost) == find_optimal_path_n_steps_lambda(e64, e32, lam, num_steps, max_jump)


@pytest.mark.parametrize(("seed", "dp_64"), [(0, True), (0, False), (1, False)])
def test_optimum_equals_plain_loops_on_the_published_grid(seed, dp_64):
    e64, e32, lam = random_problem(30, seed)
    e32 = np.zeros_like(e32) if dp_64 else e32
    expected = plain_optima(e64, e32, lam, 24, 5)
    found = find_optimal_paths_all_steps(e64, e32, lam, max_steps=24)
    assert list(found) == list(expected) == list(range(6, 25))
    for num_steps, (cells, cost) in found.items():
        assert_legal(cells, 30, num_steps, 5)
        assert cost == pytest.approx(expected[num_steps], rel=1e-12)
        assert cost == pytest.approx(total_cost(e64, e32, lam, cells), rel=1e-12)
    assert find_optimal_path_n_steps_lambda(e64, e32, lam) == found[18]


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


def test_ties_take_the_smallest_last_step():
    zeros = np.zeros((4, 4))
    cells, _ = find_optimal_path_n_steps_lambda(zeros, zeros, np.arange(4.0), 4, 3)
    assert cells == [(0, 0), (3, 0), (3, 1), (3, 2), (3, 3)]


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


# Cells and leads


def test_path_from_cells_and_its_leads():
    grid = timestep_grid()
    path = path_from_cells([(0, 0), (0, 1), (2, 9), (12, 9), (29, 29)], grid, "dp_total", {"max_jump": 17})
    assert path.points == ((999, 999), (999, 964), (930, 688), (585, 688), (0, 0))
    assert (path.kind, path.provenance) == ("dp_total", {"max_jump": 17})
    counts = {"ahead": 2, "behind": 1, "equal": 2, "points": 5}
    assert leads(path, grid) == counts | {"largest_lead": 7, "unit": "cells"}
    assert leads(path) == counts | {"largest_lead": 242, "unit": "timesteps"}
    assert path_from_cells([(0,), (29,)], grid, "one", {}).points == ((999,), (0,))


def test_path_from_cells_and_leads_refuse():
    grid = timestep_grid()
    for cell in [(30, 29), (-1, 29)]:
        with pytest.raises(ValueError, match="cell 1 .* 0 to 29"):
            path_from_cells([(0, 0), cell], grid, "bad", {})
    with pytest.raises(ValueError, match="last point"):
        path_from_cells([(0, 0), (28, 29)], grid, "bad", {})
    with pytest.raises(ValueError, match="2 scales"):
        leads(diagonal(18, num_scales=1))
    with pytest.raises(ValueError, match="timestep 990 .* not on the grid"):
        leads(Path(((999, 990), (0, 0)), "off", {}), grid)


def test_a_diagonal_never_leads():
    assert leads(diagonal(18)) == {
        "ahead": 0,
        "behind": 0,
        "equal": 19,
        "points": 19,
        "largest_lead": 0,
        "unit": "timesteps",
    }


# Schedule files

SOLVER = {"name": "ddim", "eta": 0.0, "end": "clean"}


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "schedule.json"
    log_snr = cosine_clipped_log_snr()
    path = path_from_cells([(0, 0), (0, 5), (29, 29)], timestep_grid(), "dp_total", {"max_jump": 24, "factor": "B"})
    save_schedule(path, file, log_snr, SOLVER, "trapezoid", 1.25, "aaaa", "bbbb", "cosine_clipped")
    return file, path, log_snr


def test_schedule_round_trip(saved):
    file, path, log_snr = saved
    loaded = load_schedule(file)
    assert (loaded.points, loaded.kind, loaded.fingerprint()) == (path.points, path.kind, path.fingerprint())
    assert loaded.provenance == {
        "max_jump": 24,
        "factor": "B",
        "log_snr": [[log_snr[t] for t in point] for point in path.points],
        "solver": SOLVER,
        "criterion": "trapezoid",
        "cost": 1.25,
        "path_fingerprint": path.fingerprint(),
        "model_fingerprint": "aaaa",
        "data_fingerprint": "bbbb",
        "beta_schedule": "cosine_clipped",
    }
    content = json.loads(file.read_text())
    assert content["format_version"] == 1 and (content["nfe"], content["num_scales"]) == (2, 2)
    assert content["provenance"] == {"max_jump": 24, "factor": "B"}

    again = file.with_name("again.json")
    save_schedule(loaded, again, log_snr, SOLVER, "trapezoid", 1.25, "aaaa", "bbbb", "cosine_clipped")
    assert again.read_bytes() == file.read_bytes()


def test_schedule_of_one_scale_and_of_zero_terminal_snr(tmp_path):
    log_snr = cosine_clipped_log_snr()
    log_snr[999] = -np.inf
    path = diagonal(18, num_scales=1)
    save_schedule(path, str(tmp_path / "a.json"), log_snr, SOLVER)
    loaded = load_schedule(str(tmp_path / "a.json"))
    assert loaded.points == path.points
    assert loaded.provenance["log_snr"][0] == [None] and loaded.provenance["log_snr"][-1] == [log_snr[0]]
    assert loaded.provenance["criterion"] is None and loaded.provenance["cost"] is None
    assert "Infinity" not in (tmp_path / "a.json").read_text()


def test_failed_save_leaves_the_file_as_it_was(saved, monkeypatch):
    file, path, log_snr = saved
    before = file.read_bytes()
    with_nan = log_snr.copy()
    with_nan[5] = np.nan
    for table, solver, cost, message in [
        (log_snr[:999], SOLVER, None, "starts at timestep 999"),
        (with_nan, SOLVER, None, "NaN"),
        (log_snr, {"eta": np.zeros(1)}, None, "finite JSON types"),
        (log_snr, SOLVER, float("inf"), "finite JSON types"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_schedule(path, file, table, solver, cost=cost)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_schedule(path, file.parent / "nowhere" / "a.json", log_snr, SOLVER)

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_schedule(path, file, log_snr, {"name": "heun"})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_missing_schedule(tmp_path):
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=file.name):
            load_schedule(file)


@pytest.mark.parametrize("size", [0, 1, 100, -3])
def test_truncated_schedule(saved, size):
    file = saved[0]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="schedule.json is not JSON"):
        load_schedule(file)


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"[" * 100_000])
def test_binary_and_absurd_schedule(saved, content):
    saved[0].write_bytes(content)
    with pytest.raises(ValueError, match="schedule.json is not JSON"):
        load_schedule(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "update LIFT"),
        ({"format_version": "1"}, "not a schedule file"),
        ({"points": [[999, 999], [0, 0]]}, "changed after it was saved"),
        ({"points": [[999, 999], [999, 825], [0, 0]]}, "changed after it was saved"),
        ({"points": [[999, 999], [0, 1]]}, "last point"),
        ({"points": [[999, 999], [0.5, 0], [0, 0]]}, "integer"),
        ({"points": None}, "integer"),
        ({"nfe": 3}, "changed after it was saved"),
        ({"kind": 7}, "kind"),
        ({"provenance": []}, "provenance"),
        ({"cost": float("nan")}, "finite JSON types"),
    ],
)
def test_damaged_schedule(saved, change, message):
    file = saved[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"schedule.json.*{message}"):
        load_schedule(file)


def test_json_that_is_no_schedule(saved):
    file = saved[0]
    content = json.loads(file.read_text())
    for other in ([], 3, {}, {"points": content["points"]}):
        file.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="schedule.json is not a schedule file"):
            load_schedule(file)
    for key in content.keys() - {"format_version"}:
        file.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(ValueError, match=f"schedule.json is not a complete schedule file: it lacks {key}"):
            load_schedule(file)
