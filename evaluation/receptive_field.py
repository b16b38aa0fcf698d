"""How much of a noisy image a pixel of the predicted clean image depends on, measured by gradients.

For a pixel p of the clean image x̂ that is predicted, and a pixel q of a noisy image x, let

    g(p, q) = Σ_{c, d} (∂x̂_c(p) / ∂x_d(q))²,

over the channels of both. Its mean over images at one noise level and over pixels, by the offset o = q - p, is a map of
the receptive field, and the share of the map that lies in a window around offset 0 says how wide the field is in effect
(arXiv 1701.04128). It is the sum over all q, in place of a probe of it, that `planning.error_map` takes.

From pixels near a border some offsets lead out of the image. The mean at an offset is over the pairs (p, q) that exist,
so that the map of a convolution is its squared kernel. Divided by the number of all p instead, the far offsets would
count the less the fewer pixels have them, and windows would look smaller than they are. An offset that no pair has
counts as zero. With circular borders all offsets exist, each the shorter way round.

Of several scales, offsets are counted in pixels of the scale that is read, from the pixel there that covers p, or from
the upper left of those that p covers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from images.representation import Images
from runtime.device import exact_autocast, full_precision
from scheduler import DDIMScheduler, Denoiser


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Squared gradients of a predicted clean image with regard to a noisy image of one scale, on the CPU.

    energies: float64 `[R, S]`, the mean of g(p, p + o); offset 0 is at `[R // 2, S // 2]`, rows and columns follow
    those of images. R = 2 H - 1 and S = 2 W - 1, with circular borders H and W. pairs: int64 `[R, S]`, of how many
    pairs. total: the mean over pixels p of Σ_q g(p, q), over all q that exist.
    """

    energies: torch.Tensor
    pairs: torch.Tensor
    total: float

    @property
    def sides(self) -> range:
        """The sides of all windows around offset 0: 1, 3, 5, ..., the last of which holds the whole map."""
        return range(1, 2 * max(size // 2 for size in self.energies.shape) + 2, 2)

    def shares(self) -> torch.Tensor:
        """The share of the map in each window of `sides`, float64 `[n]`, rising to 1.

        Raises ValueError if there is no gradient at all.
        """
        rows, columns = (torch.arange(size) - size // 2 for size in self.energies.shape)
        distance = torch.maximum(rows.abs()[:, None], columns.abs())  # [R, S]
        rings = torch.zeros(len(self.sides), dtype=torch.float64)
        held = rings.index_add(0, distance.flatten(), self.energies.flatten()).cumsum(0)
        if not held[-1] > 0:
            raise ValueError("The prediction does not depend on the noisy image, so that no window has a share of it.")
        return held / held[-1]

    def side_of(self, share: float) -> int:
        """The side of the smallest window that holds a share in (0, 1] of the map; raises ValueError for another."""
        if not 0 < share <= 1:
            raise ValueError(f"A window holds a share above 0 and up to 1, not {share}.")
        return self.sides[int((self.shares() < share).sum())]


def measure_receptive_fields(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    xs: Images,  # noisy images of each scale, fine first, float [B, C, H, W]
    ts: Sequence[float],  # the timestep of each scale, whole or not
    of: int = 0,  # the scale whose clean image is looked at
    num_pixels: int | None = 1,  # of each image; None: all
    circular: bool = False,  # whether images go on at the other side, as the denoiser sees them
    margin: int = 0,  # pixels nearer to a border are not looked at
    seed: int = 0,
    batch_size: int = 16,  # images in one call of the denoiser
) -> tuple[ReceptiveField, ...]:
    """The receptive field of a predicted clean image in the noisy image of every scale that is read, fine first.

    `denoise(xs, ts)` gets noisy images `[S, C, H, W]` and timesteps `[S]` of each scale and returns predictions of the
    scheduler's type, without variances (`LoadedModel.denoise`); they are converted to clean images, not clamped. It
    must treat images independently and let gradients pass. It runs without autocast and TF32, on the device and in the
    dtype of the images; nothing else than they takes a gradient.

    The pixels of every image are drawn from `seed`, whatever the batch size. Every channel of each costs a backward
    pass, and a batch of images one call: C num_pixels B / batch_size passes.

    Raises ValueError for images that are not float `[B, C, H, W]` of equally many, other numbers of timesteps than of
    scales, a scale that is not predicted, fewer than 1 pixel or more than there are, a batch_size below 1, and
    gradients that are none or not finite.
    """
    _check(xs, ts, batch_size)
    device, shape = xs[0].device, xs[of].shape
    pixels = _choose(shape, num_pixels, margin, seed)  # [B, K, 2]
    tables = scheduler.to(device)
    sizes = [x.shape[-2:] for x in xs]
    sums = [torch.zeros(2, *(size if circular else [2 * n - 1 for n in size]), dtype=torch.float64) for size in sizes]
    sums = [each.to(device) for each in sums]
    for chosen in torch.arange(shape[0]).split(batch_size):
        batch = tuple(x[chosen.to(device)].requires_grad_() for x in xs)
        times = tuple(_times(t, len(chosen), device) for t in ts)
        with torch.enable_grad(), full_precision(device), exact_autocast(device, "fp32"):
            predictions = denoise(batch, times)
            if not of < len(predictions) or not predictions[of].requires_grad:
                raise ValueError(f"The denoiser returns no prediction of scale {of} that lets gradients pass.")
            clean = tables.predict_x0(predictions[of], times[of], batch[of])
            for places in pixels[chosen].transpose(0, 1):  # [S, 2]
                squares = _squared_gradients(clean, batch, places)
                for each, found, size in zip(sums, squares, sizes, strict=True):
                    inside = [(y * size[0] // shape[2], x * size[1] // shape[3]) for y, x in places.tolist()]
                    _add(each, found, inside, circular)
    count = pixels.shape[0] * pixels.shape[1]
    return tuple(_field(each.cpu(), count) for each in sums)


def share_by_scale(fields: Sequence[ReceptiveField]) -> torch.Tensor:
    """What share of the squared gradient of a prediction comes from each scale that is read; float64 `[S]`, sums to 1.

    The second, of a fine prediction of two scales, is ‖J_HL‖² / (‖J_HH‖² + ‖J_HL‖²), blocks as in `planning.error_map`
    of the clean image. Raises ValueError if there is no gradient at all.
    """
    totals = torch.tensor([field.total for field in fields], dtype=torch.float64)
    if not totals.sum() > 0:
        raise ValueError("The prediction depends on no noisy image, so that no scale has a share of it.")
    return totals / totals.sum()


def _check(xs: Images, ts: Sequence[float], batch_size: int) -> None:
    for x in xs:
        if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape or len(x) != len(xs[0]):
            raise ValueError(
                f"Noisy images must be float [B, C, H, W], as many of each scale; got {x.dtype} {list(x.shape)}."
            )
    if len(xs) != len(ts):
        raise ValueError(f"Every scale has a timestep, but there are {len(xs)} scales and {len(ts)} timesteps.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")


def _times(t: float, count: int, device: torch.device) -> torch.Tensor:
    # Tables are looked up at whole timesteps, and curves computed in between.
    return torch.full([count], t, dtype=torch.int64 if t == int(t) else torch.float64, device=device)


def _choose(shape: torch.Size, num_pixels: int | None, margin: int, seed: int) -> torch.Tensor:
    # Rows and columns int64 [B, K, 2], of no image the same one twice.
    places = torch.cartesian_prod(*(torch.arange(size)[margin : size - margin] for size in shape[-2:]))  # [N, 2]
    if not len(places) or margin < 0:
        raise ValueError(f"A margin of {margin} pixels leaves none of images of {shape[-2]}x{shape[-1]}.")
    if num_pixels is None:
        return places.expand(shape[0], -1, -1)
    if not 1 <= num_pixels <= len(places):
        raise ValueError(f"num_pixels is {num_pixels}, but 1 to {len(places)} pixels can be looked at.")
    order = torch.rand(shape[0], len(places), generator=torch.Generator().manual_seed(seed)).argsort(1)
    return places[order[:, :num_pixels]]


def _squared_gradients(clean: torch.Tensor, xs: Images, places: torch.Tensor) -> list[torch.Tensor]:
    # g(p, q) of one pixel p of every image: float64 [S, H, W] by scale.
    rows, columns = places.T.to(clean.device)
    values = clean[torch.arange(len(clean), device=clean.device), :, rows, columns]  # [S, C]
    squares = [torch.zeros(len(x), *x.shape[2:], dtype=torch.float64, device=x.device) for x in xs]
    for value in values.sum(0):  # Images are independent, so that the sum has the gradients of each.
        gradients = torch.autograd.grad(value, xs, retain_graph=True, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                square += gradient.double().square().sum(1)
    return squares


def _add(sums: torch.Tensor, squares: torch.Tensor, places: Sequence[tuple[int, int]], circular: bool) -> None:
    # To the sums and numbers of pairs [2, R, S], of offsets from these places.
    h, w = squares.shape[1:]
    for square, (y, x) in zip(squares, places, strict=True):
        pair = torch.stack([square, torch.ones_like(square)])  # [2, H, W]
        if circular:
            sums += pair.roll((h // 2 - y, w // 2 - x), (1, 2))
        else:
            sums[:, h - 1 - y : 2 * h - 1 - y, w - 1 - x : 2 * w - 1 - x] += pair


def _field(sums: torch.Tensor, count: int) -> ReceptiveField:
    total = sums[0].sum().item() / count
    if not math.isfinite(total):
        raise ValueError("The denoiser has gradients that are not finite here; its weights may be damaged.")
    return ReceptiveField(sums[0] / sums[1].clamp(min=1), sums[1].long(), total)
