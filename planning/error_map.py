"""What a denoiser does at every pair of timesteps of two scales: Jacobian blocks and denoising error.

A cell (i, j) of the map is the pair (t_grid[i], t_grid[j]) of the fine and the coarse timestep; index 0 is
noise, the last index is clean. H stands for the fine ("64") and L for the coarse ("32") scale, output first:

    HH = ∂ε_64/∂x_64   HL = ∂ε_64/∂x_32   LH = ∂ε_32/∂x_64   LL = ∂ε_32/∂x_32

The map of a denoiser that predicts the fine scale alone has the first two, and no error of the coarse image. One that
reads the fine scale alone too has the first, and is the same in all columns.

Squared Frobenius norms come from random projections (Hutchinson 1990; of Jacobians, arXiv 1908.02729):
`E‖Jᵀw‖² = ‖J‖²_F` for probes w whose entries are ±1 with equal probability. They are vector-Jacobian
products, because fused attention has no forward-mode derivative. Every cell sees the same images, noise and
probes (common random numbers), so that neighbouring cells differ by their timesteps alone.

Shapes: n grid lines, B images, K probes, M measured cells, S samples in one call of the denoiser, each an
image in a cell.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from images.representation import OVERCOMPLETE
from paths.map_interpolation import interpolate_map, nearest_in_row
from planning.map_file import PartFiles
from runtime.distributed import Processes
from runtime.progress import Progress
from scheduler import DDIMScheduler

Pair = tuple[torch.Tensor, torch.Tensor]  # Fine first.
Scales = tuple[torch.Tensor, ...]  # Both, fine first, or the fine one alone.

BLOCKS = ("HH", "HL", "LH", "LL")
MSES = ("mse_64", "mse_32", "mse_64_low")
CLIPPED_MSES = tuple(f"clipped_{name}" for name in MSES)
MAPS = ("all", "blocks", "mse")
DIFFERENTIATED = ("eps", "x0")
SECONDS_BETWEEN_PARTS = 30

# Weight of the squared Jacobian norm as a function of S = SNR; "B" is the published default.
CHAIN_RULE_FACTORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "A": lambda snr: 1 / (1 + snr),
    "B": lambda snr: 1 / (snr * (1 + snr)),
    "C": lambda snr: snr / (4 * (1 + snr) ** 2),
    "D": lambda snr: 1 / (4 * (1 + snr) ** 2),
}

# What the squared norm of a scale's block is divided by, from its pixels H·W and its dimensions C·H·W.
NORMALISATIONS: dict[str, Callable[[int, int], int]] = {
    "published": lambda num_pixels, num_dims: num_pixels**2,
    "per_dim": lambda num_pixels, num_dims: num_dims,
    "sum": lambda num_pixels, num_dims: 1,
}


def error_map(
    denoise: Callable[[Scales, Scales], Scales],
    scheduler: DDIMScheduler,
    images_64: torch.Tensor,  # [B, C, H, W], float, in [-1, 1]; H and W even
    t_grid: Sequence[int] | torch.Tensor,  # [n], strictly falling timesteps
    num_probes: int = 4,
    seed: int = 0,
    batch_size: int = 16,  # largest S in one call; samples of several cells may share one
    autocast: Callable[[], AbstractContextManager] | None = None,  # entered around every call
    progress: bool = True,
    maps: str = "all",  # one of MAPS
    of: str = "eps",  # one of DIFFERENTIATED: the Jacobian of the noise or of the clean image predicted
    coarse: int | None = None,  # measure this many lines per axis, and interpolate
    processes: Processes | None = None,  # that share the cells
    parts: PartFiles | None = None,  # where unfinished work is kept
    num_predictions: int = 2,  # of the denoiser: both scales, or 1 for the fine one alone
    num_scales: int = 2,  # that the denoiser reads, at least as many as it predicts
    cells: torch.Tensor | None = None,  # [n, n] bool: measure these alone, at least one in every row
) -> dict[str, Any]:
    """Squared Jacobian norms and denoising errors of a denoiser in all n x n cells of a grid.

    `denoise((x_64, x_32), (t_64, t_32))` gets noisy images `[S, C, H, W]` and `[S, C, H/2, W/2]` and int64
    timesteps `[S]` twice, and returns a tuple of its predictions P, one or two, shaped like the images, in the
    prediction type of the scheduler; they are converted to ε. What x_64 and x_32 are of an image says the
    representation of the scheduler. It must treat samples independently (no batch statistics), since one call may hold
    several cells or part of one. It runs on the device and in the dtype of images_64; only gradients of its inputs are
    taken. Noise and probes are drawn once from `seed`, on the CPU, independently per image and whatever P. The whole
    map costs n² B / batch_size calls, with P K backward passes each unless `maps` is "mse".

    With `coarse` m < n, m lines per axis, about even in both index and log SNR, are measured, and the maps of every
    image are interpolated in log space over log SNR; m further cells off those lines are measured to tell the error.

    With `cells` all others take the values of the nearest of their row, in log SNR. With one scale,
    `denoise((x_64,), (t_64,))` is called at each of the n lines, and what it gives is that of every column. Neither
    goes with `coarse`.

    Returns, on the CPU, all float64 `[n, n]` (row i: t_64, column j: t_32) unless stated:
        t_grid int64 `[n]`; snr_grid, log_snr_grid float64 `[n]`
        jacobian, jacobian_se: dicts over `BLOCKS`; mean of ‖J‖²_F over images, and its standard error
        jacobian_per_image: float32 `[4, n, n, B]`, blocks in the order of `jacobian`, mean over probes
        mse_64, mse_32, mse_64_se, mse_32_se: E‖ε_s - ε̂_s‖² / SNR(t_s) = E‖x_s - x̂_s‖², total over the
            C·H·W dimensions of scale s, in units of x², mean over images
        mse_64_low, mse_64_low_se: the part of mse_64 in the low band of the fine image, 4 ‖A (x_64 - x̂_64)‖² with A
            the 2x2 mean; the rest is in its details. A perfect denoiser has mse_64_low = 4 mse_32. Zero for residuals
        clipped_mse_64, clipped_mse_32, clipped_mse_64_low, each with _se: the same of x̂ clamped to [-1, 1], as the
            sampler clamps it
        mse_per_image: float32 `[6, n, n, B]`, in the order of `MSES` and `CLIPPED_MSES`; `per_image` reads both
        eps_mse_64, eps_mse_32, eps_mse_64_se, eps_mse_32_se: E‖ε_s - ε̂_s‖² per dimension
        measured: bool; where the map was measured and kept, not interpolated
        interpolation_error: with `coarse`, a dict over blocks and errors of the median and largest relative error
            at the held-out cells, and "cells", which these are; else None
        num_probes, num_images, num_pixels_64 (H·W), num_pixels_32 (H·W/4), num_dims_64 (C·H·W), num_dims_32,
        seed: int; of, representation: str
    `maps` "blocks" leaves the mse keys out, "mse" those of the Jacobian. With one prediction there are the blocks HH
    and HL alone, and all that is named mse_32 is left out; jacobian_per_image is then `[2, n, n, B]` and mse_per_image
    `[4, n, n, B]`, in the same order. With one scale HL is left out too.

    A standard error is the sample deviation (ddof 1) over images of the mean over probes, divided by √B.
    Images, each with its own noise and probes, are the independent draws, so this covers all three sources
    of chance, whereas K·B products would not be independent draws. With one image it is taken over the
    probes and says how well the norm for that image and noise is known; where there is only one value it
    is NaN. Errors of different cells are correlated: to compare cells, resample the values per image.

    Raises ValueError for images or a grid of the wrong kind, zero SNR on the grid, num_probes or batch_size
    below 1, an impossible `maps`, `of`, `coarse`, `cells`, num_predictions or num_scales, and a denoiser that returns
    another number of predictions, other shapes, detached predictions, or what is not finite.
    """
    timesteps = _check_grid(t_grid, scheduler)  # [n]
    _check_images(images_64)
    num_images, num_lines = len(images_64), len(timesteps)
    for name, value in (("num_probes", num_probes), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value} but must be at least 1.")
    for name, value, choices in (("maps", maps, MAPS), ("of", of, DIFFERENTIATED)):
        if value not in choices:
            raise ValueError(f"{name} is '{value}' but must be one of {', '.join(choices)}.")
    if num_predictions not in (1, 2):
        raise ValueError(f"num_predictions is {num_predictions} but must be 1 (the fine scale alone) or 2.")
    if not num_predictions <= num_scales <= 2:
        raise ValueError(f"num_scales is {num_scales} but must be {num_predictions} (the predictions) to 2.")
    if coarse is not None and not 2 <= coarse < num_lines:
        raise ValueError(f"coarse is {coarse} but a grid of {num_lines} lines can be thinned to 2 to {num_lines - 1}.")
    if cells is not None and (cells.shape != (num_lines, num_lines) or not cells.any(1).all()):
        raise ValueError(f"cells must be bool [{num_lines}, {num_lines}] like the grid, and hold one in every row.")
    if coarse is not None and (cells is not None or num_scales == 1):
        raise ValueError("coarse thins a grid of which all pairs count; leave it out for some cells or for one scale.")

    images = scheduler.representation.split(images_64)  # [B, C, H, W], half
    log_snr_grid = scheduler.log_snr.cpu()[timesteps]
    held_out = []
    if coarse is None:
        # One scale has one cell in a row, whichever that is called.
        mask = torch.eye(num_lines, dtype=torch.bool) if num_scales == 1 else cells
        mask = torch.ones(num_lines, num_lines, dtype=torch.bool) if mask is None else mask.cpu()
        places = mask.nonzero()  # [M, 2]
        nearest = torch.from_numpy(nearest_in_row(mask.numpy(), log_snr_grid.numpy()))
        sources = (mask.flatten().cumsum(0) - 1).view(num_lines, num_lines).gather(1, nearest)  # [n, n]
    else:
        lines = _coarse_lines(log_snr_grid.numpy(), coarse)
        held_out = _held_out_cells(lines, num_lines, coarse, seed)
        places = torch.tensor([*itertools.product(lines, repeat=2), *held_out])
    blocks, kinds = _names(num_predictions, num_scales)
    norms, mses = _measure(
        denoise,
        scheduler,
        images,
        timesteps[places[:, :num_scales]],
        num_probes if maps != "mse" else 0,
        seed,
        batch_size,
        autocast or nullcontext,
        of,
        progress,
        processes,
        parts,
        num_predictions,
    )  # [one for each block, K, M, B], [6 or 4, M, B]

    measured = torch.zeros(num_lines, num_lines, dtype=torch.bool)
    measured[tuple(places[: len(places) - len(held_out)].T)] = True
    if num_scales == 1:
        measured[:] = True
    values = {}  # Name -> [M, B], mean over probes.
    if maps != "mse":
        values |= dict(zip(blocks, norms.mean(1), strict=True))
    if maps != "blocks":
        values |= dict(zip(kinds, mses, strict=True))

    def spread_out(value: torch.Tensor) -> torch.Tensor:  # [M, B] -> [n, n, B]
        return value[sources] if coarse is None else _interpolated(value, lines, log_snr_grid)

    spread = {name: spread_out(value) for name, value in values.items()}
    interpolation_error = None
    if coarse is not None:
        interpolation_error = _interpolation_error(values, spread, held_out)
    num_dims = [round(scheduler.representation.fine_share * images[0][0].numel()), images[1][0].numel()]
    snr_grid = scheduler.snr.cpu()[timesteps]
    result = {
        "t_grid": timesteps,
        "snr_grid": snr_grid,
        "log_snr_grid": log_snr_grid,
        "measured": measured,
        "interpolation_error": interpolation_error,
        "num_probes": num_probes,
        "num_images": num_images,
        "num_pixels_64": images[0].shape[-2] * images[0].shape[-1],
        "num_pixels_32": images[1].shape[-2] * images[1].shape[-1],
        "num_dims_64": num_dims[0],
        "num_dims_32": num_dims[1],
        "seed": seed,
        "of": of,
        "representation": scheduler.representation.name,
    }
    if maps != "mse":
        errors = {name: _standard_error(spread[name], -1) for name in blocks}
        if num_images == 1:
            probes = norms.permute(0, 2, 3, 1)[:, :, 0]  # [blocks, M, K]
            errors = {
                name: _standard_error(spread_out(values), -1) for name, values in zip(blocks, probes, strict=True)
            }
        result |= {
            "jacobian": {name: spread[name].mean(-1) for name in blocks},
            "jacobian_se": errors,
            "jacobian_per_image": torch.stack([spread[name] for name in blocks]).float(),
        }
    if maps != "blocks":
        result["mse_per_image"] = torch.stack([spread[name] for name in kinds]).float()
        for name in kinds:
            result |= {name: spread[name].mean(-1), f"{name}_se": _standard_error(spread[name], -1)}
        scales = list(zip(MSES[:2], (snr_grid[:, None], snr_grid), num_dims, strict=True))
        for name, snr, count in scales[:num_predictions]:
            result |= {f"eps_{kind}": result[kind] * snr / count for kind in (name, f"{name}_se")}
    return result


def per_image(result: dict[str, Any], name: str) -> torch.Tensor:
    """The values float32 `[n, n, B]` per image of a block or a denoising error, by its name.

    Raises ValueError for a map that does not hold them.
    """
    stacks = {
        "jacobian_per_image": list(result.get("jacobian", ())),
        "mse_per_image": [kind for kind in MSES + CLIPPED_MSES if kind in result],
    }
    for stack, names in stacks.items():
        if name in names:
            return result[stack][names.index(name)]
    raise ValueError(f"This heatmap holds no {name} but {', '.join(sum(stacks.values(), []))}.")


def largest_deviation(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest difference between two maps of one grid, in standard errors of the reference.

    Over all cells of all Jacobian blocks and denoising errors of the first. NaN where a standard error is.
    """
    # Residuals have no error in the low band, and no standard error of it.
    there = [name for name in MSES + CLIPPED_MSES if name in result and reference[name].any()]
    triples = [(result[name], reference[name], reference[f"{name}_se"]) for name in there]
    if "jacobian" in result:
        blocks = result["jacobian"]
        triples += [(blocks[b], reference["jacobian"][b], reference["jacobian_se"][b]) for b in blocks]
    return torch.stack([(one - other).abs() / error for one, other, error in triples]).max().item()


