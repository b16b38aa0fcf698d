"""Tiny random autoencoders for tests, as `diffusers` saves them."""

import pytest
import torch


def save_autoencoder(folder, seed=0, levels=2, channels=3, **options):
    """An AutoencoderKL of random weights, of 1/2 or, with three levels, 1/4 of the side; returns the folder's name."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16)[:levels], down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        in_channels=channels, out_channels=channels, **{"scaling_factor": 0.5} | options,
    )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)
