"""The single-scale baseline: the UNet of `model.py` on the fine image alone."""

import torch

from images.representation import Images
from model import ScaleModel, TimestepEmbedder, UNet, check_hidden_dims


class BaselineModel(ScaleModel):
    """Noise predictor for one scale: `forward(x_64 [B, C, H, W], t [B])` -> `eps_64 [B, C, H, W]`.

    H and W must be multiples of `2 ** len(hidden_dims)`; t lies in [0, 999]. Raises ValueError otherwise.
    """

    num_scales = 1
    num_predictions = 1
    one_clock = True
    description = (
        "the single-scale reference that LIFT is compared with: a UNet that denoises images of {fine} at one timestep"
    )

    def __init__(self, hidden_dims: tuple[int, ...] = (64, 128, 256, 512), channels: int = 3):
        super().__init__()
        check_hidden_dims(hidden_dims)
        self.channels = channels
        self.embed = TimestepEmbedder(hidden_dims[0], 4 * hidden_dims[0])
        self.unet = UNet(channels, channels, hidden_dims, 4 * hidden_dims[0])

    def forward(self, x_64: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(x_64, self.embed(t))

    def inputs(self, xs: Images, ts: Images) -> Images:
        """The first of the scales, and its clock."""
        return xs[0], ts[0]
