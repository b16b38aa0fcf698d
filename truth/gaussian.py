"""Gaussian images: the spectrum of their modes, and their optimal denoiser, its errors and Jacobians in closed form.

The fine image splits into orthonormal Haar bands: low modes l (the coarse image is their half, x_32 = l/2) and
detail modes h. Every mode is an independent Gaussian of known variance s. With γ = SNR = exp(λ), a = γ_64 and
b = γ_32, the noisy images z = √γ x + n see a low mode at SNR g = a + b/4 and a detail mode at SNR a, so that its
posterior variance is s / (1 + s g) or s / (1 + s a). Denoising errors, Jacobians and the information in z follow
exactly, and in `linear_sampler` what a sampler returns along any path.

That is the over-complete pair (x_64, x_32), `representation="overcomplete"`. The "residual" pair is (r, c) with the
coarse image c = x_32 = l/2 and the fine one r = x_64 - upsampled c, which holds the details alone: every 2x2 block of
it sums to zero, and so does its noise. "64" and a mean r there, "32" and b mean c; a low mode is seen at SNR g = b/4.
Isotropic noise of SNR γ on x_64 is (a, b) = (γ, 4γ): the diagonal of the image is λ_32 = λ_64 + log 4.

Variances are in units of x², information in nats. All of it is differentiable in λ.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from images.modes import ModeBasis, band_to_modes, dct_matrix, from_modes, to_modes
from runtime.errors import need_file
from runtime.safe_write import replacing
from scheduler import DDIMScheduler
from truth.posterior_mean import Pair, PosteriorMean, check_images, is_residual, signal_and_noise

LogSNR = torch.Tensor | np.ndarray | Sequence | float

# Variance of rounding to 8 bits, for images in [-1, 1]: no estimated variance is taken below it.
QUANTISATION_VARIANCE = (2 / 255) ** 2 / 12


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
        check_images(images)
        if len(images) < 2:
            raise ValueError("Variances need at least 2 images.")
        batches = images.split(batch_size)
        mean = sum(x.double().sum(0) for x in batches) / len(images)  # [C, H, W]
        basis = ModeBasis.of_images(batches, mean)
        square = sum(to_modes(x.double() - mean, basis).square().sum(0) for x in batches)  # [4, C, h, w]
        variances = (square / (len(images) - 1)).clamp(min=QUANTISATION_VARIANCE)
        low, high = variances[0], variances[1:]
        return cls(low.flatten(), high.flatten()), ImageVariances(low, high, basis.rotation, mean)

    @classmethod
    def load(cls, file: str | os.PathLike) -> "Spectrum":
        """Read an `.npz` with `sL` `[m_L]` and `sH` `[m_H]`, as `save` writes it.

        Raises FileNotFoundError if it is missing, and ValueError if it is damaged, lacks an array, or holds variances
        that are not positive and finite.
        """
        file = need_file(file, "Spectrum", "write one with Spectrum.save")
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
        if is_residual(representation):
            if log_snr.shape != (2,):
                raise ValueError(f"The residual pair has a log SNR per scale [2], but got {list(log_snr.shape)}.")
            return Law(signal[1] * self.low + 4 * noise[1], signal[0] * self.high + noise[0])
        return Law(signal * self.low + noise, signal * self.high + noise)


class GaussianDenoiser(PosteriorMean):
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
        buffers = dict(
            variances=variances, rotation=rotation, mean=mean, dct_h=dct_matrix(h).to(eye), dct_w=dct_matrix(w).to(eye)
        )
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def _basis(self) -> ModeBasis:
        return ModeBasis(self.rotation, self.dct_h, self.dct_w)

    def spectrum(self) -> Spectrum:
        """The variances as a `Spectrum`; raises ValueError if some are zero."""
        return Spectrum(self.variances[0].flatten(), self.variances[1:].flatten())

    def posterior_mean(self, xs: Pair, log_snrs: Pair) -> torch.Tensor:
        """E[x_64 | both noisy images], `[S, C, H, W]`; log SNRs `[S, 1, 1, 1]`, below +inf."""
        means = self.representation.split(self.mean[None])
        amplitudes = map(signal_and_noise, log_snrs)
        zs = [(x - signal * m) / noise for x, m, (signal, noise) in zip(xs, means, amplitudes, strict=True)]
        z_64 = to_modes(zs[0], self._basis())  # [S, 4, C, H/2, W/2]
        # The coarse image is half a low band, to which the rest of the transform applies.
        z_32 = band_to_modes(zs[1], self._basis())  # [S, C, H/2, W/2]
        a, b = (log_snr.exp()[..., None] for log_snr in log_snrs)  # [S, 1, 1, 1, 1]
        is_low = torch.zeros(4, 1, 1, 1).to(z_64)
        is_low[0] = 1
        a = a * (1 - is_low) if self._is_residual else a  # [S, 4, 1, 1, 1] or [S, 1, 1, 1, 1]
        gain = self.variances / (1 + self.variances * (a + is_low * b / 4))  # [S, 4, C, H/2, W/2]
        modes = gain * (a.sqrt() * z_64 + is_low * (b.sqrt() / 2) * z_32[:, None])
        return self.mean + from_modes(modes, self._basis())

    def draw(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """`count` images from the model, `[count, C, H, W]`, in the dtype and on the device of the buffers."""
        shape = (count, *self.variances.shape)
        device = self.variances.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, dtype=self.variances.dtype, device=device)
        return self.mean + from_modes(noise.to(self.variances.device) * self.variances.sqrt(), self._basis())


def mse(spectrum: Spectrum, log_snr_64: LogSNR, log_snr_32: LogSNR, representation: str = "overcomplete") -> Pair:
    """Denoising errors E‖x_s - x̂_s‖² of both scales, totals over all modes in units of x²; log SNRs broadcast.

    mse_64 = Σ_low s / (1 + s (a + b/4)) + Σ_high s / (1 + s a) and mse_32 = ¼ Σ_low s / (1 + s (a + b/4)). For the
    residual pair mse_64 = Σ_high s / (1 + s a) and mse_32 = ¼ Σ_low s / (1 + s b/4).
    """
    a, b = _snr(log_snr_64), _snr(log_snr_32)
    low = posterior_variance(spectrum.low, low_snr(a, b, representation)).sum(-1)
    high = posterior_variance(spectrum.high, a).sum(-1)
    return (torch.zeros_like(low) if is_residual(representation) else low) + high, low / 4


def information(
    spectrum: Spectrum, log_snr_64: LogSNR, log_snr_32: LogSNR, representation: str = "overcomplete"
) -> torch.Tensor:
    """Mutual information I(x; z_64, z_32) in nats; log SNRs broadcast.

    ½ Σ_low log(1 + s g) + ½ Σ_high log(1 + s a); its derivative in γ_s is ½ mse_s (I-MMSE, cs/0412108).
    """
    a, b = _snr(log_snr_64), _snr(log_snr_32)
    low = torch.log1p(spectrum.low * low_snr(a, b, representation)[..., None]).sum(-1)
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
    gain = posterior_variance(s, low_snr(a, b, representation)).square().sum(-1)  # Σ_low (s / D)²
    if is_residual(representation):
        none = torch.zeros_like(gain)
        if of == "x0":
            fine, coarse = a * posterior_variance(h, a).square().sum(-1), b / 16 * gain
        else:
            fine, coarse = ((1 + v * snr[..., None]).pow(-2).sum(-1) for v, snr in ((h, a), (s, b / 4)))
        norms = ((1 + a) * fine, none, none, (1 + b) * coarse)
    elif of == "x0":
        fine = gain + posterior_variance(h, a).square().sum(-1)
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
    """The exact maps on a grid of timesteps `[n]`, falling, with the keys that paths need.

    Namely, as `planning.error_map.error_map` returns them, t_grid, snr_grid, log_snr_grid, jacobian, mse_64, mse_32,
    mse_64_low, num_pixels_*, num_dims_*. In the residual pair mse_64_low is zero, and num_dims_64 counts the details.
    Raises ValueError if the dimensions of the spectrum are no multiple of channels, or for zero SNR on the grid.
    """
    representation = representation or scheduler.representation.name
    dims = len(spectrum.low) + len(spectrum.high)
    if dims % (4 * channels):
        raise ValueError(f"{dims} modes are no images of {channels} channels and even sides.")
    t_grid = torch.as_tensor(np.array(t_grid))
    log_snr = scheduler.log_snr[t_grid]
    mse_64, mse_32 = mse_maps(spectrum, log_snr, representation)
    residual = is_residual(representation)
    content = {"t_grid": t_grid, "log_snr_grid": log_snr, "snr_grid": scheduler.snr[t_grid]}
    content["jacobian"] = jacobian_maps(spectrum, log_snr, representation=representation)
    content |= {"mse_64": mse_64, "mse_32": mse_32}
    content["mse_64_low"] = torch.zeros_like(mse_32) if residual else 4 * mse_32
    content["representation"] = representation
    content |= {"num_dims_64": len(spectrum.high) if residual else dims, "num_dims_32": dims // 4}
    return content | {"num_pixels_64": dims // channels, "num_pixels_32": dims // channels // 4}


def low_snr(a: torch.Tensor, b: torch.Tensor, representation: str) -> torch.Tensor:
    """The SNR g at which noisy images of SNR a = γ_64 and b = γ_32, which broadcast, show a low mode."""
    return (torch.zeros_like(a) if is_residual(representation) else a) + b / 4


def posterior_variance(variances: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Variance s / (1 + s snr) of each of the modes `[m]` when it is seen at an SNR `[...]`; `[..., m]`."""
    return variances / (1 + variances * snr[..., None])  # [..., m]


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
