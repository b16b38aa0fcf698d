"""How straight the trajectories of a flow are: what is left to gain by reflow, and 0 where one step is exact.

For a flow z = (1 - tau) x + tau eps with the velocity u, which goes from z_1, noise, to z_0, an image,

    S = int_0^1 E |(z_1 - z_0) - u(z_tau, tau)|^2 dtau

along the flow's own trajectories (arXiv 2209.03003, section 2.1), here for each dimension and by Euler's method. Of two
scales each has its own line and its own clock, and so an S along a path: the integral over its own tau with the other
scale where the path has it. It depends on the path, and is no straightness of the pair.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusion.sampler import sample_seeds
from diffusion.step import check_starts_at_last
from images.representation import Images
from paths.path import Path
from scheduler import DDIMScheduler, Denoiser


class Straightness(NamedTuple):
    """S of each scale for each dimension, fine first, and its standard error over the images."""

    values: tuple[float, ...]
    errors: tuple[float, ...]


def divided(path: Path, num_steps: int) -> Path:
    """The same way in at least `num_steps` steps if whole timesteps allow it: each step in equally many parts."""
    parts = -(-num_steps // path.nfe)
    shares = np.arange(parts) / parts
    points = [path.points[0]]
    for start, after in itertools.pairwise(np.array(path.points)):
        inner = np.rint(start + shares[1:, None] * (after - start)).astype(int).tolist()
        points += [point for point in map(tuple, (*inner, after.tolist()))]
    points = [point for point, _ in itertools.groupby(points)]
    return Path(points, path.kind, {"base": path.provenance, "parts": parts})


def straightness(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: Path,
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    batch_size: int,
    device: torch.device | str = "cpu",
    labels: Sequence[int] | None = None,
) -> Straightness:
    """S along a path from the noise of some seeds, by Euler's steps and without a clamp, which is no part of a flow.

    Raises ValueError for another process than flow, and what `check_starts_at_last` and `sample` raise.
    """
    if scheduler.process != "flow":
        raise ValueError(
            f"Straightness is of lines from noise to images, which the process flow has, not {scheduler.process_name}."
        )
    check_starts_at_last(path, scheduler, "a line of noise and image")
    times = np.array(path.points) / (scheduler.num_train_timesteps - 1)  # [N + 1, scales], tau
    shares = (scheduler.representation.fine_share, 1.0)
    found: list[list[torch.Tensor]] = [[] for _ in shapes]
    start: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    squares: list[torch.Tensor | float] = []

    def look(k: int, xs: Images) -> None:
        now = [x.double() for x in xs]
        if k == 0:
            start[:], squares[:] = now, [0.0] * len(now)
        else:
            # Euler's step is the velocity times the change of tau: |u|^2 dtau = |step|^2 / dtau.
            for scale, passed in enumerate(times[k - 1] - times[k]):
                if passed > 0:
                    moved = (before[scale] - now[scale]).square().flatten(1).mean(1)  # [B]
                    squares[scale] = squares[scale] + moved / passed
        before[:] = now
        if k == path.nfe:
            # As dtau sums to 1, the mean squared difference from z_1 - z_0, which is the mean of u.
            for scale, x in enumerate(now):
                line = (start[scale] - x).square().flatten(1).mean(1)
                found[scale].append((squares[scale] - line).cpu() / shares[scale])

    walks = sample_seeds(
        denoise, scheduler.unclamped(), path, seeds, shapes, batch_size, device, callback=look, labels=labels
    )
    for _ in walks:
        pass
    each = [torch.cat(values) for values in found]  # [N] by scale
    errors = (values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan") for values in each)
    return Straightness(tuple(values.mean().item() for values in each), tuple(errors))
