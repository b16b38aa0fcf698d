"""Batches of a training in the latent space of an autoencoder: a fresh draw of every latent at every step."""

import os

import numpy as np
import torch

from data import ImageSet, TwoScaleBatches
from diffusion.space import LatentSpace
from training.objective import step_generator

POSTERIOR = 1  # Beside seed and step: random numbers of latents, apart from those of noise and timesteps.


class LatentBatches(TwoScaleBatches):
    """Shuffled batches `(latents [B, c, r, r], their 2x2 means [B, c, r/2, r/2], labels [B])`, from memory.

    Latents are scaled draws of the posterior of each image, functions of (seed, step); order, labels and what is left
    out are as of `TwoScaleBatches`. Mean and deviation of all latents lie as float32 on `device`, with `flip` those of
    the mirrored images too. Raises what `TwoScaleBatches` and `LatentSpace.posteriors` raise.
    """

    def __init__(
        self,
        space: LatentSpace,
        cache_dir: str | os.PathLike,
        images: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
        labels: np.ndarray | None = None,
    ):
        self.space, self.cache_dir = space, cache_dir
        super().__init__(images, batch_size, seed, device, flip, labels)

    def _hold(self, images: ImageSet) -> None:
        ways = (False, True) if self.flip else (False,)
        parts = [torch.from_numpy(np.array(self.space.posteriors(images, self.cache_dir, way))) for way in ways]
        self.posteriors = [part.to(self.device) for part in parts]  # [N, 2, c, r, r] each

    @property
    def nbytes(self) -> int:
        """Bytes of the posteriors as they lie in memory."""
        return sum(part.nbytes for part in self.posteriors)

    def clean(self, chosen: torch.Tensor, step: int, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """Draws of the latents of the images of some indices `[B]` at a step, `[B, c, r, r]`."""
        found = self.posteriors[0][chosen]  # [B, 2, c, r, r]
        if mirrored is not None:
            found = torch.where(mirrored[:, None, None, None, None], self.posteriors[1][chosen], found)
        generator = step_generator(self.seed, step, self.device, POSTERIOR)
        noise = torch.randn((len(found), *found.shape[2:]), generator=generator, device=self.device)  # [B, c, r, r]
        return self.space.draw(found, noise)
