import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from paths import path as path_module
from paths.path import (
    GRID_SPACINGS,
    SPACINGS,
    Path,
    Readings,
    band_readings,
    best_cascade,
    cascade,
    diagonal,
    find_optimal_path_n_steps_lambda,
    find_optimal_paths_all_steps,
    fine_first,
    heuristic,
    kl_cost,
    kl_path,
    kl_paths_all_steps,
    kl_step_cost,
    lead,
    leads,
    log_snr_shift,
    path_cost,
    path_from_cells,
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


def assert_legal(cells, n, num_steps, max_jump, start=0):
    assert len(cells) == num_steps + 1
    assert cells[0] == (start, start) and cells[-1] == (n - 1, n - 1)
    for (i, j), (k, m) in zip(cells, cells[1:], strict=False):
        assert 0 <= k - i <= max_jump and 0 <= m - j <= max_jump and (k, m) != (i, j)


def enumerate_paths(start, end, max_jump):
    """Every legal path of cells of every length, by recursion."""

    def extend(cells):
        i, j = cells[-1]
        if (i, j) == end:
            yield cells
            return
        for k in range(i, min(i + max_jump, end[0]) + 1):
            for m in range(j, min(j + max_jump, end[1]) + 1):
                if (k, m) != (i, j):
                    yield from extend([*cells, (k, m)])

    return extend([start])


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
    with pytest.raises(ValueError, match="fall strictly"):
        diagonal(18, "uniform_log_snr", log_snr=table[::-1])


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
    table = cosine_clipped_log_snr()
    with pytest.raises(ValueError, match="between 2 and 21"):
        timestep_grid(22, start=20)
    for start in (0, 1000):
        with pytest.raises(ValueError, match=f"starts at timestep {start} but .* 1 to 999"):
            timestep_grid(start=start)
    # These spacings of `diagonal` are none of a grid.
    for spacing in ("published", "karras", "quadratic"):
        with pytest.raises(ValueError, match=f"'{spacing}' is unknown; choose one of uniform_t, uniform_log_snr"):
            timestep_grid(spacing=spacing, log_snr=table)
    with pytest.raises(ValueError, match="needs the table"):
        timestep_grid(spacing="uniform_log_snr")
    with pytest.raises(ValueError, match=r"\[999\]"):
        timestep_grid(spacing="uniform_log_snr", log_snr=table[1:])
    table[999] = -np.inf
    with pytest.raises(ValueError, match="zero terminal SNR"):
        timestep_grid(spacing="uniform_log_snr", log_snr=table)
    assert timestep_grid(spacing="uniform_log_snr", log_snr=table, start=998)[0] == 998


@pytest.mark.parametrize("spacing", GRID_SPACINGS)
def test_a_grid_has_n_falling_lines_from_its_start(spacing):
    log_snr = cosine_clipped_log_snr()
    for start in (None, 998, 700, 60, 1):
        first = 999 if start is None else start
        for n in (2, min(30, first + 1), first + 1):
            grid = timestep_grid(n, spacing=spacing, start=start, log_snr=log_snr)
            assert grid.dtype == np.int64 and grid.shape == (n,)
            assert grid[0] == first and grid[-1] == 0 and (np.diff(grid) < 0).all()
            # The rest of the table does not matter.
            alone = timestep_grid(n, first + 1, spacing, log_snr=log_snr[: first + 1])
            np.testing.assert_array_equal(grid, alone)


def test_grid_even_in_t_is_truncated_from_any_start():
    assert timestep_grid(4, start=10).tolist() == [10, 6, 3, 0]
    assert timestep_grid(4, 11).tolist() == [10, 6, 3, 0]


def test_grid_even_in_log_snr_takes_the_nearest_timesteps():
    log_snr = cosine_clipped_log_snr()
    for n, start in [(2, None), (10, None), (18, 900), (30, 998)]:
        first = 999 if start is None else start
        targets = np.linspace(log_snr[first], log_snr[0], n)
        nearest = np.abs(log_snr[None, :] - targets[:, None]).argmin(axis=1)
        grid = timestep_grid(n, spacing="uniform_log_snr", start=start, log_snr=log_snr)
        assert (np.diff(nearest) < 0).all()
        np.testing.assert_array_equal(grid, nearest)


# Optimiser


@pytest.fixture(params=[0, 10**9], ids=["by_cell", "by_step"])
def both_recursions(request, monkeypatch):
    """Runs a test with each of the two ways to find minima, whichever the size of its problem asks for."""
    monkeypatch.setattr(path_module, "LARGEST_WINDOWED_JUMP", request.param)


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
@pytest.mark.usefixtures("both_recursions")
def test_optimum_equals_enumeration(n, dp_64):
    for max_jump in (1, 2, 3, 4):
        paths = list(enumerate_paths((0, 0), (n - 1, n - 1), max_jump))
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


@pytest.mark.parametrize("max_jump", [3, 12, 13, 17])
def test_optimum_equals_plain_loops_for_jumps_around_the_largest_window(max_jump):
    problem = random_problem(18, max_jump)
    expected = plain_optima(*problem, 9, max_jump)
    found = find_optimal_paths_all_steps(*problem, max_steps=9, max_jump=max_jump)
    assert list(found) == list(expected)
    for num_steps, (cells, cost) in found.items():
        assert_legal(cells, 18, num_steps, max_jump)
        assert cost == pytest.approx(expected[num_steps], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_both_recursions_find_the_same_paths_and_bits(n, max_jump, seed):
    # Few different errors make many ties.
    maps = np.random.default_rng(seed).integers(0, 3, (2, n, n))
    found = []
    for limit in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(path_module, "LARGEST_WINDOWED_JUMP", limit)
            found.append(find_optimal_paths_all_steps(*maps, np.arange(n), 2 * n, max_jump))
            found.append(kl_paths_all_steps(*maps, np.arange(n), 2 * n))
    assert found[:2] == found[2:]


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


@pytest.mark.usefixtures("both_recursions")
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


# KL


def plain_views(m64, m32, snr, cell, bands):
    """Error and SNR of both scales, or of the detail and the low band, at a cell."""
    i, j = cell
    if bands:
        return [(max(m64[cell] - 4 * m32[cell], 0.0), snr[i]), (4 * m32[cell], snr[i] + snr[j] / 4)]
    return [(m64[cell], snr[i]), (m32[cell], snr[j])]


def plain_kl_step(m64, m32, snr, a, b, weight, symmetric, bands):
    cost = 0.0
    for (error, low), (next_error, high) in zip(*(plain_views(m64, m32, snr, c, bands) for c in (a, b)), strict=True):
        integral = np.log(high / low) if weight == 1 else (high ** (1 - weight) - low ** (1 - weight)) / (1 - weight)
        cost += (error if weight == 0 and not symmetric else error - next_error) * integral / 2
    return cost


def kl_problem(n: int, seed: int, falling: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m64, m32, log_snr = random_problem(n, seed)
    if falling:
        detail, low = (np.cumsum(np.cumsum(m[::-1, ::-1], 0), 1)[::-1, ::-1] for m in (m64, m32))
        m64, m32 = detail + low, low / 4
    return m64, m32, np.exp(log_snr)


CRITERIA = [(0.0, False), (0.0, True), (0.5, False), (1.0, False)]
SPANS = [
    ((0, 0), (3, 3), False),
    ((1, 0), (3, 3), False),
    ((0, 1), (3, 1), False),
    ((0, 0), (4, 2), False),
    ((0, 0), (4, 4), True),
    ((1, 1), (3, 3), True),
]


@pytest.mark.parametrize(("start", "end", "on_diagonal"), SPANS)
@pytest.mark.parametrize(("weight", "symmetric"), CRITERIA)
@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.usefixtures("both_recursions")
def test_kl_optimum_equals_enumeration(bands, weight, symmetric, start, end, on_diagonal):
    if on_diagonal:
        between = range(start[0] + 1, end[0])
        chosen = [c for size in range(len(between) + 1) for c in itertools.combinations(between, size)]
        paths = [[(k, k) for k in (start[0], *inner, end[0])] for inner in chosen]
    else:
        paths = list(enumerate_paths(start, end, 5))
    criterion = {"weight": weight, "symmetric": symmetric, "bands": bands}
    options = criterion | {"start": start, "end": end, "diagonal": on_diagonal}
    for seed in range(3):
        problem = kl_problem(5, seed)
        step = functools.partial(plain_kl_step, *problem, **criterion)
        best = {}
        for cells in paths:
            cost = sum(step(a, b) for a, b in itertools.pairwise(cells))
            best[len(cells) - 1] = min(cost, best.get(len(cells) - 1, np.inf))
        found = kl_paths_all_steps(*problem, 99, **options)
        assert list(found) == sorted(best)
        for num_steps, (cells, cost) in found.items():
            assert cells in paths and len(cells) == num_steps + 1
            assert cost == pytest.approx(best[num_steps], rel=1e-12, abs=1e-12)
            assert cost == pytest.approx(sum(step(a, b) for a, b in itertools.pairwise(cells)), rel=1e-12, abs=1e-12)
            assert (cells, cost) == kl_path(*problem, num_steps, **options)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.usefixtures("both_recursions")
def test_kl_optimum_within_allowed_cells_equals_enumeration(weight):
    paths = list(enumerate_paths((0, 0), (4, 4), 5))
    generator = np.random.default_rng(4)
    for seed in range(4):
        problem = kl_problem(5, seed)
        allowed = generator.random((5, 5)) < 0.6
        step = functools.partial(plain_kl_step, *problem, weight=weight, symmetric=False, bands=True)
        best = {}
        for cells in paths:
            if all(allowed[cell] for cell in cells[1:-1]):
                cost = sum(step(a, b) for a, b in itertools.pairwise(cells))
                best[len(cells) - 1] = min(cost, best.get(len(cells) - 1, np.inf))
        assert 1 < len(best) < 8
        for num_steps in range(1, 9):
            if num_steps not in best:
                with pytest.raises(ValueError, match=f"no path of {num_steps} steps keeps to the allowed cells"):
                    kl_path(*problem, num_steps, weight, bands=True, allowed=allowed)
                continue
            cells, cost = kl_path(*problem, num_steps, weight, bands=True, allowed=allowed)
            assert all(allowed[cell] for cell in cells[1:-1])
            assert cost == pytest.approx(best[num_steps], rel=1e-12, abs=1e-12)
        everywhere = kl_path(*problem, 3, weight, bands=True)
        assert kl_path(*problem, 3, weight, bands=True, allowed=np.ones((5, 5))) == everywhere
    with pytest.raises(ValueError, match="allowed has shape"):
        kl_path(*problem, 3, weight, allowed=allowed[1:])


def enumerate_cascades(n):
    """Every cascade of every length: the line at which it waits, and subsets of the lines within both legs."""
    for line in range(1, n):
        for stops in itertools.product((False, True), repeat=line - 1 + n - 2):
            coarse = [j for j in range(1, line) if stops[j - 1]]
            fine = [i for i in range(1, n - 1) if stops[line - 2 + i]]
            yield [(0, 0), *((0, j) for j in coarse), (0, line), *((i, line) for i in fine), (n - 1, n - 1)]


@pytest.mark.parametrize(("weight", "symmetric"), CRITERIA)
@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.usefixtures("both_recursions")
def test_best_cascade_equals_enumeration(bands, weight, symmetric):
    cascades = list(enumerate_cascades(5))
    # Lines 1 to 4, with 0 to 3 inner lines on the way and 3 after it.
    assert len(cascades) == (1 + 2 + 4 + 8) * 8
    criterion = {"weight": weight, "symmetric": symmetric, "bands": bands}
    for seed in range(3):
        problem = kl_problem(5, seed)
        step = functools.partial(plain_kl_step, *problem, **criterion)
        costs = {}
        for cells in cascades:
            cost = sum(step(a, b) for a, b in itertools.pairwise(cells))
            costs.setdefault(len(cells) - 1, []).append((cost, cells))
        assert sorted(costs) == list(range(2, 9))
        for num_steps, found in costs.items():
            best, best_cells = min(found)
            cells, cost = best_cascade(*problem, num_steps, **criterion)
            assert cost == pytest.approx(best, rel=1e-12, abs=1e-12) and cells == best_cells
            assert cost >= kl_path(*problem, num_steps, **criterion)[1] - 1e-9


@pytest.mark.usefixtures("both_recursions")
def test_the_best_of_equal_cascades_has_few_coarse_steps_and_waits_early():
    zeros = np.zeros((4, 4))
    assert best_cascade(zeros, zeros, np.arange(4.0), 3)[0] == [(0, 0), (0, 1), (2, 1), (3, 3)]
    # The fine leg has three steps at most.
    assert best_cascade(zeros, zeros, np.arange(4.0), 5)[0] == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (3, 3)]


def test_a_cascade_needs_a_step_for_each_scale():
    for num_steps in (1, 9):
        with pytest.raises(ValueError, match=f"{num_steps} steps are no cascade on a grid of 5.*2 to 8"):
            best_cascade(*kl_problem(5, 0), num_steps)


def test_kl_ends_may_be_single_indices_and_default_to_the_whole_grid():
    problem = kl_problem(5, 0)
    assert kl_path(*problem, 4) == kl_path(*problem, 4, start=(0, 0), end=(4, 4))
    assert kl_path(*problem, 2, start=1, end=np.int64(3)) == kl_path(*problem, 2, start=(1, 1), end=(3, 3))
    assert kl_path(*map(torch.from_numpy, problem), 4) == kl_path(*problem, 4)


@pytest.mark.usefixtures("both_recursions")
def test_kl_ties_take_the_smallest_last_step():
    zeros = np.zeros((4, 4))
    assert kl_path(zeros, zeros, np.arange(4.0), 4)[0] == [(0, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert kl_path(zeros, zeros, np.arange(4.0), 2, diagonal=True)[0] == [(0, 0), (2, 2), (3, 3)]


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


def test_infeasible_kl_paths_raise():
    problem = kl_problem(5, 0)
    for num_steps in (-1, 0, 9):
        with pytest.raises(ValueError, match=f"{num_steps} steps .* allow 1 to 8"):
            kl_path(*problem, num_steps)
    with pytest.raises(ValueError, match="allow 1 to 4"):
        kl_path(*problem, 5, diagonal=True)
    with pytest.raises(ValueError, match="max_steps is 0"):
        kl_paths_all_steps(*problem, 0)
    for start, end in [(0, 5), (-1, 4), (3, 2), (2, 2), ((0, 3), (4, 2)), (4, None)]:
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
