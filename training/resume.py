"""Where a run writes, what there is of an earlier one, and whether the new one may go on from it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint import FILE_STEMS, checkpoint_file, peek, read_resume_file
from planning.presets import preset_of
from runtime.runs import CHECKPOINTS, LOGS, derived_name, hint_at_runs, logs_beside, places, resume_folder
from runtime.safe_write import versions
from training.run_log import METRICS_FILE, SETTINGS_FILE
from training.settings import TrainingSettings

# Of the settings of a run, what is said anew each time.
NOT_STORED = ("resume", "dry_run", "output_dir")


def placed(settings: TrainingSettings) -> tuple[TrainingSettings, list[str]]:
    """The settings with the folders that the run writes into, and what is to be said of them.

    They are those given, those of the name given, or else of the name derived from the settings; what the published
    code trains goes to the published places unless another run is there.
    """
    notes = []
    stem = settings.stem
    checkpoints, logs, _ = places(settings.run)
    if settings.output_dir is not None:
        checkpoints, logs = Path(settings.output_dir), logs_beside(settings.output_dir)
    elif not settings.is_named and settings.is_published_kind and not any(checkpoints.glob(f"{stem}_*")):
        other = _published_run(settings.model_type)
        if other in (None, settings.run):
            checkpoints, logs, _ = places(None)
        else:
            notes = [f"note: {CHECKPOINTS} holds the run {other}, so that this one goes to {checkpoints}"]
    return settings.but(output_dir=str(checkpoints), log_dir=settings.log_dir or str(logs)), notes


def _published_run(model_type: str) -> str | None:
    """The name of the run of a model type in the published places; None if there is none."""
    try:
        name = json.loads((LOGS / FILE_STEMS[model_type] / SETTINGS_FILE).read_text()).get("run")
    except (OSError, ValueError, AttributeError):
        name = None
    saved = sorted(CHECKPOINTS.glob(f"{FILE_STEMS[model_type]}_*.pth"))
    if name is not None or not saved:
        return name
    config = peek(saved[0]).get("config", {})
    said = {"representation": "overcomplete", "preset": preset_of(config)} | config
    names = ("model_type", "representation", "preset", "resolution", "dataset", "seed")
    # Whatever else lies there is another run, too.
    return config.get("run") or (derived_name(*(said[key] for key in names)) if said.keys() >= set(names) else saved[0])


def stored_settings(values: dict[str, Any], model_types: Sequence[str], flag: str = "--model") -> dict[str, Any]:
    """The settings of the run that `--resume` names by its folder, or `--run` by its name; nothing without either.

    model_types: those that the stage trains; flag: which says what of them. Raises FileNotFoundError if the folder
    holds no resume file of these, and ValueError for several of which none is that of the flags, or if the file is
    damaged.
    """
    place = values["resume"]
    if place == "required" and values["run"] and values["output_dir"] is None:
        place = CHECKPOINTS / values["run"]
    if place in (None, "required", "auto"):
        return {}
    folder = resume_folder(place)
    there = [name for name in model_types if versions(checkpoint_file(folder, name, "last"))]
    if not there:
        what = " or ".join(f"{FILE_STEMS[name]}_last.pth" for name in model_types)
        raise FileNotFoundError(f"{folder} holds no {what} to resume{hint_at_runs()}.")
    if len(there) > 1 and values["model_type"] not in there:
        raise ValueError(f"{folder} holds several runs; pass {flag} {' or '.join(there)}.")
    model_type = values["model_type"] if values["model_type"] in there else there[0]
    for file in versions(checkpoint_file(folder, model_type, "last")):
        saved = peek(file)
        if saved:
            break
    else:
        raise ValueError(f"{file} is damaged or not a checkpoint; train again.")
    known = {field.name for field in dataclasses.fields(TrainingSettings)} - set(NOT_STORED)
    config = saved["config"]
    # Files from before there were settings in them do not say where their logs are.
    settings = saved.get("settings") or config | {"preset": preset_of(config), "run": config.get("run")}
    # What there was no choice of then is not what the preset says of it now.
    settings = {name: value for name, value in TrainingSettings.absent().items() if name not in config} | settings
    if settings.get("log_dir") == str(logs_beside(settings.get("output_dir", CHECKPOINTS))):
        settings = settings | {"log_dir": None}  # They move with the checkpoints.
    return {name: value for name, value in settings.items() if name in known}


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
        try:
            of_log = json.loads(settings_file.read_text())
            of_log.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{settings_file} is damaged ({error}); bring it back, or pass another --log_dir."
            ) from error
        _compare(settings, identity, of_log, f"{log_file} is of a run")
    return earlier


def _refuse_to_overwrite(resume: str | None, last_file: Path, log_file: Path) -> None:
    student = last_file.with_name(last_file.name.replace("_last", ""))  # Which has no epoch in its name.
    taken = [student] * student.exists() + sorted(last_file.parent.glob(last_file.name.replace("_last", "_*")))
    if taken and resume == "auto":
        raise ValueError(f"{taken[0]} exists, but no {last_file} to resume; pass another --run or --output_dir.")
    if taken:
        raise ValueError(
            f"{taken[0]} exists already; pass --resume to continue its run, another --run, or another --output_dir and "
            "--log_dir."
        )
    if resume is None and log_file.exists() and log_file.stat().st_size:
        raise ValueError(
            f"{log_file} exists already; pass --resume auto to start its run again, or another --run or --log_dir."
        )


def _compare(settings: TrainingSettings, identity: dict[str, Any], saved: dict[str, Any], what: str) -> None:
    """Raise ValueError, naming the first setting that differs from a saved one."""
    saved = settings.before_choices() | saved
    # What follows from another flag comes last, so that the flag is named.
    follows = ("beta_schedule", "channels", "data_fingerprint", "start_fingerprint", "epochs")
    for key in sorted(identity, key=lambda key: (key in follows, key)):
        if saved.get(key) != identity[key]:
            file = " (--t_pairs with the schedule file of its path)" if "path:" in str(saved.get(key)) else ""
            file = " (--vgg_weights with the weights of then)" if key == "vgg_fingerprint" else file
            file = " (--latents with the autoencoder of then)" if key == "latents_fingerprint" else file
            raise ValueError(
                f"{what} with {key} = {saved.get(key)}, not {identity[key]}; resume with the same value{file}, or "
                "start another --run, or in another --output_dir and --log_dir."
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
