"""Super-resolution: the coarse image is given, and the fine one denoised beside it.

The path goes along one axis of the plane of timesteps, from (S, s_0) to (0, s_0), by a model with two clocks, which was
trained for nothing of the sort, or by a stage of a cascade, which was trained for that alone (arXiv 2106.15282). At
s_0 = 0 the coarse image is given clean. What the network knows of it at t_32 = 0 is all it needs: it has met noise of
standard deviation sqrt(1 - abar(0)) = 0.01 there, and gets the image without any, as published. At s_0 > 0 noise of
that timestep is added to it, and told (conditioning augmentation): it hides what another model made wrong, and at the
last timestep the image itself. `make_consistent` corrects a result so that its 2x2 mean is a clean input.

Pixels are uint8 as a PNG holds them, coarse ones too, so that every method sees the same input.
"""

import functools
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import data
from data import fingerprint_array, to_float, to_uint8
from diffusion.sampler import IMAGES_PER_SEED, Denoiser, SeededNoise, check_finite, image_seeds, sample
from diffusion.step import Solver
from images.representation import upsample_nearest
from paths.path import Path
from scheduler import DDIMScheduler

# Half-pixel centres, as of the 2x2 mean; bicubic with a = -1/2 (Keys 1981), Lanczos with three lobes.
UPSAMPLERS = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Those of Wang et al. 2004; this sigma makes the window 11x11.
SSIM_SETTINGS = {"gaussian_kernel": True, "sigma": 1.5, "k1": 0.01, "k2": 0.03}
SSIM_WINDOW = 11
# The smallest image that leaves AlexNet something to look at in its last layers.
LPIPS_SMALLEST = 32
QUALITY_BATCH = 256
LEVEL_NOISE = 1  # Beside the seed of an image: the noise that its coarse image is given with.


class Upscaled(NamedTuple):
    """A batch of `super_resolve`."""

    images: torch.Tensor  # float32 [B, C, 2H, 2W], in [-1, 1] if the schedule clamps
    nfe: int  # network calls each took


class Quality(NamedTuple):
    """How near images are to their originals, float64 `[N]` each: PSNR in dB (inf where equal), SSIM up to 1."""

    psnr: torch.Tensor
    ssim: torch.Tensor

    @property
    def columns(self) -> dict[str, float]:
        """Means and standard deviations over the images, as columns of a table; of one image the latter are 0."""
        correction = len(self.psnr) > 1
        return {
            "psnr": round(self.psnr.mean().item(), 4),
            "psnr_sd": round(self.psnr.std(correction=correction).item(), 4),
            "ssim": round(self.ssim.mean().item(), 6),
            "ssim_sd": round(self.ssim.std(correction=correction).item(), 6),
        }


def super_resolution_path(base: Path, level: int = 0) -> Path:
    """The path of two scales on which the fine one goes along `base`, and the coarse one rests at a timestep.

    Its last point is clean in both, as that of every path. Raises ValueError if base has more than one scale, and for a
    negative level.
    """
    if base.num_scales != 1:
        raise ValueError(f"a path of super-resolution moves one scale, but this one has {base.num_scales}")
    points = (*((t, level) for (t,) in base.points[:-1]), (0, 0))
    return Path(points, "super_resolution", {"base": base.provenance} | ({"level": level} if level else {}))


def noise_seeds(coarse_pixels: torch.Tensor, seed: int) -> list[int]:
    """The seed of the noise of each coarse image, uint8 `[N, C, H, W]`: one of `image_seeds(seed)`, by its pixels.

    An image thus comes out the same under any name, in any order and in any company.
    """
    seeds = image_seeds(seed, IMAGES_PER_SEED)
    return [seeds[int(fingerprint_array(image), 16) % len(seeds)] for image in coarse_pixels.numpy()]


def super_resolve(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,  # of two scales, of which the coarse one rests
    coarse: torch.Tensor,  # [N, C, H, W] in [-1, 1]
    seeds: Sequence[int | tuple[int, ...]],  # of the noise of each image
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    eta: float = 0.0,
    solver: Solver | None = None,  # None: DDIM with eta
    labels: Sequence[int] | None = None,  # the class of each image, for a denoiser that takes one
    names: Sequence[object] | None = None,  # what messages call each image; None: its place
) -> Iterator[Upscaled]:
    """Fine images of twice the size, batch by batch, from noise and the coarse images, which rest at a noise level.

    That is the coarse timestep of the path: every call sees the coarse images with the same noise of that level, at
    timestep 0 as given. Image k depends on its coarse image and `seeds[k]` alone, and the noise of its start not on the
    level. Raises ValueError if the coarse scale moves on the path before its end, if an image comes out NaN or
    infinite, and what `sample` raises.
    """
    shape = (coarse.shape[1], *(2 * side for side in coarse.shape[2:]))
    for start in range(0, len(coarse), batch_size):
        chosen = slice(start, start + batch_size)
        given = coarse[chosen].to(device)
        draw = functools.partial(SeededNoise(seeds[chosen]).draw, device=device)
        level_noise = torch.zeros_like(given)
        if path.points[0][-1] > 0:
            own = [(*(seed if isinstance(seed, tuple) else (seed,)), LEVEL_NOISE) for seed in seeds[chosen]]
            level_noise = SeededNoise(own).draw(given.shape[1:], device)
        told = None if labels is None else torch.tensor(labels[chosen], device=device)
        noise = draw(shape), level_noise
        (fine, _), nfe = sample(
            denoise, scheduler, path, noise, eta, draw=draw, solver=solver, labels=told, given=given
        )
        check_finite(fine, range(start, start + len(fine)) if names is None else names[chosen])
        yield Upscaled(fine, nfe)


