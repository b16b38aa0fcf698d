"""The single-scale baseline: a backbone of `model.py` on the fine image alone."""

import torch

from images.representation import Images
from model import DEFAULT_HIDDEN_DIMS, ScaleModel


class BaselineModel(ScaleModel):
    """Noise predictor for one scale: `forward(x_64 [B, C, H, W], t [B])` -> `eps_64 [B, C, H, W]`.

    H and W must be multiples of the stride of the backbone, `2 ** len(hidden_dims)` for the UNet; t lies in [0, 999].
    With classes, `forward(x_64, t, labels [B])`. Raises ValueError otherwise, and what `resolve_network` raises.
    """

    num_scales = 1
    num_predictions = 1
    one_clock = True
    description = (
        "the single-scale reference that LIFT is compared with: a {network} that denoises images of {fine} at one "
        "timestep"
    )

    def __init__(
        self,
        hidden_dims: tuple[int, ...] = DEFAULT_HIDDEN_DIMS,
        channels: int = 3,
        network: str = "unet",
        num_classes: int = 0,
        learned_variance: bool = False,
    ):
        super().__init__(hidden_dims, channels, network, num_classes, learned_variance)
        self.embed = self._make_embed()
        self.unet = self._make_unet()
        self._embed_classes()

    def forward(self, x_64: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out = self.unet(*self._backbone_inputs(x_64, t, labels=labels))
        return out[0] if self.unet.reads_scales else out

    def _backbone_inputs(self, x_64: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor | None) -> tuple:
        t = self.with_class(self.embed(t), labels)  # [B, T]
        return ((x_64,), (t,)) if self.unet.reads_scales else (x_64, t)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """The first of the scales, and its clock."""
        return xs[0], ts[0]
