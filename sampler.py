"""Run any model along any path, one scale or several, with DDIM.

The final point of a path is clean: the last step takes every scale to abar = 1 (`end="clean"`), or stops at
abar(0), noise of standard deviation 0.01, as the published runs did (`end="t0"`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from path import Path
from scheduler import CLEAN, DDIMScheduler

Images = tuple[torch.Tensor, ...]
Denoiser = Callable[[Images, Images], Images]
ENDS = ("clean", "t0")
IMAGES_PER_SEED = 1_000_000


class Samples(NamedTuple):
    """What `sample` returns: one `[B, C, H, W]` tensor per scale, fine first, and the calls it took."""

    images: Images
    nfe: int


class SeededNoise:
    """Standard normal noise in which row k depends on `seeds[k]` and on the number of draws before only.

    The same on every device and for every batch size: it is drawn on the CPU, one generator per seed.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Float32 `[len(seeds), *shape]`."""
        rows = [g.standard_normal(tuple(shape), dtype=np.float32) for g in self._generators]
        return torch.from_numpy(np.stack(rows)).to(device)


def image_seeds(seed: int, count: int) -> range:
    """The seeds of `count` images of evaluation seed `seed`: no two evaluation seeds share an image."""
    if seed < 0:
        raise ValueError(f"Seed {seed} is negative; choose 0 or a positive integer.")
    if count > IMAGES_PER_SEED:
        raise ValueError(f"{count} images exceed the {IMAGES_PER_SEED} that one seed provides; use several seeds.")
    return range(seed * IMAGES_PER_SEED, seed * IMAGES_PER_SEED + count)


def scale_shapes(num_scales: int, channels: int, resolution: int) -> list[tuple[int, int, int]]:
    """`(C, H, W)` of each scale, fine first, each half the size of the one before."""
    return [(channels, resolution >> s, resolution >> s) for s in range(num_scales)]


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    noise: Sequence[torch.Tensor],
    eta: float = 0.0,
    callback: Callable[[int, Images], None] | None = None,
    end: str = "clean",
    draw: Callable[[Sequence[int]], torch.Tensor] | None = None,
) -> Samples:
    """Sample along a path from `noise`, one `[B, C, H, W]` tensor per scale, fine first.

    denoise: `(xs, ts) -> predictions`, one tensor per scale each, ts int64 `[B]`, called once at every point
        but the last. A scale whose timestep does not move keeps its image, except that with `end="clean"` the
        last step takes every scale to clean. eta: 0 DDIM to 1 ancestral; above 0, `draw(shape)` supplies
        fresh noise `[B, C, H, W]` for shape `(C, H, W)`, scale by scale. callback: called as `(k, images)` at
        every point k.

    Returns images (float32, in [-1, 1] if the schedule clamps) and the calls counted. Raises ValueError if
    path and noise differ in their number of scales, for an unknown end, and what `scheduler.step` raises.
    """
    if path.num_scales != len(noise):
        raise ValueError(f"The path has {path.num_scales} scale(s) but the model samples {len(noise)}.")
    if end not in ENDS:
        raise ValueError(f"Unknown end '{end}'; choose one of {', '.join(ENDS)}.")
    xs = tuple(noise)
    batch, device = len(xs[0]), xs[0].device
    nfe = 0
    for k, (point, next_point) in enumerate(zip(path.points, path.points[1:], strict=False)):
        if callback is not None:
            callback(k, xs)
        ts = tuple(torch.full((batch,), t, dtype=torch.long, device=device) for t in point)
        predictions = denoise(xs, ts)
        nfe += 1
        if end == "clean" and k == path.nfe - 1:
            next_point = (CLEAN,) * path.num_scales
        xs = tuple(
            scheduler.step(
                prediction.to(x.dtype),
                t,
                t_next,
                x,
                eta=eta,
                noise=draw(x.shape[1:]) if eta > 0 and draw is not None else None,
            )
            if t_next != t
            else x
            for x, prediction, t, t_next in zip(xs, predictions, point, next_point, strict=True)
        )
    if callback is not None:
        callback(path.nfe, xs)
    return Samples(xs, nfe)


def sample_seeds(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    batch_size: int,
    device: torch.device | str = "cpu",
    eta: float = 0.0,
    callback: Callable[[int, Images], None] | None = None,
    end: str = "clean",
) -> Iterator[tuple[Sequence[int], Samples]]:
    """`sample` batch by batch, with the noise of each seed: image k depends on `seeds[k]` alone.

    shapes: `(C, H, W)` per scale, fine first. Yields the seeds of each batch with its samples.
    """
    for start in range(0, len(seeds), batch_size):
        chosen = seeds[start : start + batch_size]
        source = SeededNoise(chosen)
        draw = functools.partial(source.draw, device=device)
        noise = [draw(shape) for shape in shapes]
        yield chosen, sample(denoise, scheduler, path, noise, eta, callback, end, draw)
