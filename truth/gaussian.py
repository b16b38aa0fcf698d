"""Images whose optimal denoiser is known: Gaussian ones in closed form, and any finite set of images.

The fine image splits into orthonormal Haar bands: low modes l (the coarse image is their half, x_32 = l/2) and
detail modes h. Every mode is an independent Gaussian of known variance s. With γ = SNR = exp(λ), a = γ_64 and
b = γ_32, the noisy images z = √γ x + n see a low mode at SNR g = a + b/4 and a detail mode at SNR a, so that its
posterior variance is s / (1 + s g) or s / (1 + s a). Denoising errors, Jacobians, the information in z, and what a
sampler returns along any path follow exactly.

That is the over-complete pair (x_64, x_32), `representation="overcomplete"`. The "residual" pair is (r, c) with the
coarse image c = x_32 = l/2 and the fine one r = x_64 - upsampled c, which holds the details alone: every 2x2 block of
it sums to zero, and so does its noise. "64" and a mean r there, "32" and b mean c; a low mode is seen at SNR g = b/4.
Isotropic noise of SNR γ on x_64 is (a, b) = (γ, 4γ): the diagonal of the image is λ_32 = λ_64 + log 4.

"Points" of a path are log SNRs λ, float64 `[N + 1, 2]`, fine first, that never fall; -inf is pure noise, and the last
point may be +inf, which is clean. One clock on the fine image alone, `[N + 1]`, is the special case λ_32 = -inf.
Variances are in units of x², KL divergences and information in nats. All of it is differentiable in λ.
"""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import OptimizeResult, minimize
from torch import nn

from images.representation import REPRESENTATIONS
from runtime.safe_write import replacing
from scheduler import DDIMScheduler, epsilon_from_x0, v_from_x0_epsilon

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.
LogSNR = torch.Tensor | np.ndarray | Sequence | float

# Variance of rounding to 8 bits, for images in [-1, 1]: no estimated variance is taken below it.
QUANTISATION_VARIANCE = (2 / 255) ** 2 / 12
# Projected gradient of log(value) per unit of λ below which an optimum counts as found.
GRADIENT_TOLERANCE = 1e-5


class Law(NamedTuple):
    """A zero-mean Gaussian law of fine images: variances of the low modes `[m_L]` and detail modes `[m_H]`."""

    low: torch.Tensor
    high: torch.Tensor


