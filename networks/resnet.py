"""A convolutional network of one resolution, without attention and without norms, whose receptive field is known.

It is what the theory of local score machines describes (arXiv 2412.20292): a pixel of its prediction is the same
function of the window around it everywhere, but for borders. `resnet` pads with zeros and sees them there;
`resnet_circular` goes on at the other side, knows no border, and commutes with every shift.
"""

import torch
import torch.nn.functional as F
from torch import nn

from networks.blocks import Backbone, Named, ResidualBlock

CIRCULAR = "resnet_circular"


class ResNet(Backbone):
    """A ResNet at full resolution: images of all scales `[B, C, H, W]`, embedding `[B, T]` -> `[B, C', H, W]`.

    A 3x3 stem, a residual block of two 3x3 convolutions for each of `hidden_dims`, its width, and a 3x3 head behind a
    SiLU. A pixel sees the window of 4 n + 5 pixels square around it, n blocks, `receptive_field`, of all that is joined
    at its input. A coarse image is half as large and enlarged bilinearly, its prediction the 2x2 mean.

    Nothing is normalised, so that the last convolution of every block and the head begin with zeros: blocks that keep
    their width are the identity at first, and predictions 0. `padding` is that of all convolutions, "zeros" or
    "circular". H and W may be any sizes, even ones with two scales; `forward` raises ValueError for others, the
    constructor for widths that are not multiples of 8. Features: the output of every block, `[B, d, H, W]`.
    """

    name = "resnet"
    title = "ResNet (resnet)"

    @classmethod
    def parse_name(cls, name: str) -> Named | None:
        if name.lower() == CIRCULAR:
            return Named(CIRCULAR, f"ResNet ({CIRCULAR})", options={"padding": "circular"})
        return super().parse_name(name)

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        embedding_dim: int | None,
        padding: str = "zeros",
    ):
        super().__init__()
        self.check_hidden_dims(hidden_dims)
        self.padding = padding
        self.stride = 2 ** (len(in_channels) - 1)  # So that there is a coarse image.
        self.stride_reason = "for two scales; use another --resolution."
        first, last = hidden_dims[0], hidden_dims[-1]
        self.stem = nn.Conv2d(sum(in_channels), first, 3, padding=1, padding_mode=padding)
        self.layers = nn.ModuleList(
            ResidualBlock(narrow, wide, embedding_dim, normalised=False, padding=padding)
            for narrow, wide in zip((first, *hidden_dims), hidden_dims, strict=False)
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(last, sum(out_channels), 3, padding=1, padding_mode=padding))
        for convolution in (*(layer.conv2 for layer in self.layers), self.head[-1]):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    @property
    def receptive_field(self) -> int:
        """The side in pixels of the window that a pixel of the prediction depends on: two 3x3 and two for each block.

        A torus that is no larger is seen whole.
        """
        return 1 + 2 * (2 + 2 * len(self.layers))

    def enlarge(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """As other kinds do, and on the torus if padding is circular."""
        if self.padding != "circular":
            return super().enlarge(x, size)
        wide = super().enlarge(F.pad(x, (1, 1, 1, 1), mode="circular"), (size[0] + 4, size[1] + 4))
        return wide[..., 2:-2, 2:-2]

    def features(self, x: torch.Tensor, embedding: torch.Tensor | None) -> list[torch.Tensor]:
        """What every block hands on."""
        self.check_size(x)
        h = self.stem(x)  # [B, d, H, W]
        found = []
        for layer in self.layers:
            h = self._run(layer, h, embedding)  # [B, d, H, W]
            found.append(h)
        return found

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        return self.head(self.features(x, t)[-1])  # [B, out, H, W]
