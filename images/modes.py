"""Images in an orthonormal basis in which those of photographs are nearly independent: colours, Haar bands, DCT.

Colours are rotated to principal axes, an image is split into the four Haar bands of its 2x2 blocks (low, details along
W, along H, along both), and each band into DCT-II frequencies. The coarse image is half the low band, so that to it the
rest of the transform applies.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class ModeBasis(NamedTuple):
    """An orthonormal basis: rotation `[C, C]`, whose rows are colours, and DCT-II matrices of the sides of a band."""

    rotation: torch.Tensor
    dct_h: torch.Tensor
    dct_w: torch.Tensor

    @classmethod
    def of_images(cls, batches: Iterable[torch.Tensor], mean: torch.Tensor) -> "ModeBasis":
        """That of the principal colours of images `[B, C, H, W]`, H and W even, about their mean `[C, H, W]`.

        float64; the weakest colour comes first.
        """
        colour = sum(torch.einsum("bchw,bdhw->cd", *(x.double() - mean,) * 2) for x in batches)
        rotation = torch.linalg.eigh(colour).eigenvectors.T.contiguous()  # [C, C]
        return cls(rotation, *(dct_matrix(side // 2).to(mean) for side in mean.shape[-2:]))


def to_modes(x: torch.Tensor, basis: ModeBasis) -> torch.Tensor:
    """Modes `[B, 4, C, H/2, W/2]` of images `[B, C, H, W]`, the low band first."""
    blocks = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))  # [B, C, 4, H/2, W/2]
    return band_to_modes(torch.einsum("kp,bcphw->bkchw", _haar(x), blocks), basis)  # [B, 4, C, H/2, W/2]


def from_modes(modes: torch.Tensor, basis: ModeBasis) -> torch.Tensor:
    """Images `[B, C, H, W]` of modes `[B, 4, C, H/2, W/2]`."""
    bands = _rotate_and_dct(modes, basis.rotation.T, basis.dct_h.T, basis.dct_w.T)  # [B, 4, C, H/2, W/2]
    blocks = torch.einsum("pk,bkchw->bcphw", _haar(modes), bands)  # [B, C, 4, H/2, W/2]
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)  # [B, C, H, W]


def band_to_modes(band: torch.Tensor, basis: ModeBasis) -> torch.Tensor:
    """Modes of a band, or of a coarse image, `[..., C, H/2, W/2]`."""
    return _rotate_and_dct(band, *basis)


def dct_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II, float64 `[size, size]`, whose rows are frequencies."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * index[:, None] * (index + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _haar(like: torch.Tensor) -> torch.Tensor:
    # Rows are bands, columns the pixels of a 2x2 block; symmetric, and so its own inverse.
    return like.new_tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def _rotate_and_dct(x: torch.Tensor, rotation: torch.Tensor, dct_h: torch.Tensor, dct_w: torch.Tensor) -> torch.Tensor:
    return dct_h @ torch.einsum("cd,...dhw->...chw", rotation, x) @ dct_w.T  # [..., C, H/2, W/2]
