"""Schedule files: a path as JSON, which replays without the model or the map that made it."""

import json
import os
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from paths.path import Path
from runtime.errors import need_file
from runtime.safe_write import replacing

SCHEDULE_FORMAT_VERSION = 1
# What a schedule file says beyond the path itself; a loaded path carries it in its provenance.
SCHEDULE_DETAILS = (
    "log_snr",
    "solver",
    "criterion",
    "cost",
    "path_fingerprint",
    "model_fingerprint",
    "data_fingerprint",
    "beta_schedule",
)
# The same, of which files of earlier versions say nothing: None.
FURTHER_DETAILS = ("num_train_timesteps", "representation", "resolution", "weights", "epoch", "run")


def save_schedule(
    path: Path,
    file: str | os.PathLike,
    log_snr: ArrayLike,  # [num_train_timesteps], log SNR of every timestep
    solver: dict[str, Any],  # such as {"name": "ddim", "eta": 0.0, "end": "clean"}
    criterion: str | None = None,  # what the path was optimised for
    cost: float | None = None,  # value of the criterion
    model_fingerprint: str | None = None,
    data_fingerprint: str | None = None,
    beta_schedule: str | None = None,
    representation: str | None = None,  # of the two scales
    resolution: int | None = None,  # side of the fine image
    weights: str | None = None,  # raw or ema
    epoch: int | None = None,
    run: str | None = None,  # name of the training
) -> None:
    """Write a path as a schedule file: JSON with the points as timesteps and as log SNR, and the solver.

    A log SNR of -inf (zero terminal SNR) is written as null. The file appears complete or not at all, and a
    failure leaves an earlier file of that name as it was. What `load_schedule` put into the provenance is not
    carried over: the arguments given here hold.

    Raises ValueError if the table is too short for the path or holds NaN or +inf, or if a value is not JSON,
    and FileNotFoundError if the folder does not exist.
    """
    file = FilePath(file)
    table = np.asarray(log_snr, dtype=np.float64)
    noisiest = max(path.points[0])
    if table.ndim != 1 or len(table) <= noisiest:
        raise ValueError(
            f"log_snr has shape {list(table.shape)} but the path for {file} starts at timestep {noisiest}; "
            "pass the table of all training timesteps"
        )
    if np.isnan(table).any() or np.isposinf(table).any():
        raise ValueError(f"log_snr holds NaN or +inf, so the schedule for {file} cannot be written; check the table")
    details = SCHEDULE_DETAILS + FURTHER_DETAILS
    content = {
        "format_version": SCHEDULE_FORMAT_VERSION,
        "kind": path.kind,
        "nfe": path.nfe,
        "num_scales": path.num_scales,
        "points": path.points,
        "log_snr": [[None if np.isneginf(table[t]) else float(table[t]) for t in point] for point in path.points],
        "solver": solver,
        "criterion": criterion,
        "cost": None if cost is None else float(cost),
        "path_fingerprint": path.fingerprint(),
        "model_fingerprint": model_fingerprint,
        "data_fingerprint": data_fingerprint,
        "beta_schedule": beta_schedule,
        "num_train_timesteps": len(table),
        "representation": representation,
        "resolution": resolution,
        "weights": weights,
        "epoch": epoch,
        "run": run,
        "provenance": {key: value for key, value in path.provenance.items() if key not in details},
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {file} must hold finite JSON types only ({error})") from error
    if not file.parent.is_dir():
        raise FileNotFoundError(f"folder {file.parent} for schedule {file.name} does not exist; create it first")
    with replacing(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_schedule(file: str | os.PathLike) -> Path:
    """Read a schedule file; the path can be replayed without the model or the map that made it.

    The provenance of the path holds what the path was saved with, plus SCHEDULE_DETAILS and FURTHER_DETAILS from the
    file. `planning.replay` makes it a path of another model.

    Raises FileNotFoundError if there is no such file, and ValueError if it is not JSON, not a schedule, of a
    later format version, or if its points are invalid or not those it was written with, by fingerprint and log SNR.
    """
    file = need_file(file, "schedule file", "check the name or save a schedule first")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"schedule file {file} is not JSON ({error}); save it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{file} is not a schedule file: it has no format_version; pass a file that LIFT saved")
    if version > SCHEDULE_FORMAT_VERSION:
        raise ValueError(
            f"schedule file {file} has format version {version} but this code reads only up to "
            f"{SCHEDULE_FORMAT_VERSION}; update LIFT"
        )
    required = ("kind", "nfe", "num_scales", "points", *SCHEDULE_DETAILS, "provenance")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{file} is not a complete schedule file: it lacks {', '.join(missing)}; save it again")
    try:
        path = Path(content["points"], content["kind"], content["provenance"])
        details = {key: content.get(key) for key in SCHEDULE_DETAILS + FURTHER_DETAILS}
        path = Path(path.points, path.kind, path.provenance | details)
    except ValueError as error:
        raise ValueError(f"schedule file {file} holds no valid path: {error}") from error
    stated = (content["nfe"], content["num_scales"], content["path_fingerprint"])
    if stated != (path.nfe, path.num_scales, path.fingerprint()):
        raise ValueError(
            f"schedule file {file} was changed after it was saved: its points do not match its nfe, "
            "num_scales and path_fingerprint; save it again"
        )
    if not _has_log_snr(path):
        raise ValueError(
            f"schedule file {file} was changed after it was saved: its log_snr is not one number for every timestep, "
            "higher at lower ones; save it again"
        )
    return path


def log_snr_of(path: Path) -> np.ndarray:
    """Log SNR of every point of a loaded path as its file says it, float64 `[N + 1, scales]`; null is -inf."""
    rows = [[-np.inf if value is None else value for value in point] for point in path.provenance["log_snr"]]
    return np.array(rows, dtype=np.float64)


def _has_log_snr(path: Path) -> bool:
    """Whether a loaded path has one log SNR for each timestep, falling with it."""
    try:
        log_snr = log_snr_of(path)
    except (TypeError, ValueError):
        return False
    if log_snr.shape != np.shape(path.points):
        return False
    _, first, place = np.unique(path.points, return_index=True, return_inverse=True)
    values = log_snr.ravel()
    return bool((values[first][place.ravel()] == values).all() and (values[first][1:] < values[first][:-1]).all())
