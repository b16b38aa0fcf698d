"""Paths of schedule files for the model at hand: by log SNR, since the number of a timestep means nothing by itself.

A schedule file says of which process, pair of scales, resolution and weights its path is. A path of another process is
followed at the timesteps of the same log SNR; what cannot be followed is refused, and what need not suit is said.
"""

import math
from typing import Any

import numpy as np

from checkpoint import LoadedModel
from paths.path import Path
from paths.schedule_file import load_schedule, log_snr_of
from runtime.reports import say_once
from scheduler import ALL_SCHEDULES, DDIMScheduler

DEFAULT_TIMESTEPS = 1000  # Of files that do not say.
ROUNDING = 1e-6  # Of log SNR, absolute and relative.
TOLERANCE = 0.5  # By which a point may be off in log SNR; timesteps are up to 0.8 apart, those next to 0.
PURE_NOISE = math.log(1e-5)  # Below this log SNR hardly anything is left of an image, wherever that is.
FOR_A_SOLVER = "trajectory"  # How criteria begin that plan for one.
# What a schedule file says of the model that its path was made for.
MADE_FOR = ("model_fingerprint", "data_fingerprint", "representation", "resolution", "weights", "epoch", "run")


def made_for(path: Path, loaded: LoadedModel) -> dict[str, Any]:
    """What a schedule file is to say of the model of a path: that of the file it was read from, else the loaded one."""
    if "path_fingerprint" in path.provenance:
        return {key: path.provenance[key] for key in MADE_FOR}
    said = loaded.config | {"model_fingerprint": loaded.fingerprint, "weights": loaded.weights}
    return {key: said.get(key) for key in MADE_FOR}


def replay(file: str, scheduler: DDIMScheduler, resolution: int | None = None) -> Path:
    """The path of a schedule file as one of another process, where no network is at hand yet.

    Its points are the timesteps of `scheduler` that have the log SNR of the file. Timestep 0, the clean end, stays 0.
    Prints a note with the largest deviation if the process is another one, and one if the resolution is.

    Raises ValueError if the file's log SNRs are not those of the process that it names, for a path of another pair of
    scales, one that is off by more than TOLERANCE anywhere, or of which two points would fall on one, and what
    `load_schedule` raises.
    """
    path = load_schedule(file)
    _check_unaltered(path, file)
    made = path.provenance
    here = scheduler.representation.name
    if path.num_scales == 2 and made["representation"] not in (None, here):
        raise ValueError(
            f"Schedule {file} was made for the {made['representation']} pair of scales, and this model has the {here} "
            "one, where the same timesteps mean another noise; plan a path for it (plan_path.py)."
        )
    followed = _at_log_snr(path, scheduler, file)
    if None not in (resolution, made["resolution"]) and resolution != made["resolution"]:
        there, shift = made["resolution"], 2 * math.log(made["resolution"] / resolution)
        _say(
            path,
            f"schedule {file} was made at {there}x{there}, and this model is of {resolution}x{resolution}, where an "
            f"image is as noisy at log SNRs {abs(shift):.2f} {'higher' if shift > 0 else 'lower'} (arXiv 2301.11093)",
        )
    return followed


def replay_for(file: str, loaded: LoadedModel, solver: str | None = None) -> Path:
    """The path of a schedule file for a loaded model, as `replay` finds it.

    Prints a warning, or of a path made by hand a note, if it was made for other weights; and a warning if it was
    planned for another solver than the one named.
    """
    path = replay(file, loaded.scheduler, loaded.config.get("resolution"))
    made = path.provenance
    planned = (made["solver"] or {}).get("name") if (made["criterion"] or "").startswith(FOR_A_SOLVER) else None
    if None not in (solver, planned) and solver != planned:
        _say(path, f"schedule {file} was planned for --solver {planned}, and is followed by {solver}")
    if made["model_fingerprint"] not in (None, loaded.fingerprint):
        here = loaded.config | {"weights": loaded.weights}
        _say(path, f"schedule {file} was made for other weights{_words(made)} than it is followed with{_words(here)}")
    return path


def _say(path: Path, text: str) -> None:
    # What was made by hand suits one model as it suits another.
    say_once(f"{'note' if path.provenance['criterion'] is None else 'warning'}: {text}")


