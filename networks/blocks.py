"""What backbones are made of: embeddings of timesteps and classes, residual blocks, attention.

Shapes: B images, C channels, H x W pixels, T embedding width.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NUM_GROUPS = 8
NUM_HEADS = 4
# Of initial class embeddings (arXiv 2212.09748), which begin as next to nothing beside the time.
CLASS_DEVIATION = 0.02


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
    """Sinusoid of a width, then Linear-SiLU-Linear to `embedding_dim`: `[B]` -> `[B, T]`."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(timestep_embedding(t, self.width))


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv, plus the projected time embedding, GroupNorm-SiLU-conv, plus a shortcut.

    `embedding_dim=None` leaves the time projection out, `normalised=False` the norms. `padding` is that of the
    convolutions, of PyTorch's padding modes. `[B, in, H, W]` -> `[B, out, H, W]`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int | None,
        normalised: bool = True,
        padding: str = "zeros",
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, in_channels) if normalised else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode=padding)
        self.time = nn.Linear(embedding_dim, out_channels) if embedding_dim is not None else None
        self.norm2 = nn.GroupNorm(NUM_GROUPS, out_channels) if normalised else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, padding_mode=padding)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [B, out, H, W]
        if self.time is not None:
            h = h + self.time(F.silu(t))[:, :, None, None]  # [B, out, 1, 1]
        h = self.conv2(F.silu(self.norm2(h)))  # [B, out, H, W]
        return h + self.shortcut(x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of tensors `[B, heads, N, D]`, in their dtype.

    On a CPU in float32, as PyTorch's kernel for bf16 takes two to seven times as long there.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


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
        a = attend(q, k, v)  # [B, heads, HW, C/heads]
        a = a.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).reshape(b, c, h, w)  # [B, C, H, W]
        return x + self.proj(a)


def check_hidden_dims(hidden_dims: tuple[int, ...]) -> None:
    """Raise ValueError unless GroupNorm and the attention heads can divide every width, and there is one."""
    if not hidden_dims or any(d < NUM_GROUPS or d % NUM_GROUPS for d in hidden_dims):
        raise ValueError(
            f"hidden_dims {tuple(hidden_dims)} must be positive multiples of {NUM_GROUPS}, for example 64,128,256,512."
        )


def levels_reason(hidden_dims: tuple[int, ...]) -> str:
    """Why a UNet refuses an image size, and the way out."""
    return f"for the {len(hidden_dims)} levels of --hidden_dims; use fewer levels or another --resolution."


class Named(NamedTuple):
    """What the name of a network says: how it is written in configs and on cards, and what it settles."""

    name: str
    title: str
    hidden_dims: tuple[int, ...] | None = None  # None: whatever is asked for
    options: Mapping[str, Any] = {}  # further arguments of its class


class Backbone(nn.Module):
    """What stands between embeddings and predictions, and what all kinds of it say of themselves.

    A kind is built as `(in_channels, out_channels, hidden_dims, embedding_dim)`, where `in_channels` has the channels
    of every scale that is read, fine first, `out_channels` those of every prediction, and `embedding_dim` is None for
    a model without clocks (not of a kind that `needs_time`).

    Joined: `forward(x [B, sum(in_channels), H, W], embedding [B, T] or None) -> [B, sum(out_channels), H, W]`, and a
    model of two scales brings both to one size. Otherwise (`reads_scales`) `forward(xs, embeddings)` takes one of each
    per scale, fine first, and returns one prediction per scale, `[B, out_channels[s], H >> s, W >> s]`.
    `features` takes what `forward` takes. `stride`: what divides H and W of the fine scale, and `stride_reason` the
    rest of the sentence that refuses another size. With `recompute` set, the backward pass computes the inside of every
    block once more instead of keeping it (arXiv 1604.06174).
    """

    name: ClassVar[str]  # of `--network`, in lower case
    title: ClassVar[str]  # what cards call it, behind "a" or "one"
    recompute = False
    reads_scales = False
    needs_time = False
    stride: int
    stride_reason: str

    @classmethod
    def parse_name(cls, name: str) -> Named | None:
        """What a name says, in whatever case; None if it is that of another kind."""
        return Named(cls.name, cls.title) if name.lower() == cls.name else None

    @classmethod
    def check_hidden_dims(cls, hidden_dims: tuple[int, ...]) -> None:
        """Raise ValueError for widths that this kind cannot have."""
        check_hidden_dims(hidden_dims)

    @classmethod
    def init_embedder(cls, embedder: TimestepEmbedder) -> None:
        """Give the embedder of clocks other initial weights than those of PyTorch, if this kind has such."""

    def check_size(self, x: torch.Tensor) -> None:
        """Raise ValueError for a fine image `[B, C, H, W]` that `stride` does not divide."""
        if x.shape[-1] % self.stride or x.shape[-2] % self.stride:
            raise ValueError(
                f"Image size {x.shape[-2]}x{x.shape[-1]} must be a multiple of {self.stride} {self.stride_reason}"
            )

    def enlarge(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A coarse image `[B, C, H/2, W/2]` at the size (H, W) of the fine one, which it is joined to."""
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def features(self, x: Any, embedding: Any) -> list[torch.Tensor]:
        """What it makes of an input on the way, from the input on; nothing is computed that these do not need."""
        raise NotImplementedError

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
