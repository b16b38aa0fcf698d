"""The search of one number by what comes of it, where a single value costs many samples."""

from collections.abc import Callable

import numpy as np


def search(value: Callable[[float], float], low: float, high: float, grid: int, rounds: int) -> dict[float, float]:
    """Values by place: of `grid` even places from low to high, then of those half-way from the least to its neighbours.

    Of a function with one valley the least that is found is within 2^-(rounds + 1) of a step of the grid, and more
    exactly where rounds go on. Raises ValueError for fewer than three places.
    """
    if grid < 3:
        raise ValueError(f"--grid {grid} has no place between two others; choose 3 or more.")
    found = {place: value(place) for place in np.linspace(low, high, grid).tolist()}
    for _ in range(rounds):
        places = sorted(found)
        best = places.index(min(found, key=found.get))
        for near in (best - 1, best + 1):
            if 0 <= near < len(places):
                middle = (places[best] + places[near]) / 2
                found[middle] = value(middle)
    return found
