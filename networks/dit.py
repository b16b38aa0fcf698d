"""Diffusion transformers (DiT, arXiv 2212.09748) over the patches of an image in one scale or two.

Shapes: B images, S scales, N tokens of all scales, N_s of one, D width, T embedding width, P patch.
"""

import re
from collections.abc import Callable, Collection

import torch
from torch import nn

from networks.blocks import Backbone, Named, TimestepEmbedder, attend

SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # depth, width, heads; table 1
NAME = re.compile(r"dit(?:-(s|b|l|xl))?/([1-9][0-9]{0,3})", re.IGNORECASE)
SINUSOID_WIDTH = 256
HEAD_WIDTH = 64
MLP_RATIO = 4
NORM_EPS = 1e-6
EMBEDDER_DEVIATION = 0.02
MAX_PERIOD = 10000.0
FEATURE_INTERVAL = 3


def heads_of_width(width: int) -> int:
    """As many heads of 64 channels as a width has, or as few less as divide it; at least one."""
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


def positions(rows: int, columns: int, spacing: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sine-cosine positions of patches in row-major order, float32 `[N_s, D]` (arXiv 2212.09748).

    spacing: of patches, in patches of the fine scale, whose centres lie at 0, 1, 2, ...; so patches of two scales
    around one place of the picture have positions around one. width: a multiple of 4; a quarter each are sines and
    cosines of the column, and sines and cosines of the row, of falling frequency.
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** (-torch.arange(quarter, device=device) / quarter)  # [D/4]

    def of_axis(count: int) -> torch.Tensor:
        centres = (torch.arange(count, device=device) + 0.5) * spacing - 0.5
        angles = centres[:, None] * frequencies  # [count, D/4]
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, D/2]

    across = of_axis(columns).expand(rows, columns, -1)  # [rows, columns, D/2]
    down = of_axis(rows)[:, None].expand(rows, columns, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)  # [N_s, D]


