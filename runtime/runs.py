"""Runs by name: which folder holds the checkpoints and logs of one, and which its maps, plans, samples and scores.

    checkpoints/NAME/        {model}_{epoch}ep.pth, {model}_last.pth, logs/{model}/
    results/NAME/            heatmap_30_{epoch}ep.pth, plan_{epoch}ep_{weights}/, samples/, fid_results.csv, ...

The published places, checkpoints/, logs/ and results/ themselves, are those of one run without a folder of its own.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHECKPOINTS, LOGS, RESULTS = Path("checkpoints"), Path("logs"), Path("results")
SCORES_FILE = "fid_results.csv"
MAX_NAME = 100
SHORT = 40  # Letters of a data set in the name of a run.


class Places(NamedTuple):
    """Where a run keeps what it makes."""

    checkpoints: Path
    logs: Path  # with a folder for each model
    results: Path


def run_name(text: str) -> str:
    """Parse the name of a run: letters, digits and `._+-`, not a dot first."""
    if not re.fullmatch(r"\w[\w.+-]*", text) or len(text) > MAX_NAME:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not the name of a run, which has up to {MAX_NAME} letters, digits and ._+- in it"
        )
    return text


def places(name: str | None) -> Places:
    """The places of a run; the published ones for None."""
    if name is None:
        return Places(CHECKPOINTS, LOGS, RESULTS)
    return Places(CHECKPOINTS / name, logs_beside(CHECKPOINTS / name), RESULTS / name)


def logs_beside(checkpoints: str | Path) -> Path:
    """Where the logs of checkpoints in a folder lie: the published ones apart, others within."""
    return LOGS if is_same(checkpoints, CHECKPOINTS) else Path(checkpoints) / "logs"


def is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one folder."""
    return Path(one).resolve() == Path(other).resolve()


def resume_folder(place: str | Path) -> Path:
    """The folder of checkpoints that a run is resumed from, named itself or by a file in it."""
    return Path(place) if Path(place).suffix != ".pth" else Path(place).parent


def results_of(checkpoint: str | Path, config: Mapping[str, Any]) -> Path:
    """The folder for what is made with a checkpoint: that of its run, by the folder it lies in or by its config."""
    folder = Path(checkpoint).resolve().parent
    if folder == CHECKPOINTS.resolve():
        return RESULTS
    name = folder.name if folder.parent == CHECKPOINTS.resolve() else config.get("run")
    return RESULTS / name if name else RESULTS


def derived_name(
    model_type: str,
    representation: str,
    preset: str,
    resolution: int,
    dataset: str,
    seed: int,
    start_dataset: str | None = None,
) -> str:
    """What a run is called that was given no name: `dual-residual-improved-64px-AFHQv2-seed42`.

    Of one that maps a data set onto another both are named: `baseline-flow-64px-cats-to-dogs-seed42`.
    """
    sets = "-to-".join(_short_name(each) for each in (start_dataset, dataset) if each is not None)
    words = [model_type, representation.replace("overcomplete", ""), preset, f"{resolution}px", sets, f"seed{seed}"]
    return "-".join(filter(None, words))


def _short_name(dataset: str) -> str:
    # A folder by its own name, wherever it is seen from; a hub id without its owner.
    own = Path(dataset).resolve().name if Path(dataset).exists() else dataset.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", own).strip("-.")[:SHORT] or "images"


def known_runs() -> list[str]:
    """The names of the runs in the folder of checkpoints, in the order of the alphabet."""
    return sorted({file.parent.name for file in CHECKPOINTS.glob("*/*.pth")})


def hint_at_runs() -> str:
    """`; the runs here are A, B (--run)`, or nothing where there is none."""
    names = known_runs()
    return f"; the runs here are {', '.join(names)} (--run)" if names else ""
