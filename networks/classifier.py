"""Classifiers of noisy images, at every timestep of a process, on one scale or on both.

    NoisyClassifier(x_64, t_64)             -> logits   of the fine image and its clock
    PairClassifier(x_64, x_32, t_64, t_32)  -> logits   of both scales, each with its own clock

Their gradient guides what samples (arXiv 2105.05233), and their features and probabilities judge it. They make no
images, so that nothing that samples takes one.

Shapes: B images, C channels, H x W pixels of the fine scale, T embedding width, D features, K classes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from images.representation import REPRESENTATIONS, Images
from networks.blocks import (
    NUM_GROUPS,
    Backbone,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedder,
    check_hidden_dims,
    levels_reason,
)


class Encoder(Backbone):
    """The way down of a UNet, then the mean over pixels: `[B, in_channels, H, W]`, embedding `[B, T]` -> `[B, D]`.

    Two residual blocks per level, a stride-2 convolution between levels, self-attention over the pixels of the last,
    whose width is D. H and W must be multiples of `stride`, `2 ** (levels - 1)`; raises ValueError otherwise.
    """

    name = title = "encoder"

    def __init__(self, in_channels: int, hidden_dims: tuple[int, ...], embedding_dim: int):
        super().__init__()
        self.stride = 2 ** (len(hidden_dims) - 1)
        self.stride_reason = levels_reason(hidden_dims)
        self.stem = nn.Conv2d(in_channels, hidden_dims[0], 3, padding=1)
        self.levels = nn.ModuleList()
        channels = hidden_dims[0]
        for k, width in enumerate(hidden_dims):
            level = nn.Module()
            level.downsample = nn.Conv2d(channels, channels, 4, stride=2, padding=1) if k else nn.Identity()
            level.block1 = ResidualBlock(channels, width, embedding_dim)
            level.block2 = ResidualBlock(width, width, embedding_dim)
            self.levels.append(level)
            channels = width
        self.attention = SelfAttention(channels)
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.check_size(x)
        h = self.stem(x)  # [B, d0, H, W]
        for level in self.levels:
            h = level.downsample(h)  # [B, d', H/2, W/2]
            h = self._run(level.block2, self._run(level.block1, h, t), t)  # [B, d, H/2, W/2]
        h = self._run(self.attention, h)  # [B, D, H/stride, W/stride]
        return F.silu(self.norm(h)).mean((2, 3))  # [B, D]


class NoisyClassifier(nn.Module):
    """Classes of noisy images of one scale: `forward(x_64 [B, C, H, W], t_64 [B])` -> logits `[B, K]`.

    Timesteps lie in [0, T - 1] of the process of the training, and images are as its `shown` makes them. `features`
    takes the same and returns `[B, D]`, of which the logits are linear. Raises ValueError for widths that
    `check_hidden_dims` refuses, for fewer than two classes, and for image sizes the encoder refuses.
    """

    predicts_images = False
    num_scales = 1
    num_predictions = 0
    one_clock = True
    knows_time = True
    description = "a classifier of noisy images of {fine}"

    def __init__(
        self, hidden_dims: tuple[int, ...] = (64, 128, 256), channels: int = 3, num_classes: int = 2, **options: str
    ):
        super().__init__()
        check_hidden_dims(hidden_dims)
        if num_classes < 2:
            raise ValueError(f"A classifier needs two classes or more, not {num_classes}.")
        self._take(**options)
        self.channels, self.num_classes, self.num_features = channels, num_classes, hidden_dims[-1]
        sinusoid_width, width = Encoder.embedding_widths(hidden_dims)
        self.embed = TimestepEmbedder(sinusoid_width, width)
        self._make_parts(width)
        self.encoder = Encoder(self.num_scales * channels, hidden_dims, width)
        self.head = nn.Linear(self.num_features, num_classes)

    def _take(self) -> None:
        """Keep the arguments that this kind has beside those of all."""

    def _make_parts(self, width: int) -> None:
        """Make what else a kind has."""

    @property
    def unet(self) -> Backbone:
        """The backbone, as models of images call theirs."""
        return self.encoder

    @classmethod
    def has_two_clocks(cls) -> bool:
        """Whether it predicts two scales, each at a timestep of its own."""
        return False

    def features(self, x_64: torch.Tensor, t_64: torch.Tensor) -> torch.Tensor:
        """What the head reads, `[B, D]`."""
        return self.encoder(x_64, self.embed(t_64))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(*inputs))

    def inputs(self, xs: Images, ts: Images) -> Images:
        """What `forward` takes, of one noisy image and one `[B]` timestep tensor per scale, fine first."""
        return xs[0], ts[0]

    def classify(self, xs: Images, ts: Images, network: nn.Module | None = None) -> torch.Tensor:
        """Logits `[B, K]` of noisy images by scale at timesteps by scale.

        network: what is called in place of the model, such as its compiled form.
        """
        return (self if network is None else network)(*self.inputs(xs, ts))


class PairClassifier(NoisyClassifier):
    """Classes of noisy pairs: `forward(x_64 [B, C, H, W], x_32 [B, C, H/2, W/2], t_64 [B], t_32 [B])` -> `[B, K]`.

    In the residual `representation` the fine scale is projected to the subspace of details, as models of that pair do.
    Raises ValueError for an unknown representation and a coarse image that is not half the fine one.
    """

    num_scales = 2
    one_clock = False
    description = "a classifier of noisy images of {fine} and {coarse} together, each with its own timestep"

    def _take(self, representation: str = "overcomplete") -> None:
        if representation not in REPRESENTATIONS:
            raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
        self.representation = REPRESENTATIONS[representation]

    def _make_parts(self, width: int) -> None:
        self.combine = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, t_32: torch.Tensor) -> torch.Tensor:
        if tuple(x_64.shape[-2:]) != (2 * x_32.shape[-2], 2 * x_32.shape[-1]):
            raise ValueError(
                f"A coarse image of {x_32.shape[-2]}x{x_32.shape[-1]} must be half the size of the fine image, "
                f"which is {x_64.shape[-2]}x{x_64.shape[-1]}."
            )
        x_64, x_32 = self.representation.project((x_64, x_32))
        x_up = F.interpolate(x_32, size=x_64.shape[-2:], mode="bilinear", align_corners=False)
        t = self.combine(torch.cat([self.embed(t_64), self.embed(t_32)], dim=1))  # [B, T]
        return self.encoder(torch.cat([x_64, x_up], dim=1), t)  # [B, D]

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Two scales, two clocks."""
        return *xs, *ts
