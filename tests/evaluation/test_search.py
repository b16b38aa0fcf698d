"""The search of one number, on functions with one valley."""

import pytest

from evaluation.search import search


@pytest.mark.parametrize("valley", [-8.0, -7.3, -1.01, 0.4, 5.2, 6.0])
@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_the_least_of_one_valley_is_found_to_the_step_of_the_last_round(valley, rounds):
    calls = []

    def value(place):
        calls.append(place)
        return abs(place - valley) ** 1.5

    found = search(value, -8.0, 6.0, 8, rounds)
    best = min(found, key=found.get)
    assert abs(best - valley) <= 2.0 / 2 ** (rounds + 1) + 1e-12
    assert len(calls) == len(set(calls)) == len(found) <= 8 + 2 * rounds


def test_a_search_needs_a_place_between_two():
    with pytest.raises(ValueError, match="--grid 2 has no place"):
        search(abs, 0, 1, 2, 1)
