"""Images of a data set that a model is tried on: held out of its training or trained on, which is said."""

import numpy as np
import torch

import cli
from checkpoint import LoadedModel
from cli import DataSettings
from image_folder import evenly


def evaluation_images(
    settings: DataSettings, loaded: LoadedModel, checkpoint: str, on: str, num_images: int | None
) -> torch.Tensor:
    """The images to try a model on, uint8 `[N, C, R, R]`, with a note on what the network has seen of them.

    They are those of `on`, holdout or train: so many, evenly over the set, or all.

    Raises ValueError where none were held out, where those named were trained on, and for other channels.
    """
    config = loaded.config
    training, held_out = cli.load_image_parts(settings, config)
    is_training_set = training.fingerprint == config["data_fingerprint"]
    images = training
    if on == "holdout":
        if held_out is None:
            raise ValueError(
                f"Held-out images are needed, but none of '{training.name}' were kept out of training; train with "
                "--holdout N, pass another --dataset with --holdout N, or measure with --on train."
            )
        images = held_out
        if not is_training_set and settings.dataset in (None, config["dataset"]):
            raise ValueError(
                f"{checkpoint} was not trained without these {len(held_out)} images of '{training.name}'; leave "
                "--holdout and --limit as they were in training."
            )
    if images.channels != loaded.image_channels:
        raise ValueError(
            f"The images of '{images.name}' have {images.channels} channel(s) but {checkpoint} was trained on "
            f"{loaded.image_channels}; pass another --dataset."
        )
    if is_training_set and on == "train":
        print("NOTE: THE NETWORK WAS TRAINED ON THESE IMAGES, so that its scores say nothing of new ones.")
    elif not is_training_set:
        print(f"note: '{images.name}' is not what the network was trained on, and nothing shows what it saw of it")
    chosen = evenly(num_images or len(images), len(images), f"'{images.name}'")
    return torch.from_numpy(np.array(images.pixels[chosen]))
