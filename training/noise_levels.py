"""Which neighbouring noise levels a training of consistency shows, and how that changes over the run.

Levels are σ̂ = sigma / alpha. `--consistency` names a form:

    ct   N levels of Karras, rho = 7, of which N grows with the square root of the progress from 2 to 151; neighbours
         are drawn evenly (arXiv 2303.01469, section 5 and appendix C)
    ict  N - 1 doubles from 10 to 1280; log-normal of mean -1.1 and deviation 2, each pair weighed by the inverse of its
         distance (arXiv 2310.14189, section 3)
    ect  any levels, log-normal as well; the cleaner one of t is t (1 - n(t) / 2^a) with n(t) = 1 + 8 / (1 + e^t), at
         first often clean, and a rises from 1 to 8 (arXiv 2406.14548, section 4); the same weights

The first level is that of timestep 0, the last one that of the last timestep with signal, or LARGEST if the process
goes on: what is noisier than that is told apart by nothing but its timestep. Sampling starts there, so that those
timesteps stand, all alike, for the last level, and have all of the law that lies beyond.

Shapes: B images of a step, N levels.
"""

import functools
import math
from typing import NamedTuple

import torch

from scheduler import DDIMScheduler

ICT = "ict"
RHO = 7.0  # (arXiv 2206.00364, table 1)
LARGEST = 80.0  # The largest level of arXiv 2303.01469, whose images have the range of ours.
LAW = (-1.1, 2.0)  # Mean and deviation of log σ̂ (arXiv 2310.14189, section 3.5).
CT_LEVELS = (2, 150)  # s_0 and s_1 of arXiv 2303.01469, table 3.
CT_DECAY = 0.9  # mu_0 there, of images of 32x32 pixels.
ICT_LEVELS = (10, 1280)  # s_0 and s_1 of arXiv 2310.14189, table 1.
ECT_BASE, ECT_STAGES, ECT_SLOPE, ECT_RATE = 2.0, 8, 8.0, 1.0  # q, of a, k and b of arXiv 2406.14548.


class Drawn(NamedTuple):
    """Neighbouring levels of the fine scale, as times and what a pair counts, float64 `[B]` each."""

    times: torch.Tensor
    next_times: torch.Tensor  # the cleaner ones
    weights: torch.Tensor


def karras_levels(low: float, high: float, count: int) -> torch.Tensor:
    """Levels from low to high that are even in their RHO-th roots (arXiv 2206.00364, eq. 5), float64 `[count]`."""
    roots = torch.linspace(0, 1, count, dtype=torch.float64) * (high ** (1 / RHO) - low ** (1 / RHO))
    levels = (low ** (1 / RHO) + roots) ** RHO
    levels[0], levels[-1] = low, high  # Not by rounding.
    return levels


def ct_levels(progress: float) -> int:
    """N of ct when this share of the run, 0 to 1, is over (arXiv 2303.01469, appendix C)."""
    first, last = CT_LEVELS
    return math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ct_decay(progress: float) -> float:
    """mu of the target network of ct (arXiv 2303.01469, appendix C): exp(s_0 log mu_0 / N)."""
    return math.exp(CT_LEVELS[0] * math.log(CT_DECAY) / ct_levels(progress))


