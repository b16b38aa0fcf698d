"""Does the fine prediction use the coarse image? Its error where that image is swapped for another or for noise.

At a fine timestep t_64 the network is given the same noisy fine image with six coarse inputs (CONDITIONS):

    own             the noisy coarse image of the same image, t_32 = t_64: what every other is compared with
    own_at_0        the same, t_32 = 0
    clean           the coarse image without noise, t_32 = 0
    noise           pure noise N(0, I) of the noisiest timestep, which says nothing of the image
    shuffled        the noisy coarse image of another image, t_32 = t_64
    shuffled_at_0   the same, t_32 = 0

A network that reads the coarse scale has a lower error with `clean` than with `noise`, and a higher one with
`shuffled`; for one that ignores it all six are alike. A Jacobian says how far the prediction moves with the coarse
input, this whether it moves towards the image.

Shapes: n fine timesteps, c = 6 conditions, B images.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from planning.error_map import draw_noise_and_probes
from runtime.progress import Progress
from scheduler import DDIMScheduler

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.

CONDITIONS = ("own", "own_at_0", "clean", "noise", "shuffled", "shuffled_at_0")
COUPLING_ERRORS = ("mse_64", "clipped_mse_64")


def measure_coupling(
    denoise: Callable[[Pair, Pair], Pair],
    scheduler: DDIMScheduler,
    images_64: torch.Tensor,  # [B, C, H, W], float, in [-1, 1]; H and W even, B at least 2
    t_64: Sequence[int],  # [n], of positive SNR
    seed: int = 0,
    batch_size: int = 64,  # images in one call of the denoiser
    autocast: Callable[[], AbstractContextManager] | None = None,  # entered around every call
    progress: bool = True,
) -> dict[str, Any]:
    """The denoising error of the fine image of a two-scale denoiser under every coarse input of CONDITIONS.

    `denoise`, its inputs, and the noise drawn from `seed` are those of `planning.error_map.error_map`: at equal images
    and seed `own` and `own_at_0` are its cells (t_64, t_64) and (t_64, 0), but at the ends of flow. Every condition
    sees the same fine images and noise; `noise` is the noise of `own` alone, and `shuffled` goes by one cycle through
    all images in an order drawn from `seed`, so that nobody is given its own. Costs n c ⌈B / batch_size⌉ calls.

    Returns, on the CPU: t_64 int64 `[n]`; t_32 int64 `[n, c]`; mse_64 and clipped_mse_64 float64 `[n, c, B]`, the
    squared error ‖x_64 - x̂_64‖² of every image (of its residual, in that representation), summed over its values, in
    units of x², as predicted and with x̂ clamped to [-1, 1] as the sampler clamps it.

    Raises ValueError for images of another kind, fewer than 2, no timestep, one outside the schedule or without
    signal, batch_size below 1, and predictions that are not finite.
    """
    shape, device = list(images_64.shape), images_64.device
    if images_64.ndim != 4 or not images_64.is_floating_point() or shape[0] < 2 or shape[2] % 2 or shape[3] % 2:
        raise ValueError(
            f"The fine images have shape {shape}, {images_64.dtype}, but must be float [B, C, H, W] of at least 2 "
            "images of even height and width."
        )
    last = scheduler.num_train_timesteps - 1
    bad = [t for t in t_64 if not 0 <= t <= last or scheduler.snr[t] == 0]
    if bad or not len(t_64):
        raise ValueError(
            f"The fine timesteps must be of positive SNR in 0 to {last}, at least one, but "
            f"{bad[0] if bad else 'none'} is given."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
    representation = scheduler.representation
    images = representation.split(images_64)
    noise_64, noise_32 = representation.project(draw_noise_and_probes(images, 0, seed)[0])
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    tables = scheduler.to(device)

    errors = torch.zeros(len(COUPLING_ERRORS), len(t_64), len(CONDITIONS), shape[0], dtype=torch.float64)
    t_32 = torch.zeros(len(t_64), len(CONDITIONS), dtype=torch.int64)
    calls = [(i, k) for i in range(len(t_64)) for k in range(len(CONDITIONS))]
    for i, k in Progress(calls, desc="coupling", unit="condition", disable=not progress):
        t = int(t_64[i])
        x_64 = tables.add_noise(images[0], noise_64, t)
        x_32, t_32[i, k] = _coarse_input(CONDITIONS[k], tables, images[1], noise_32, partner.to(device), t)
        for chosen in torch.arange(shape[0]).split(batch_size):
            batch = chosen.to(device)
            ts = tuple(torch.full_like(batch, value) for value in (t, t_32[i, k].item()))
            with torch.no_grad(), autocast() if autocast else nullcontext():
                predictions = denoise((x_64[batch], x_32[batch]), ts)
            # In fp64, because x̂ is the difference of almost equal numbers where there is little noise.
            xs = (x_64[batch].double(), x_32[batch].double())
            x0s = tuple(tables.predict_x0(p.double(), u, x) for p, u, x in zip(predictions, ts, xs, strict=True))
            for e, estimate in enumerate((x0s[0], representation.clamp(x0s)[0])):
                errors[e, i, k, chosen] = (images[0][batch] - estimate).square().flatten(1).sum(1).cpu()
    if not errors.isfinite().all():
        raise ValueError("The denoiser returns what is not finite here; its weights may be damaged.")
    return {"t_64": torch.as_tensor(t_64), "t_32": t_32} | dict(zip(COUPLING_ERRORS, errors, strict=True))


def against_own(errors: torch.Tensor) -> dict[str, torch.Tensor]:
    """What conditions cost beside `own`, from errors `[n, c, B]` of `measure_coupling`; float64 `[n, c]` each.

    mean and mean_se: over images. difference and difference_se: of the paired differences to `own`. ratio and
    ratio_se: of the mean to that of `own`, as by `ratio_of_means`.

    The values of a shuffled condition are not quite independent, as every image is the partner of one other. Only
    neighbours in the cycle share an image, whose correlation is at most 1/2, so that these standard errors may be up
    to √2 too small; with independent images they are so only where the coarse input decides the error.
    """
    own = errors[:, :1]
    ratio, ratio_se = ratio_of_means(errors, own)
    result = {"ratio": ratio, "ratio_se": ratio_se}
    for name, values in (("mean", errors), ("difference", errors - own)):
        result |= {name: values.mean(-1), f"{name}_se": values.std(-1, correction=1) / math.sqrt(errors.shape[-1])}
    return result


def ratio_of_means(above: torch.Tensor, below: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio r of two means over images, and its standard error by the delta method; `[..., B]` each, to `[...]`.

    Values of one image are paired, so that the error is that of the mean of `above - r below`, over the mean of
    `below`: what both share cancels. It is NaN for a single image.
    """
    above, below = above.double(), below.double()
    ratio = above.mean(-1) / below.mean(-1)
    residual = above - ratio[..., None] * below
    count = residual.shape[-1]
    if count == 1:
        return ratio, torch.full_like(ratio, math.nan)
    return ratio, residual.std(-1, correction=1) / math.sqrt(count) / below.mean(-1).abs()


def _coarse_input(
    condition: str,
    scheduler: DDIMScheduler,
    x_32: torch.Tensor,  # [B, C, H/2, W/2]
    noise_32: torch.Tensor,
    partner: torch.Tensor,  # [B], the image whose coarse image each one gets when shuffled
    t_64: int,
) -> tuple[torch.Tensor, int]:
    # The input and its timestep.
    if condition == "clean":
        return x_32, 0
    if condition == "noise":
        last = scheduler.num_train_timesteps - 1
        return scheduler.prior(noise_32, last), last
    t_32 = 0 if condition.endswith("_at_0") else t_64
    own = scheduler.add_noise(x_32, noise_32, t_32)
    return own[partner] if condition.startswith("shuffled") else own, t_32
