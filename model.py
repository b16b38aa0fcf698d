"""UNet noise predictors over one or two image scales.

One set of blocks serves every model. A model maps noisy images (one tensor per scale) and timesteps
(one `[B]` tensor per scale) to noise predictions:

    LIFTDualTimestepModel(x_64, x_32, t_64, t_32) -> (eps_64, eps_32)   each scale has its own clock
    LIFTBaselineModel(x_64, x_32, t)              -> (eps_64, eps_32)   both scales share one clock
    SingleTimestepModel(x_64, x_32, t_64)         -> eps_64             the coarse clock is hidden
    NoTimestepModel(x_64, x_32)                   -> eps_64             both clocks are hidden

`baseline_model.BaselineModel(x_64, t) -> eps_64` is the single-scale reference built from the same UNet.
The names say 64 and 32; the sizes come from the tensors, so a 32/16 pair runs through the same code.

Shapes: B batch, C image channels, H = W fine resolution (a multiple of 16), T embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from images.representation import REPRESENTATIONS, Images
from networks.pretrained import PretrainedMixin

NUM_GROUPS = 8
NUM_HEADS = 4
ATTENTION_MIN_CHANNELS = 128


def check_hidden_dims(hidden_dims: tuple[int, ...]) -> None:
    """Raise ValueError unless GroupNorm and the attention heads can divide every width, and there is one."""
    if not hidden_dims or any(d < NUM_GROUPS or d % NUM_GROUPS for d in hidden_dims):
        raise ValueError(
            f"hidden_dims {tuple(hidden_dims)} must be positive multiples of {NUM_GROUPS}, for example 64,128,256,512."
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

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))  # [B, 3C, H, W]
        # Fused kernels want the channels of a head next to each other.
        q, k, v = (
            part.flatten(2).transpose(1, 2).contiguous().view(b, h * w, NUM_HEADS, c // NUM_HEADS).transpose(1, 2)
            for part in qkv.chunk(3, dim=1)
        )  # [B, heads, HW, C/heads]
        a = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, C/heads]
        a = a.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).reshape(b, c, h, w)  # [B, C, H, W]
        return x + self.proj(a)


def _attention(channels: int) -> nn.Module:
    return SelfAttention(channels) if channels >= ATTENTION_MIN_CHANNELS else nn.Identity()


class UNet(nn.Module):
    """The UNet all models share: `[B, in_channels, H, W]`, embedding `[B, T]` -> `[B, out_channels, H, W]`.

    Per level two residual blocks, self-attention where a level has at least 128 channels, and a stride-2
    convolution after every level, so H and W must be multiples of `2 ** len(hidden_dims)`; `forward` raises
    ValueError for other sizes. With `recompute` set, the backward pass computes the inside of every block once more
    instead of keeping it (arXiv 1604.06174).
    """

    recompute = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_dims: tuple[int, ...],
        embedding_dim: int | None,
    ):
        super().__init__()
        self.stride = 2 ** len(hidden_dims)
        self.stem = nn.Conv2d(in_channels, hidden_dims[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = hidden_dims[0]
        for width in hidden_dims:
            level = nn.Module()
            level.block1 = ResidualBlock(channels, width, embedding_dim)
            level.block2 = ResidualBlock(width, width, embedding_dim)
            level.attention = _attention(width)
            level.downsample = nn.Conv2d(width, width, 4, stride=2, padding=1)
            self.down.append(level)
            channels = width
        self.middle1 = ResidualBlock(channels, channels, embedding_dim)
        self.middle_attention = SelfAttention(channels)
        self.middle2 = ResidualBlock(channels, channels, embedding_dim)
        self.up = nn.ModuleList()
        for width in reversed(hidden_dims):
            level = nn.Module()
            level.upsample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
            level.block1 = ResidualBlock(channels + width, width, embedding_dim)
            level.block2 = ResidualBlock(width, width, embedding_dim)
            level.attention = _attention(width)
            self.up.append(level)
            channels = width
        self.head = nn.Sequential(
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )

    def blocks(self) -> list[nn.Module]:
        """The modules whose insides `recompute` does not keep."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | SelfAttention)]

    def _run(self, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _run_level(self, level: nn.Module, h: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        h = self._run(level.block2, self._run(level.block1, h, t), t)
        return self._run(level.attention, h)

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        if x.shape[-1] % self.stride or x.shape[-2] % self.stride:
            raise ValueError(
                f"Image size {x.shape[-2]}x{x.shape[-1]} must be a multiple of {self.stride} for this model."
            )
        h = self.stem(x)  # [B, d0, H, W]
        skips = []
        for level in self.down:
            h = self._run_level(level, h, t)  # [B, d, H, W]
            skips.append(h)
            h = level.downsample(h)  # [B, d, H/2, W/2]
        h = self._run(self.middle1, h, t)  # [B, d, H/16, W/16]
        h = self._run(self.middle2, self._run(self.middle_attention, h), t)  # [B, d, H/16, W/16]
        for level in self.up:
            h = torch.cat([level.upsample(h), skips.pop()], dim=1)  # [B, d'+d, H, W]
            h = self._run_level(level, h, t)  # [B, d, H, W]
        return self.head(h)  # [B, out, H, W]


class ScaleModel(nn.Module, PretrainedMixin):
    """A network that denoises an image in one or two scales; what a class says of itself is all that others ask.

    `num_scales` it reads and `num_predictions` of them, from the fine one on, it predicts. `one_clock`: its scales have
    one timestep, or it has one scale. `description`, with {fine} and {coarse} for sizes, is what its card calls it.
    """

    num_scales = 2
    num_predictions = 2
    one_clock = False
    description: str

    @classmethod
    def has_two_clocks(cls) -> bool:
        """Whether it predicts two scales, each at a timestep of its own."""
        return cls.num_predictions > 1 and not cls.one_clock

    def inputs(self, xs: Images, ts: Images) -> Images:
        """What `forward` takes, of one noisy image and one `[B]` timestep tensor per scale, fine first."""
        raise NotImplementedError

    def denoise(self, xs: Images, ts: Images, network: nn.Module | None = None) -> Images:
        """The form that samplers, maps and training call: noisy images and timesteps by scale to predictions by scale.

        network: what is called in place of the model, such as its compiled form.
        """
        predictions = (self if network is None else network)(*self.inputs(xs, ts))
        return predictions if isinstance(predictions, tuple) else (predictions,)


class _TwoScaleModel(ScaleModel):
    """What the four two-scale models share: joining the scales at the input, splitting at the output.

    In the residual `representation` the fine input and its prediction are projected to the subspace of details, so that
    the network knows of nothing else and its Jacobian neither. Raises ValueError for the widths that
    `check_hidden_dims` refuses, for a representation that is unknown or that the predictions do not compose, for image
    sizes the UNet refuses, and for a coarse image that is not half the fine one.
    """

    knows_time = True

    def __init__(
        self,
        hidden_dims: tuple[int, ...] = (64, 128, 256, 512),
        channels: int = 3,
        representation: str = "overcomplete",
    ):
        super().__init__()
        check_hidden_dims(hidden_dims)
        if representation not in REPRESENTATIONS:
            raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
        if representation == "residual" and self.num_predictions < self.num_scales:
            raise ValueError(
                f"{type(self).__name__} predicts no coarse image, without which a residual is no image; use the "
                "over-complete representation."
            )
        self.representation = REPRESENTATIONS[representation]
        self.channels = channels
        embedding_dim = 4 * hidden_dims[0] if self.knows_time else None
        self.unet = UNet(2 * channels, self.num_predictions * channels, hidden_dims, embedding_dim)
        if self.knows_time:
            self.embed = TimestepEmbedder(hidden_dims[0], embedding_dim)

    def _predict(self, x_64: torch.Tensor, x_32: torch.Tensor, t: torch.Tensor | None):
        if tuple(x_64.shape[-2:]) != (2 * x_32.shape[-2], 2 * x_32.shape[-1]):
            raise ValueError(
                f"A coarse image of {x_32.shape[-2]}x{x_32.shape[-1]} must be half the size of the fine image, "
                f"which is {x_64.shape[-2]}x{x_64.shape[-1]}."
            )
        x_64, x_32 = self.representation.project((x_64, x_32))
        x_up = F.interpolate(x_32, size=x_64.shape[-2:], mode="bilinear", align_corners=False)
        out = self.unet(torch.cat([x_64, x_up], dim=1), t)  # [B, 2C or C, H, W]
        if self.num_predictions == 1:
            return out
        eps_64, eps_32 = out.split(self.channels, dim=1)  # [B, C, H, W] twice
        return self.representation.project((eps_64, F.avg_pool2d(eps_32, 2)))  # [B, C, H, W], [B, C, H/2, W/2]


class LIFTDualTimestepModel(_TwoScaleModel):
    """LIFT: both scales denoised together, each with its own timestep.

    `forward(x_64 [B, C, H, W], x_32 [B, C, H/2, W/2], t_64 [B], t_32 [B])` returns the predictions
    `(eps_64 [B, C, H, W], eps_32 [B, C, H/2, W/2])`. Timesteps lie in [0, 999]. Both go through one
    embedding; the pair is combined by Linear-SiLU-Linear.
    """

    description = (
        "the LIFT model: one UNet that denoises images of {fine} and {coarse} together, each with its own timestep"
    )

    def __init__(
        self,
        hidden_dims: tuple[int, ...] = (64, 128, 256, 512),
        channels: int = 3,
        representation: str = "overcomplete",
    ):
        super().__init__(hidden_dims, channels, representation)
        width = 4 * hidden_dims[0]
        self.combine = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(
        self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.combine(torch.cat([self.embed(t_64), self.embed(t_32)], dim=1))  # [B, T]
        return self._predict(x_64, x_32, t)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Two scales, two clocks."""
        return *xs, *ts


class LIFTBaselineModel(_TwoScaleModel):
    """Both scales denoised together with one shared timestep: `(x_64, x_32, t [B])` -> `(eps_64, eps_32)`."""

    one_clock = True
    description = "an ablation: one UNet that denoises images of {fine} and {coarse} together at one shared timestep"

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._predict(x_64, x_32, self.embed(t))

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Two scales, one clock."""
        return *xs, ts[0]

    def denoise(self, xs: Images, ts: Images, network: nn.Module | None = None) -> Images:
        """Raises ValueError off the diagonal, which this model was never shown."""
        # Training, which draws equal timesteps, is not to wait for a GPU.
        if network is None and not torch.equal(ts[0], ts[1]):
            raise ValueError("A model with one shared timestep can only follow a diagonal path.")
        return super().denoise(xs, ts, network)


class SingleTimestepModel(_TwoScaleModel):
    """Ablation that knows t_64 only: `(x_64, x_32, t_64 [B])` -> `eps_64 [B, C, H, W]`."""

    num_predictions = 1
    description = (
        "an ablation: a UNet that sees images of {fine} and {coarse}, denoises the fine one and knows the timestep of "
        "that one alone"
    )

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor) -> torch.Tensor:
        return self._predict(x_64, x_32, self.embed(t_64))

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Both scales; the coarse timestep is not used."""
        return *xs, ts[0]


class NoTimestepModel(_TwoScaleModel):
    """Ablation that knows no timestep: `(x_64, x_32)` -> `eps_64 [B, C, H, W]`."""

    num_predictions = 1
    knows_time = False
    description = (
        "an ablation: a UNet that sees images of {fine} and {coarse}, denoises the fine one and knows no timestep"
    )

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor) -> torch.Tensor:
        return self._predict(x_64, x_32, None)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Both scales; no timestep is used."""
        return tuple(xs)
