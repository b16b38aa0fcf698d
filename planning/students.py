"""What students were taught: the points of their path, and how they are to be sampled."""

from typing import Any, NamedTuple

from paths.path import Path

STUDENT_PATH = "student"  # As `--path_type` has it.
NO_STUDENT = "{} is no student, which has a path of its own; pass another --path_type, or a checkpoint of distill.py."


class Cost(NamedTuple):
    """What it took to make a student of a first teacher, that of the students in between included."""

    images: int  # that students were shown in training
    teacher_calls: int  # network calls of teachers, for one image each

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Cost | None":
        """By the config of a loaded student; None for a model that is none."""
        said = config.get("distillation")
        if said is None:
            return None
        seen = config["step"] * config["batch_size"]
        return cls(said["images"] + seen, said["teacher_calls"] + said["calls_each"] * seen)


def said_of_cost(teacher: dict[str, Any], calls_each: int, calls_before: int = 0) -> dict[str, Any]:
    """What the config of a student says of its cost, by which `Cost.of` knows it.

    teacher: its config; calls_each: of the teacher, for every image of a step; calls_before: those before the first.
    """
    before = Cost.of(teacher) or Cost(0, 0)
    calls = before.teacher_calls + calls_before
    return {"distillation": {"images": before.images, "teacher_calls": calls, "calls_each": calls_each}}


def student_path(config: dict[str, Any]) -> Path | None:
    """The path that a student, by its config, has learnt to walk; None for a model that is none."""
    points = config.get("student_points")
    if points is None:
        return None
    said = {"teacher": config["teacher_fingerprint"], "calls": len(points) - 1}
    return Path(tuple(map(tuple, points)), STUDENT_PATH, said)


def file_words(config: dict[str, Any], epoch: int) -> str:
    """`[{model}_][{student}_]{epoch}ep`: what tells a checkpoint from others of its run in names of files."""
    model = "" if config["model_type"] == "dual" else config["model_type"]
    return "_".join(filter(None, (model, config.get("student"), f"{epoch}ep")))


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
    steps = f"{taught.nfe} step{'s' * (taught.nfe > 1)}"
    return (
        f"this model is a student of {steps}, and {off} of the {path.nfe} of path {path.kind} are none of them; expect "
        f"worse images than with --path_type {STUDENT_PATH}."
    )
