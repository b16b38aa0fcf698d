"""The noise level of each stage of a chain, by search on images held out (arXiv 2106.15282, section 4.2).

Stage by stage: the chain so far is kept, and candidates of the next level are scored by the sliced Wasserstein distance
(SWD ×1000) of its images to as many held-out ones, all from the same seeds: `clean`, then a grid of log SNRs, then what
lies half-way to the neighbours of the best.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluation.chain import Chain, Enlarged, level_text
from evaluation.pixel_metrics import SlicedWasserstein
from evaluation.search import search
from paths.path import timestep_of_level


class Found(NamedTuple):
    """What the search says of one stage: the level of the least score, and the score of each candidate."""

    level: float
    scores: dict[float, float]  # by log SNR; that of inf is plain super-resolution


def search_levels(
    chain: Chain,
    references: Sequence[np.ndarray | torch.Tensor],  # of each stage, uint8 [M, C, R, R] of its size, M >= N
    seeds: Sequence[int],  # of the N images of a candidate
    lowest: float = -4.0,  # log SNRs of the grid
    highest: float = 8.0,
    grid: int = 7,
    rounds: int = 2,
    score: Callable[[int, torch.Tensor], float] | None = None,  # of a stage and its images, in place of the SWD
    seen: Callable[[dict[str, Any]], None] | None = None,  # called with a row for every candidate
) -> list[Found]:
    """The best level of every stage.

    Levels of one timestep are one candidate. Raises ValueError for a grid that is none, and what `Chain.enlarge`,
    `search` and `SlicedWasserstein` raise.
    """
    if not -math.inf < lowest < highest < math.inf:
        raise ValueError(
            f"From {lowest:g} to {highest:g} there are no levels to search; pass --lowest below --highest."
        )
    made, found = chain.start(seeds), []
    for number in range(len(chain.stages)):
        distance = score
        if distance is None:
            distance = _swd_of(chain, SlicedWasserstein(references[number], len(seeds), device=chain.device))
        candidates = _Candidates(chain, number, made, seeds, distance, seen)
        scores = {math.inf: candidates.score(math.inf)}
        low, high = (float(np.clip(level, *candidates.log_snr[[-2, 1]])) for level in (lowest, highest))
        scores |= search(candidates.score, low, high, grid, rounds)
        found.append(Found(min(scores, key=scores.get), scores))
        made = candidates.best[1]
    return found


class _Candidates:
    """The levels of one stage, each tried once."""

    def __init__(self, chain: Chain, number: int, made: Enlarged, seeds: Sequence[int], distance: Callable, seen):
        self.log_snr = chain.stages[number].loaded.scheduler.log_snr.cpu().numpy()
        self.best: tuple[float, Enlarged] | None = None
        self._chain, self._number, self._made, self._seeds = chain, number, made, seeds
        self._distance, self._seen = distance, seen
        self._by_timestep: dict[int, float] = {}

    def score(self, level: float) -> float:
        timestep = timestep_of_level(level, self.log_snr)
        if timestep not in self._by_timestep:
            images = self._chain.enlarge(self._number, self._made, self._seeds, level)
            value = self._by_timestep[timestep] = self._distance(self._number, images.images)
            if self.best is None or value < self.best[0]:
                self.best = value, images
            if self._seen is not None:
                row = {"stage": self._number + 1, "s_0": level_text(level), "timestep": timestep}
                self._seen(row | {"num_images": len(self._seeds), "nfe": images.nfe, "swd": value})
        return self._by_timestep[timestep]


def _swd_of(chain: Chain, metric: SlicedWasserstein) -> Callable[[int, torch.Tensor], float]:
    def distance(number: int, images: torch.Tensor) -> float:
        pixels = chain.stages[number].loaded.space.pixels(images)
        return statistics.mean(metric.distance(pixels).values())

    return distance