def published_errors(result: dict[str, Any], factor: str = "B", normalisation: str = "published") -> Pair:
    """The published error maps of the two scales, from what `error_map` returned.

    `error_s = ‖∂ε_s/∂x_s‖²_F / N_s · f(SNR(t_s))` with f from `CHAIN_RULE_FACTORS` and N from
    `NORMALISATIONS`: (H_s W_s)² as published, C H_s W_s for "per_dim", 1 for "sum". The SNR of the fine scale
    varies along axis 0 and that of the coarse scale along axis 1.
    Returns (error_64, error_32), float64 `[n, n]` each; error_32 is 0 where the coarse scale is not predicted.
    Raises ValueError for an unknown factor or normalisation, and for maps without Jacobian.
    """
    if factor not in CHAIN_RULE_FACTORS:
        raise ValueError(f"Unknown chain-rule factor '{factor}'; choose one of {', '.join(CHAIN_RULE_FACTORS)}.")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"Unknown normalisation '{normalisation}'; choose one of {', '.join(NORMALISATIONS)}.")
    if "jacobian" not in result:
        raise ValueError("This heatmap holds denoising errors only; compute it again with --maps all.")
    weight = CHAIN_RULE_FACTORS[factor](result["snr_grid"])  # [n]
    divide = NORMALISATIONS[normalisation]
    error_64 = result["jacobian"]["HH"] / divide(result["num_pixels_64"], result["num_dims_64"]) * weight[:, None]
    if "LL" not in result["jacobian"]:
        return error_64, torch.zeros_like(error_64)
    error_32 = result["jacobian"]["LL"] / divide(result["num_pixels_32"], result["num_dims_32"]) * weight[None, :]
    return error_64, error_32


