"""How certain an optimal path is: the search repeated on resampled images.

The maps of an error map are means over images, each with noise and probes of its own, so that resampling the images
covers all three sources of chance (the bootstrap of Efron 1979).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Cells = Sequence[tuple[int, int]]


class Bootstrap(NamedTuple):
    """What the replicates say: how often each cell is on the path, and the spread of its cost."""

    density: np.ndarray  # [n, n], share of replicates whose path has a point in the cell
    costs: np.ndarray  # [R], the optimal cost of each replicate
    interval: tuple[float, float]  # of the cost, 95 %: quantiles of the replicates


def bootstrap_paths(
    maps: ArrayLike,  # [M, n, n, B], values per image of M maps
    solve: Callable[..., tuple[Cells, float]],  # M mean maps [n, n] -> cells, cost
    replicates: int = 200,
    seed: int = 0,
) -> Bootstrap:
    """Optimal paths on `replicates` sets of B images drawn with replacement; an image goes with all its maps.

    The interval is one of percentiles. It says what another choice of as many images could give. It leaves out what
    all replicates share: that an optimum over a noisy map is biased low, and the model itself. Raises ValueError for
    fewer than two images, maps of another shape, and fewer than two replicates.
    """
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim != 4 or maps.shape[1] != maps.shape[2] or maps.shape[3] < 2:
        raise ValueError(
            f"maps have shape {list(maps.shape)} but must be [M, n, n, B]; resampling needs at least 2 images."
        )
    if replicates < 2:
        raise ValueError(f"replicates is {replicates}; at least 2 make a spread.")
    rng = np.random.default_rng(seed)
    num_images = maps.shape[3]
    density, costs = np.zeros(maps.shape[1:3]), np.empty(replicates)
    for r in range(replicates):
        counts = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        cells, costs[r] = solve(*(maps @ (counts / num_images)))
        rows, columns = np.array(sorted(set(cells))).T
        density[rows, columns] += 1
    low, high = np.quantile(costs, [0.025, 0.975])
    return Bootstrap(density / replicates, costs, (float(low), float(high)))
