"""Optima against every path there is, enumerated or pushed forwards in plain loops, with both ways to find minima."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from path_problems import CRITERIA, assert_legal, kl_problem, random_problem, total_cost, trapezoid
from paths import dynamic_programme
from paths.optimal import (
    best_cascade,
    find_optimal_path_n_steps_lambda,
    find_optimal_paths_all_steps,
    kl_path,
    kl_paths_all_steps,
)

SPANS = [
    ((0, 0), (3, 3), False),
    ((1, 0), (3, 3), False),
    ((0, 1), (3, 1), False),
    ((0, 0), (4, 2), False),
    ((0, 0), (4, 4), True),
    ((1, 1), (3, 3), True),
]


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


def enumerate_cascades(n):
    """Every cascade of every length: the line at which it waits, and subsets of the lines within both legs."""
    for line in range(1, n):
        for stops in itertools.product((False, True), repeat=line - 1 + n - 2):
            coarse = [j for j in range(1, line) if stops[j - 1]]
            fine = [i for i in range(1, n - 1) if stops[line - 2 + i]]
            yield [(0, 0), *((0, j) for j in coarse), (0, line), *((i, line) for i in fine), (n - 1, n - 1)]


@pytest.fixture(params=[0, 10**9], ids=["by_cell", "by_step"])
def both_recursions(request, monkeypatch):
    """Runs a test with each of the two ways to find minima, whichever the size of its problem asks for."""
    monkeypatch.setattr(dynamic_programme, "LARGEST_WINDOWED_JUMP", request.param)


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
            patch.setattr(dynamic_programme, "LARGEST_WINDOWED_JUMP", limit)
            found.append(find_optimal_paths_all_steps(*maps, np.arange(n), 2 * n, max_jump))
            found.append(kl_paths_all_steps(*maps, np.arange(n), 2 * n))
    assert found[:2] == found[2:]


@pytest.mark.usefixtures("both_recursions")
def test_ties_take_the_smallest_last_step():
    zeros = np.zeros((4, 4))
    cells, _ = find_optimal_path_n_steps_lambda(zeros, zeros, np.arange(4.0), 4, 3)
    assert cells == [(0, 0), (3, 0), (3, 1), (3, 2), (3, 3)]


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


@pytest.mark.usefixtures("both_recursions")
def test_kl_ties_take_the_smallest_last_step():
    zeros = np.zeros((4, 4))
    assert kl_path(zeros, zeros, np.arange(4.0), 4)[0] == [(0, 0), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert kl_path(zeros, zeros, np.arange(4.0), 2, diagonal=True)[0] == [(0, 0), (2, 2), (3, 3)]
