"""Noise predictors over one or two image scales.

Every model may have any backbone: the UNet below, or one of `networks/`. A model maps noisy images (one tensor per
scale) and timesteps (one `[B]` tensor per scale) to noise predictions:

    LIFTDualTimestepModel(x_64, x_32, t_64, t_32) -> (eps_64, eps_32)   each scale has its own clock
    LIFTBaselineModel(x_64, x_32, t)              -> (eps_64, eps_32)   both scales share one clock
    CascadeModel(x_64, x_32, t_64, t_32)          -> eps_64             the coarse image is given, at a level of its own
    SingleTimestepModel(x_64, x_32, t_64)         -> eps_64             the coarse clock is hidden
    NoTimestepModel(x_64, x_32)                   -> eps_64             both clocks are hidden

`baseline_model.BaselineModel(x_64, t) -> eps_64` is the single-scale reference built from the same backbones.
The names say 64 and 32; the sizes come from the tensors, so a 32/16 pair runs through the same code.

Shapes: B batch, C image channels, H = W fine resolution (a multiple of 16 for the UNet), T embedding width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from images.representation import REPRESENTATIONS, Images
from networks.blocks import (
    NUM_GROUPS,
    Backbone,
    ClassEmbedder,
    Named,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedder,
    levels_reason,
)
from networks.ddpm_unet import DdpmUNet
from networks.dit import DiT
from networks.pretrained import PretrainedMixin
from networks.resnet import ResNet

ATTENTION_MIN_CHANNELS = 128
DEFAULT_HIDDEN_DIMS = (64, 128, 256, 512)


def _attention(channels: int) -> nn.Module:
    return SelfAttention(channels) if channels >= ATTENTION_MIN_CHANNELS else nn.Identity()


class UNet(Backbone):
    """The UNet of the published code: the images of all scales `[B, C, H, W]`, embedding `[B, T]` -> `[B, C', H, W]`.

    Per level two residual blocks, self-attention where a level has at least 128 channels, and a stride-2
    convolution after every level, so H and W must be multiples of `2 ** len(hidden_dims)`; `forward` raises
    ValueError for other sizes. Features: the output of every level `[B, d, H, W]` and of the middle.
    """

    name = "unet"
    title = "UNet"

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        embedding_dim: int | None,
    ):
        super().__init__()
        self.stride = 2 ** len(hidden_dims)
        self.stride_reason = levels_reason(hidden_dims)
        self.stem = nn.Conv2d(sum(in_channels), hidden_dims[0], 3, padding=1)
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
            nn.GroupNorm(NUM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, sum(out_channels), 3, padding=1)
        )

    def _run_level(self, level: nn.Module, h: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        h = self._run(level.block2, self._run(level.block1, h, t), t)
        return self._run(level.attention, h)

    def _encode(self, x: torch.Tensor, t: torch.Tensor | None) -> list[torch.Tensor]:
        self.check_size(x)
        h = self.stem(x)  # [B, d0, H, W]
        found = []
        for level in self.down:
            h = self._run_level(level, h, t)  # [B, d, H, W]
            found.append(h)
            h = level.downsample(h)  # [B, d, H/2, W/2]
        h = self._run(self.middle1, h, t)  # [B, d, H/16, W/16]
        h = self._run(self.middle2, self._run(self.middle_attention, h), t)  # [B, d, H/16, W/16]
        return [*found, h]

    def forward(self, x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        *skips, h = self._encode(x, t)
        for level in self.up:
            h = torch.cat([level.upsample(h), skips.pop()], dim=1)  # [B, d'+d, H, W]
            h = self._run_level(level, h, t)  # [B, d, H, W]
        return self.head(h)  # [B, out, H, W]

    def features(self, x: torch.Tensor, embedding: torch.Tensor | None) -> list[torch.Tensor]:
        """What skips carry, from the fine level on, and what the middle gives to the decoder."""
        return self._encode(x, embedding)


BACKBONES: tuple[type[Backbone], ...] = (UNet, DdpmUNet, DiT, ResNet)
NETWORK_NAMES = (
    "unet, ddpm_unet, ddpm_unet_plain, DiT-S/2, DiT-B/4, DiT-L/2, DiT-XL/2 (any patch behind the stroke), DiT/4, "
    "resnet, resnet_circular"
)


class Network(NamedTuple):
    """A backbone that a name stands for: `make(in_channels, out_channels, hidden_dims, embedding_dim)` builds it."""

    name: str
    title: str
    kind: type[Backbone]
    make: Callable[..., Backbone]
    hidden_dims: tuple[int, ...]


def _named(name: str) -> tuple[type[Backbone], Named]:
    for kind in BACKBONES:
        if (said := kind.parse_name(name)) is not None:
            return kind, said
    raise ValueError(f"Unknown network '{name}'; choose one of {NETWORK_NAMES}.")


def network_name(text: str) -> str:
    """A name as configs have it, from one in any case; raises ValueError for one that is unknown."""
    return _named(text)[1].name


def resolve_network(name: str, hidden_dims: tuple[int, ...] = DEFAULT_HIDDEN_DIMS, knows_time: bool = True) -> Network:
    """The backbone of a name, which may settle the widths that are not given, and of a model that may know no time.

    Raises ValueError for a name that is unknown, for widths other than those that it settles or that the backbone
    cannot have, and for a backbone that needs a timestep where there is none.
    """
    kind, said = _named(name)
    hidden_dims = tuple(hidden_dims)
    if said.hidden_dims is not None:
        if hidden_dims not in (DEFAULT_HIDDEN_DIMS, said.hidden_dims):
            raise ValueError(
                f"{said.name} has {len(said.hidden_dims)} blocks of width {said.hidden_dims[0]}; leave hidden_dims "
                "out, or choose a network whose name says no size."
            )
        hidden_dims = said.hidden_dims
    kind.check_hidden_dims(hidden_dims)
    if kind.needs_time and not knows_time:
        raise ValueError(
            f"{said.name} hears of its input through timesteps alone, and a model without any has nothing to tell it; "
            "choose unet or ddpm_unet."
        )
    return Network(said.name, said.title, kind, partial(kind, **said.options), hidden_dims)


class ScaleModel(nn.Module, PretrainedMixin):
    """A network that denoises an image in one or two scales; what a class says of itself is all that others ask.

    `num_scales` it reads and `num_predictions` of them, from the fine one on, it predicts. `one_clock`: its scales have
    one timestep, or it has one scale. `coarse_given`: the coarse image that it reads and does not predict is given to
    it, clean or at a noise level that it is told, so that it makes no image from noise alone. `description`, with
    {network}, {fine} and {coarse} for what is asked for, is what its card calls it.
    `unet` is its backbone, of whatever kind, as weights of earlier versions call it; `embed` embeds clocks.
    With `num_classes` > 0 it may be told what class an image is of. With `learned_variance` a prediction has 2C
    channels: the second half, v, says where the log variance of a step lies between the two that bound it
    (arXiv 2102.09672, eq. 15). Raises ValueError for what `resolve_network` refuses, and for classes without a clock.
    """

    predicts_images = True
    num_scales = 2
    num_predictions = 2
    one_clock = False
    coarse_given = False
    knows_time = True
    description: str

    def __init__(
        self,
        hidden_dims: tuple[int, ...] = DEFAULT_HIDDEN_DIMS,
        channels: int = 3,
        network: str = "unet",  # a name that `resolve_network` knows
        num_classes: int = 0,
        learned_variance: bool = False,
    ):
        super().__init__()
        if num_classes and not self.knows_time:
            raise ValueError(f"{type(self).__name__} has no embedding, which classes are added to.")
        self.channels, self.num_classes, self.learned_variance = channels, num_classes, learned_variance
        self.network = resolve_network(network, hidden_dims, self.knows_time)
        self.hidden_dims = self.network.hidden_dims
        self.sinusoid_width, self.embedding_dim = self.network.kind.embedding_widths(self.hidden_dims)

    def _make_unet(self) -> Backbone:
        predicted = self.channels * (2 if self.learned_variance else 1)
        return self.network.make(
            (self.channels,) * self.num_scales,
            (predicted,) * self.num_predictions,
            self.hidden_dims,
            self.embedding_dim if self.knows_time else None,
        )

    def _make_embed(self) -> TimestepEmbedder:
        embedder = TimestepEmbedder(self.sinusoid_width, self.embedding_dim)
        self.network.kind.init_embedder(embedder)
        return embedder

    def _embed_classes(self) -> None:
        """Make the embeddings of classes: last of all, so that other weights are those of a model without."""
        if self.num_classes:
            self.embed_class = ClassEmbedder(self.num_classes, self.embedding_dim)

    def with_class(self, embedding: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """An embedding `[B, T]` with that of classes, int64 `[B]`, added; without labels that of the null class.

        Raises ValueError for labels of a model without classes.
        """
        if not self.num_classes:
            if labels is not None:
                raise ValueError("This model was trained without classes; leave the class out.")
            return embedding
        if labels is None:
            labels = torch.full(embedding.shape[:1], self.num_classes, device=embedding.device)
        return embedding + self.embed_class(labels)

    @classmethod
    def has_two_clocks(cls) -> bool:
        """Whether it predicts two scales, each at a timestep of its own."""
        return cls.num_predictions > 1 and not cls.one_clock

    @classmethod
    def enlarges(cls) -> bool:
        """Whether it can be given a coarse image, clean or as noisy as it is told, and asked for the fine one."""
        return cls.coarse_given or cls.has_two_clocks()

    def inputs(self, xs: Images, ts: Images) -> Images:
        """What `forward` takes, of one noisy image and one `[B]` timestep tensor per scale, fine first."""
        raise NotImplementedError

    def denoise(
        self, xs: Images, ts: Images, labels: torch.Tensor | None = None, network: nn.Module | None = None
    ) -> Images:
        """The form that samplers, maps and training call: noisy images and timesteps by scale to predictions by scale.

        labels: classes int64 `[B]` in [0, num_classes], the last for none; None: for none of the images.
        network: what is called in place of the model, such as its compiled form.
        """
        inputs = self.inputs(xs, ts)
        predictions = (self if network is None else network)(*(inputs if labels is None else (*inputs, labels)))
        return predictions if isinstance(predictions, tuple) else (predictions,)

    def features(self, xs: Images, ts: Images, labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What `Backbone.features` says of noisy images and timesteps by scale, as `denoise` takes them."""
        return self.unet.features(*self._backbone_inputs(*self.inputs(xs, ts), labels=labels))

    def _backbone_inputs(self, *inputs: torch.Tensor, labels: torch.Tensor | None) -> tuple:
        """What the backbone takes, of what `forward` takes."""
        raise NotImplementedError


