"""What students were taught: the points of their path, and how they are to be sampled."""

from typing import Any

from paths.path import Path

STUDENT_PATH = "student"  # As `--path_type` has it.


def student_path(config: dict[str, Any]) -> Path | None:
    """The path that a student, by its config, has learnt to walk; None for a model that is none."""
    points = config.get("student_points")
    if points is None:
        return None
    said = {"teacher": config["teacher_fingerprint"], "calls": len(points) - 1}
    return Path(tuple(map(tuple, points)), STUDENT_PATH, said)


def halved(path: Path) -> Path:
    """The path through every second point. Raises ValueError for an odd number of steps."""
    if path.nfe % 2:
        raise ValueError(f"a path of {path.nfe} steps cannot be halved; choose an even number of them.")
    return Path(path.points[::2], path.kind, {"halved": path.provenance})


def off_student_note(path: Path, config: dict[str, Any]) -> str | None:
    """One sentence if a student is called where it was not taught, else None."""
    taught = student_path(config)
    if taught is None:
        return None
    learnt = {*zip(taught.points, taught.points[1:], strict=False)}
    off = sum(step not in learnt for step in zip(path.points, path.points[1:], strict=False))
    if not off:
        return None
    return (
        f"this model is a student of {taught.nfe} steps, and {off} of the {path.nfe} of path {path.kind} are none of "
        f"them; expect worse images than with --path_type {STUDENT_PATH}."
    )
