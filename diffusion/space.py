"""Where a diffusion takes place: in the pixels of images, or in the latents of an autoencoder (arXiv 2112.10752).

A space turns the images of a data set into what a network learns, and what it makes back into bytes. Everything between
the two, which is all of training and sampling, does not ask which space it is in; everything that compares images does
so in bytes.

Shapes: N images, C_i channels and R x R pixels of an image, c channels and r x r values of a latent.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from data import ImageSet, to_float, to_uint8, write_array
from networks.autoencoder import Autoencoder, is_local, load_autoencoder
from runtime.progress import Progress

CALL_IMAGES = 8  # In one call of an autoencoder; decoding 256x256 pixels takes about half a GiB for each.


def side_of(config: Mapping[str, Any]) -> int:
    """The side of what the network of a config sees as the fine image: pixels, or values of a latent."""
    return config["resolution"] // (config.get("latents_downscale") or 1)


def image_channels_of(config: Mapping[str, Any]) -> int:
    """The channels of the images of a config, 1 or 3, whatever its network sees."""
    return config.get("image_channels") or config["channels"]


class PixelSpace:
    """The images themselves, in [-1, 1]."""

    def clean(
        self, images: ImageSet, rows: np.ndarray, seed: int, cache_dir: str | os.PathLike, device: torch.device
    ) -> torch.Tensor:
        """Some images as a network learns them, float32 `[B, C_i, R, R]`; seed and cache_dir are not needed."""
        return to_float(torch.from_numpy(images.pixels[rows])).to(device)

    def pixels(self, made: torch.Tensor) -> torch.Tensor:
        """What a network made, `[B, C_i, R, R]`, as uint8 on the same device, clamped."""
        return to_uint8(made)


class LatentSpace:
    """The latents of an autoencoder, shifted and scaled as it says, and nowhere clamped.

    image_channels: 1 for grey images, 3 for RGB. Raises ValueError for colour images and an autoencoder of grey ones.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        image_channels: int,
        device: torch.device | str = "cpu",
        scaling: float | None = None,  # those of the autoencoder
        shift: float | None = None,
    ):
        if image_channels > autoencoder.image_channels:
            raise ValueError(
                f"The autoencoder '{autoencoder.name}' is one of grey images, and these have {image_channels} channels."
            )
        self.autoencoder, self.image_channels, self.device = autoencoder.to(device), image_channels, device
        self.scaling = autoencoder.scaling if scaling is None else scaling
        self.shift = autoencoder.shift if shift is None else shift

    def said(self) -> dict[str, Any]:
        """What a config says of it, beside the name."""
        autoencoder = self.autoencoder
        return {
            "channels": autoencoder.channels,
            "image_channels": self.image_channels,
            "latents_is_here": is_local(autoencoder.name),
            "latents_fingerprint": autoencoder.fingerprint,
            "latents_scaling": self.scaling,
            "latents_shift": self.shift,
            "latents_downscale": autoencoder.downscale,
        }

    def posteriors(self, images: ImageSet, cache_dir: str | os.PathLike, mirrored: bool = False) -> np.ndarray:
        """Mean and standard deviation of the latents of all images, not scaled: float32 `[N, 2, c, r, r]`, mapped.

        Encoded once, in fp32, and kept in the cache by the fingerprints of pixels and weights, exactly as computed; on
        another device or in another version of PyTorch they would differ by rounding. mirrored: of the images mirrored,
        whose latents are not the mirrored ones. Raises ValueError for an image whose latent is not finite, OSError if
        the cache cannot be written.
        """
        side = images.pixels.shape[-1] // self.autoencoder.downscale
        shape = (len(images), 2, self.autoencoder.channels, side, side)
        name = f"latents_{images.fingerprint}_{self.autoencoder.fingerprint}{'_mirrored' if mirrored else ''}"
        file = Path(cache_dir) / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file.with_suffix('.lock')}"):
            found = _cached(file, shape)
            if found is None:
                write_array(file, self._encode_all(images, shape, mirrored), "latents")
                found = np.load(file, mmap_mode="r")
        return found

    def _encode_all(self, images: ImageSet, shape: tuple[int, ...], mirrored: bool) -> np.ndarray:
        found = np.empty(shape, np.float32)
        with Progress(total=len(images), desc="encoding", unit="img") as bar:
            for start in range(0, len(images), CALL_IMAGES):
                chosen = slice(start, start + CALL_IMAGES)
                x = to_float(torch.from_numpy(np.array(images.pixels[chosen])).to(self.device))  # [B, C_i, R, R]
                parts = self.autoencoder.posterior(x.flip(-1) if mirrored else x)
                found[chosen] = torch.stack(parts, dim=1).cpu().numpy()  # [B, 2, c, r, r]
                bar.update(len(x))
        finite = np.isfinite(found).all(axis=(1, 2, 3, 4))  # [N]
        if not finite.all():
            raise ValueError(
                f"The autoencoder '{self.autoencoder.name}' makes the latent of image {int(np.argmin(finite))} of "
                f"'{images.name}' NaN or infinite; use another."
            )
        return found

    def draw(self, posteriors: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draws of latents `[B, c, r, r]`, scaled, from posteriors `[B, 2, c, r, r]` and standard normal noise."""
        mean, deviation = posteriors.unbind(1)
        return (mean + deviation * noise - self.shift) * self.scaling

    def clean(
        self, images: ImageSet, rows: np.ndarray, seed: int, cache_dir: str | os.PathLike, device: torch.device
    ) -> torch.Tensor:
        """Some images as a network learns them: scaled draws of their latents, float32 `[B, c, r, r]`.

        A draw depends on the seed and on the place among the rows.
        """
        posteriors = torch.from_numpy(self.posteriors(images, cache_dir)[rows])
        shape = (len(posteriors), *posteriors.shape[2:])
        noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return self.draw(posteriors, torch.from_numpy(noise)).to(device)

    def decode(self, made: torch.Tensor) -> torch.Tensor:
        """Scaled latents `[B, c, r, r]` as images, float32 `[B, C_i, R, R]`, not clamped; a few in each call, in fp32.

        Latents of a coarse scale become images of half the size.
        """
        latents = made.to(self.device).float() / self.scaling + self.shift
        parts = [self.autoencoder.decode(part, self.image_channels) for part in latents.split(CALL_IMAGES)]
        return torch.cat(parts).to(made.device)

    def pixels(self, made: torch.Tensor) -> torch.Tensor:
        """What a network made, `[B, c, r, r]`, as uint8 images `[B, C_i, R, R]` on the same device, clamped."""
        return to_uint8(self.decode(made))


Space = PixelSpace | LatentSpace


def _cached(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of a file, or None if there is none or it is not what was written."""
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


@functools.lru_cache(maxsize=2)
def _opened(name: str, fingerprint: str, what: str) -> Autoencoder:
    autoencoder = load_autoencoder(name)
    if autoencoder.fingerprint != fingerprint:
        raise ValueError(
            f"The autoencoder '{name}' holds other weights ({autoencoder.fingerprint}) than {what} was trained with "
            f"({fingerprint}); bring those back."
        )
    return autoencoder


def open_space(config: Mapping[str, Any], what: str | os.PathLike, device: torch.device | str) -> Space:
    """The space that the model of a config was trained in.

    what: the checkpoint, for messages. Raises FileNotFoundError if the autoencoder was a folder that is not there any
    more, ValueError if it has other weights by now, and what `load_autoencoder` raises.
    """
    name = config.get("latents")
    if name is None:
        return PixelSpace()
    if config["latents_is_here"] and not is_local(name):
        raise FileNotFoundError(
            f"The autoencoder of {what} lay in '{name}', which is not there (seen from {os.getcwd()}); put it or a "
            "link to it in that place."
        )
    autoencoder = _opened(name, config["latents_fingerprint"], str(what))
    # What the network knows are latents as they were scaled then.
    scales = config["latents_scaling"], config["latents_shift"]
    return LatentSpace(autoencoder, config["image_channels"], device, *scales)
