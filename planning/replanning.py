"""Training in a band that follows its own best path: measure the errors, plan again, move the band.

The network knows the pairs of timesteps in its band alone. So the errors are measured there, the path is planned there,
and the band moves by at most half its width each time.

Shapes: T training timesteps. A curve `[T]` is the log SNR of the coarse scale at each t_64.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from paths.path import Path, timestep_grid
from planning.error_map import error_map
from planning.map_paths import kl_refined, seen_cells
from runtime.distributed import Processes
from scheduler import DDIMScheduler

NUM_STEPS = 18
KL_WEIGHT = 1.0
GRID_LINES = 60
CALL_IMAGES = 64  # In one network call of the map.


def plan_within(
    curve: np.ndarray,  # [T], of the path so far
    width: float,  # of the band around it, in log SNR
    planned: Path,  # of two scales, such as the optimum of a map
    log_snr: np.ndarray,  # [T]
) -> tuple[np.ndarray, Path]:
    """A planned path as far as a band reaches: as a curve `[T]`, and as a path from and to where the planned one goes.

    λ_32 is that of the planned path, between its points in proportion to λ_64, and at most width / 2 from that of the
    curve at the same t_64. Points that fall together are one.
    """
    t_64, t_32 = np.array(planned.points).T  # [N + 1] each
    reach = width / 2

    def clip(wanted: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.clip(wanted, curve[t] - reach, curve[t] + reach)

    # A clock without a signal stays where the curve has it.
    moved = clip(np.interp(log_snr, log_snr[t_64], log_snr[t_32]), np.arange(len(log_snr)))  # [T]
    nearest = np.abs(log_snr - clip(log_snr[t_32], t_64)[1:-1, None]).argmin(1)  # [N - 1]
    between = zip(t_64[1:-1].tolist(), nearest.tolist(), strict=True)
    points = dict.fromkeys([planned.points[0], *between, planned.points[-1]])
    return moved, Path(tuple(points), "follow", {"width": width})


def replan(
    denoise: Callable,  # as of `error_map`, of both scales
    scheduler: DDIMScheduler,
    images_64: torch.Tensor,  # [B, C, H, W], in [-1, 1]
    curve: np.ndarray,  # [T]
    width: float,
    seed: int,
    autocast: Callable[[], AbstractContextManager] | None = None,
    processes: Processes | None = None,
) -> tuple[np.ndarray, Path]:
    """The curve and path of `plan_within` towards the KL optimum on the denoising errors of these images.

    Processes share the cells of the map, and all get the same. Raises what `error_map` raises.
    """
    log_snr = scheduler.log_snr.cpu().numpy()
    start = int(np.isfinite(log_snr).nonzero()[0][-1])
    t_grid = timestep_grid(min(GRID_LINES, start + 1), len(log_snr), "uniform_log_snr", start, log_snr)
    band = {"t_grid": t_grid, "seen_32": torch.from_numpy(np.stack([curve - width / 2, curve + width / 2]))}
    heatmap = error_map(
        denoise,
        scheduler,
        images_64,
        t_grid.tolist(),
        seed=seed,
        batch_size=CALL_IMAGES,
        autocast=autocast,
        progress=False,
        maps="mse",
        processes=processes,
        cells=torch.from_numpy(seen_cells(band, t_grid, log_snr)),
    )
    refined = kl_refined(heatmap | {"seen_32": band["seen_32"]}, log_snr, NUM_STEPS, KL_WEIGHT)
    return plan_within(curve, width, refined.path, log_snr)
