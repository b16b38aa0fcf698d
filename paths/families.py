"""Paths made by hand: a spacing, and an offset between the scales.

`diagonal` makes the spacing, and `log_snr_shift`, `lead` and `heuristic` add an offset to any diagonal; `cascade` and
`fine_first` take one scale after the other; `through` names its points.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from paths.path import Path, check_log_snr_table, check_start, nearest_timesteps, spaced


def diagonal(
    num_steps: int,
    spacing: str = "uniform_t",  # one of SPACINGS
    num_scales: int = 2,  # 1 for a model with a single timestep
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """Path of exactly num_steps steps on which all scales move together, from timestep S = start to 0.

    spacing:
        "uniform_t": N + 1 points, even in t, rounded.
        "published": multiples of the stride (S + 1) // N, from N strides down to 0 (990, 935, ..., 55, 0 for
            N = 18); starts at S where N divides S + 1, and well below S where the division cuts off much.
        "uniform_log_snr": N + 1 targets, even in log SNR from log_snr[S] to log_snr[0], each at the timestep
            of nearest log SNR; timesteps that coincide are moved apart towards noise, ends stay.
        "karras": targets even in σ̂^(1/ρ), σ̂ = SNR^-½ and ρ = 7 (arXiv 2206.00364, eq. 5, with the N + 1
            levels of this path, the last of them σ̂ at timestep 0), each put on a timestep as above.

    Raises ValueError for an unknown spacing, a start outside 1..num_train_timesteps - 1, num_steps outside
    1..S, num_scales < 1, and, for a spacing by log SNR, a table that is missing, of the wrong length, not
    finite up to S (zero terminal SNR) or not strictly decreasing.
    """
    start = check_start(start, num_train_timesteps)
    if num_scales < 1:
        raise ValueError(f"num_scales is {num_scales}; a path needs at least 1 scale")
    timesteps = spaced(num_steps, spacing, start, 0, log_snr, num_train_timesteps)
    provenance = {"spacing": spacing, "num_train_timesteps": num_train_timesteps, "start": start}
    return Path(tuple((t,) * num_scales for t in timesteps), "diagonal", provenance)


def log_snr_shift(
    base: Path,
    shift: float,  # of log SNR; > 0: the coarse scale is ahead (cleaner)
    log_snr: ArrayLike,  # [num_train_timesteps]
) -> Path:
    """Two-scale path with λ_32 = λ_64 + shift, where t_64 goes along the diagonal `base`.

    t_32 of a point is the timestep of nearest log SNR between the ends of the base. The first and the last
    point are those of the base, in both scales. No point repeats, because t_64 falls at every step.

    Raises ValueError if the scales of the base do not move together, a shift that is not finite, and a table
    that is too short or does not fall strictly; -inf is allowed at the first timestep of the base.
    """
    timesteps = _diagonal_timesteps(base)
    if not math.isfinite(shift):
        raise ValueError(f"the shift of log SNR is {shift}; it must be finite")
    table = check_log_snr_table(log_snr, timesteps[0])
    inner = np.clip(table[timesteps[1:-1]] + shift, table[-1], table[0])
    coarse = [timesteps[0], *nearest_timesteps(table, inner).tolist(), 0]
    points = tuple(zip(timesteps, coarse, strict=True))
    return Path(points, "log_snr_shift", {"base": base.provenance, "shift": float(shift)})


def through(
    places: Sequence[float],  # log SNRs, rising
    log_snr: ArrayLike,  # [num_train_timesteps]
    num_scales: int = 2,  # 1 for a model with a single timestep
    shift: float = 0.0,  # of log SNR, by which the coarse scale is ahead at the places
) -> Path:
    """Path from pure noise through the timesteps of nearest log SNR, and from the last one to 0: few chosen steps.

    Raises ValueError for no place, for places that are not finite or too near to each other to be timesteps that fall,
    and for a table that does not fall strictly; -inf is allowed at its last timestep.
    """
    start = len(log_snr) - 1
    table = check_log_snr_table(log_snr, start)
    if not len(places) or not np.isfinite(places).all():
        raise ValueError(f"the path is to lead through log SNRs {list(places)}; give one or more, all finite")
    inner = [
        nearest_timesteps(table, np.clip(np.array(places) + ahead, table[-1], table[0])).tolist()
        for ahead in (0.0, shift)[:num_scales]
    ]
    for timesteps in inner:
        if any(after >= before for before, after in zip([start, *timesteps], [*timesteps, 0], strict=True)):
            raise ValueError(
                f"log SNRs {list(places)} lead through timesteps {timesteps}, which must fall between {start} and 0; "
                "give rising ones, not so near to each other or to the ends"
            )
    points = (tuple([start] * num_scales), *zip(*inner, strict=True), tuple([0] * num_scales))
    return Path(points, "through", {"log_snrs": [float(place) for place in places], "shift": float(shift)})


def lead(base: Path, k: int) -> Path:
    """Two-scale path whose coarse scale is k points ahead on the diagonal `base`; for k < 0 the fine one is.

    With s_0, ..., s_N the timesteps of the base, point i >= 1 is (s_i, s_min(i + k, N)), and point 0 is
    (s_0, s_0), so that the first step of the scale ahead goes k + 1 points. No point repeats, because the
    other scale falls at every step.

    Raises ValueError if the scales of the base do not move together.
    """
    timesteps = _diagonal_timesteps(base)
    ahead = [timesteps[0], *(timesteps[min(i + abs(k), base.nfe)] for i in range(1, base.nfe + 1))]
    scales = (timesteps, ahead) if k >= 0 else (ahead, timesteps)
    return Path(tuple(zip(*scales, strict=True)), "lead", {"base": base.provenance, "k": k})


def heuristic(base: Path, factor: float) -> Path:
    """Two-scale path with t_32 = factor · t_64, rounded (half to even), where t_64 goes along the diagonal `base`.

    The first point is that of the base in both scales. No point repeats, because t_64 falls at every step.

    Raises ValueError if the scales of the base do not move together, and unless 0 < factor <= 1.
    """
    timesteps = _diagonal_timesteps(base)
    if not 0 < factor <= 1:
        raise ValueError(f"the factor of timesteps is {factor}; it must lie above 0 and not above 1")
    coarse = [timesteps[0], *(round(factor * t) for t in timesteps[1:])]
    points = tuple(zip(timesteps, coarse, strict=True))
    return Path(points, "heuristic", {"base": base.provenance, "factor": float(factor)})


def cascade(
    num_steps: int,
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    coarse_steps: int | None = None,  # None for num_steps // 2
    remaining: int = 0,  # timestep at which the coarse scale waits for the fine one
    spacing: str = "uniform_t",  # of both legs; one of SPACINGS but "published"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """Path that denoises the coarse scale first, then the fine one: a cascade within one model.

    The coarse scale goes from start to `remaining` in coarse_steps steps while t_64 stays at start; then the
    fine scale goes from start to 0 in the other num_steps - coarse_steps steps while the coarse one is held.
    The last point is (0, 0), so that the last step also takes the coarse scale from `remaining` to 0. Each leg
    is spaced as a `diagonal` from its first to its last timestep; "published" is refused, because its strides
    cut off the start.

    Raises ValueError unless 1 <= coarse_steps < num_steps and 0 <= remaining < start, if a leg has more steps
    than timesteps, and for what `diagonal` refuses.
    """
    points, provenance = _one_after_the_other(
        num_steps, log_snr, coarse_steps, remaining, spacing, num_train_timesteps, start
    )
    return Path(tuple((t_64, t_32) for t_32, t_64 in points), "cascade", provenance)


def fine_first(
    num_steps: int,
    log_snr: ArrayLike | None = None,  # [num_train_timesteps], only for "uniform_log_snr" and "karras"
    fine_steps: int | None = None,  # None for num_steps // 2
    remaining: int = 0,  # timestep at which the fine scale waits for the coarse one
    spacing: str = "uniform_t",  # of both legs; one of SPACINGS but "published"
    num_train_timesteps: int = 1000,
    start: int | None = None,  # timestep of the first point; None for num_train_timesteps - 1
) -> Path:
    """The `cascade` with the scales exchanged: the fine scale first, in fine_steps steps; a control for it.

    Raises ValueError as `cascade` does.
    """
    points, provenance = _one_after_the_other(
        num_steps, log_snr, fine_steps, remaining, spacing, num_train_timesteps, start
    )
    return Path(points, "fine_first", provenance)


def _one_after_the_other(
    num_steps: int,
    log_snr: ArrayLike | None,
    first_steps: int | None,
    remaining: int,
    spacing: str,
    num_train_timesteps: int,
    start: int | None,
) -> tuple[tuple[tuple[int, int], ...], dict[str, Any]]:
    # Points (timestep of the scale that goes first, timestep of the other), and how they were made.
    start = check_start(start, num_train_timesteps)
    first_steps = num_steps // 2 if first_steps is None else first_steps
    if not 1 <= first_steps < num_steps:
        raise ValueError(
            f"{first_steps} of {num_steps} steps are for the scale that goes first; give both scales at least 1"
        )
    if not 0 <= remaining < start:
        raise ValueError(f"the first scale waits at timestep {remaining}; choose 0 to {start - 1}, below the start")
    if spacing == "published":
        raise ValueError("spacing 'published' does not begin at the start of a leg; choose another spacing")
    leg = spaced(first_steps, spacing, start, remaining, log_snr, num_train_timesteps)
    other_leg = spaced(num_steps - first_steps, spacing, start, 0, log_snr, num_train_timesteps)
    points = (*((t, start) for t in leg), *((remaining, t) for t in other_leg[1:-1]), (0, 0))
    provenance = {
        "spacing": spacing,
        "num_train_timesteps": num_train_timesteps,
        "start": start,
        "first_steps": first_steps,
        "remaining": remaining,
    }
    return points, provenance


def _diagonal_timesteps(base: Path) -> list[int]:
    for k, point in enumerate(base.points):
        if len(set(point)) > 1:
            raise ValueError(f"point {k} of the base path is {point}; its scales must move together, as on a diagonal")
    return [point[0] for point in base.points]