def make_consistent(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """The image nearest to `fine` `[B, C, 2H, 2W]` whose 2x2 mean is `coarse` `[B, C, H, W]`.

    With A the 2x2 mean, AAᵀ = I/4, so that the orthogonal projection x + A⁺(y - A x) (arXiv 2212.00490, section 3.1)
    adds the same value to four pixels. It never takes an image farther from an original whose 2x2 mean is y. The mean
    holds to the rounding of floats; values may leave [-1, 1], and `to_uint8` moves a mean by half a grey level at
    most where they do not and by more where they are clipped (`mean_deviation` tells).
    """
    return fine + upsample_nearest(coarse - data.coarse(fine))


def mean_deviation(pixels: torch.Tensor, coarse_pixels: torch.Tensor) -> torch.Tensor:
    """Per image, how far its 2x2 mean is from the input at most, in grey levels; both uint8, returns float64 `[N]`."""
    deviation = data.coarse(pixels.double()) - coarse_pixels
    return deviation.abs().flatten(1).amax(1)


def upsample(coarse_pixels: torch.Tensor, method: str) -> torch.Tensor:
    """uint8 `[N, C, H, W]` to `[N, C, 2H, 2W]` by one of UPSAMPLERS, as Pillow resizes a picture."""
    height, width = coarse_pixels.shape[2:]
    enlarged = []
    for pixels in coarse_pixels.permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        enlarged.append(np.asarray(picture.resize((2 * width, 2 * height), UPSAMPLERS[method])))
    return torch.from_numpy(np.stack(enlarged)).view(len(enlarged), 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def upscale_all(coarse_pixels: torch.Tensor, lift: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each method makes of uint8 `[N, C, H, W]`: name -> uint8 `[N, C, 2H, 2W]`.

    lift: the fine images of `super_resolve` for them. "X consistent" is X after `make_consistent`.
    """
    results = {name: upsample(coarse_pixels, name) for name in UPSAMPLERS} | {"lift": to_uint8(lift)}
    given = to_float(coarse_pixels)
    consistent = {name: make_consistent(to_float(results[name]), given) for name in ("bicubic", "lanczos")}
    consistent["lift"] = make_consistent(lift, given)
    return results | {f"{name} consistent": to_uint8(images) for name, images in consistent.items()}


def image_quality(pixels: torch.Tensor, originals: torch.Tensor) -> Quality:
    """PSNR and SSIM of uint8 `[N, C, H, W]` against originals of the same shape, by torchmetrics, data range 255.

    PSNR is 10 log10(255² / MSE) over all values of an image. SSIM is that of Wang et al. 2004: Gaussian windows of
    11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, the mean over channels and over the places where a window lies within
    the image. Raises ValueError for unequal shapes and images under 11 pixels a side, and RuntimeError if torchmetrics
    is missing.
    """
    if pixels.shape != originals.shape or min(pixels.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"Images of shape {list(pixels.shape)} cannot be compared with originals of {list(originals.shape)}; pass "
            f"equal shapes of {SSIM_WINDOW} pixels a side or more."
        )
    metrics = _torchmetrics("functional.image")
    parts = []
    for pair in zip(pixels.split(QUALITY_BATCH), originals.split(QUALITY_BATCH), strict=True):
        # Variances of grey levels are differences of large numbers.
        pair = tuple(batch.double() for batch in pair)
        psnr = metrics.peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3))
        _, ssim = metrics.structural_similarity_index_measure(
            *pair, data_range=255.0, return_full_image=True, **SSIM_SETTINGS
        )  # [B, C, H, W]
        # Its own mean counts padded windows at the border in some versions and leaves them out in others.
        edge = SSIM_WINDOW // 2
        parts.append((psnr, ssim[..., edge:-edge, edge:-edge].flatten(1).mean(1)))
    return Quality(*map(torch.cat, zip(*parts, strict=True)))


def lpips_missing(resolution: int) -> str:
    """Why LPIPS cannot be computed of images of this size, or an empty text; it never downloads anything."""
    from torchvision.models import AlexNet_Weights

    file = FilePath(torch.hub.get_dir()) / "checkpoints" / FilePath(AlexNet_Weights.IMAGENET1K_V1.url).name
    if not file.exists():
        return f"it needs the ImageNet weights of AlexNet of torchvision; put them at {file}"
    return f"it needs images of {LPIPS_SMALLEST} pixels a side or more" if resolution < LPIPS_SMALLEST else ""


def lpips_distance(pixels: torch.Tensor, originals: torch.Tensor) -> float:
    """Mean LPIPS (arXiv 1801.03924, AlexNet) of uint8 `[N, C, H, W]` to originals; first see `lpips_missing`."""
    metric = _torchmetrics("image.lpip").LearnedPerceptualImagePatchSimilarity(net_type="alex")
    for pair in zip(pixels.split(QUALITY_BATCH), originals.split(QUALITY_BATCH), strict=True):
        metric.update(*(to_float(batch).expand(-1, 3, -1, -1) for batch in pair))
    return metric.compute().item()


def _torchmetrics(module: str) -> Any:
    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except ImportError as error:
        raise RuntimeError("PSNR and SSIM need the package torchmetrics: run `pip install torchmetrics`.") from error