def _words(model: dict[str, Any]) -> str:
    said = {"run": "run {}", "epoch": "epoch {}", "weights": "{}"}
    words = [text.format(model[name]) for name, text in said.items() if model.get(name) is not None]
    return f" ({', '.join(words)})" if words else ""


def _process(beta_schedule: str | None, num_train_timesteps: int) -> str:
    return f"'{beta_schedule}' with {num_train_timesteps} timesteps" if beta_schedule else "another process"


def _check_unaltered(path: Path, file: str) -> None:
    name, count, resolution = (path.provenance[key] for key in ("beta_schedule", "num_train_timesteps", "resolution"))
    count = DEFAULT_TIMESTEPS if count is None else count
    points = np.array(path.points)
    for key, value, least in (
        ("num_train_timesteps", count, points.max() + 1),
        ("resolution", 1 if resolution is None else resolution, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(f"Schedule {file} was changed after it was saved: its {key} is {value}; save it again.")
    if name not in ALL_SCHEDULES:  # It does not say, or is of a later version.
        return
    expected, said = DDIMScheduler(count, name, "v").log_snr.numpy()[points], log_snr_of(path)
    differs = ~np.isclose(said, expected, ROUNDING, ROUNDING)
    if differs.any():
        raise ValueError(
            f"Schedule {file} was changed after it was saved: timestep {points[differs][0]} of {_process(name, count)} "
            f"has log SNR {expected[differs][0]:.6g}, not {said[differs][0]:.6g}; save it again."
        )


def _counted(log_snr: np.ndarray) -> np.ndarray:
    # Below PURE_NOISE differences count a thousandth, and an infinite one is finite.
    return np.where(log_snr < PURE_NOISE, PURE_NOISE + 1e-3 * (np.maximum(log_snr, -100) - PURE_NOISE), log_snr)


def _at_log_snr(path: Path, scheduler: DDIMScheduler, file: str) -> Path:
    table = scheduler.log_snr.cpu().numpy()  # [T]
    points, wanted = np.array(path.points), log_snr_of(path)  # [N + 1, scales] each
    if points.max() < len(table) and np.isclose(table[points], wanted, ROUNDING, ROUNDING).all():
        return path
    made = path.provenance
    there = _process(made["beta_schedule"], made["num_train_timesteps"] or DEFAULT_TIMESTEPS)
    here = _process(scheduler.beta_schedule, scheduler.num_train_timesteps)
    distances = np.abs(_counted(table)[:, None, None] - _counted(wanted))  # [T, N + 1, scales]
    nearest = np.where(points == 0, 0, distances.argmin(0))
    off = np.where(points == 0, 0, distances.min(0))
    if off.max() > TOLERANCE:
        worst = np.unravel_index(off.argmax(), off.shape)
        raise ValueError(
            f"Schedule {file} was made for {there}, and {here} of this model cannot follow it: at timestep "
            f"{points[worst]} it has log SNR {wanted[worst]:.4g}, and the nearest here is {table[nearest[worst]]:.4g}; "
            "plan a path for this model (plan_path.py)."
        )
    repeated = (np.diff(nearest, axis=0) == 0).all(1).nonzero()[0]
    if len(repeated):
        raise ValueError(
            f"Schedule {file} was made for {there}, and the timesteps of {here} of this model are too far apart to "
            f"follow it: two of its points would fall on {tuple(nearest[repeated[0]].tolist())}; plan a path for this "
            "model (plan_path.py)."
        )
    say_once(
        f"note: schedule {file} was made for {there}, and is followed at the timesteps of {here} that have the same "
        f"log SNR, off by {off.max():.2g} at most"
    )
    points = nearest.tolist()
    said = {
        "log_snr": [[None if np.isneginf(table[t]) else float(table[t]) for t in point] for point in points],
        "beta_schedule": scheduler.beta_schedule,
        "num_train_timesteps": scheduler.num_train_timesteps,
        "followed": {"path_fingerprint": path.fingerprint(), "beta_schedule": made["beta_schedule"]},
    }
    followed = Path(points, path.kind, made | said)
    return Path(followed.points, path.kind, followed.provenance | {"path_fingerprint": followed.fingerprint()})