def ict_levels(progress: float) -> int:
    """N of ict: doubled in stages of equal length (arXiv 2310.14189, section 3.4)."""
    first, last = ICT_LEVELS
    stages = int(math.log2(last // first)) + 1
    return min(first * 2 ** math.floor(stages * progress), last) + 1


def ect_exponent(progress: float) -> int:
    """The exponent a of ect, in stages of equal length."""
    return min(1 + math.floor(ECT_STAGES * progress), ECT_STAGES)


def ect_cleaner(levels: torch.Tensor, progress: float) -> torch.Tensor:
    """The cleaner neighbours of levels `[B]`, at least 0 (arXiv 2406.14548, section 4)."""
    spread = 1 + ECT_SLOPE * torch.sigmoid(-ECT_RATE * levels)
    return (levels * (1 - spread / ECT_BASE ** ect_exponent(progress))).clamp(min=0)


class Levels:
    """What the forms share: the range of levels of a process, and the times at which it has them.

    Raises ValueError for a prediction that has no consistency function there.
    """

    averages_target = False  # Whether the target is an average of the weights, and not the weights as they are.

    def __init__(self, scheduler: DDIMScheduler):
        self._scheduler = scheduler
        count = scheduler.num_train_timesteps
        # Of a schedule that ends at zero SNR the last timestep but one; of flow half a timestep less.
        last = count - 1.5 if scheduler.process == "flow" else count - 1.0 - float(scheduler.alphas[-1] == 0)
        self._last = torch.tensor(last, dtype=torch.float64, device=scheduler.alphas.device)
        self.low = (scheduler.sigmas[0] / scheduler.alphas[0]).item()
        end = scheduler.log_snr_at(self._last).div(-2).exp().item()
        self.high, self.goes_on = min(end, LARGEST), end > LARGEST
        self._grid = functools.cache(self._make_grid)

    def times(self, levels: torch.Tensor) -> torch.Tensor:
        """When the process has these levels, float64 like them; 0 for those that are no larger than the first."""
        found = self._scheduler.time_of(-2 * levels.log())
        return torch.where(levels <= self.low, 0.0, found)

    def levels_at(self, times: torch.Tensor) -> torch.Tensor:
        """The levels of times float64 `[B]`."""
        return (-self._scheduler.log_snr_at(times) / 2).exp()

    def _make_grid(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels = karras_levels(self.low, self.high, count).to(self._last.device)
        return levels, self.times(levels)

    def draw(self, batch: int, generator: torch.Generator, progress: float) -> Drawn:
        """Neighbours for so many images when this share of the run, 0 to 1, is over."""
        raise NotImplementedError

    def _uniform(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(2, batch, dtype=torch.float64, generator=generator, device=self._last.device)

    def _neighbours(self, count: int, above: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Times of the levels numbered `above` [B] and of those below; places [B] in [0, 1) among those beyond the last.
        levels, times = self._grid(count)
        noisier = times[above]
        if self.goes_on:
            beyond = times[-1] + places * (self._last - times[-1])
            noisier = torch.where(above == count - 1, beyond, noisier)
        return noisier, times[above - 1]


class CtLevels(Levels):
    """Evenly, all pairs alike, and an average of the weights as the target."""

    averages_target = True

    def draw(self, batch: int, generator: torch.Generator, progress: float) -> Drawn:
        count = ct_levels(progress)
        which, places = self._uniform(batch, generator)
        above = 1 + (which * (count - 1)).long()
        return Drawn(*self._neighbours(count, above, places), torch.ones_like(places))


class IctLevels(Levels):
    """Log-normal on the grid, and the inverse distance as the weight."""

    def probabilities(self, count: int) -> torch.Tensor:
        """Those of the pairs of neighbours, from the cleanest one, float64 `[count - 1]` (arXiv 2310.14189, eq. 10)."""
        levels = self._grid(count)[0].clone()
        if self.goes_on:
            levels[-1] = math.inf
        shares = torch.special.ndtr((levels.log() - LAW[0]) / LAW[1]).diff()
        return shares / shares.sum()

    def draw(self, batch: int, generator: torch.Generator, progress: float) -> Drawn:
        count = ict_levels(progress)
        which, places = self._uniform(batch, generator)
        below = torch.searchsorted(self.probabilities(count).cumsum(0), which, right=True).clamp(max=count - 2)
        distances = self._grid(count)[0].diff()
        return Drawn(*self._neighbours(count, below + 1, places), 1 / distances[below])


class EctLevels(Levels):
    """Log-normal within the range of the process, and the cleaner level by a rule."""

    def draw(self, batch: int, generator: torch.Generator, progress: float) -> Drawn:
        which, _ = self._uniform(batch, generator)
        low, high = (
            torch.special.ndtr((level.log() - LAW[0]) / LAW[1])
            for level in (torch.tensor(self.low, dtype=torch.float64), self.levels_at(self._last))
        )
        levels = (LAW[0] + LAW[1] * torch.special.ndtri(low + which * (high - low))).exp()  # [B]
        cleaner = ect_cleaner(levels, progress).clamp(min=self.low)
        # As on a grid, what is noisier than the largest level counts as that does.
        counted = levels.clamp(max=self.high)
        weights = 1 / (counted - ect_cleaner(counted, progress).clamp(min=self.low))
        return Drawn(*self.times(torch.stack([levels, cleaner])), weights)


FORMS: dict[str, type[Levels]] = {"ct": CtLevels, ICT: IctLevels, "ect": EctLevels}
