"""Local score machines of two scales with two clocks: the best denoisers of pairs that see a window of blocks.

A block is a coarse pixel and the 2x2 fine ones that it covers. Let u_s = x_s / α_s and γ_s = α_s² / σ_s² of either
scale s. Block p of the clean image is estimated from the window Ω_p, P blocks wide and high, of both noisy images,

    x̂(p) = Σ_q w_q φ(q) / Σ_q w_q,    w_q = exp(-½ Σ_s γ_s Σ_{o: p+o ∈ Ω_p} |u_s(p + o) - φ_s(q + o)|²),

over blocks q of training images φ, of which φ_s are the two scales in either representation. That is a machine of
`truth.local` on the grid of blocks: its channels are the four fine pixels and the coarse one, times √γ_s, at precision
1, and what it takes the mean of are the four pixels of the image. Which q are candidates, and what borders do, is said
there.

Candidates are thus shifted by whole blocks, two fine pixels. The pair has no other shifts: an image shifted by one
fine pixel has 2x2 means of other pixels, which are no shift of its coarse image. A network that puts both scales
together on one grid does the same at every block and not at every pixel.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from runtime.device import full_precision
from scheduler import DDIMScheduler
from truth.local import LOG_SNR_RANGE, Window, check_machine, window_side
from truth.posterior_mean import Pair, PosteriorMean, check_images, signal_and_noise


class LocalPairDenoiser(PosteriorMean):
    """A local score machine of the pairs of `images` `[N, C, H, W]`, with the interface of `EmpiricalDenoiser`.

    machine, borders, memory_mib: as of `LocalDenoiser`. window: its side P in blocks, odd, for all noise levels, or
    what gives it for the log SNRs (fine, coarse), of pure noise -inf. Every scale may be pure noise, which says
    nothing, or clean. All candidates count, in the dtype of the images; every row of a batch is computed by itself. No
    gradients pass. Work is that of `LocalDenoiser` of images of H/2 x W/2 pixels with 5 C channels, and of N of them
    once for every pair of noise levels in a batch.

    Raises ValueError for images of another shape, and what `LocalDenoiser` refuses.
    """

    num_predictions = 2

    def __init__(
        self,
        scheduler: DDIMScheduler,
        images: torch.Tensor,
        machine: str,
        window: int | Callable[[float, float], int],
        borders: str = "zeros",
        memory_mib: float | None = None,
        representation: str | None = None,  # None for that of the scheduler
    ):
        super().__init__(scheduler, representation)
        check_machine(machine, borders, memory_mib)
        check_images(images)
        self.machine, self.window, self.borders, self.memory_mib = machine, window, borders, memory_mib
        scales = self.representation.split(images)
        self.largest = tuple(each.abs().max().item() ** 2 for each in scales)
        self.register_buffer("pixels", F.pixel_unshuffle(images, 2))  # [N, 4C, H/2, W/2]
        self.register_buffer("blocks", _blocks(scales))  # [N, 5C, H/2, W/2]
        if not callable(window):
            self.window_at(0.0, 0.0)

    def window_at(self, log_snr_64: float, log_snr_32: float) -> int:
        """The side of the window in blocks at two log SNRs; raises ValueError unless it is odd and positive."""
        return window_side(self.window, log_snr_64, log_snr_32)

    @torch.no_grad()
    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor) -> Pair:
        """Both predictions, like the noisy images `[S, C, H, W]` and `[S, C, H/2, W/2]` at timesteps `[S]`."""
        return super().forward(x_64, x_32, t_64, t_32)

    @torch.no_grad()
    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        """x̂_64 `[S, C, H, W]` float64, of variance-preserving noisy images and their log SNRs `[S, 1, 1, 1]`."""
        shape, trained = list(xs[0].shape[1:]), [self.pixels.shape[1] // 4, *(2 * n for n in self.pixels.shape[2:])]
        if shape != trained:
            raise ValueError(f"Noisy images are {shape}, those of training {trained}.")
        noisy, levels = [], []
        for x, log_snr in zip(xs, log_snrs, strict=True):
            log_snr = log_snr.double().clamp(max=LOG_SNR_RANGE[1])
            is_noise = log_snr < LOG_SNR_RANGE[0]
            # √γ u, for which √γ and α of pure noise would leave 0 / 0.
            noisy.append(torch.where(is_noise, 0.0, x.double() / signal_and_noise(log_snr)[1]))
            levels.append(torch.where(is_noise, -math.inf, log_snr).flatten().tolist())
        seen = _blocks(noisy).to(self.blocks.dtype)
        levels = list(zip(*levels, strict=True))
        result = torch.empty_like(xs[0], dtype=torch.float64)
        with full_precision(result.device):
            for level in dict.fromkeys(levels):
                rows = [k for k, other in enumerate(levels) if other == level]
                sums = self._window(*level).sums([seen[k] for k in rows], [1.0] * len(rows))
                for k, each in zip(rows, sums, strict=True):
                    result[k] = F.pixel_shuffle(each.mean / each.total, 2)
        return result

    def _window(self, *log_snrs: float) -> Window:
        # What precision 1 is for: images whose scales have √γ of their own as a factor.
        precisions = [math.exp(log_snr) for log_snr in log_snrs]
        channels = self.pixels.shape[1], self.blocks.shape[1] - self.pixels.shape[1]
        roots = [math.sqrt(p) for p, count in zip(precisions, channels, strict=True) for _ in range(count)]
        scaled = self.blocks * self.blocks.new_tensor(roots)[:, None, None]
        largest = max(precision * square for precision, square in zip(precisions, self.largest, strict=True))
        side = self.window_at(*log_snrs)
        # Shifted images take as much longer as they have channels, and here there are many.
        return Window(
            scaled, self.pixels, largest, self.machine, side, self.borders, self.memory_mib, sum(channels)
        )  # fmt: skip


def _blocks(xs: Pair) -> torch.Tensor:
    # Both scales as channels of the coarse grid: [S, 5C, H/2, W/2].
    return torch.cat([F.pixel_unshuffle(xs[0], 2), xs[1]], 1)
