"""How an image is split into two scales, and which noise belongs to them.

`overcomplete`, as published: the image and its 2x2 mean, each with noise of its own; the coarse scale says again what
the fine one holds. `residual`: the 2x2 mean c and what it leaves, r = x - up(c) with nearest-neighbour upsampling up.
As A up = I for the 2x2 mean A, and Aᵀ = up / 4, every 2x2 block of r sums to zero: r lies in the orthogonal complement
of the coarse images, and the pair is the Haar split in the form of images, without saying anything twice.

A pair is (fine `[B, C, H, W]`, coarse `[B, C, H/2, W/2]`), H and W even. A tuple of one image, that of a model of one
scale, goes through every method as an over-complete pair without its coarse half.

In the residual pair n - up(A n) of white noise n is that of the fine scale, of variance 1 in every direction of its
subspace (3/4 per pixel), and independent of A n, whose variance is 1/4. Noise on the image at SNR γ is thus the pair
at SNRs (γ, 4 γ).
"""

import math

import torch
import torch.nn.functional as F

Images = tuple[torch.Tensor, ...]


def upsample_nearest(images: torch.Tensor) -> torch.Tensor:
    """Each pixel four times: `[B, C, H/2, W/2]` -> `[B, C, H, W]`."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


class Overcomplete:
    """The image and its 2x2 mean."""

    name = "overcomplete"
    fine_share = 1.0  # Dimensions of the fine scale, as a share of those of the image.
    image_lead = 0.0  # λ_32 - λ_64 on the diagonal that ties the clocks.

    def __reduce__(self) -> str:
        # Copies and pickles are the one object of this module.
        return self.name.upper()

    def split(self, images: torch.Tensor) -> Images:
        """The pair of clean images `[B, C, H, W]`."""
        return images, F.avg_pool2d(images, 2)

    def compose(self, xs: Images) -> torch.Tensor:
        """The image `[B, C, H, W]` of a pair; undoes `split`, up to rounding in the residual pair."""
        return xs[0]

    def project(self, xs: Images) -> Images:
        """The pair with its fine half brought to its subspace, which makes white noise the noise of the pair."""
        return xs

    def blockwise(self, values: Images) -> Images:
        """Values for each pixel of a pair, made even where noise that they scale would leave its subspace."""
        return values

    def directions(self, numbers: Images) -> Images:
        """The pair whose coordinates in orthonormal bases of the spaces of its scales are these numbers.

        Of the residual pair those in the first of the four pixels of each block of the fine scale count for nothing.
        """
        return numbers

    def clamp(self, x0s: Images) -> Images:
        """The pair of the image that is nearest in [-1, 1]."""
        return tuple(x0.clamp(-1, 1) for x0 in x0s)

    def finished(self, xs: Images) -> Images:
        """What sampling returns of its last state: the image first."""
        return xs


class Residual(Overcomplete):
    """The 2x2 mean and what it leaves: two orthogonal bands."""

    name = "residual"
    fine_share = 0.75
    image_lead = math.log(4)

    def split(self, images: torch.Tensor) -> Images:
        low = F.avg_pool2d(images, 2)
        return images - upsample_nearest(low), low

    def compose(self, xs: Images) -> torch.Tensor:
        return xs[0] + upsample_nearest(xs[1])

    def project(self, xs: Images) -> Images:
        return (xs[0] - upsample_nearest(F.avg_pool2d(xs[0], 2)), *xs[1:])

    def blockwise(self, values: Images) -> Images:
        return (upsample_nearest(F.avg_pool2d(values[0], 2)), *values[1:])

    def directions(self, numbers: Images) -> Images:
        blocks = F.pixel_unshuffle(numbers[0], 2).unflatten(1, (-1, 4))  # [B, C, 4, H/2, W/2]
        # Rows are the pixels of a block, columns the three details, as the first pattern is constant.
        patterns = blocks.new_tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]]) / 2
        details = torch.einsum("pk,bckhw->bcphw", patterns, blocks[:, :, 1:])
        return (F.pixel_shuffle(details.flatten(1, 2), 2), *numbers[1:])

    def clamp(self, x0s: Images) -> Images:
        return self.split(self.compose(x0s).clamp(-1, 1))

    def finished(self, xs: Images) -> Images:
        return (self.compose(xs), *xs[1:])


OVERCOMPLETE, RESIDUAL = Overcomplete(), Residual()
REPRESENTATIONS = {kind.name: kind for kind in (OVERCOMPLETE, RESIDUAL)}
