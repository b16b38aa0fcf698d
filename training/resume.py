"""What there is of an earlier run where a new one would write, and whether the new one may go on from it."""

import json
from pathlib import Path
from typing import Any

from checkpoint import read_resume_file
from runtime.safe_write import versions
from training.run_log import METRICS_FILE, SETTINGS_FILE
from training.settings import TrainingSettings


def earlier_run(
    settings: TrainingSettings,
    identity: dict[str, Any],  # of the new run, which an earlier one must share
    execution: dict[str, Any],
    last_file: Path,
    log_dir: Path,
) -> tuple[dict[str, Any], list[Path], list[str]] | None:
    """The content of the resume file that a run goes on from, newer files that are damaged, and what is to be said.

    None for a run that starts afresh. Raises FileNotFoundError if there is no resume file and one is required, and
    ValueError if an earlier run would be lost or mixed with one of other settings, naming the first that differs.
    """
    log_file, settings_file = log_dir / METRICS_FILE, log_dir / SETTINGS_FILE
    earlier = None
    if settings.resume is not None and versions(last_file):
        saved, file, damaged = read_resume_file(last_file)
        if settings.precision == "auto":
            identity = identity | {"precision": saved["config"]["precision"]}
        _compare(settings, identity, saved["config"], f"{file} was trained")
        notes = [f"warning: {name} is damaged; going on from {file}" for name in damaged]
        earlier = saved, damaged, notes + _differences(execution, saved["execution"])
    elif settings.resume == "required":
        hint = "leave --resume out to start a new run" if not settings_file.exists() else "pass --resume auto"
        raise FileNotFoundError(f"{last_file} does not exist; {hint}.")
    else:
        _refuse_to_overwrite(settings.resume, last_file, log_file)
    # The rows of another run would be lost. Without a resume file they are of a run that ended before its first.
    if settings_file.exists() and log_file.exists() and log_file.stat().st_size:
        _compare(settings, identity, json.loads(settings_file.read_text()), f"{log_file} is of a run")
    return earlier


def _refuse_to_overwrite(resume: str | None, last_file: Path, log_file: Path) -> None:
    taken = sorted(last_file.parent.glob(last_file.name.replace("_last", "_*")))
    if taken and resume == "auto":
        raise ValueError(f"{taken[0]} exists, but no {last_file} to resume; pass another --output_dir.")
    if taken:
        raise ValueError(
            f"{taken[0]} exists already; pass --resume to continue its run, or another --output_dir and --log_dir."
        )
    if resume is None and log_file.exists() and log_file.stat().st_size:
        raise ValueError(f"{log_file} exists already; pass --resume auto to start its run again, or another --log_dir.")


def _compare(settings: TrainingSettings, identity: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    """Raise ValueError, naming the first setting that differs from a saved one."""
    saved = settings.before_choices() | saved
    # What follows from another flag comes last, so that the flag is named.
    for key in sorted(identity, key=lambda key: (key == "data_fingerprint", key == "epochs", key)):
        if saved.get(key) != identity[key]:
            file = " (--t_pairs with the schedule file of its path)" if "path:" in str(saved.get(key)) else ""
            raise ValueError(
                f"{what} with {key} = {saved.get(key)}, not {identity[key]}; resume with the same value{file} or "
                "start in another --output_dir and --log_dir."
            )


def _differences(execution: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A sentence about each way in which a resumed run is executed differently."""
    notes = []
    for key, value in execution.items():
        if before.get(key, value) == value:
            continue
        consequence = "other noise is drawn from here on" if key == "device" else "roundings may differ"
        notes.append(f"note: {key} is {value} and was {before[key]}, so that {consequence}")
    return notes
