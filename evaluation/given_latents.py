"""Latents of given images under a loaded model, and latents of files, checked against it."""

import torch

from checkpoint import LoadedModel
from data import to_float
from diffusion.latents import SCALES, Latents
from diffusion.likelihood import Encoded, encode, why_no_equation
from diffusion.sampler import scale_shapes
from paths.path import Path
from scheduler import Denoiser


def check_latents_exist(loaded: LoadedModel, checkpoint: str) -> None:
    """Raise ValueError for a model under which images have no latents."""
    if reason := why_no_equation(loaded.model.num_scales, loaded.model.num_predictions):
        raise ValueError(f"{checkpoint} is a '{loaded.config['model_type']}' model: {reason}")


def encode_pixels(
    loaded: LoadedModel,
    path: Path,
    pixels: torch.Tensor,  # uint8 [N, C, R, R], on the device of the model
    tolerance: float,
    max_calls: int,
    denoise: Denoiser | None = None,  # the model told of a class, with predictions alone; None: as it is
) -> Encoded:
    """The latents of images as `diffusion.likelihood.encode` finds them; raises what it raises.

    A grey level is the number in its middle, without noise.
    """
    images = to_float(pixels)
    scales = loaded.scheduler.representation.split(images) if path.num_scales > 1 else (images,)
    return encode(denoise or loaded.denoise, loaded.scheduler, path, scales, tolerance, max_calls)


def check_fits(latents: Latents, file: str, loaded: LoadedModel, checkpoint: str) -> None:
    """Raise ValueError for latents of other weights or of other shapes than a model has."""
    if latents.settings["weights_fingerprint"] != loaded.fingerprint:
        raise ValueError(
            f"{file} holds latents of other weights than the {loaded.weights} ones of {checkpoint}; pass the "
            "checkpoint that made them, with --ema or without."
        )
    config = loaded.config
    expected = scale_shapes(loaded.model.num_scales, config["channels"], config["resolution"])
    found = [tuple(x.shape[1:]) for x in latents.scales]
    if found != expected:
        shapes = ["; ".join(f"{name} {list(s)}" for name, s in zip(SCALES, each, strict=False)) for each in
                  (found, expected)]  # fmt: skip
        raise ValueError(
            f"{file} holds latents of shapes {shapes[0]}, and this model has {shapes[1]}; write it again with "
            "encode.py --input."
        )
