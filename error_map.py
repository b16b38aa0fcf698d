"""What a two-scale denoiser does at every pair of timesteps: Jacobian blocks and denoising error.

A cell (i, j) of the map is the pair (t_grid[i], t_grid[j]) of the fine and the coarse timestep; index 0 is
noise, the last index is clean. H stands for the fine ("64") and L for the coarse ("32") scale, output first:

    HH = ∂ε_64/∂x_64   HL = ∂ε_64/∂x_32   LH = ∂ε_32/∂x_64   LL = ∂ε_32/∂x_32

Squared Frobenius norms come from random projections (Hutchinson 1990; of Jacobians, arXiv 1908.02729):
`E‖Jᵀw‖² = ‖J‖²_F` for probes w whose entries are ±1 with equal probability. They are vector-Jacobian
products, because fused attention has no forward-mode derivative. Every cell sees the same images, noise and
probes (common random numbers), so that neighbouring cells differ by their timesteps alone.

Shapes: n grid lines, B images, K probes, S samples in one call of the denoiser, each an image in a cell.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from safe_write import replacing
from scheduler import DDIMScheduler, epsilon_from_x0

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.

HEATMAP_FORMAT_VERSION = 1
BLOCKS = ("HH", "HL", "LH", "LL")

# Weight of the squared Jacobian norm as a function of S = SNR; "B" is the published default.
CHAIN_RULE_FACTORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "A": lambda snr: 1 / (1 + snr),
    "B": lambda snr: 1 / (snr * (1 + snr)),
    "C": lambda snr: snr / (4 * (1 + snr) ** 2),
    "D": lambda snr: 1 / (4 * (1 + snr) ** 2),
}


def error_map(
    denoise: Callable[[Pair, Pair], Pair],
    scheduler: DDIMScheduler,
    images_64: torch.Tensor,  # [B, C, H, W], float, in [-1, 1]; H and W even
    t_grid: Sequence[int] | torch.Tensor,  # [n], strictly falling timesteps
    num_probes: int = 4,
    seed: int = 0,
    batch_size: int = 16,  # largest S in one call; samples of several cells may share one
    autocast: Callable[[], AbstractContextManager] | None = None,  # entered around every call
    progress: bool = True,
) -> dict[str, Any]:
    """Squared Jacobian norms and denoising errors of a two-scale denoiser in all n x n cells of a grid.

    `denoise((x_64, x_32), (t_64, t_32))` gets noisy images `[S, C, H, W]` and `[S, C, H/2, W/2]` and int64
    timesteps `[S]` twice, and returns its two predictions, shaped like the images, in the prediction type
    of the scheduler; they are converted to ε. It must treat samples independently (no batch statistics),
    since one call may hold several cells or part of one. It runs on the device and in the dtype of
    images_64; only gradients of its inputs are taken. The coarse image is the 2x2 mean of the fine one.
    Noise and probes are drawn once from `seed`, on the CPU, independently per image. The whole map costs
    about n² B / batch_size calls with 2K backward passes each.

    Returns, on the CPU, all float64 `[n, n]` (row i: t_64, column j: t_32) unless stated:
        t_grid int64 `[n]`; snr_grid, log_snr_grid float64 `[n]`
        jacobian, jacobian_se: dicts over `BLOCKS`; mean of ‖J‖²_F over images, and its standard error
        jacobian_per_image: float32 `[4, n, n, B]`, blocks in the order of `BLOCKS`, mean over probes
        mse_64, mse_32, mse_64_se, mse_32_se: E‖ε_s - ε̂_s‖² / SNR(t_s) = E‖x_s - x̂_s‖², total over the
            C·H·W dimensions of scale s, in units of x², mean over images
        num_probes, num_images, num_pixels_64 (H·W), num_pixels_32 (H·W/4), seed: int

    A standard error is the sample deviation (ddof 1) over images of the mean over probes, divided by √B.
    Images, each with its own noise and probes, are the independent draws, so this covers all three sources
    of chance, whereas K·B products would not be independent draws. With one image it is taken over the
    probes and says how well the norm for that image and noise is known; where there is only one value it
    is NaN. Errors of different cells are correlated: to compare cells, resample `jacobian_per_image`.

    Raises ValueError for images or a grid of the wrong kind, zero SNR on the grid, num_probes or batch_size
    below 1, and a denoiser that returns other shapes or detached predictions.
    """
    timesteps = _check_grid(t_grid, scheduler)  # [n]
    _check_images(images_64)
    num_images, num_lines = len(images_64), len(timesteps)
    for name, value in (("num_probes", num_probes), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1.")

    device = images_64.device
    images = (images_64, F.avg_pool2d(images_64, 2))  # [B, C, H, W], half
    noise, probes = _draw(images, num_probes, seed)  # [B, ...], [K, B, ...]
    tables = scheduler.to(device)

    # Samples are numbered cell by cell, and a call takes any run of them.
    num_samples = num_lines**2 * num_images
    norms = torch.empty(len(BLOCKS), num_probes, num_samples, dtype=torch.float64)
    mses = torch.empty(2, num_samples, dtype=torch.float64)
    with tqdm(total=num_lines**2, desc="error map", unit="cell", disable=not progress) as bar:
        for start in range(0, num_samples, batch_size):
            stop = min(start + batch_size, num_samples)
            cell, image = _divmod(torch.arange(start, stop), num_images)  # [S], [S]
            ts = tuple(timesteps[line].to(device) for line in _divmod(cell, num_lines))
            image = image.to(device)
            norms[:, :, start:stop], mses[:, start:stop] = _evaluate(
                denoise,
                tables,
                tuple(x[image] for x in images),
                tuple(e[image] for e in noise),
                tuple(w[:, image] for w in probes),
                ts,
                autocast or nullcontext,
            )
            bar.update(stop // num_images - start // num_images)

    norms = norms.view(len(BLOCKS), num_probes, num_lines, num_lines, num_images)
    mses = mses.view(2, num_lines, num_lines, num_images)
    per_image = norms.mean(1)  # [4, n, n, B]
    norms_se = _standard_error(per_image, -1) if num_images > 1 else _standard_error(norms[..., 0], 1)
    mses_se = _standard_error(mses, -1)  # [2, n, n]
    return {
        "t_grid": timesteps,
        "snr_grid": scheduler.snr.cpu()[timesteps],
        "log_snr_grid": scheduler.log_snr.cpu()[timesteps],
        "jacobian": dict(zip(BLOCKS, per_image.mean(-1), strict=True)),
        "jacobian_se": dict(zip(BLOCKS, norms_se, strict=True)),
        "jacobian_per_image": per_image.float(),
        "mse_64": mses[0].mean(-1),
        "mse_32": mses[1].mean(-1),
        "mse_64_se": mses_se[0],
        "mse_32_se": mses_se[1],
        "num_probes": num_probes,
        "num_images": num_images,
        "num_pixels_64": images[0].shape[-2] * images[0].shape[-1],
        "num_pixels_32": images[1].shape[-2] * images[1].shape[-1],
        "seed": seed,
    }


def published_errors(result: dict[str, Any], factor: str = "B") -> Pair:
    """The published error maps of the two scales, from what `error_map` returned.

    `error_s = ‖∂ε_s/∂x_s‖²_F / (H_s W_s)² · f(SNR(t_s))` with f from `CHAIN_RULE_FACTORS`. The SNR of the
    fine scale varies along axis 0 and that of the coarse scale along axis 1. Channels are not counted.
    Returns (error_64, error_32), float64 `[n, n]` each. Raises ValueError for an unknown factor.
    """
    if factor not in CHAIN_RULE_FACTORS:
        raise ValueError(f"Unknown chain-rule factor '{factor}'; choose one of {', '.join(CHAIN_RULE_FACTORS)}.")
    weight = CHAIN_RULE_FACTORS[factor](result["snr_grid"])  # [n]
    error_64 = result["jacobian"]["HH"] / result["num_pixels_64"] ** 2 * weight[:, None]
    error_32 = result["jacobian"]["LL"] / result["num_pixels_32"] ** 2 * weight[None, :]
    return error_64, error_32


def save_heatmap(file: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a heatmap file atomically: the maps of `error_map` with whatever the stage adds, plain types only."""
    with replacing(file) as temporary:
        torch.save({"format_version": HEATMAP_FORMAT_VERSION} | content, temporary)


