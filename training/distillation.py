"""Students of a trained model: which there are, what teaches each, and runs of the one loop, one after the other.

    progressive   {stem}_{calls}calls.pth     every round halves the calls of the one before (`training.progressive`)
    consistency   {stem}_consistency.pth      one round (`training.consistency`)

Reflow, which makes pairs before each round, is in `training.reflow`. The student of a round is the teacher of the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cli
from checkpoint import MODEL_CLASSES, checkpoint_file, has_ema, load_model, peek
from paths.path import Path as SamplingPath
from planning.choice import OnePathSettings, path_of_settings
from planning.students import halved, said_of_cost, student_path
from runtime.distributed import PATIENCE, Processes
from runtime.safe_write import versions
from runtime.settings import option
from training.consistency import CALLS_OF_TEACHER
from training.progressive import CALLS_EACH
from training.resume import placed
from training.run import train
from training.settings import TrainingSettings
from training.teaching import Teaching
from training.timesteps import UNIFORM

Teach = Callable[[Processes], Teaching]
STEPS_OF_TEACHER, LEAST_CALLS = 64, 1
CONSISTENCY_STUDENT = "consistency"


@dataclass(frozen=True, kw_only=True)
class RoundSettings(OnePathSettings):
    """Along which path a teacher walks, and how many rounds there are."""

    group = "distillation"
    rounds: int | None = option(
        None,
        "of progressive: rounds to do by this call, those that are done among them (all); of reflow: students one "
        "after the other, each the teacher of the next (1)",
        parse=cli.positive_int,
        metavar="K",
    )


@dataclass(frozen=True, kw_only=True)
class HalvingSettings(RoundSettings):
    """How many calls the first teacher takes, and the last student. Raises ValueError unless halving leads there."""

    group = "distillation"
    from_calls: int | None = option(
        None, f"of progressive: calls of the teacher's walk ({STEPS_OF_TEACHER})", parse=cli.positive_int,
        flag="--from", metavar="N",
    )  # fmt: skip
    to_calls: int | None = option(
        None, f"of progressive: calls of the last student ({LEAST_CALLS})", parse=cli.positive_int, flag="--to",
        metavar="N",
    )  # fmt: skip

    @property
    def halvings(self) -> tuple[int, ...]:
        """Calls of the students, round by round."""
        first, last = self.from_calls or STEPS_OF_TEACHER, self.to_calls or LEAST_CALLS
        found = [first]
        while found[-1] > last and not found[-1] % 2:
            found.append(found[-1] // 2)
        if found[-1] != last or len(found) == 1:
            raise ValueError(
                f"--from {first} --to {last} are no rounds that halve the calls; choose --from a power of two times "
                "--to, such as 64 and 1."
            )
        return tuple(found[1:][: self.rounds])


def training_settings(settings: TrainingSettings, **changes: Any) -> TrainingSettings:
    """The settings of a training alone, of those of a stage that has more, with changes."""
    names = {field.name for field in fields(TrainingSettings)}
    return TrainingSettings(**{name: value for name, value in settings.given().items() if name in names} | changes)


def begun(settings: TrainingSettings, students: Sequence[str], *folders: Path) -> TrainingSettings:
    """The settings of the first student, with the places of the run.

    folders: beside the checkpoints, what else there is of a run that has been begun. Raises FileNotFoundError if there
    is nothing to resume where that is asked for, and ValueError if there is something where it is not.
    """
    settings, notes = placed(training_settings(settings, student=students[0]))
    print(*notes, sep="\n", end="\n" * bool(notes))
    output, resume = Path(settings.output_dir), settings.resume
    last_file = checkpoint_file(output, settings.model_type, "last", settings.student)
    if resume == "required" and not versions(last_file) and not any((output / name).exists() for name in folders):
        raise FileNotFoundError(f"{last_file} does not exist; leave --resume out to start a new run.")
    if resume is None and versions(last_file):
        # Said before anything is made that may take hours.
        raise ValueError(f"{last_file} exists already; pass --resume to continue its run, or another --run.")
    return settings


def of_student(settings: TrainingSettings, student: str) -> TrainingSettings:
    """The settings of one of the students: what has been begun goes on, and the rounds after it begin."""
    return settings.but(student=student, resume=None if settings.resume is None else "auto")


def finished(settings: TrainingSettings) -> Path | None:
    """The checkpoint of a student; None for one that was stopped on the way, or not to be trained."""
    file = checkpoint_file(settings.output_dir, settings.model_type, settings.epochs, settings.student)
    # A student of more epochs, from before, is done as well.
    return None if settings.dry_run or peek(file).get("epoch", 0) < settings.epochs else file


def check_predicts_all(settings: TrainingSettings) -> None:
    """Raise ValueError for a model that reads what it does not predict."""
    kind = MODEL_CLASSES[settings.model_type]
    if kind.num_predictions < kind.num_scales:
        raise ValueError(
            f"a '{settings.model_type}' model reads a coarse image that it does not predict, so that two of its steps "
            "do not follow from where it is; distil a baseline, dual or shared_t model."
        )


def check_halving(settings: TrainingSettings, options: HalvingSettings) -> None:
    """Raise ValueError for rounds that do not halve, and for a model that has no students of few steps."""
    check_predicts_all(settings)
    _ = options.halvings
    if settings.t_law != UNIFORM:
        raise ValueError("a student of --method progressive is shown every step as often; leave --t_law out.")
    if settings.prediction_type in ("epsilon", "score"):
        raise ValueError(
            f"a teacher that predicts {settings.prediction_type} has no student of few steps, as at high noise an "
            "error of the noise says little of the image; train one with --prediction_type v, x0 or velocity."
        )


def path_of_teacher(options: HalvingSettings, teacher: str | Path, ema: bool) -> SamplingPath:
    """The path of the first teacher; raises ValueError if it has not as many steps as `--from` says."""
    steps = options.from_calls or STEPS_OF_TEACHER
    chosen = {field.name: getattr(options, field.name) for field in fields(OnePathSettings)}
    path, kind = path_of_settings(OnePathSettings(**chosen | {"num_steps": steps}), load_model(teacher, ema))
    if path.nfe != steps:
        raise ValueError(
            f"--from {steps} is not the number of steps of path {kind}, which has {path.nfe}; pass --from {path.nfe}, "
            "or another path."
        )
    return path


def progressive(settings: TrainingSettings, options: HalvingSettings, teacher: str | Path, weights: str | None) -> None:
    """Train the students of all rounds, each taught by the one before, from where an earlier run stopped.

    weights: of the teachers, "raw" or "ema"; None: EMA where there is. A stop signal ends it after its step. Raises
    what `path_of_teacher`, `begun` and `train` raise.
    """
    students = {calls: f"{calls}calls" for calls in options.halvings}
    path = path_of_teacher(options, teacher, has_ema(teacher, weights))
    settings = begun(settings, list(students.values()))
    processes, teacher = Processes(settings.device, PATIENCE), Path(teacher)
    for student in students.values():
        own = of_student(settings, student)
        train(own, _halving(teacher, has_ema(teacher, weights), path), processes)
        file = finished(own)
        if file is None:
            break
        path, teacher = halved(path), file
    processes.close()


def _halving(teacher: Path, ema: bool, path: SamplingPath) -> Teach:
    def teach(processes: Processes) -> Teaching:
        loaded = load_model(teacher, ema, processes.device)
        points = [list(point) for point in path.points]
        said = {"teacher_points": points, "student_points": points[::2]}
        return Teaching(loaded, said | said_of_cost(loaded.config, CALLS_EACH))

    return teach


def consistency(settings: TrainingSettings, options: RoundSettings, teacher: str | Path, weights: str | None) -> None:
    """Train a consistency model that starts from a trained model, which may also take its steps.

    As of `progressive`. Raises ValueError for steps of a teacher that knows no noise levels but those of its own path.
    """
    settings = begun(settings, [CONSISTENCY_STUDENT])
    processes = Processes(settings.device, PATIENCE)
    own = of_student(settings, CONSISTENCY_STUDENT)

    def teach(processes: Processes) -> Teaching:
        loaded = load_model(teacher, has_ema(teacher, weights), processes.device)
        if own.consistency_solver is not None and (taught := student_path(loaded.config)) is not None:
            raise ValueError(
                f"{loaded.file} is a student that knows the noise levels of its own {taught.nfe} step(s) alone, and a "
                "teacher of consistency takes steps between all; pass the model that it was distilled from, or "
                "--consistency ect."
            )
        return Teaching(loaded, said_of_cost(loaded.config, CALLS_OF_TEACHER[own.consistency_solver]))

    train(own, teach, processes)
    processes.close()