def _names(num_predictions: int, num_scales: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    # Of the Jacobian blocks, and of the denoising errors in the order of MSES + CLIPPED_MSES.
    return BLOCKS[: num_predictions * num_scales], tuple(
        name for name in MSES + CLIPPED_MSES if num_predictions == 2 or "32" not in name
    )


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
        raise ValueError(f"The fine images have shape {shape}, {images_64.dtype}, but must be float [B, C, H, W].")
    if 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"The fine images have shape {shape} but must be at least one image of even height and width.")


def draw_noise_and_probes(images: Scales, num_probes: int, seed: int) -> tuple[Scales, Scales]:
    """Normal noise like the images, and probes of ±1 `[K, B, ...]`, fine first, from a seed on every device alike."""
    generator = torch.Generator().manual_seed(seed)
    # Noise comes first, so that it does not change with the number of probes.
    noise = tuple(torch.randn(x.shape, generator=generator).to(x) for x in images)
    probes = tuple((2 * torch.randint(0, 2, (num_probes, *x.shape), generator=generator) - 1).to(x) for x in images)
    return noise, probes


def _coarse_lines(log_snr: np.ndarray, count: int) -> np.ndarray:
    # Half by index and half by log SNR: lines even in t leave a quarter of the log SNRs to their last interval.
    n = len(log_snr)
    place = np.arange(n) / (n - 1) + (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    lines = np.abs(place[:, None] - np.linspace(0, 2, count)).argmin(0)
    # Lines that coincide move apart, towards noise, within the grid.
    k = np.arange(count)
    lines = np.minimum.accumulate((lines - k)[::-1])[::-1] + k
    return np.maximum.accumulate(np.maximum(lines - k, 0)) + k


def _held_out_cells(lines: np.ndarray, num_lines: int, count: int, seed: int) -> list[tuple[int, int]]:
    off = np.setdiff1d(np.arange(num_lines), lines)
    rng = np.random.default_rng(seed)
    # Each row and column of the plane is visited before one is visited again.
    rows, columns = (np.concatenate([rng.permutation(off) for _ in range(-(-count // len(off)))]) for _ in range(2))
    return [(int(i), int(j)) for i, j in zip(rows[:count], columns[:count], strict=True)]


def _measure(
    denoise,
    scheduler,
    images,
    ts,
    num_probes,
    seed,
    batch_size,
    autocast,
    of,
    progress,
    processes,
    parts,
    num_predictions,
) -> Pair:
    # ts is [M, number of scales]. Samples are numbered cell by cell, and a call takes any run of them.
    num_images, num_cells, device = len(images[0]), len(ts), images[0].device
    num_samples = num_cells * num_images
    noise, probes = draw_noise_and_probes(images, num_probes, seed)  # [B, ...], [K, B, ...]
    noise = scheduler.representation.project(noise)
    # Noise and probes of the fine scale are the same whether the coarse one is read or not.
    images, noise = images[: ts.shape[1]], noise[: ts.shape[1]]
    tables = scheduler.to(device)

    blocks, kinds = _names(num_predictions, len(images))
    norms = torch.zeros(len(blocks), num_probes, num_samples, dtype=torch.float64)
    mses = torch.zeros(len(kinds), num_samples, dtype=torch.float64)
    done = torch.zeros(num_samples, dtype=torch.bool)
    for part in parts.read() if parts else ():
        new = part["done"] & ~done
        norms[..., new], mses[:, new] = part["norms"][..., new], part["mses"][:, new]
        done |= new
    # Nobody writes before everybody has read, and all must have read the same to share what is left: where they do not
    # see the same files, they start anew.
    if processes and not processes.agree(str(done.nonzero().tolist())):
        done[:] = False
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    todo = (~done).nonzero()[:, 0].tensor_split(count)[rank]

    def save() -> None:
        if parts and done.any():
            parts.write(rank, {"done": done, "norms": norms, "mses": mses})

    saved = time.monotonic()
    bar = Progress(total=num_cells, desc="error map", unit="cell", disable=not progress or rank > 0)
    try:
        with bar:
            bar.update(done.sum().item() // num_images)
            for samples in filter(len, todo.split(batch_size)):  # What has no rows splits into one part.
                cell, image = samples // num_images, (samples % num_images).to(device)  # [S], [S]
                values = _evaluate(
                    denoise,
                    tables,
                    tuple(x[image] for x in images),
                    tuple(e[image] for e in noise),
                    tuple(w[:, image] for w in probes[:num_predictions]),
                    tuple(t.to(device) for t in ts[cell].T),
                    autocast,
                    of,
                )
                # Found here, what is not finite ends the run at once, and is not kept in its part.
                if not all(v.isfinite().all() for v in values):
                    raise ValueError("The denoiser returns what is not finite here; its weights may be damaged.")
                norms[..., samples], mses[:, samples] = values
                done[samples] = True
                bar.update(min(num_cells, done.sum().item() * count // num_images) - bar.n)
                if time.monotonic() - saved > SECONDS_BETWEEN_PARTS:
                    save()
                    saved = time.monotonic()
    except BaseException:
        save()
        raise
    if count > 1:
        save()
        mine = torch.zeros(num_samples, dtype=torch.float64)
        # What was read from parts is known to every process, and counts once.
        mine[done if rank == 0 else todo] = 1.0
        norms, mses = processes.sum(norms * mine), processes.sum(mses * mine)
    return norms.view(*norms.shape[:2], num_cells, num_images), mses.view(len(kinds), num_cells, num_images)


def _evaluate(
    denoise: Callable[[Scales, Scales], Scales],
    scheduler: DDIMScheduler,
    images: Scales,  # [S, C, H, W], [S, C, H/2, W/2]
    noise: Scales,  # like images
    probes: Scales,  # [K, S, ...], for each prediction
    ts: Scales,  # [S] each
    autocast: Callable[[], AbstractContextManager],
    of: str,
) -> Pair:
    # Returns ‖Jᵀw‖² [blocks, K, S] and the denoising errors [6 or 4, S].
    num_probes, num_predictions = len(probes[0]), len(probes)
    ts = tuple(map(scheduler.inside, ts))
    xs = tuple(scheduler.add_noise(x, e, t) for x, e, t in zip(images, noise, ts, strict=True))
    with torch.set_grad_enabled(num_probes > 0):
        xs = tuple(x.requires_grad_(num_probes > 0) for x in xs)
        with autocast():
            predictions = denoise(xs, ts)
        _check_predictions(predictions, xs, num_predictions)
        # What follows is of the scales predicted; gradients are of both. A direction that is no noise of its scale
        # would count in a conversion that reads it, though not in the network.
        seen = list(zip(scheduler.representation.project(xs), ts, strict=True))[:num_predictions]
        predictions = [p.to(x.dtype) for p, (x, _) in zip(predictions, seen, strict=True)]
        epsilons = [scheduler.predict_epsilon(p, t, x) for p, (x, t) in zip(predictions, seen, strict=True)]
        outputs = epsilons
        if of == "x0":
            outputs = [scheduler.predict_x0(p, t, x) for p, (x, t) in zip(predictions, seen, strict=True)]
    norms = []
    for scale, (output, ws) in enumerate(zip(outputs, probes, strict=True)):
        for k, w in enumerate(ws):
            last = scale == num_predictions - 1 and k == num_probes - 1
            # One pass per probe is as fast as vmap over the probes and holds 1/K of its gradients, and a
            # prediction that ignores one scale has a zero block there.
            grads = torch.autograd.grad(output, xs, w, retain_graph=not last, materialize_grads=True)
            # PyTorch 2.6 gives zero blocks that want a gradient themselves.
            norms.append(torch.stack([_sum_of_squares(g.detach()) for g in grads]))  # [scales, S]
    shape = (num_predictions, num_probes, len(xs), len(ts[0]))
    norms = torch.stack(norms).view(shape) if norms else torch.zeros(shape, dtype=torch.float64)
    with torch.no_grad():
        x0s = [scheduler.predict_x0(p, t, x) for p, (x, t) in zip(predictions, seen, strict=True)]
        images, noise = images[:num_predictions], noise[:num_predictions]
        errors = [x - x0 for x, x0 in zip(images, x0s, strict=True)]
        if scheduler.prediction_type == "epsilon":
            # The same number, with more digits where there is little noise.
            scales = [scheduler.snr[t].rsqrt().to(x.dtype)[:, None, None, None] for x, t in seen]
            errors = [(p - e) * scale for p, e, scale in zip(epsilons, noise, scales, strict=True)]
        clipped = [x - x0 for x, x0 in zip(images, scheduler.representation.clamp(tuple(x0s)), strict=True)]
        # Means of residuals are zero but for rounding.
        low = 2 * (scheduler.representation is OVERCOMPLETE)
        mses = [
            _sum_of_squares(error) for group in (errors, clipped) for error in (*group, low * F.avg_pool2d(group[0], 2))
        ]
    return norms.transpose(1, 2).flatten(0, 1).cpu(), torch.stack(mses).cpu()  # [out and in, K, S], [6 or 4, S]


def _interpolated(values: torch.Tensor, lines: np.ndarray, log_snr_grid: torch.Tensor) -> torch.Tensor:
    # values [M, B], the product of `lines` first -> [n, n, B].
    count = len(lines)
    grid = values[: count**2].view(count, count, -1)
    known = log_snr_grid[lines].numpy()
    whole = interpolate_map(grid.permute(2, 0, 1).numpy(), known, log_snr_grid.numpy())  # [B, n, n]
    whole[:, lines[:, None], lines] = grid.permute(2, 0, 1)  # To the last bit.
    return torch.from_numpy(whole).permute(1, 2, 0).contiguous()


def _interpolation_error(values: dict, spread: dict, held_out: list[tuple[int, int]]) -> dict[str, Any]:
    report = {"cells": [list(cell) for cell in held_out]}
    rows, columns = (list(index) for index in zip(*held_out, strict=True))
    for name, value in values.items():
        truth = value[-len(held_out) :].mean(-1)  # [held out]
        if not truth.any():
            continue
        error = (spread[name][rows, columns].mean(-1) / truth - 1).abs()
        report[name] = {"median": error.quantile(0.5).item(), "max": error.max().item()}
    return report


def _check_predictions(predictions: Scales, xs: Scales, num_predictions: int) -> None:
    if not isinstance(predictions, tuple | list) or len(predictions) != num_predictions:
        wanted = "two predictions, fine and coarse" if num_predictions == 2 else "a tuple of one prediction, the fine"
        raise ValueError(f"The denoiser must return {wanted}.")
    for name, prediction, x in zip(("fine", "coarse"), predictions, xs, strict=False):
        if prediction.shape != x.shape:
            raise ValueError(
                f"The denoiser returned a {name} prediction of shape {list(prediction.shape)} for images of "
                f"shape {list(x.shape)}; both must agree."
            )
        if torch.is_grad_enabled() and not prediction.requires_grad:
            raise ValueError(
                f"The {name} prediction of the denoiser carries no gradient; run it outside torch.no_grad() "
                "and do not detach what it returns."
            )


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(1, dtype=torch.float64)  # [S]


def _standard_error(samples: torch.Tensor, dim: int) -> torch.Tensor:
    count = samples.shape[dim]
    if count == 1:
        return torch.full_like(samples.select(dim, 0), math.nan)
    return samples.std(dim, correction=1) / math.sqrt(count)
