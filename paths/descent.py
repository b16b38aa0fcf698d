"""The best path of lines for a cost that no dynamic programme takes apart, by descent from several paths at once.

A path is given by the grid lines of its points but the last, int `[N, S]`, one per scale, which never fall. Its cost is
that of the whole: what a step costs hangs on the steps before it, and how errors add up. The descent tries all moves of
one point, and of all points from one on, by a few lengths, takes the best, several at once where that is better still,
and stops where none gains. It finds a local optimum.
"""

from collections.abc import Callable, Sequence

import numpy as np

JUMPS = (1, 2, 5, 12)  # Lines that one point is moved by.
SHIFTS = (1, 3)  # Lines that all points from one on are moved by.
LEAST_GAIN = 1e-5  # A share of the cost: a descent that gains less in a round ends.

Cost = Callable[[np.ndarray], np.ndarray]  # of paths int [P, N, S], float64 [P]
Valid = Callable[[np.ndarray], np.ndarray]  # of paths, bool [P]


def descend(
    cost: Cost,
    valid: Valid,
    starts: Sequence[np.ndarray],  # paths [N, S], at least one of them valid
    tied: bool = False,  # all scales of a point are on one line
    polished: int = 8,  # how many of the starts, the cheapest ones, are gone on from
) -> tuple[np.ndarray, float]:
    """The cheapest path found, `[N, S]`, and its cost; the first point stays where it is.

    Never worse than the best valid start. Raises ValueError if no start is valid.
    """
    candidates = np.unique(np.stack(starts), axis=0)
    candidates = candidates[valid(candidates)]
    if not len(candidates):
        raise ValueError("no path to start the search from keeps to what was measured; choose fewer steps")
    costs = cost(candidates)
    order = np.argsort(costs, kind="stable")[:polished]
    moves = _moves(*candidates.shape[1:], tied)
    found = [_descent(cost, valid, candidates[k], float(costs[k]), moves) for k in order]
    return min(found, key=lambda result: result[1])


def _moves(num_points: int, num_scales: int, tied: bool) -> np.ndarray:
    """All moves, int `[moves, N, S]`."""
    groups = [np.ones(num_scales, dtype=int)]
    if num_scales > 1 and not tied:
        groups += list(np.eye(num_scales, dtype=int))
    moves = []
    for point in range(1, num_points):
        for group in groups:
            one, rest = np.zeros((2, num_points, num_scales), dtype=int)
            one[point], rest[point:] = group, group
            moves += [sign * jump * one for jump in JUMPS for sign in (1, -1)]
            moves += [sign * jump * rest for jump in SHIFTS for sign in (1, -1) if point < num_points - 1]
    return np.stack(moves) if moves else np.zeros((0, num_points, num_scales), dtype=int)


def _descent(cost: Cost, valid: Valid, path: np.ndarray, value: float, moves: np.ndarray) -> tuple[np.ndarray, float]:
    while True:
        possible = moves[valid(path + moves)] if len(moves) else moves
        if not len(possible):
            return path, value
        costs = cost(path + possible)
        gaining = np.argsort(costs, kind="stable")[: int((costs < value).sum())]
        if not len(gaining):
            return path, value
        # The best two, four, ... moves together.
        counts = [2**k for k in range(1, len(gaining).bit_length())]
        together = np.stack([possible[gaining[:count]].sum(0) for count in (1, *counts)])
        together = together[valid(path + together)]
        values = cost(path + together)
        best = int(values.argmin())
        before, path, value = value, path + together[best], float(values[best])
        if value > before * (1 - LEAST_GAIN):
            return path, value
