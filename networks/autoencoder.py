"""Autoencoders of images: what latent diffusion (arXiv 2112.10752) puts around a network.

They are `AutoencoderKL` of the library `diffusers`, which is imported when one is asked for, or anything with the same
interface. Shapes: B images, C_i channels and R x R pixels of an image, c channels and r x r values of a latent.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from images.sources import is_hub_id
from networks.fingerprint import weights_fingerprint

CLASS_NAME = "AutoencoderKL"
WAY_OUT = (
    "pass --latents ID, a hub id such as stabilityai/sd-vae-ft-ema or a folder of save_pretrained, or ID:vae for that "
    "of a whole Stable Diffusion"
)


class Autoencoder:
    """A frozen autoencoder in fp32.

    model: a module with `encode(x).latent_dist.mean` and `.std`, `decode(z).sample`, and a `config` with
    `in_channels`, `out_channels`, `latent_channels`, `block_out_channels`, `scaling_factor` and maybe `shift_factor`.
    `fingerprint` names its weights, `downscale` is R / r, `channels` c. What a diffusion works on is
    `(z - shift) * scaling` of a latent z (arXiv 2112.10752, appendix G).

    Grey images, one channel, are shown to an autoencoder of colour as three equal ones, and are the mean over the three
    that it returns. Raises ValueError for a config that lacks these, or weights that are not finite.
    """

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        self.model = model.float().eval().requires_grad_(False)
        config = model.config
        try:
            self.image_channels = int(config["in_channels"])
            self.channels = int(config["latent_channels"])
            self.downscale = 2 ** (len(config["block_out_channels"]) - 1)
            self.scaling, self.shift = float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The config of the autoencoder '{name}' is incomplete ({error}); {WAY_OUT}.") from error
        if config.get("out_channels", self.image_channels) != self.image_channels or self.image_channels not in (1, 3):
            raise ValueError(f"The autoencoder '{name}' is not one of grey or colour images; {WAY_OUT}.")
        if not (math.isfinite(self.scaling) and self.scaling > 0 and math.isfinite(self.shift)):
            raise ValueError(
                f"The autoencoder '{name}' has a scaling_factor of {self.scaling} and a shift_factor of {self.shift}; "
                f"{WAY_OUT}."
            )
        state = model.state_dict()
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError(f"The autoencoder '{name}' is damaged, as it holds weights that are not finite.")
        self.fingerprint = weights_fingerprint(state)

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Itself, on a device."""
        self.model.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(value.nbytes for value in self.model.state_dict().values())

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of images `[B, C_i, R, R]` in [-1, 1]: float32 `[B, c, r, r]`.

        Without gradient and in fp32, whatever autocast is around. They are not scaled yet.
        """
        with _exact(images.device):
            found = self.model.encode(images.float().expand(-1, self.image_channels, -1, -1)).latent_dist
            return found.mean, found.std

    def decode(self, latents: torch.Tensor, image_channels: int) -> torch.Tensor:
        """Images `[B, C_i, R, R]`, about in [-1, 1] and not clamped, of latents `[B, c, r, r]` that are not scaled.

        Without gradient and in fp32, whatever autocast is around.
        """
        with _exact(latents.device):
            images = self.model.decode(latents.float()).sample  # [B, 1 or 3, R, R]
        return images.mean(1, keepdim=True) if image_channels == 1 else images


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    # The grey levels of a sample are not to depend on the precision in which the network ran.
    with (
        torch.no_grad(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def is_local(name: str) -> bool:
    """Whether an autoencoder is a folder of this machine, with or without `:SUBFOLDER`."""
    return Path(_place(name)[0]).is_dir()


def _place(name: str) -> tuple[str, str | None]:
    """The folder or hub id of a name, and the subfolder."""
    place, colon, subfolder = name.rpartition(":")
    return (place, subfolder) if colon and place and not Path(name).is_dir() else (name, None)


def load_autoencoder(name: str) -> Autoencoder:
    """The autoencoder that a hub id or a folder of `save_pretrained` names, or `ID:SUBFOLDER`, on the CPU.

    A folder is never looked for on the hub, and no random number is drawn. Raises RuntimeError without `diffusers` or
    if the hub does not give it, FileNotFoundError for a place that is none, and ValueError if what is there is damaged,
    of another class, or lacks weights.
    """
    place, subfolder = _place(name)
    local = Path(place).is_dir()
    if not local and not is_hub_id(place):
        raise FileNotFoundError(f"'{place}' is no folder (seen from {os.getcwd()}) and no hub id; {WAY_OUT}.")
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:  # Only models of latents need it.
        raise RuntimeError(f"--latents needs the library diffusers ({error}); run pip install diffusers.") from error
    where = {"subfolder": subfolder} if subfolder else {}
    loud = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # What is wrong is said once, below.
    try:
        kind = AutoencoderKL.load_config(place, **where).get("_class_name")
        if kind == CLASS_NAME:
            with torch.random.fork_rng(devices=[]):
                model, said = AutoencoderKL.from_pretrained(
                    place, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True, **where
                )
    except Exception as error:  # The libraries raise a dozen types of their own for damage, places and the network.
        reason = (str(error).strip().split("\n")[0] or "no reason given").rstrip(".:")
        if local:
            way_out = f"pass --latents {name}:vae" if not subfolder and Path(place, "vae").is_dir() else WAY_OUT
            raise ValueError(
                f"The folder '{name}' holds no {CLASS_NAME} that can be read ({type(error).__name__}: {reason}); "
                f"{way_out}."
            ) from error
        raise RuntimeError(
            f"The autoencoder '{name}' is no folder here, and the hub did not give it ({type(error).__name__}: "
            f"{reason}); check the name and the network, or pass --latents FOLDER."
        ) from error
    finally:
        logging.set_verbosity(loud)
    if kind != CLASS_NAME:
        raise ValueError(f"'{name}' holds a {kind or 'model of another library'}, not an {CLASS_NAME}; {WAY_OUT}.")
    missing = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in said.get(kind) or ()]
    if missing:
        raise ValueError(
            f"The weights of '{name}' are not those of its config: {len(missing)} of them are missing, of another "
            f"shape or too many ({missing[0]}); {WAY_OUT}."
        )
    return Autoencoder(model, name)