class _TwoScaleModel(ScaleModel):
    """What the two-scale models share: joining the scales at the input, splitting at the output.

    In the residual `representation` the fine input and its prediction are projected to the subspace of details, so that
    the network knows of nothing else and its Jacobian neither. Raises ValueError for the widths that
    `resolve_network` refuses, for a representation that is unknown or that the predictions do not compose, for image
    sizes the backbone refuses, and for a coarse image that is not half the fine one.
    """

    def __init__(
        self,
        hidden_dims: tuple[int, ...] = DEFAULT_HIDDEN_DIMS,
        channels: int = 3,
        representation: str = "overcomplete",
        network: str = "unet",
        num_classes: int = 0,
        learned_variance: bool = False,
    ):
        super().__init__(hidden_dims, channels, network, num_classes, learned_variance)
        if representation not in REPRESENTATIONS:
            raise ValueError(f"Unknown representation '{representation}'; choose one of {', '.join(REPRESENTATIONS)}.")
        if representation == "residual" and self.num_predictions < self.num_scales and not self.coarse_given:
            raise ValueError(
                f"{type(self).__name__} predicts no coarse image, without which a residual is no image; use the "
                "over-complete representation."
            )
        self.representation = REPRESENTATIONS[representation]
        self.unet = self._make_unet()
        if self.knows_time:
            self.embed = self._make_embed()
        self._make_parts()
        self._embed_classes()

    def _make_parts(self) -> None:
        """Make what else a model has."""

    def _embeddings(self, clocks: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """Of the clocks `[B]` that a model knows, for its backbone: `[B, T]`, or one for each scale."""
        if not clocks:
            return None
        t = self.embed(clocks[0])  # [B, T]
        return (t, t) if self.unet.reads_scales else t

    def _backbone_inputs(
        self, x_64: torch.Tensor, x_32: torch.Tensor, *clocks: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple:
        if tuple(x_64.shape[-2:]) != (2 * x_32.shape[-2], 2 * x_32.shape[-1]):
            raise ValueError(
                f"A coarse image of {x_32.shape[-2]}x{x_32.shape[-1]} must be half the size of the fine image, "
                f"which is {x_64.shape[-2]}x{x_64.shape[-1]}."
            )
        x_64, x_32 = self.representation.project((x_64, x_32))
        embeddings = self._embeddings(clocks)
        if self.unet.reads_scales:
            return (x_64, x_32), tuple(self.with_class(t, labels) for t in embeddings)
        x_up = self.unet.enlarge(x_32, x_64.shape[-2:])
        t = embeddings if embeddings is None else self.with_class(embeddings, labels)  # [B, T]
        return torch.cat([x_64, x_up], dim=1), t

    def _predict(
        self,
        x_64: torch.Tensor,
        x_32: torch.Tensor,
        clocks: tuple[torch.Tensor, ...] = (),
        labels: torch.Tensor | None = None,
    ):
        out = self.unet(*self._backbone_inputs(x_64, x_32, *clocks, labels=labels))
        if not self.unet.reads_scales:  # [B, 2C or C, H, W], of learned variance twice that
            out = out.chunk(self.num_predictions, dim=1)
            out = (out[0], *(F.avg_pool2d(coarse, 2) for coarse in out[1:]))  # [B, C, H, W], [B, C, H/2, W/2]
        # Variances are no part of an image, and have no subspace to be brought to.
        predictions, variances = zip(
            *((each[:, : self.channels], each[:, self.channels :]) for each in out), strict=True
        )
        predictions = self.representation.project(predictions)
        if self.learned_variance:
            predictions = tuple(torch.cat(pair, dim=1) for pair in zip(predictions, variances, strict=True))
        return predictions if self.num_predictions > 1 else predictions[0]


class _TwoClockModel(_TwoScaleModel):
    """What models share that are told the timesteps of both scales.

    Both go through one embedding; the pair is combined by Linear-SiLU-Linear, unless the backbone takes one for each
    scale.
    """

    def _make_parts(self) -> None:
        width = self.embedding_dim
        if not self.unet.reads_scales:  # Where each has its own, nothing is to be combined.
            self.combine = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def _embeddings(self, clocks: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        ts = tuple(map(self.embed, clocks))  # [B, T] each
        return ts if self.unet.reads_scales else self.combine(torch.cat(ts, dim=1))

    def forward(
        self,
        x_64: torch.Tensor,
        x_32: torch.Tensor,
        t_64: torch.Tensor,
        t_32: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._predict(x_64, x_32, (t_64, t_32), labels)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Two scales, two clocks."""
        return *xs, *ts


class LIFTDualTimestepModel(_TwoClockModel):
    """LIFT: both scales denoised together, each with its own timestep.

    `forward(x_64 [B, C, H, W], x_32 [B, C, H/2, W/2], t_64 [B], t_32 [B])` returns the predictions
    `(eps_64 [B, C, H, W], eps_32 [B, C, H/2, W/2])`. Timesteps lie in [0, 999].
    """

    description = (
        "the LIFT model: one {network} that denoises images of {fine} and {coarse} together, each with its own timestep"
    )


class CascadeModel(_TwoClockModel):
    """A stage of cascaded diffusion (arXiv 2106.15282): it enlarges a coarse image that it is given.

    `forward(x_64 [B, C, H, W], z_32 [B, C, H/2, W/2], t_64 [B], s [B])` returns `eps_64 [B, C, H, W]`: z_32 is the
    coarse image with noise of its own at the timestep s, which it is told (conditioning augmentation, section 4.2).
    In the residual representation it predicts what the given image leaves of the fine one.
    """

    num_predictions = 1
    coarse_given = True
    description = (
        "a stage of a cascade: a {network} that makes images of {fine} of given ones of {coarse}, which may be noisy "
        "and whose noise level it is told"
    )


class LIFTBaselineModel(_TwoScaleModel):
    """Both scales denoised together with one shared timestep: `(x_64, x_32, t [B])` -> `(eps_64, eps_32)`."""

    one_clock = True
    description = (
        "an ablation: one {network} that denoises images of {fine} and {coarse} together at one shared timestep"
    )

    def forward(
        self, x_64: torch.Tensor, x_32: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._predict(x_64, x_32, (t,), labels)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Two scales, one clock."""
        return *xs, ts[0]

    def denoise(
        self, xs: Images, ts: Images, labels: torch.Tensor | None = None, network: nn.Module | None = None
    ) -> Images:
        """Raises ValueError off the diagonal, which this model was never shown."""
        # Training, which draws equal timesteps, is not to wait for a GPU.
        if network is None and not torch.equal(ts[0], ts[1]):
            raise ValueError("A model with one shared timestep can only follow a diagonal path.")
        return super().denoise(xs, ts, labels, network)


class SingleTimestepModel(_TwoScaleModel):
    """Ablation that knows t_64 only: `(x_64, x_32, t_64 [B])` -> `eps_64 [B, C, H, W]`."""

    num_predictions = 1
    description = (
        "an ablation: a {network} that sees images of {fine} and {coarse}, denoises the fine one and knows the "
        "timestep of that one alone"
    )

    def forward(
        self, x_64: torch.Tensor, x_32: torch.Tensor, t_64: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._predict(x_64, x_32, (t_64,), labels)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Both scales; the coarse timestep is not used."""
        return *xs, ts[0]


class NoTimestepModel(_TwoScaleModel):
    """Ablation that knows no timestep: `(x_64, x_32)` -> `eps_64 [B, C, H, W]`."""

    num_predictions = 1
    knows_time = False
    description = (
        "an ablation: a {network} that sees images of {fine} and {coarse}, denoises the fine one and knows no timestep"
    )

    def forward(self, x_64: torch.Tensor, x_32: torch.Tensor) -> torch.Tensor:
        return self._predict(x_64, x_32)

    def inputs(self, xs: Images, ts: Images) -> Images:
        """Both scales; no timestep is used."""
        return tuple(xs)
