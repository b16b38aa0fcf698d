"""The UNet of the DDPM report: 15.7 million parameters at the usual widths, attention at 16x16 and 8x8 of 32x32.

`ddpm_unet_plain` is the same without attention, the report's ablation of it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from networks.blocks import NUM_GROUPS, Backbone, Named, ResidualBlock, SelfAttention, levels_reason

# Where the side is a half and a quarter of that of the image: 16x16 and 8x8 of 32x32. The network is not told how large
# its images will be.
ATTENTION_LEVELS = (1, 2)
NUM_HEADS = 8
PLAIN = "ddpm_unet_plain"


class DdpmUNet(Backbone):
    """A UNet with attention (arXiv 2006.11239): images of all scales `[B, C, H, W]`, `[B, T]` -> `[B, C', H, W]`.

    A 7x7 stem, one residual block per level on the way down and up and two at the lowest level, self-attention of 8
    heads after the blocks of levels 1 and 2, counted from 0, unless `attention` is False, and a 3x3 head. Images are
    halved between levels alone, so H and W must be multiples of `2 ** (len(hidden_dims) - 1)`, and of 2 with two
    scales; `forward` raises ValueError for other sizes, the constructor for widths that 8 heads and 8 groups do not
    divide. Features: the output of every level on the way down, `[B, d, H >> k, W >> k]`.
    """

    name = "ddpm_unet"
    title = "UNet (ddpm_unet)"

    @classmethod
    def parse_name(cls, name: str) -> Named | None:
        if name.lower() == PLAIN:
            return Named(PLAIN, f"UNet ({PLAIN})", options={"attention": False})
        return super().parse_name(name)

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        embedding_dim: int | None,
        attention: bool = True,
    ):
        super().__init__()

        def after_block(level: int, channels: int) -> nn.Module:
            here = attention and level in ATTENTION_LEVELS
            return SelfAttention(channels, NUM_HEADS) if here else nn.Identity()

        self.check_hidden_dims(hidden_dims)
        # A coarse image is half the fine one, however few levels there are.
        self.stride = 2 ** max(len(hidden_dims) - 1, len(in_channels) - 1)
        self.stride_reason = levels_reason(hidden_dims)
        self.stem = nn.Conv2d(sum(in_channels), hidden_dims[0], 7, padding=3)
        lowest = len(hidden_dims) - 1
        self.down = nn.ModuleList()
        channels = hidden_dims[0]
        for k, width in enumerate(hidden_dims):
            level = nn.Module()
            level.block = ResidualBlock(channels, width, embedding_dim)
            level.attention = after_block(k, width)
            if k < lowest:
                level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
            channels = width
        self.middle = ResidualBlock(channels, channels, embedding_dim)
        self.up = nn.ModuleList()
        for k, width in reversed(list(enumerate(hidden_dims[:-1]))):
            level = nn.Module()
            level.upsample = nn.Conv2d(channels, width, 3, padding=1)
            level.block = ResidualBlock(2 * width, width, embedding_dim)
            level.attention = after_block(k, width)
            self.up.append(level)
            channels = width
        self.head = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, sum(out_channels), 3, padding=1)
        )

    def _encode(self, x: torch.Tensor, t: torch.Tensor | None) -> list[torch.Tensor]:
        self.check_size(x)
        h = self.stem(x)  # [B, d0, H, W]
        found = []
        for level in self.down:
            if found:
                h = self.down[len(found) - 1].downsample(h)  # [B, d, H/2, W/2]
            h = self._run(level.attention, self._run(level.block, h, t))  # [B, d, H, W]
            found.append(h)
        found[-1] = self._run(self.middle, h, t)  # [B, d, H/8, W/8]
        return found

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        *skips, h = self._encode(x, t)
        for level in self.up:
            h = level.upsample(F.interpolate(h, scale_factor=2, mode="nearest"))  # [B, d, H, W]
            h = self._run(level.block, torch.cat([h, skips.pop()], dim=1), t)  # [B, d, H, W]
            h = self._run(level.attention, h)
        return self.head(h)  # [B, out, H, W]

    def features(self, x: torch.Tensor, embedding: torch.Tensor | None) -> list[torch.Tensor]:
        """What skips carry, from the fine level on, and what the lowest level gives to the decoder."""
        return self._encode(x, embedding)
