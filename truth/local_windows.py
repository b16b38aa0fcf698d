"""Which window a network works with: pixels of local score machines against those that it predicts.

A local score machine has one number that theory leaves open, the side P of its window at each noise level. It is
calibrated (arXiv 2412.20292, section 4): of some windows the one is taken whose clean pixels are nearest to those that
the network predicts of the same noisy images. For that a few pixels of an image serve as well as all of them, and cost
that much less.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from images.representation import Images
from runtime.device import full_precision
from truth.local import LOG_SNR_RANGE, PRODUCT_ERROR, LocalDenoiser, WindowTable
from truth.local_pair import LocalPairDenoiser

MEMORY_MIB = 64  # Of logits at once.


class LocalPixels(LocalDenoiser):
    """A local score machine that can be asked for single pixels."""

    @torch.no_grad()
    def pixels_at(self, xs: Images, ts: Images, places: torch.Tensor) -> torch.Tensor:
        """x̂ `[B, M, C]` float64 at places `[M, 2]`, row and column, of noisy `[B, C, H, W]` at timesteps `[B]`.

        They are those of `posterior_mean`. Logits of a place at all candidates are two convolutions of the training
        images, with its window of u and with what of it counts: γ Σ_o m(o) (u(p + o) φ(q + o) - φ(q + o)²/2).
        """
        [x], [t] = xs, ts
        log_snr, size, _ = self._at(t)
        preserving = x.to(torch.promote_types(x.dtype, self.log_snr.dtype)) / size[:, None, None, None]
        if self.machine == "ls":
            return self.posterior_mean(preserving, log_snr)[:, :, places[:, 0], places[:, 1]].transpose(1, 2)
        clean, precisions = self.in_units_of_images(preserving, log_snr)
        sides = [self.window_at(each) for each in log_snr.tolist()]
        found = []
        with full_precision(x.device):
            for image, precision, side in zip(clean, precisions, sides, strict=True):
                found.append(self._pixels_of(image, precision, side, places))
        return torch.stack(found)

    def _pixels_of(self, image: torch.Tensor, precision: float, side: int, places: torch.Tensor) -> torch.Tensor:
        channels, *shape = image.shape
        whole = [self.borders == "circular" and side >= size for size in shape]
        before = [size // 2 if all_of_it else side // 2 for size, all_of_it in zip(shape, whole, strict=True)]
        spans = [size if all_of_it else side for size, all_of_it in zip(shape, whole, strict=True)]
        behind = [span - 1 - reach for span, reach in zip(spans, before, strict=True)]
        largest = precision * channels * math.prod(spans) * self.largest
        rounding = (largest + math.sqrt(largest * channels * math.prod(spans))) * torch.finfo(image.dtype).eps
        dtype = image.dtype if rounding <= PRODUCT_ERROR else torch.float64

        def continued(images: torch.Tensor) -> torch.Tensor:
            mode = "circular" if self.borders == "circular" else "constant"
            return F.pad(images.to(dtype), (before[1], behind[1], before[0], behind[0]), mode=mode)

        def windows(image: torch.Tensor) -> torch.Tensor:
            rows, columns = continued(image[None])[0].unfold(1, spans[0], 1).unfold(2, spans[1], 1), places
            return rows[:, columns[:, 0], columns[:, 1]].transpose(0, 1)  # [M, C, P, P]

        inside = windows(torch.ones_like(image))
        filters = precision * torch.cat([windows(image) * inside, inside / -2], 1)  # [M, 2C, P, P]
        allowed = self._allowed(side, places)  # [M, H, W]
        top = image.new_full((len(places), 1), -math.inf, dtype=dtype)
        total, mean = 0.0, 0.0
        numbers = MEMORY_MIB * 2**20 / top.element_size()
        for chunk in self.images.split(max(1, int(numbers / (len(places) * math.prod(shape))))):
            candidates = continued(chunk)
            logits = F.conv2d(torch.cat([candidates, candidates.square()], 1), filters)  # [n, M, H, W]
            logits = logits.masked_fill_(~allowed, -math.inf).transpose(0, 1).flatten(1)  # [M, n H W]
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            weights = logits.sub_(new_top).exp_()
            factor = (top - new_top).exp().double()
            total = total * factor + weights.sum(1, keepdim=True).double()
            mean = mean * factor + (weights @ chunk.to(dtype).transpose(0, 1).flatten(1).T).double()
            top = new_top
        return mean / total  # [M, C]

    def _allowed(self, side: int, places: torch.Tensor) -> torch.Tensor:
        # Whether the window at a place is a candidate for that at one of `places`: [M, H, W].
        classes = [self._cut_of(size, side) for size in self.images.shape[2:]]
        rows, columns = (each[places[:, k], None] == each for k, each in enumerate(classes))
        return rows[:, :, None] & columns[:, None, :]

    def _cut_of(self, size: int, side: int) -> torch.Tensor:
        # [size]: places of one number have windows that the border cuts alike.
        reach, places = side // 2, torch.arange(size, device=self.images.device)
        if self.machine == "els":
            return torch.zeros_like(places)
        before, behind = (reach - places).clamp(min=0), (places + reach - (size - 1)).clamp(min=0)
        return before * (reach + 1) + behind


class LocalPairPixels(LocalPairDenoiser):
    """The same of two scales; all blocks are computed, of which there are few."""

    @torch.no_grad()
    def pixels_at(self, xs: Images, ts: Images, places: torch.Tensor) -> torch.Tensor:
        """x̂_64 `[B, M, C]` float64 at places `[M, 2]` of the fine image, of both noisy images and their timesteps."""
        return self._mean_of(*self._seen(xs, ts))[:, :, places[:, 0], places[:, 1]].transpose(1, 2)


class State(NamedTuple):
    """What a network makes of noisy images of one noise level for each scale."""

    xs: Images  # [B, C, H, W], fine first
    ts: Images  # [B], equal timesteps
    clean: torch.Tensor  # [B, C, H, W], the clean image that it predicts
    level: tuple[float, ...]  # log SNRs


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How far a machine is from a network at each noise level, by its window.

    levels: log SNRs by scale, finite. windows: sides, rising. errors: for each level and window the mean square
    difference of clean pixels, per value.
    """

    levels: tuple[tuple[float, ...], ...]
    windows: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]

    @property
    def sides(self) -> tuple[int, ...]:
        """The window of least difference of each level, the smallest of equal ones."""
        return tuple(self.windows[min(range(len(row)), key=row.__getitem__)] for row in self.errors)

    def table(self) -> WindowTable:
        """The same as what a machine takes."""
        return WindowTable(self.levels, self.sides)


def calibrate(
    machines: Sequence[LocalPixels] | Sequence[LocalPairPixels],  # of one kind, a fixed window each, rising
    states: Sequence[State],
    places: torch.Tensor,  # [M, 2]
) -> Calibration:
    """Compare machines with what a network predicts of noisy images, one state for each noise level."""
    errors = []
    for state in states:
        target = state.clean[:, :, places[:, 0], places[:, 1]].transpose(1, 2).double()  # [B, M, C]
        pixels = (machine.pixels_at(state.xs, state.ts, places) for machine in machines)
        errors.append(tuple((each - target).square().mean().item() for each in pixels))
    low, high = LOG_SNR_RANGE
    levels = tuple(tuple(min(max(log_snr, low), high) for log_snr in state.level) for state in states)
    return Calibration(levels, tuple(int(machine.window) for machine in machines), tuple(errors))
