"""What backbones are made of: embeddings of timesteps and classes, residual blocks, attention.

Shapes: B images, C channels, H x W pixels, T embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NUM_GROUPS = 8
NUM_HEADS = 4
# Of initial class embeddings (arXiv 2212.09748), which begin as next to nothing beside the time.
CLASS_DEVIATION = 0.02
CLASS_DEVIATION = (
    0.02  # Of initial class embeddings (arXiv 2212.09748), which begin as next to nothing beside the time.
)


def timestep_embedding(t: torch.Tensor, width: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of timesteps (arXiv 1706.03762, section 3.5).

    t: `[B]`, any real dtype, in [0, 999]; integers need not be whole. width: even.
    Returns float32 `[B, width]`: cosines in the first half, sines in the second.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies  # [B, width/2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # [B, width]


class TimestepEmbedder(nn.Module):
    """Sinusoid of width `hidden_dims[0]`, then Linear-SiLU-Linear to `embedding_dim`: `[B]` -> `[B, T]`."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(timestep_embedding(t, self.width))


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv, plus the projected time embedding, GroupNorm-SiLU-conv, plus a shortcut.

    `embedding_dim=None` leaves the time projection out. `[B, in, H, W]` -> `[B, out, H, W]`.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int | None):
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels) if embedding_dim is not None else None
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out, H, W]
        if self.time is not None:
            h = h + self.time(F.silu(t))[:, :, None, None]  # [B, out, 1, 1]
        h = self.conv2(F.silu(self.norm2(h)))  # [B, out, H, W]
        return h + self.shortcut(x)


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the pixels of a feature map (arXiv 1706.03762)."""

    def __init__(self, channels: int, num_heads: int = NUM_HEADS):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))  # [B, 3C, H, W]
        # Fused kernels want the channels of a head next to each other.
        heads = self.num_heads
        q, k, v = (
            part.flatten(2).transpose(1, 2).contiguous().view(b, h * w, heads, c // heads).transpose(1, 2)
            for part in qkv.chunk(3, dim=1)
        )  # [B, heads, HW, C/heads]
        a = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, C/heads]
        a = a.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).reshape(b, c, h, w)  # [B, C, H, W]
        return x + self.proj(a)


class Backbone(nn.Module):
    """What stands between embeddings and predictions, and what all kinds of it say of themselves.

    Joined: `forward(x [B, in_channels, H, W], embedding [B, T] or None) -> [B, out_channels, H, W]`, and a model of two
    scales brings both to one size. Otherwise (`reads_scales`) `forward(xs, embeddings)` takes one of each per scale,
    fine first, and returns one prediction per scale. `stride`: what divides H and W of the fine scale.
    With `recompute` set, the backward pass computes the inside of every block once more instead of keeping it
    (arXiv 1604.06174).
    """

    recompute = False
    reads_scales = False
    stride: int

    @classmethod
    def embedding_widths(cls, hidden_dims: tuple[int, ...]) -> tuple[int, int]:
        """Width of the sinusoids of a timestep and of its embedding, T, that a backbone of such widths takes."""
        return hidden_dims[0], 4 * hidden_dims[0]

    def blocks(self) -> list[nn.Module]:
        """The modules whose insides `recompute` does not keep."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | SelfAttention)]

    def _run(self, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)


class ClassEmbedder(nn.Module):
    """A learned vector for each of K classes and for none, the null class K: int64 `[B]` in [0, K] -> `[B, T]`."""

    def __init__(self, num_classes: int, embedding_dim: int):
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + 1, embedding_dim)
        nn.init.normal_(self.table.weight, std=CLASS_DEVIATION)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table(labels)
