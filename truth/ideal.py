"""The optimal denoiser of a finite set of images, which knows each of them: images `[M, C, H, W]`."""

import torch

from scheduler import DDIMScheduler
from truth.posterior_mean import Pair, PosteriorMean, check_images, signal_and_noise


class EmpiricalDenoiser(PosteriorMean):
    """The exact posterior-mean denoiser when the data are exactly `images` `[M, C, H, W]`, each equally likely.

    The interface is that of `GaussianDenoiser`. Posterior weights are the softmax over images y of
    -½ Σ_s ‖x_s - √abar_s y_s‖² / (1 - abar_s), with both scales in the sum (the ideal denoiser of arXiv 2206.00364,
    appendix B.3, with two clocks). Sampling with it returns training images. Work is O(S M C H W) per call; images
    are read `chunk_size` at a time. Raises ValueError for images of another shape or dtype.
    """

    def __init__(
        self,
        scheduler: DDIMScheduler,
        images: torch.Tensor,
        chunk_size: int = 256,
        representation: str | None = None,  # None for that of the scheduler
    ):
        super().__init__(scheduler, representation)
        check_images(images)
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size} but must be at least 1.")
        self.chunk_size = chunk_size
        self.register_buffer("images", images.clone())

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        """E[x_64 | both noisy images], `[S, C, H, W]`; log SNRs `[S, 1, 1, 1]`, below +inf."""
        log_weights = []
        for chunk in self.images.split(self.chunk_size):
            ys = self.representation.split(chunk.to(xs[0].dtype))
            log_weights.append(sum(map(_log_likelihood, xs, ys, log_snrs)))  # [S, chunk]
        weights = torch.cat(log_weights, 1).softmax(1)  # [S, M]
        chunks = zip(weights.split(self.chunk_size, 1), self.images.split(self.chunk_size), strict=True)
        return sum(torch.einsum("sm,mchw->schw", w, y.to(w.dtype)) for w, y in chunks)


def _log_likelihood(x: torch.Tensor, images: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    # -½‖x - √abar y‖² / (1 - abar) without ‖x‖², which all images y share.
    signal, noise = (a.flatten(1) for a in signal_and_noise(log_snr))  # [S, 1]
    overlap = x.flatten(1) @ images.flatten(1).T  # [S, M]
    return (signal * overlap - signal.square() * images.flatten(1).square().sum(1) / 2) / noise.square()
