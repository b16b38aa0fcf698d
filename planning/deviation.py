"""How far samples along a path end from the fine trajectories of the same noise: what a plan for a solver minimises.

The solver is run on the network as it is near its own trajectories (docs/theory.md, section 14): in a state off the
trajectory it sees the clean image that it sees on it, moved by the gain of the best linear denoiser,

    x0(z* + d) = x0(z*) + v a / (1 + v a) d,    d a difference of x/alpha in modes of variance v, a the SNR,

and likewise of two scales at once where both show a mode. That is exact for Gaussian images, whatever the solver and
the path. It takes no call of the network.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from diffusion.multistep import Rule, ScaleWalk
from diffusion.step import level_of_log_snr
from planning.trajectories import Band, Trajectories

LARGEST_TABLE = 2**18  # Numbers in the states of paths that are followed at once.
LARGEST_LOG_SNR = 40.0  # Of a state without noise, as far as a gain is concerned.


def deviation(
    trajectories: Trajectories,
    rule: Rule,
    carried: bool = True,
) -> Callable[[np.ndarray], np.ndarray]:
    """The mean squared distance, in units of x² per image, as a function of paths: int `[P, N, S]` -> float64 `[P]`.

    carried: the distance at the end, to which the loss of every step is carried by those after it. Otherwise the sum of
    the losses themselves, in x/alpha, each of a step that starts on the trajectory, before any correction.

    A path is given by the lines of its points but the last, which is clean; for two scales by the fine and the coarse
    line. The function raises ValueError for lines that do not begin at 0, go back or are not measured together.
    """
    scales = trajectories.points.shape[1]

    def measure(lines: np.ndarray) -> np.ndarray:
        lines = torch.as_tensor(np.asarray(lines))
        if lines.ndim != 3 or lines.shape[2] != scales or lines[:, 0].any() or (lines.diff(dim=1) < 0).any():
            raise ValueError(f"paths must be lines [P, N, {scales}] that begin at 0 and never go back.")
        if lines.max() >= len(trajectories.cells):
            raise ValueError(f"a path has a line beyond the last, {len(trajectories.cells) - 1}.")
        if (trajectories.cells[lines[..., 0], lines[..., -1]] < 0).any():
            raise ValueError("a path has a point at which nothing was measured; keep to the measured cells.")
        timesteps = torch.stack([trajectories.points[lines[..., s], s] for s in range(scales)], -1)  # [P, N, S]
        # In the last step, to clean, nothing rests.
        rests = F.pad(timesteps.diff(dim=1) == 0, (0, 0, 0, 1)).flatten(1)  # [P, N S]
        patterns, which = rests.unique(dim=0, return_inverse=True)
        found = torch.zeros(len(lines), dtype=torch.float64)
        for number, pattern in enumerate(patterns):
            rows = (which == number).nonzero()[:, 0]
            for band in trajectories.bands:
                size = max(1, LARGEST_TABLE // band.states.shape[-1])
                for chunk in rows.split(size):
                    found[chunk] += _deviation(
                        trajectories, band, rule, carried, lines[chunk], pattern.view(-1, scales)
                    )
        return found.numpy()

    return measure


def _deviation(
    trajectories: Trajectories, band: Band, rule: Rule, carried: bool, lines: torch.Tensor, rests: torch.Tensor
) -> torch.Tensor:
    """Of paths `[P, N, S]` in which the same scales rest at the same steps, bool `[N, S]`."""
    ends = torch.full_like(lines[:, :1], len(trajectories.points) - 1)
    own = [torch.cat([lines, ends], 1)[..., scale] for scale in band.scales]  # [P, N + 1] each
    log_snrs = [trajectories.log_snr[line, s][..., None] for line, s in zip(own, band.scales, strict=True)]
    states = [table[line[:, 0]] for table, line in zip(band.states, own, strict=True)]  # [P, R] each
    walks = [ScaleWalk(rule) for _ in states]
    losses = torch.zeros(len(lines), dtype=torch.float64)
    for k in range(lines.shape[1]):
        if not carried:
            states = [table[line[:, k]] for table, line in zip(band.states, own, strict=True)]
        cell = trajectories.cells[lines[:, k, 0], lines[:, k, -1]]
        levels = [level_of_log_snr(log_snr[:, k].clamp(max=LARGEST_LOG_SNR)) for log_snr in log_snrs]
        # Half the coarse image is a mode at a quarter of its SNR.
        shares = [1 / 4 if scale else 1.0 for scale in band.scales]
        off = [
            share * level.alpha / level.sigma**2 * (state - table[line[:, k]])
            for share, level, state, table, line in zip(shares, levels, states, band.states, own, strict=True)
        ]
        snr = sum(share * (level.alpha / level.sigma) ** 2 for share, level in zip(shares, levels, strict=True))
        moved = band.variances / (1 + band.variances * snr) * sum(off)
        for s, (walk, scale) in enumerate(zip(walks, band.scales, strict=True)):
            if rests[k, scale]:
                walk.rest()
            else:
                after = level_of_log_snr(log_snrs[s][:, k + 1])
                states[s] = walk.advance(states[s], band.seen[s][cell] + moved, levels[s], after)
                if s == band.result and not carried:
                    loss = (states[s] - band.states[s][own[s][:, k + 1]]) / after.alpha
                    losses += loss.square().sum(1)
    if not carried:
        return losses
    return (states[band.result] - band.states[band.result, -1]).square().sum(1)
