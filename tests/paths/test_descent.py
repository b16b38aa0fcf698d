"""The descent against all paths of small grids."""

import itertools

import numpy as np
import pytest

from paths.descent import descend


def all_paths(n, num_points, num_scales, tied=False):
    """Every path of lines `[P, N, S]` from line 0 that never falls and whose every step moves some scale."""
    axis = [(0, *rest) for rest in itertools.combinations_with_replacement(range(n), num_points - 1)]
    scales = [(each,) * num_scales for each in axis] if tied else itertools.product(axis, repeat=num_scales)
    paths = np.array([np.array(each).T for each in scales])
    return paths[(np.diff(paths, axis=1) > 0).any(2).all(1)]


class Problem:
    """A smooth random cost of whole paths, with all the paths that are valid; counts what it is asked."""

    def __init__(self, n, num_points, num_scales, seed, tied=False, reach=None):
        generator = np.random.default_rng(seed)
        self.n, self.reach, self.tied, self.asked = n, reach, tied, []
        self.best = generator.uniform(0.2, 0.8, (num_points, num_scales)).cumsum(0) / num_points * n
        numbers = num_points * num_scales
        factor = generator.normal(size=(numbers, numbers)) / numbers**0.5
        self.form = factor @ factor.T + 0.3 * np.eye(numbers)  # Points of a path hang on each other.
        self.waves, self.phases = generator.normal(size=(3, numbers)) / n, generator.uniform(0, 6, 3)
        paths = all_paths(n, num_points, num_scales, tied)
        self.paths = paths[self.valid(paths)]
        self.values = self(self.paths)
        self.asked.clear()

    def __call__(self, paths):
        assert paths.ndim == 3 and self.valid(paths).all()  # Nothing else is asked for.
        self.asked.append(paths)
        off = (paths - self.best).reshape(len(paths), -1)
        return 1 + np.einsum("pi,ij,pj->p", off, self.form, off) + np.sin(off @ self.waves.T + self.phases).sum(1)

    def valid(self, paths):
        good = (paths[:, 0] == 0).all(1) & (paths >= 0).all((1, 2)) & (paths < self.n).all((1, 2))
        good &= (np.diff(paths, axis=1) >= 0).all((1, 2)) & (np.diff(paths, axis=1) > 0).any(2).all(1)
        if self.reach is not None:
            good &= (abs(paths[..., 0] - paths[..., -1]) <= self.reach).all(1)
        return good

    def starts(self, seed, count=4):
        chosen = np.random.default_rng(seed).choice(len(self.paths), count, replace=False)
        return [self.paths[k] for k in chosen]


CASES = {  # lines, points, scales, tied, reach of one scale beside the other, and how many of 30 must be the optimum
    "one scale": (10, 4, 1, False, None, 27),
    "two scales": (8, 3, 2, False, None, 27),
    "two scales of four points": (8, 4, 2, False, 2, 27),
    "tied": (10, 4, 2, True, None, 27),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_of_all_paths_is_mostly_found(case):
    """In nine of ten problems; else it stops at a path hardly worse, which no line of one point makes better."""
    n, num_points, num_scales, tied, reach, enough = CASES[case]
    hits, ranks = 0, []
    for seed in range(30):
        problem = Problem(n, num_points, num_scales, seed, tied, reach)
        starts = problem.starts(seed)
        found, value = descend(problem, problem.valid, starts, tied)
        assert problem.valid(found[None]).all() and found.shape == (num_points, num_scales)
        assert value == pytest.approx(problem(found[None])[0])
        assert value <= min(problem(np.stack(starts)))
        hits += value <= problem.values.min() * (1 + 1e-12)
        beside = problem.paths[abs(problem.paths - found).sum((1, 2)) == (2 if tied else 1)]
        assert problem(beside).min() > value * (1 - 1e-3)
        ranks.append((problem.values < value * (1 - 1e-12)).mean())
        if tied:
            assert all((paths[..., 0] == paths[..., 1]).all() for paths in problem.asked)
            assert (found[:, 0] == found[:, 1]).all()
    assert hits >= enough and max(ranks) < 0.02


def test_one_move_at_a_time_finds_the_bottom_of_a_bowl():
    """Points that do not hang on each other: the optimum is the nearest line of each."""
    target = np.array([[0.0, 0.0], [7.2, 3.9], [12.4, 20.1], [31.0, 28.7]])

    def cost(paths):
        return 1 + np.square(paths - target).sum((1, 2))

    def valid(paths):
        return (np.diff(paths, axis=1) >= 0).all((1, 2)) & (paths >= 0).all((1, 2)) & (paths[:, 0] == 0).all(1)

    for start in ([[0, 0], [1, 1], [2, 2], [3, 3]], [[0, 0], [30, 0], [40, 0], [60, 60]]):
        found, value = descend(cost, valid, [np.array(start)])
        assert found.tolist() == target.round().astype(int).tolist()
        assert value == pytest.approx(1 + np.square(target.round() - target).sum())


def test_all_points_from_one_on_are_moved_together():
    """Where only the distance of points costs, and one alone cannot move without leaving what is valid."""

    def cost(paths):
        return 1.0 + abs(paths[:, 1, 0] - 9)

    def valid(paths):
        return (paths[:, 0] == 0).all(1) & (np.diff(paths[:, 1:], axis=1) == 2).all((1, 2)) & (paths >= 0).all((1, 2))

    found, value = descend(cost, valid, [np.array([[0], [1], [3], [5]])])
    assert found[:, 0].tolist() == [0, 9, 11, 13] and value == 1


def test_the_first_point_stays_even_where_another_would_be_cheaper():
    start = np.array([[4, 4], [9, 9]])
    anywhere = lambda paths: np.ones(len(paths), dtype=bool)  # noqa: E731
    found, value = descend(lambda paths: 1.0 + abs(paths).sum((1, 2)), anywhere, [start])
    assert found.tolist() == [[4, 4], [0, 0]] and value == 9


def test_a_path_of_one_point_has_nowhere_to_go():
    cost, valid = (lambda paths: np.full(len(paths), 3.0)), (lambda paths: np.ones(len(paths), dtype=bool))
    found, value = descend(cost, valid, [np.zeros((1, 2), dtype=int)])
    assert found.tolist() == [[0, 0]] and value == 3


def test_the_cheapest_starts_are_gone_on_from():
    """Two wells: that of the cheaper start is found, and the other one only if both starts are polished."""

    def cost(paths):
        place = paths[:, 1, 0]
        return np.where(place < 20, 2.0 + 0.1 * abs(place - 5), 1.0 + abs(place - 40))

    def valid(paths):
        return ((paths[:, 1] >= 0) & (paths[:, 1] < 60)).all(1) & (paths[:, 0] == 0).all(1)

    starts = [np.array([[0], [7]]), np.array([[0], [58]])]
    near, far = (descend(cost, valid, starts, polished=count) for count in (1, 2))
    assert (near[0][1, 0], near[1]) == (5, 2.0) and (far[0][1, 0], far[1]) == (40, 1.0)


def test_a_start_that_is_not_valid_is_left_out():
    problem = Problem(8, 3, 1, 0)
    bad = np.array([[0], [6], [2]])
    [good] = problem.starts(1, count=1)
    assert problem.valid(descend(problem, problem.valid, [bad, good])[0][None]).all()
    with pytest.raises(ValueError, match="no path to start the search from keeps to what was measured"):
        descend(problem, problem.valid, [bad, np.array([[1], [2], [3]])])