def unpatchify(tokens: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Patches in row-major order, `[B, rows * columns, P * P * C]`, as images `[B, C, rows * P, columns * P]`."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # [B, rows, columns, P, P, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # [B, C, H, W]


def _by_scale(
    function: Callable[..., torch.Tensor], h: torch.Tensor, counts: tuple[int, ...], *modulations: torch.Tensor
) -> torch.Tensor:
    """A function of the tokens of each scale `[B, N_s, D]` and of what the clock of that scale says `[B, 1, D]`."""
    parts = [function(part, *(m[:, s : s + 1] for m in modulations)) for s, part in enumerate(h.split(counts, dim=1))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [B, N, D]


def _modulate(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return h * (1 + scale) + shift


def _linear(inputs: int, outputs: int, zero: bool = False) -> nn.Linear:
    """With the initial weights of DiT: uniform of Glorot, or zeros, and no bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight) if zero else nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Attention(nn.Module):
    """Multi-head self-attention over tokens, with biases: `[B, N, D]` -> `[B, N, D]` (arXiv 1706.03762)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D/heads]
        a = attend(q, k, v)  # [B, heads, N, D/heads]
        return self.proj(a.transpose(1, 2).flatten(2))  # [B, N, D]


class DiTBlock(nn.Module):
    """Attention and an MLP, both modulated by the clock and next to a shortcut (adaLN-Zero, arXiv 2212.09748, fig. 3).

    `forward(h [B, N, D], c [B, S, T], counts)`: the first `counts[0]` tokens listen to the first embedding, and so on.
    At initialisation it is the identity, because the gates are zero.
    """

    def __init__(self, width: int, embedding_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.mlp = nn.Sequential(
            _linear(width, MLP_RATIO * width), nn.GELU(approximate="tanh"), _linear(MLP_RATIO * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), _linear(embedding_dim, 6 * width, zero=True))

    def forward(self, h: torch.Tensor, c: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=2)  # [B, S, D] each
        a = self.attention(_by_scale(_modulate, self.norm1(h), counts, shift1, scale1))  # [B, N, D]
        h = h + _by_scale(torch.mul, a, counts, gate1)
        a = self.mlp(_by_scale(_modulate, self.norm2(h), counts, shift2, scale2))  # [B, N, D]
        return h + _by_scale(torch.mul, a, counts, gate2)


class FinalLayer(nn.Module):
    """From tokens to the values of their patches: `[B, N_s, D]`, embedding `[B, T]` -> `[B, N_s, P * P * C]`.

    At initialisation all of them are zero.
    """

    def __init__(self, width: int, embedding_dim: int, values: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), _linear(embedding_dim, 2 * width, zero=True))
        self.linear = _linear(width, values, zero=True)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)  # [B, 1, D] each
        return self.linear(_modulate(self.norm(h), shift, scale))


class DiT(Backbone):
    """DiT with adaLN-Zero blocks, `len(hidden_dims)` of them, which all have one width (arXiv 2212.09748).

    `forward(xs, embeddings)`: images `[B, in_channels[s], H >> s, W >> s]` and embeddings `[B, T]` of every scale, fine
    first -> as many predictions as `out_channels` has, `[B, out_channels[s], H >> s, W >> s]`. Patches of P x P pixels
    of all scales are the tokens of one sequence: each scale has its own patch embedding, whose bias tells it from the
    other, positions are those in the picture, and every token is modulated by the embedding of its own scale. Raises
    ValueError for images of other sizes than multiples of P, in two scales of 2P, and without embeddings.
    Features: the tokens `[B, N, D]` after every third block and after the last.

    Names: `DiT-S/P`, B, L and XL, for the depth, width and heads of the paper, and `DiT/P`, for those of `hidden_dims`,
    with heads of 64 channels.
    """

    reads_scales = True
    needs_time = True

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        embedding_dim: int | None,
        patch: int = 2,
        num_heads: int | None = None,  # that of the width
    ):
        super().__init__()
        self.check_hidden_dims(hidden_dims)
        if embedding_dim is None:
            raise ValueError(
                "A DiT hears of its input through timesteps alone and cannot be built without an embedding."
            )
        width, scales = hidden_dims[0], len(in_channels)
        self.patch, self.width = patch, width
        self.stride = patch * 2 ** (scales - 1)
        self.stride_reason = (
            f"for the {patch}x{patch} patches of {'one scale' if scales == 1 else 'two scales'}; use a smaller patch, "
            "such as --network DiT/2, or another --resolution."
        )
        self.patchify = nn.ModuleList(nn.Conv2d(channels, width, patch, stride=patch) for channels in in_channels)
        for convolution in self.patchify:
            nn.init.xavier_uniform_(convolution.weight.flatten(1))  # As the linear map of a patch that it is.
            nn.init.zeros_(convolution.bias)
        heads = num_heads or heads_of_width(width)
        self.layers = nn.ModuleList(DiTBlock(width, embedding_dim, heads) for _ in hidden_dims)
        self.heads = nn.ModuleList(
            FinalLayer(width, embedding_dim, patch * patch * channels) for channels in out_channels
        )

    @classmethod
    def parse_name(cls, name: str) -> Named | None:
        """`DiT-XL/2` and the like, and `DiT/P`."""
        match = NAME.fullmatch(name)
        if match is None:
            return None
        size, patch = (match[1] or "").upper(), int(match[2])
        if not size:
            return Named(f"DiT/{patch}", f"diffusion transformer (DiT/{patch})", None, {"patch": patch})
        depth, width, heads = SIZES[size]
        name, options = f"DiT-{size}/{patch}", {"patch": patch, "num_heads": heads}
        return Named(name, f"diffusion transformer ({name})", (width,) * depth, options)

    @classmethod
    def check_hidden_dims(cls, hidden_dims: tuple[int, ...]) -> None:
        """Raise ValueError unless there is one width for all blocks, which positions can be written in."""
        if not hidden_dims or len(set(hidden_dims)) > 1 or hidden_dims[0] < 4 or hidden_dims[0] % 4:
            raise ValueError(
                f"hidden_dims {tuple(hidden_dims)} must be the width of every block of a DiT, all equal and a multiple "
                "of 4, for example 128,128,128,128 for four blocks."
            )

    @classmethod
    def embedding_widths(cls, hidden_dims: tuple[int, ...]) -> tuple[int, int]:
        """Sinusoids of width 256, and embeddings as wide as tokens."""
        return SINUSOID_WIDTH, hidden_dims[0]

    @classmethod
    def init_embedder(cls, embedder: TimestepEmbedder) -> None:
        """Normal weights of deviation .02, without bias."""
        for linear in (embedder.mlp[0], embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=EMBEDDER_DEVIATION)
            nn.init.zeros_(linear.bias)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.layers)

    def _grids(self, xs: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
        """Rows and columns of the patches of every scale."""
        self.check_size(xs[0])
        return [(x.shape[-2] // self.patch, x.shape[-1] // self.patch) for x in xs]

    def _tokens(self, xs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Patches of every scale with their positions, `[B, N_s, D]`."""
        found = []
        for s, (x, grid) in enumerate(zip(xs, self._grids(xs), strict=True)):
            h = self.patchify[s](x).flatten(2).transpose(1, 2)  # [B, N_s, D]
            found.append(h + positions(*grid, 2**s, self.width, x.device).to(x.dtype))
        return found

    def _walk(
        self, xs: tuple[torch.Tensor, ...], embeddings: tuple[torch.Tensor, ...], wanted: Collection[int]
    ) -> list[torch.Tensor]:
        """The tokens of all scales, `[B, N, D]`, after the blocks of these numbers; others are not kept."""
        tokens = self._tokens(xs)
        counts = tuple(part.shape[1] for part in tokens)
        h, c = torch.cat(tokens, dim=1), torch.stack(embeddings, dim=1)  # [B, N, D], [B, S, T]
        found = []
        for k, block in enumerate(self.layers):
            h = self._run(block, h, c, counts)  # [B, N, D]
            if k in wanted:
                found.append(h)
        return found

    def forward(self, xs: tuple[torch.Tensor, ...], embeddings: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        grids = self._grids(xs)
        [h] = self._walk(xs, embeddings, [len(self.layers) - 1])  # [B, N, D]
        parts = h.split([rows * columns for rows, columns in grids], dim=1)  # [B, N_s, D] each
        return tuple(
            unpatchify(head(part, embedding), *grid, self.patch)  # [B, C, H >> s, W >> s]
            for head, part, embedding, grid in zip(self.heads, parts, embeddings, grids, strict=False)
        )

    def features(self, x: tuple[torch.Tensor, ...], embedding: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The tokens after every third block and after the last."""
        last = len(self.layers) - 1
        return self._walk(x, embedding, {*range(FEATURE_INTERVAL - 1, last, FEATURE_INTERVAL), last})
