"""Images that walks start from in place of noise, of models that map one data set onto another (arXiv 2209.03003).

Such a model is a flow whose lines lead from an image of one set, at tau = 1, to an image of the other, at tau = 0. Its
coarse image starts as the 2x2 mean of the fine one, and nothing is drawn on the way.

Shapes: N images, C channels, R x R pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from data import coarse, to_float
from diffusion.sampler import IMAGES_PER_SEED
from diffusion.step import Solver, check_draws_nothing, check_starts_at_last
from images.representation import Images
from paths.path import Path
from scheduler import DDIMScheduler

STARTS = 1  # Beside the seed: the order of these images, apart from that of those that lines end at.


@functools.lru_cache(maxsize=8)
def _turn(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, turn, STARTS)).permutation(count)


def rows_in_turn(seed: int, positions: Sequence[int], count: int) -> list[int]:
    """What of `count` things comes at these positions, from 0 on: one order of all after the other, each shuffled."""
    return [int(_turn(seed, position // count, count)[position % count]) for position in positions]


class Starts:
    """Images to start from, uint8 `[N, C, R, R]`."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def scales(self, rows: Sequence[int], num_scales: int, device: torch.device | str) -> Images:
        """Some of them as walks start from them, fine first: float32 `[B, C, R, R]` in [-1, 1], `[B, C, R/2, R/2]`."""
        x_64 = to_float(torch.from_numpy(self.pixels[list(rows)]).to(device))  # [B, C, R, R]
        return (x_64, coarse(x_64))[:num_scales]

    def of_seeds(self, seeds: Sequence[int], num_scales: int, device: torch.device | str) -> Images:
        """The images of seeds of `diffusion.sampler.image_seeds`: each a function of its seed and of the set alone.

        Of one evaluation seed none comes twice before all have come.
        """
        rows = [
            row
            for seed in seeds
            for row in rows_in_turn(seed // IMAGES_PER_SEED, [seed % IMAGES_PER_SEED], len(self.pixels))
        ]
        return self.scales(rows, num_scales, device)


def check_walk(path: Path, solver: Solver, scheduler: DDIMScheduler) -> None:
    """Raise ValueError for a walk that cannot start from images: that draws noise, or begins below tau = 1."""
    check_draws_nothing(
        solver, "which a model that starts from images has never seen; choose a solver that draws none."
    )
    check_starts_at_last(path, scheduler, "images to start from belong")
