"""Batches of a training on stored pairs: at every step each image comes with the noise that it was made of."""

from collections.abc import Iterator

import numpy as np
import torch

from data import coarse
from diffusion.pairs import Pairs
from images.representation import Images


class PairBatches:
    """Shuffled batches `(x_64 [B, C, R, R], x_32 [B, C, R/2, R/2], labels [B] or None, noise by scale)`, from memory.

    The noise of an image is that of the seed of its pair, whatever the batch, the epoch and the number of processes,
    and is never given to another. x_32 is where the coarse scale of the walk ended, and of a model of one scale the
    mean of x_64, with a noise of its own that nothing depends on. Order and remainder are as of `TwoScaleBatches`.
    Raises ValueError if a batch is larger than the number of pairs.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int, device: torch.device):
        if not 1 <= batch_size <= len(pairs):
            raise ValueError(
                f"--batch_size {batch_size} does not fit {len(pairs)} pairs; choose one between 1 and that, or more "
                "--num_pairs."
            )
        self.pairs, self.count, self.batch_size, self.seed, self.device = pairs, len(pairs), batch_size, seed, device
        self.scales = [torch.from_numpy(x).to(device) for x in pairs.scales]  # [N, C, R, R], maybe [N, C, R/2, R/2]
        self.labels = None if pairs.labels is None else torch.from_numpy(pairs.labels).to(device)  # [N]

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs as they lie in memory."""
        return sum(x.nbytes for x in self.scales)

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.count // self.batch_size

    def clean(self, chosen: torch.Tensor, step: int, mirrored: None = None) -> torch.Tensor:
        """The images of some indices `[B]`, `[B, C, R, R]`, the same at every step."""
        return self.scales[0][chosen]

    def epoch(
        self, epoch: int, first_batch: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Images]]:
        """The batches of one epoch, from `first_batch` on."""
        order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(self.count))  # [N]
        for batch in range(first_batch, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]  # [B]
            chosen = rows.to(self.device)
            x_64 = self.scales[0][chosen]  # [B, C, R, R]
            x_32 = self.scales[1][chosen] if len(self.scales) > 1 else coarse(x_64)  # [B, C, R/2, R/2]
            labels = None if self.labels is None else self.labels[chosen]
            yield x_64, x_32, labels, self.pairs.noise(rows.tolist(), self.device)