def load_heatmap(file: str | os.PathLike) -> dict[str, Any]:
    """Read a heatmap file.

    Raises FileNotFoundError if it is missing, ValueError if it is damaged, no heatmap, or of a later version.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"Heatmap {file} does not exist; make it with compute_heatmap_30.py.")
    try:
        content = torch.load(file, weights_only=True)
    except Exception as error:  # A damaged zip or pickle raises whatever the damage happens to hit.
        raise ValueError(f"Heatmap {file} is damaged ({type(error).__name__}); compute it again.") from error
    if not isinstance(content, dict) or not {"format_version", "jacobian", "t_grid", "fingerprint"} <= content.keys():
        raise ValueError(f"{file} is not a heatmap; make one with compute_heatmap_30.py.")
    if content["format_version"] > HEATMAP_FORMAT_VERSION:
        raise ValueError(f"Heatmap {file} has format version {content['format_version']}; update LIFT to read it.")
    return content


def _check_grid(t_grid: Sequence[int] | torch.Tensor, scheduler: DDIMScheduler) -> torch.Tensor:
    timesteps = torch.as_tensor(t_grid).cpu()
    last = scheduler.num_train_timesteps - 1
    if timesteps.ndim != 1 or len(timesteps) == 0 or timesteps.is_floating_point():
        raise ValueError(f"t_grid has shape {list(timesteps.shape)}, {timesteps.dtype}, but must be integers [n].")
    timesteps = timesteps.long()
    if timesteps.min() < 0 or timesteps.max() > last:
        raise ValueError(
            f"t_grid spans {timesteps.min()} to {timesteps.max()} but the schedule has timesteps 0 to {last}."
        )
    if (timesteps.diff() >= 0).any():
        raise ValueError("t_grid must fall strictly, from noise (index 0) to clean.")
    if scheduler.snr[timesteps[0]] == 0:
        raise ValueError(f"The SNR at timestep {timesteps[0]} is 0; start t_grid below it.")
    return timesteps


def _check_images(images_64: torch.Tensor) -> None:
    shape = list(images_64.shape)
    if images_64.ndim != 4 or not images_64.is_floating_point():
        raise ValueError(f"images_64 has shape {shape}, {images_64.dtype}, but must be float [B, C, H, W].")
    if 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"images_64 has shape {shape} but needs at least one image of even height and width.")


def _draw(images: Pair, num_probes: int, seed: int) -> tuple[Pair, Pair]:
    generator = torch.Generator().manual_seed(seed)
    # Noise comes first, so that it does not change with the number of probes.
    noise = tuple(torch.randn(x.shape, generator=generator).to(x) for x in images)
    probes = tuple((2 * torch.randint(0, 2, (num_probes, *x.shape), generator=generator) - 1).to(x) for x in images)
    return noise, probes


def _divmod(index: torch.Tensor, divisor: int) -> Pair:
    return index // divisor, index % divisor


def _evaluate(
    denoise: Callable[[Pair, Pair], Pair],
    scheduler: DDIMScheduler,
    images: Pair,  # [S, C, H, W], [S, C, H/2, W/2]
    noise: Pair,  # like images
    probes: Pair,  # [K, S, ...]
    ts: Pair,  # [S], [S]
    autocast: Callable[[], AbstractContextManager],
) -> Pair:
    # Returns ‖Jᵀw‖² [4, K, S] and the denoising errors [2, S].
    with torch.enable_grad():
        xs = tuple(scheduler.add_noise(x, e, t).requires_grad_() for x, e, t in zip(images, noise, ts, strict=True))
        with autocast():
            predictions = denoise(xs, ts)
        _check_predictions(predictions, xs)
        epsilons = [_epsilon(scheduler, p.to(x.dtype), t, x) for p, x, t in zip(predictions, xs, ts, strict=True)]
    num_probes = len(probes[0])
    norms = []
    for scale, (epsilon, ws) in enumerate(zip(epsilons, probes, strict=True)):
        for k, w in enumerate(ws):
            last = scale == 1 and k == num_probes - 1
            # One pass per probe is as fast as vmap over the probes and holds 1/K of its gradients, and a
            # prediction that ignores one scale has a zero block there.
            grads = torch.autograd.grad(epsilon, xs, w, retain_graph=not last, materialize_grads=True)
            norms.append(torch.stack([_sum_of_squares(g) for g in grads]))  # [2, S]
    norms = torch.stack(norms).view(2, num_probes, 2, -1).transpose(1, 2)  # [out, in, K, S]
    mses = [
        _sum_of_squares(e - epsilon.detach()) / scheduler.snr[t]
        for e, epsilon, t in zip(noise, epsilons, ts, strict=True)
    ]
    return norms.flatten(0, 1), torch.stack(mses)


def _check_predictions(predictions: Pair, xs: Pair) -> None:
    if not isinstance(predictions, tuple | list) or len(predictions) != 2:
        raise ValueError("The denoiser must return two predictions, fine and coarse.")
    for name, prediction, x in zip(("fine", "coarse"), predictions, xs, strict=True):
        if prediction.shape != x.shape:
            raise ValueError(
                f"The denoiser returned a {name} prediction of shape {list(prediction.shape)} for images of "
                f"shape {list(x.shape)}; both must agree."
            )
        if not prediction.requires_grad:
            raise ValueError(
                f"The {name} prediction of the denoiser carries no gradient; run it outside torch.no_grad() "
                "and do not detach what it returns."
            )


def _epsilon(scheduler: DDIMScheduler, prediction: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if scheduler.prediction_type == "epsilon":
        return prediction
    alpha_bar = scheduler.alphas_cumprod[t].to(x.dtype)[:, None, None, None]  # [S, 1, 1, 1]
    return epsilon_from_x0(x, scheduler.predict_x0(prediction, t, x), alpha_bar)


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(1, dtype=torch.float64)  # [S]


def _standard_error(samples: torch.Tensor, dim: int) -> torch.Tensor:
    count = samples.shape[dim]
    if count == 1:
        return torch.full_like(samples.select(dim, 0), math.nan)
    return samples.std(dim, correction=1) / math.sqrt(count)
