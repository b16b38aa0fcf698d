"""Batches of a training that maps one data set onto another: images, and images of the other set in place of noise."""

from collections.abc import Iterator

import numpy as np
import torch

from data import ImageSet, TwoScaleBatches, coarse, to_float
from diffusion.starts import rows_in_turn
from images.representation import Images

MIRRORS = 2  # Beside seed and step: which images to start from are mirrored.


class MappingBatches(TwoScaleBatches):
    """Shuffled batches `(x_64 [B, C, R, R], x_32 [B, C, R/2, R/2], None, starts by scale)`, from memory.

    x_64 and x_32 are as of `TwoScaleBatches`, and an epoch is one over them. Each has an image of `starts` at the other
    end of its line, any one: these come in an order of their own, a function of seed and step, all of them before any
    comes again, however many there are. `flip` mirrors both, each by itself. Raises what `TwoScaleBatches` raises.
    """

    def __init__(
        self,
        images: ImageSet,
        starts: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
    ):
        super().__init__(images, batch_size, seed, device, flip)
        self.start_pixels = torch.from_numpy(np.array(starts.pixels)).to(device)  # [M, C, R, R]

    @property
    def nbytes(self) -> int:
        """Bytes of both sets as they lie in memory."""
        return super().nbytes + self.start_pixels.nbytes

    def starts(self, step: int) -> Images:
        """What the lines of a step start from, `[B, C, R, R]` and `[B, C, R/2, R/2]` in [-1, 1]."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        rows = torch.tensor(rows_in_turn(self.seed, positions, len(self.start_pixels)), device=self.device)  # [B]
        x_64 = to_float(self.start_pixels[rows])  # [B, C, R, R]
        if self.flip:
            mirrored = np.random.default_rng((self.seed, step, MIRRORS)).random(self.batch_size) < 0.5
            mirrored = torch.from_numpy(mirrored).to(self.device)  # [B]
            x_64 = torch.where(mirrored[:, None, None, None], x_64.flip(-1), x_64)
        return x_64, coarse(x_64)

    def epoch(
        self, epoch: int, first_batch: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Images]]:
        """The batches of one epoch, from `first_batch` on."""
        for batch, shown in enumerate(super().epoch(epoch, first_batch), first_batch):
            yield *shown, self.starts(epoch * len(self) + batch)