class ImageVariances(NamedTuple):
    """The same law as image tensors, what `GaussianDenoiser(scheduler, *parts)` takes.

    low `[C, H/2, W/2]`, high `[3, C, H/2, W/2]` (details along W, along H, along both), both over (principal colour,
    DCT-II frequency); rotation `[C, C]`, whose rows are the principal colours; mean `[C, H, W]`.
    """

    low: torch.Tensor
    high: torch.Tensor
    rotation: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances of independent Gaussian modes of the fine image, float64: `low` `[m_L]` and `high` `[m_H]`.

    Low modes are orthonormal Haar coefficients l = 2 x_32 (so modes of x_32 have variance low / 4), high ones the
    details. Raises ValueError unless both are one-dimensional, positive and finite.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            values = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if values.ndim != 1 or not (values.isfinite() & (values > 0)).all():
                raise ValueError(f"Variances of the {name} modes must be a vector of positive finite numbers.")
            object.__setattr__(self, name, values)

    @classmethod
    def power_law(
        cls, resolution: int = 64, channels: int = 3, exponent: float = 2.0, variance: float = 0.25
    ) -> "Spectrum":
        """Haar variances of images whose DCT-II coefficients have variance ∝ max(|k|, 1)^-exponent.

        k is the frequency in half cycles per image, `variance` the mean variance of a pixel (0.25 is that of
        photographs in [-1, 1]). Channels are independent and alike. A coarse frequency i of a band holds the fine
        frequencies i and H - i, with the squared Haar gains cos² and sin² of πi / 2H; the correlation between bands
        that this leaves is dropped. Order: `[C, H/2, W/2]` for low and `[3, C, H/2, W/2]` for high, as in
        `ImageVariances`. Raises ValueError for an odd or non-positive resolution, channels or variance.
        """
        if resolution < 2 or resolution % 2 or channels < 1 or not variance > 0:
            raise ValueError(
                f"A power law needs an even resolution, at least 1 channel and a positive variance; got {resolution}, "
                f"{channels} and {variance}."
            )
        frequency = torch.arange(resolution, dtype=torch.float64)
        power = torch.hypot(frequency[:, None], frequency).clamp(min=1) ** -exponent  # [H, W]
        power = power * (variance * resolution**2 / power.sum())
        smooth, detail = _haar_folding(resolution)  # [H/2, H] each
        low = smooth @ power @ smooth.T  # [H/2, W/2]
        bands = [rows @ power @ columns.T for rows, columns in ((smooth, detail), (detail, smooth), (detail, detail))]
        high = torch.stack(bands)[:, None].expand(-1, channels, -1, -1)  # [3, C, H/2, W/2]
        return cls(low.expand(channels, -1, -1).flatten(), high.flatten())

    @classmethod
    def of_images(cls, images: torch.Tensor, batch_size: int = 512) -> tuple["Spectrum", ImageVariances]:
        """The Gaussian model of a data set, `[B, C, H, W]` floats in [-1, 1], B >= 2, H and W even.

        Colours are rotated to the principal axes of their covariance, weakest first, then Haar split, then DCT-II of
        each band; the variance of each mode about the mean image is the unbiased estimate, at least
        `QUANTISATION_VARIANCE`. Correlations between modes are dropped. Returns the spectrum and the same variances
        with rotation and mean image, float64. Raises ValueError for another shape or dtype.
        """
        _check_images(images)
        if len(images) < 2:
            raise ValueError("Variances need at least 2 images.")
        batches = images.split(batch_size)
        mean = sum(x.double().sum(0) for x in batches) / len(images)  # [C, H, W]
        colour = sum(torch.einsum("bchw,bdhw->cd", *(x.double() - mean,) * 2) for x in batches)
        rotation = torch.linalg.eigh(colour).eigenvectors.T.contiguous()  # [C, C]
        dct = _dct(images.shape[-2] // 2).to(mean), _dct(images.shape[-1] // 2).to(mean)
        square = sum(_to_modes(x.double() - mean, rotation, *dct).square().sum(0) for x in batches)  # [4, C, h, w]
        variances = (square / (len(images) - 1)).clamp(min=QUANTISATION_VARIANCE)
        low, high = variances[0], variances[1:]
        return cls(low.flatten(), high.flatten()), ImageVariances(low, high, rotation, mean)

    @classmethod
    def load(cls, file: str | os.PathLike) -> "Spectrum":
        """Read an `.npz` with `sL` `[m_L]` and `sH` `[m_H]`, as `save` writes it.

        Raises FileNotFoundError if it is missing, and ValueError if it is damaged, lacks an array, or holds variances
        that are not positive and finite.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"Spectrum {file} does not exist; write one with Spectrum.save.")
        try:
            with np.load(file, allow_pickle=False) as content:
                low, high = (np.asarray(content[name], dtype=np.float64) for name in ("sL", "sH"))
        except KeyError as error:
            raise ValueError(f"{file} is not a spectrum: it lacks sL or sH; write one with Spectrum.save.") from error
        except Exception as error:  # A damaged zip raises whatever the damage happens to hit.
            raise ValueError(f"Spectrum {file} is damaged ({type(error).__name__}); write it again.") from error
        try:
            return cls(torch.from_numpy(low), torch.from_numpy(high))
        except ValueError as error:
            raise ValueError(f"Spectrum {file} cannot be used: {error} Estimate it again.") from error

    def save(self, file: str | os.PathLike) -> None:
        """Write the variances as the `.npz` that `load` reads, atomically."""
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, sL=self.low.detach().cpu().numpy(), sH=self.high.detach().cpu().numpy())

    def noised(self, log_snr: LogSNR, representation: str = "overcomplete") -> Law:
        """The true law of the fine image at a log SNR, in variance-preserving scale: abar s + 1 - abar per mode.

        For the residual pair, of r + upsampled c at a point `[2]`, where a low mode is twice one of c: its noise has
        4 (1 - abar_32). Raises ValueError for a single log SNR there.
        """
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
        signal, noise = log_snr.sigmoid(), (-log_snr).sigmoid()
        if _is_residual(representation):
            if log_snr.shape != (2,):
                raise ValueError(f"The residual pair has a log SNR per scale [2], but got {list(log_snr.shape)}.")
            return Law(signal[1] * self.low + 4 * noise[1], signal[0] * self.high + noise[0])
        return Law(signal * self.low + noise, signal * self.high + noise)


class _PosteriorMean(nn.Module):
    """An optimal two-scale denoiser: subclasses give the mean of x_64 given both noisy images."""

    num_scales = 2

    def __init__(self, scheduler: DDIMScheduler, representation: str | None):
        super().__init__()
        representation = representation or scheduler.representation.name
        self._is_residual = _is_residual(representation)
        self.representation = REPRESENTATIONS[representation]
        self.prediction_type = scheduler.prediction_type
        # A table of abar would lose 1 - abar if the module is cast to float32; log SNR does not.
        self.register_buffer("log_snr", scheduler.log_snr.clone())

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor) -> Pair:
        xs = tuple(x.to(torch.promote_types(x.dtype, self.log_snr.dtype)) for x in (x_64, x_32))
        xs = self.representation.project(xs)  # What is outside the space of the fine scale is not seen.
        log_snrs = tuple(self.log_snr[t][:, None, None, None] for t in (t_64, t_32))  # [S, 1, 1, 1]
        x0_64 = self.posterior_mean(xs, log_snrs)  # [S, C, H, W]
        x0s = self.representation.split(x0_64)  # The mean of the coarse image is the coarse mean.
        predictions = map(self._prediction, xs, x0s, log_snrs)
        return tuple(p.to(x.dtype) for p, x in zip(predictions, (x_64, x_32), strict=True))

    def _prediction(self, x: torch.Tensor, x0: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "x0":
            return x0
        alpha_bar = log_snr.sigmoid()
        epsilon = epsilon_from_x0(x, x0, alpha_bar)
        return epsilon if self.prediction_type == "epsilon" else v_from_x0_epsilon(x0, epsilon, alpha_bar)

    def denoise(self, xs: Pair, ts: Pair) -> Pair:
        """Two scales, two clocks, the form the sampler and the error map call."""
        return self(*xs, *ts)


class GaussianDenoiser(_PosteriorMean):
    """The exact posterior-mean denoiser of Gaussian images, with the interface of LIFTDualTimestepModel.

    `forward(x_64 [S, C, H, W], x_32 [S, C, H/2, W/2], t_64 [S], t_32 [S])` returns both predictions, shaped and typed
    like the images, in the prediction type of the scheduler. It computes in the wider of the image dtype and that of
    its buffers (float64 unless cast). Per mode, l̂ = s (√a z_64 + √b z_32 / 2) / (1 + s (a + b/4)). With
    representation="residual", x_64 stands for the noisy r, of which it reads and predicts the details alone, and
    l̂ = s √b z_32 / 2 / (1 + s b/4).

    low `[C, H/2, W/2]`, high `[3, C, H/2, W/2]`: variances as in `ImageVariances`, >= 0. rotation `[C, C]`: orthogonal
    rows, identity by default. mean `[C, H, W]`: zero by default. Raises ValueError for other shapes, negative or
    infinite variances and a rotation that is not orthogonal.
    """

    def __init__(
        self,
        scheduler: DDIMScheduler,
        low: torch.Tensor,
        high: torch.Tensor,
        rotation: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        representation: str | None = None,  # None for that of the scheduler
    ):
        super().__init__(scheduler, representation)
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high))
        if low.ndim != 3 or high.shape != (3, *low.shape):
            raise ValueError(
                f"Variances must be low [C, H/2, W/2] and high [3, C, H/2, W/2]; got {list(low.shape)} and "
                f"{list(high.shape)}."
            )
        variances = torch.cat([low[None], high])  # [4, C, H/2, W/2]
        if not (variances.isfinite() & (variances >= 0)).all():
            raise ValueError("Variances must be finite and not negative.")
        channels, h, w = low.shape
        eye = torch.eye(channels, dtype=torch.float64, device=low.device)
        rotation = eye if rotation is None else torch.as_tensor(rotation).to(eye)
        if rotation.shape != eye.shape or not torch.allclose(rotation @ rotation.T, eye, atol=1e-6):
            raise ValueError(f"rotation must be an orthogonal matrix [{channels}, {channels}].")
        mean = torch.zeros(channels, 2 * h, 2 * w).to(eye) if mean is None else torch.as_tensor(mean).to(eye)
        if mean.shape != (channels, 2 * h, 2 * w):
            raise ValueError(f"mean has shape {list(mean.shape)} but the variances want {[channels, 2 * h, 2 * w]}.")
        buffers = dict(variances=variances, rotation=rotation, mean=mean, dct_h=_dct(h).to(eye), dct_w=_dct(w).to(eye))
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def _basis(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rotation, self.dct_h, self.dct_w

    def spectrum(self) -> Spectrum:
        """The variances as a `Spectrum`; raises ValueError if some are zero."""
        return Spectrum(self.variances[0].flatten(), self.variances[1:].flatten())

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        """E[x_64 | both noisy images], `[S, C, H, W]`; log SNRs `[S, 1, 1, 1]`, below +inf."""
        means = self.representation.split(self.mean[None])
        amplitudes = map(_amplitudes, log_snrs)
        zs = [(x - signal * m) / noise for x, m, (signal, noise) in zip(xs, means, amplitudes, strict=True)]
        z_64 = _to_modes(zs[0], *self._basis())  # [S, 4, C, H/2, W/2]
        # The coarse image is half a low band, to which the rest of the transform applies.
        z_32 = _rotate_and_dct(zs[1], *self._basis())  # [S, C, H/2, W/2]
        a, b = (log_snr.exp()[..., None] for log_snr in log_snrs)  # [S, 1, 1, 1, 1]
        is_low = torch.zeros(4, 1, 1, 1).to(z_64)
        is_low[0] = 1
        a = a * (1 - is_low) if self._is_residual else a  # [S, 4, 1, 1, 1] or [S, 1, 1, 1, 1]
        gain = self.variances / (1 + self.variances * (a + is_low * b / 4))  # [S, 4, C, H/2, W/2]
        modes = gain * (a.sqrt() * z_64 + is_low * (b.sqrt() / 2) * z_32[:, None])
        return self.mean + _from_modes(modes, *self._basis())

    def draw(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """`count` images from the model, `[count, C, H, W]`, in the dtype and on the device of the buffers."""
        shape = (count, *self.variances.shape)
        device = self.variances.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, dtype=self.variances.dtype, device=device)
        return self.mean + _from_modes(noise.to(self.variances.device) * self.variances.sqrt(), *self._basis())


class EmpiricalDenoiser(_PosteriorMean):
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
        _check_images(images)
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


def mse(spectrum: Spectrum, log_snr_64: LogSNR, log_snr_32: LogSNR, representation: str = "overcomplete") -> Pair:
    """Denoising errors E‖x_s - x̂_s‖² of both scales, totals over all modes in units of x²; log SNRs broadcast.

    mse_64 = Σ_low s / (1 + s (a + b/4)) + Σ_high s / (1 + s a) and mse_32 = ¼ Σ_low s / (1 + s (a + b/4)). For the
    residual pair mse_64 = Σ_high s / (1 + s a) and mse_32 = ¼ Σ_low s / (1 + s b/4).
    """
    a, b = _snr(log_snr_64), _snr(log_snr_32)
    low = _posterior_variance(spectrum.low, _low_snr(a, b, representation)).sum(-1)
    high = _posterior_variance(spectrum.high, a).sum(-1)
    return (torch.zeros_like(low) if _is_residual(representation) else low) + high, low / 4


def information(
    spectrum: Spectrum, log_snr_64: LogSNR, log_snr_32: LogSNR, representation: str = "overcomplete"
) -> torch.Tensor:
    """Mutual information I(x; z_64, z_32) in nats; log SNRs broadcast.

    ½ Σ_low log(1 + s g) + ½ Σ_high log(1 + s a); its derivative in γ_s is ½ mse_s (I-MMSE, cs/0412108).
    """
    a, b = _snr(log_snr_64), _snr(log_snr_32)
    low = torch.log1p(spectrum.low * _low_snr(a, b, representation)[..., None]).sum(-1)
    return (low + torch.log1p(spectrum.high * a[..., None]).sum(-1)) / 2


def mse_maps(spectrum: Spectrum, log_snr: LogSNR, representation: str = "overcomplete") -> Pair:
    """`mse` at every pair of grid lines: (mse_64, mse_32), float64 `[n, n]`, row: fine, column: coarse."""
    log_snr = _finite_grid(log_snr)
    # One row at a time, since each holds n x m_L numbers.
    rows = [mse(spectrum, line, log_snr, representation) for line in log_snr]
    return tuple(torch.stack(row) for row in zip(*rows, strict=True))


def jacobian(
    spectrum: Spectrum,
    log_snr_64: LogSNR,
    log_snr_32: LogSNR,
    of: str = "eps",
    representation: str = "overcomplete",
) -> dict[str, torch.Tensor]:
    """Squared Frobenius norms of the Jacobian blocks of the optimal ε̂ (or, with `of="x0"`, x̂0); log SNRs broadcast.

    Derivatives are with respect to the variance-preserving noisy images. Returns HH, HL, LH, LL (output first, H the
    fine scale). With D = 1 + s (a + b/4), the singular values of ε̂ are
        HH: √(1+a) (1 + s b/4) / D for low modes and √(1+a) / (1 + s a) for details
        LL: √(1+b) (1 + s a) / D        HL: √(1+b) ½√(ab) s / D        LH: √(1+a) ½√(ab) s / D
    and those of x̂0 are s / D (details s / (1 + s a)) times √(a(1+a)), ¼√(b(1+b)), ½√(b(1+b)) and ½√(a(1+a)).
    The residual pair has HL = LH = 0, no low modes in HH, and 1 + s b/4 for D, of which LL is √(1+b) / D.
    Raises ValueError for log SNRs that are not finite and for another `of`.
    """
    if of not in ("eps", "x0"):
        raise ValueError(f"Unknown Jacobian '{of}'; choose eps or x0.")
    s, h = spectrum.low, spectrum.high
    a, b = torch.broadcast_tensors(*(_finite(v).exp() for v in (log_snr_64, log_snr_32)))
    gain = _posterior_variance(s, _low_snr(a, b, representation)).square().sum(-1)  # Σ_low (s / D)²
    if _is_residual(representation):
        none = torch.zeros_like(gain)
        if of == "x0":
            fine, coarse = a * _posterior_variance(h, a).square().sum(-1), b / 16 * gain
        else:
            fine, coarse = ((1 + v * snr[..., None]).pow(-2).sum(-1) for v, snr in ((h, a), (s, b / 4)))
        norms = ((1 + a) * fine, none, none, (1 + b) * coarse)
    elif of == "x0":
        fine = gain + _posterior_variance(h, a).square().sum(-1)
        norms = (a * (1 + a) * fine, b * (1 + b) / 4 * gain, a * (1 + a) / 4 * gain, b * (1 + b) / 16 * gain)
    else:
        a_s, b_s = a[..., None], b[..., None]
        shrink = 1 + s * (a_s + b_s / 4)  # [..., m_L]
        fine = ((1 + s * b_s / 4) / shrink).square().sum(-1) + (1 + h * a_s).pow(-2).sum(-1)
        coarse = ((1 + s * a_s) / shrink).square().sum(-1)
        norms = ((1 + a) * fine, (1 + b) * a * b / 4 * gain, (1 + a) * a * b / 4 * gain, (1 + b) * coarse)
    return dict(zip(("HH", "HL", "LH", "LL"), norms, strict=True))


def jacobian_maps(
    spectrum: Spectrum, log_snr: LogSNR, of: str = "eps", representation: str = "overcomplete"
) -> dict[str, torch.Tensor]:
    """`jacobian` at every pair of grid lines, float64 `[n, n]` each, row: fine, column: coarse."""
    log_snr = _finite_grid(log_snr)
    rows = [jacobian(spectrum, line, log_snr, of, representation) for line in log_snr]
    return {block: torch.stack([row[block] for row in rows]) for block in rows[0]}


def exact_heatmap(
    spectrum: Spectrum,
    scheduler: DDIMScheduler,
    t_grid: Sequence[int] | np.ndarray,
    channels: int = 3,
    representation: str | None = None,  # None for that of the scheduler
) -> dict[str, object]:
    """The exact maps on a grid of timesteps `[n]`, falling, with the keys of `error_map.error_map` that paths need.

    Namely t_grid, snr_grid, log_snr_grid, jacobian, mse_64, mse_32, mse_64_low, num_pixels_*, num_dims_*. In the
    residual pair mse_64_low is zero, and num_dims_64 counts the details. Raises ValueError if the dimensions of the
    spectrum are no multiple of channels, or for zero SNR on the grid.
    """
    representation = representation or scheduler.representation.name
    dims = len(spectrum.low) + len(spectrum.high)
    if dims % (4 * channels):
        raise ValueError(f"{dims} modes are no images of {channels} channels and even sides.")
    t_grid = torch.as_tensor(np.array(t_grid))
    log_snr = scheduler.log_snr[t_grid]
    mse_64, mse_32 = mse_maps(spectrum, log_snr, representation)
    residual = _is_residual(representation)
    content = {"t_grid": t_grid, "log_snr_grid": log_snr, "snr_grid": scheduler.snr[t_grid]}
    content["jacobian"] = jacobian_maps(spectrum, log_snr, representation=representation)
    content |= {"mse_64": mse_64, "mse_32": mse_32}
    content["mse_64_low"] = torch.zeros_like(mse_32) if residual else 4 * mse_32
    content["representation"] = representation
    content |= {"num_dims_64": len(spectrum.high) if residual else dims, "num_dims_32": dims // 4}
    return content | {"num_pixels_64": dims // channels, "num_pixels_32": dims // channels // 4}


def ddim_output(spectrum: Spectrum, points: LogSNR, representation: str = "overcomplete") -> Law:
    """The exact law of the fine image that DDIM (η = 0, no clamping; arXiv 2010.02502) returns along points.

    points `[N + 1, 2]`, or `[N + 1]` for a model of the fine image alone. As in `sampler.sample`, both scales start
    from independent N(0, I) whatever the first point, and a scale whose λ does not move keeps its image. The result
    is the variance-preserving state at the last point: the image itself if that is clean. Every low mode is a linear
    map of two numbers, x_s' = √abar_s' x̂_s + √(1 - abar_s') ε̂_s, every detail mode of one. In the residual pair both
    are of one, and the result is r + upsampled c, each in variance-preserving scale (compare `Spectrum.noised`).
    Raises ValueError unless the points never fall and only the last is +inf, and for one clock in the residual pair.
    """
    residual = _is_residual(representation)
    points = _check_points(points, residual=residual)
    signal, noise = _amplitudes(points)  # [N + 1, 2]
    keep = noise[1:] / noise[:-1]  # Each step is x' = keep x + gain x̂.
    gain = signal[1:] - keep * signal[:-1]
    a, b = points[:-1].exp().unbind(1)  # [N]
    see = signal[:-1] / noise[:-1].square()  # l̂ = posterior variance · (see_64 x_64 + see_32 x_32 / 2)
    # How the result depends on x_64 and x_32, from the last step back to the start.
    fine, coarse, detail = torch.ones_like(spectrum.low), torch.zeros_like(spectrum.low), torch.ones_like(spectrum.high)
    if residual:
        fine, coarse = coarse, 2 * fine  # A low mode of the result is twice that of the coarse image.
    steps = zip(a, b, keep, gain, see, strict=True)
    for a_k, b_k, keep_k, gain_k, see_k in reversed(list(steps)):
        low = _posterior_variance(spectrum.low, _low_snr(a_k, b_k, representation))
        estimate = (fine * gain_k[0] + coarse * (gain_k[1] / 2)) * low
        fine = fine if residual else fine * keep_k[0] + estimate * see_k[0]
        coarse = coarse * keep_k[1] + estimate * (see_k[1] / 2)
        detail = detail * (keep_k[0] + gain_k[0] * see_k[0] * _posterior_variance(spectrum.high, a_k))
    return Law(fine.square() + coarse.square(), detail.square())


def ddim_output_single(spectrum: Spectrum, log_snr_points: LogSNR) -> Law:
    """`ddim_output` of the single-scale baseline, which sees the fine image only: log SNRs `[N + 1]`."""
    points = torch.as_tensor(log_snr_points, dtype=torch.float64)
    if points.ndim != 1:
        raise ValueError(f"The points of one scale must be log SNRs [N + 1] but have shape {list(points.shape)}.")
    return ddim_output(spectrum, points)


def frozen_drift_output(
    spectrum: Spectrum, points: LogSNR, start: str = "noise", representation: str = "overcomplete"
) -> Law:
    """The exact law of the final fine state of the sampler that freezes x̂ during each step.

    In y_s = √γ_s z_s = γ_s x_s + W(γ_s) (stochastic localisation) the step is y' = y + x̂ Δγ + √Δγ n. The first point
    is drawn from N(0, I) in variance-preserving scale (`start="noise"`) or from the true law (`start="truth"`).
    Returned is the variance-preserving state at the last point, which must be finite: compare it with
    `spectrum.noised(points[-1, 0])`, the truth at the same noise, not with `spectrum`. In the residual pair it is
    r + upsampled c, to be compared with `spectrum.noised(points[-1], "residual")`.
    Raises ValueError for bad points, a clean or infinitely noisy end of a scale that the result holds, another start.
    """
    residual = _is_residual(representation)
    points = _check_points(points, finite_end=True, residual=residual)
    if start not in ("noise", "truth"):
        raise ValueError(f"Unknown start '{start}'; choose noise or truth.")
    snr = points.exp()
    g = _low_snr(*snr.unbind(1), representation)
    if snr[-1, 0] == 0 or (residual and snr[-1, 1] == 0):
        held = "both images" if residual else "the fine image"
        raise ValueError(f"The last point must have a finite log SNR of {held}.")
    # A low mode l is known through y = y_64 and the sufficient statistic y_64 + y_32 / 2 = g l + W(g) alone, of which
    # the residual pair has no first term.
    (a, b), s, h = snr[0], spectrum.low, spectrum.high
    if start == "truth":
        y, cross, total = a**2 * s + a, a * g[0] * s + a, g[0] ** 2 * s + g[0]
        detail = a**2 * h + a
    else:
        y = cross = (a * (1 + a)).expand_as(s)
        total, detail = b * (1 + b) / 4 + (torch.zeros_like(y) if residual else y), (a * (1 + a)).expand_as(h)
    for k, step in enumerate(snr.diff(dim=0)):
        step_g = _low_snr(step[0], step[1], representation)
        pull = _posterior_variance(s, g[k])
        grow = 1 + pull * step_g
        y = y + 2 * pull * step[0] * cross + (pull * step[0]) ** 2 * total + step[0]
        cross = grow * (cross + pull * step[0] * total) + step[0]
        total = grow**2 * total + step_g
        detail = (1 + _posterior_variance(h, snr[k, 0]) * step[0]) ** 2 * detail + step[0]
    end, end_32 = snr[-1]
    low = 16 * total / (end_32 * (1 + end_32)) if residual else y / (end * (1 + end))
    return Law(low, detail / (end * (1 + end)))


def chain_kl(spectrum: Spectrum, points: LogSNR, representation: str = "overcomplete") -> torch.Tensor:
    """KL(true chain ‖ frozen-drift chain) in nats, of the noisy images at all points, from the true law at points[0].

    Σ_k ½ [tr(Δγ C) - log det(I + Δγ C)] with C the posterior covariance at point k, which for two views of a low mode
    has rank one: Δγ C has the single eigenvalue c Δg, g = γ_64 + γ_32 / 4 (γ_32 / 4 in the residual pair). It equals
    Σ_k ½ Σ_s mse_s(γ^k) Δγ_s minus the information gained. points `[N + 1, 2]` or `[N + 1]`. Raises ValueError for
    bad points, a clean end, where it is infinite, and one clock in the residual pair.
    """
    snr = _check_points(points, finite_end=True, residual=_is_residual(representation)).exp()
    a, g = snr[:, 0], _low_snr(*snr.unbind(1), representation)
    total = 0.0
    for s, seen in ((spectrum.low, g), (spectrum.high, a)):
        growth = _posterior_variance(s, seen[:-1]) * seen.diff()[:, None]  # [N, m]
        total = total + (growth - torch.log1p(growth)).sum() / 2
    return total


def start_kl(spectrum: Spectrum, point: LogSNR, representation: str = "overcomplete") -> torch.Tensor:
    """KL(true law ‖ N(0, I)) in nats of the variance-preserving noisy images at one point, `[2]` or a single λ.

    With `chain_kl` it bounds the KL of what the frozen-drift sampler returns when it starts from N(0, I).
    """
    point = torch.as_tensor(point, dtype=torch.float64)
    residual = _is_residual(representation)
    points = _check_points(point[None].expand(2, *point.shape), finite_end=True, residual=residual)
    alpha_64, alpha_32 = points[0].sigmoid()
    s, h = spectrum.low, spectrum.high
    # The determinant is written as 1 + something small, so that little noise in λ is not lost at high noise.
    extra_64, extra_32, extra_h = alpha_64 * (s - 1), alpha_32 * (s / 4 - 1), alpha_64 * (h - 1)
    determinant = extra_64 + extra_32 + extra_64 * extra_32 - alpha_64 * alpha_32 * s**2 / 4
    if residual:
        extra_64, determinant = torch.zeros_like(s), extra_32
    low = (extra_64 + extra_32 - torch.log1p(determinant)).sum()
    return (low + (extra_h - torch.log1p(extra_h)).sum()) / 2


def w2_squared(spectrum: Spectrum | Law, output: Law | Spectrum, by_band: bool = False) -> torch.Tensor | Pair:
    """Squared 2-Wasserstein distance of two laws of fine images, Σ (√s - √v)², in units of x²; (low, high) by band."""
    bands = tuple((s.sqrt() - v.sqrt()).square().sum() for s, v in _bands(spectrum, output))
    return bands if by_band else sum(bands)


def kl(spectrum: Spectrum | Law, output: Law | Spectrum, by_band: bool = False) -> torch.Tensor | Pair:
    """KL(spectrum ‖ output), truth first, of two laws of fine images in nats; (low, high) by band."""
    # s/v - 1 through log1p keeps its digits where the laws agree.
    ratios = ((s - v) / v for s, v in _bands(spectrum, output))
    bands = tuple((r - torch.log1p(r)).sum() / 2 for r in ratios)
    return bands if by_band else sum(bands)


# Functions of a spectrum, points and, if it is not "overcomplete", a representation.
OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "w2": lambda spectrum, *args: w2_squared(spectrum, ddim_output(spectrum, *args)),
    "kl": lambda spectrum, *args: kl(spectrum, ddim_output(spectrum, *args)),
    "chain_kl": chain_kl,
}


def optimal_points(
    spectrum: Spectrum,
    num_steps: int,
    objective: str,  # a key of OBJECTIVES
    start: float | tuple[float, float],  # log SNR of the first point, finite; one number: isotropic noise on the image
    end: float | tuple[float, float],  # of the last; +inf is clean
    diagonal: bool = False,
    single_scale: bool = False,
    initial: LogSNR | None = None,  # [N + 1, 2] or, for one clock, [N + 1]: one more path to start from
    representation: str = "overcomplete",
) -> tuple[torch.Tensor, float]:
    """The path of N = num_steps steps from start to end that minimises an objective, and its value.

    objective: "w2" (squared, of the DDIM output), "kl" (of the DDIM output) or "chain_kl" (frozen drift, finite end).
    Points lie anywhere, free of any grid, and never fall; a scale may stand still. diagonal: the noise is isotropic on
    the image, λ_32 = λ_64 + `image_lead` of the representation. single_scale: the baseline with the fine image alone.
    Returns points float64 `[N + 1, 2]` (`[N + 1]` for single_scale).

    L-BFGS-B over the non-negative increments of λ with exact gradients, from several spacings and, in two dimensions,
    from the diagonal optimum with the coarse scale level, ahead and behind; the best is polished. The value is never
    above that of any of them or of `initial`. It is a local optimum, the best found: the problem is not convex.
    Warns (RuntimeWarning) if the projected gradient of log(value) has not fallen below `GRADIENT_TOLERANCE`.
    Raises ValueError for an unknown objective, num_steps < 1, ends that are not in order or not finite where they
    must be, or not on the diagonal for a diagonal, single_scale in the residual pair, and an `initial` of another
    shape, order or end.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective '{objective}'; choose one of {', '.join(OBJECTIVES)}.")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps} but must be at least 1.")
    if diagonal and single_scale:
        raise ValueError("A single scale has no diagonal; choose diagonal or single_scale.")
    if _is_residual(representation) and single_scale:
        raise ValueError("A single scale is no residual pair; choose one of them, or the diagonal, which is the same.")
    image_lead = REPRESENTATIONS[representation].image_lead
    start, end = _axis_values(start, image_lead), _axis_values(end, image_lead)
    if not all(math.isfinite(s) and s <= e for s, e in zip(start, end, strict=True)):
        raise ValueError(f"start {start} must be finite and not above end {end}.")
    if objective == "chain_kl" and math.inf in end:
        raise ValueError("chain_kl is infinite for a clean end; give end a finite log SNR.")
    one_clock = diagonal or single_scale
    on_diagonal = start[0] + image_lead == start[1] and end[0] + image_lead == end[1]
    if one_clock and not on_diagonal:
        raise ValueError(
            f"One clock needs equal ends in both scales, log 4 apart in the residual pair; got {start} and {end}."
        )
    axes = [_Axis(s, e, num_steps) for s, e in zip(start, end, strict=True)][: 1 if one_clock else 2]

    def assemble(increments: torch.Tensor) -> torch.Tensor:
        columns = [axis.points(part) for axis, part in zip(axes, increments.split([a.size for a in axes]), strict=True)]
        if single_scale:
            return columns[0]
        return _on_diagonal(columns[0], image_lead) if diagonal else torch.stack(columns, dim=1)

    def value_of(points: torch.Tensor) -> torch.Tensor:
        return OBJECTIVES[objective](spectrum, points, representation)

    def log_value(increments: np.ndarray) -> tuple[float, np.ndarray]:
        parts = np.split(increments, np.cumsum([a.size for a in axes])[:-1])
        if any(not (a.clean or part.any()) for a, part in zip(axes, parts, strict=True)):
            # A step so long that bounds clip it to zero leaves no ratio of increments: the line search must go back.
            return above_all, np.zeros_like(increments)
        theta = torch.tensor(increments, requires_grad=True)
        value = value_of(assemble(theta)).log()
        return value.item(), torch.autograd.grad(value, theta)[0].numpy()

    if one_clock or not on_diagonal:
        # With a clean end, the last step starts where most or where all modes are resolved.
        tops = [-math.log(float(torch.cat([spectrum.low, spectrum.high]).quantile(q))) for q in (0.5, 0.0)]
        tops = tops if math.inf in end else tops[:1]
        powers = (0.8, 1.2)
        starts = [[axis.spaced(power, top) for axis in axes] for top, power in itertools.product(tops, powers)]
    else:
        with warnings.catch_warnings(action="ignore"):  # A mere start need not be converged.
            level = optimal_points(
                spectrum, num_steps, objective, start, end, diagonal=True, representation=representation
            )[0]
        starts = []
        for lead in (0.0, 1.0, -1.0):
            coarse = level[:, 1]
            shifted = torch.cat([coarse[:1], (coarse[1:-1] + lead).clamp(start[1], end[1]), coarse[-1:]])
            starts.append([axes[0].increments(level[:, 0]), axes[1].increments(shifted)])
    if initial is not None:
        starts.append(_initial_increments(initial, axes, start, end, num_steps, single_scale, image_lead))
    starts = [np.concatenate(increments) for increments in starts]
    if len(starts[0]) == 0:
        points = assemble(torch.zeros(0, dtype=torch.float64))
        return points, value_of(points).item()

    above_all = max(log_value(increments)[0] for increments in starts) + 1

    def descend(increments: np.ndarray, max_iterations: int) -> OptimizeResult:
        # ftol 0: the value is stationary to second order, so its change says little about the gradient.
        options = dict(maxiter=max_iterations, maxfun=2 * max_iterations, maxcor=20, ftol=0.0, gtol=GRADIENT_TOLERANCE)
        bounds = [(0, None)] * len(increments)
        return minimize(log_value, increments, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    tried = [descend(increments, 12) for increments in starts]
    result = min(tried, key=lambda r: r.fun)
    for _ in range(3):  # A new start forgets an estimate of the curvature that led nowhere.
        result = min(result, descend(result.x, 1000), key=lambda r: r.fun)
        gradient = log_value(result.x)[1]
        gradient = float(np.abs(np.where((result.x <= 0) & (gradient > 0), 0, gradient)).max())
        if gradient <= GRADIENT_TOLERANCE:
            break
    if not gradient <= GRADIENT_TOLERANCE:
        warnings.warn(
            f"The {objective} optimum with {num_steps} steps is not converged (relative gradient {gradient:.1e} per "
            f"unit of log SNR; {result.message}); pass its points as initial to go on.",
            RuntimeWarning,
            stacklevel=2,
        )
    points = assemble(torch.from_numpy(result.x))
    return points, value_of(points).item()


class _Axis:
    """One clock of a path as non-negative increments of λ: free if the end is clean, else scaled to reach it."""

    def __init__(self, start: float, end: float, num_steps: int):
        self.start, self.end, self.num_steps = start, end, num_steps
        self.clean = math.isinf(end)
        self.size = num_steps - self.clean

    def points(self, increments: torch.Tensor) -> torch.Tensor:
        moved = torch.cat([increments.new_zeros(1), increments.cumsum(0)])
        last = moved.new_tensor([self.end])
        if self.clean:
            return torch.cat([self.start + moved, last])
        inner = self.start + (self.end - self.start) * moved[:-1] / moved[-1]
        # Rounding may pass the end; a clamp would also cut the gradient there.
        return torch.cat([inner - (inner - self.end).clamp(min=0).detach(), last])

    def increments(self, column: torch.Tensor) -> np.ndarray:
        increments = column[: self.size + 1].diff().numpy()
        return increments if self.start < self.end else np.ones_like(increments)

    def spaced(self, power: float, top: float) -> np.ndarray:
        top = max(top, self.start + 1) if self.clean else self.end
        fraction = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        return self.increments(self.start + (top - self.start) * fraction**power)


def _initial_increments(
    initial: LogSNR,
    axes: list[_Axis],
    start: tuple,
    end: tuple,
    num_steps: int,
    single_scale: bool,
    image_lead: float,
) -> list[np.ndarray]:
    columns = torch.as_tensor(initial, dtype=torch.float64).detach()
    if columns.ndim == 1 and len(axes) == 1:
        columns = _on_diagonal(columns, image_lead)
    if columns.shape != (num_steps + 1, 2):
        raise ValueError(f"initial has shape {list(columns.shape)} but must be {num_steps + 1} points.")
    columns = _check_points(columns)
    used = slice(0, 1) if single_scale else slice(0, 2)
    if not np.allclose(columns[0, used], start[used]) or not np.allclose(columns[-1, used], end[used]):
        raise ValueError(f"initial must go from {start} to {end}.")
    if len(axes) == 1 and not single_scale and not torch.equal(columns, _on_diagonal(columns[:, 0], image_lead)):
        raise ValueError(
            "initial must have equal log SNRs in both scales for a diagonal, log 4 apart in the residual pair."
        )
    return [axis.increments(columns[:, k]) for k, axis in enumerate(axes)]


def _axis_values(value: float | Sequence[float], image_lead: float) -> tuple[float, float]:
    values = torch.as_tensor(value, dtype=torch.float64)
    values = _on_diagonal(values, image_lead) if values.ndim == 0 else values.expand(2)
    return values[0].item(), values[1].item()


def _on_diagonal(log_snr_64: torch.Tensor, image_lead: float) -> torch.Tensor:
    return torch.stack([log_snr_64, log_snr_64 + image_lead], dim=-1)  # [..., 2]


def _is_residual(representation: str) -> bool:
    if representation not in REPRESENTATIONS:
        raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
    return representation == "residual"


def _low_snr(a: torch.Tensor, b: torch.Tensor, representation: str) -> torch.Tensor:
    # The SNR g of a low mode, broadcast over both.
    return (torch.zeros_like(a) if _is_residual(representation) else a) + b / 4


def _check_points(points: LogSNR, finite_end: bool = False, residual: bool = False) -> torch.Tensor:
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim == 1 and residual:
        raise ValueError("points of the residual pair must be [N + 1, 2]; its coarse scale needs a clock too.")
    if points.ndim == 1:
        points = torch.stack([points, torch.full_like(points, -math.inf)], dim=1)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise ValueError(f"points have shape {list(points.shape)} but must be [N + 1, 2], or [N + 1] for one clock.")
    if not (points[1:] >= points[:-1]).all():
        raise ValueError("points must be log SNRs that never fall, from noise to clean.")
    if torch.isposinf(points[:-1]).any():
        raise ValueError("Only the last point may be clean (+inf).")
    if finite_end and torch.isposinf(points[-1]).any():
        raise ValueError("The last point must have a finite log SNR here, not be clean (+inf).")
    return points


def _check_images(images: torch.Tensor) -> None:
    shape = list(images.shape)
    if images.ndim != 4 or not images.is_floating_point() or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"Images must be float [B, C, H, W] of even height and width; got {images.dtype} {shape}.")


def _finite(log_snr: LogSNR) -> torch.Tensor:
    log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
    if not log_snr.isfinite().all():
        raise ValueError("The log SNRs of a map must be finite numbers.")
    return log_snr


def _finite_grid(log_snr: LogSNR) -> torch.Tensor:
    log_snr = _finite(log_snr)
    if log_snr.ndim != 1:
        raise ValueError(f"The log SNRs of a map must be the lines of a grid [n], but are {list(log_snr.shape)}.")
    return log_snr


def _snr(log_snr: LogSNR) -> torch.Tensor:
    return torch.as_tensor(log_snr, dtype=torch.float64).exp()


def _amplitudes(log_snr: torch.Tensor) -> Pair:
    # √abar and √(1 - abar), with full relative accuracy and finite gradients up to both infinities.
    return (F.logsigmoid(log_snr) / 2).exp(), (F.logsigmoid(-log_snr) / 2).exp()


def _posterior_variance(variances: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    return variances / (1 + variances * snr[..., None])  # [..., m]


def _bands(spectrum: Spectrum | Law, output: Law | Spectrum) -> tuple[Pair, Pair]:
    return (spectrum.low, output.low), (spectrum.high, output.high)


def _log_likelihood(x: torch.Tensor, images: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    # -½‖x - √abar y‖² / (1 - abar) without ‖x‖², which all images y share.
    signal, noise = (a.flatten(1) for a in _amplitudes(log_snr))  # [S, 1]
    overlap = x.flatten(1) @ images.flatten(1).T  # [S, M]
    return (signal * overlap - signal.square() * images.flatten(1).square().sum(1) / 2) / noise.square()


def _haar_folding(resolution: int) -> Pair:
    # Squared gains from the DCT-II frequencies of a line to those of its low band (DCT-II) and detail band (DST-II).
    half = resolution // 2
    smooth, detail = torch.zeros(2, half, resolution, dtype=torch.float64)
    for i in range(half):
        smooth[i, i] += math.cos(math.pi * i / (2 * resolution)) ** 2
        if i > 0:
            smooth[i, resolution - i] += math.sin(math.pi * i / (2 * resolution)) ** 2
        detail[i, i + 1] += math.sin(math.pi * (i + 1) / (2 * resolution)) ** 2
        detail[i, resolution - i - 1] += math.cos(math.pi * (i + 1) / (2 * resolution)) ** 2
    return smooth, detail


def _dct(size: int) -> torch.Tensor:
    # Orthonormal DCT-II, rows are frequencies.
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * index[:, None] * (index + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _haar(like: torch.Tensor) -> torch.Tensor:
    # Rows are bands, columns the pixels of a 2x2 block; symmetric, and so its own inverse.
    return like.new_tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def _rotate_and_dct(x: torch.Tensor, rotation: torch.Tensor, dct_h: torch.Tensor, dct_w: torch.Tensor) -> torch.Tensor:
    return dct_h @ torch.einsum("cd,...dhw->...chw", rotation, x) @ dct_w.T  # [..., C, H/2, W/2]


def _to_modes(x: torch.Tensor, *basis: torch.Tensor) -> torch.Tensor:
    blocks = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))  # [B, C, 4, H/2, W/2]
    return _rotate_and_dct(torch.einsum("kp,bcphw->bkchw", _haar(x), blocks), *basis)  # [B, 4, C, H/2, W/2]


def _from_modes(modes: torch.Tensor, rotation: torch.Tensor, dct_h: torch.Tensor, dct_w: torch.Tensor) -> torch.Tensor:
    bands = _rotate_and_dct(modes, rotation.T, dct_h.T, dct_w.T)  # [B, 4, C, H/2, W/2]
    blocks = torch.einsum("pk,bkchw->bcphw", _haar(modes), bands)  # [B, C, 4, H/2, W/2]
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)  # [B, C, H, W]
