"""Reflow: a flow that is trained on the pairs of noise and image that another flow made, round by round.

The pairs of a trained flow are a coupling whose lines cross less than those of fresh noise, so that the trajectories of
a flow that is trained on them are straighter and fewer steps do (arXiv 2209.03003, section 2.2). The student of a round
is the teacher of the next. In the end the last one may be taught to take its one step from pure noise to the image.

    {stem}_reflow1.pth          the student of the first round, trained on pairs_reflow1/ of the teacher
    {stem}_reflow2.pth          of the second, on pairs_reflow2/ of the first student
    {stem}_reflow2_1calls.pth   of one step, on pairs_reflow2_1calls/ of the last student

Rectified flow is of straight lines from noise to images, and so of the process flow and its velocity. Beside the log of
each round lies straightness.json, S of its teacher and of its student (`diffusion.straightness`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from checkpoint import LoadedModel, has_ema, load_model
from diffusion.pairs import (
    SHARD_SIZE,
    Pairs,
    blank_pairs,
    check_unique,
    ends_of,
    is_sealed,
    load_pairs,
    make_pairs,
    num_own,
    pair_seeds,
    seal_pairs,
)
from diffusion.sampler import IMAGES_PER_SEED, scale_shapes
from diffusion.straightness import divided, straightness
from paths.path import Path as SamplingPath
from planning.choice import WalkSettings, path_of_settings
from planning.students import said_of_cost
from runtime.device import autocast, resolve_precision
from runtime.distributed import PATIENCE, Processes
from runtime.progress import Progress
from runtime.safe_write import replacing
from runtime.settings import option
from training.distillation import RoundSettings, begun, finished, of_student
from training.run import train
from training.settings import TrainingSettings
from training.teaching import Teaching

STRAIGHTNESS_FILE = "straightness.json"
STRAIGHT_IMAGES, STRAIGHT_STEPS = 64, 100  # By which S is measured.
PAIRED = "pairs"  # The coupling that configs of students name.


@dataclass(frozen=True, kw_only=True)
class ReflowSettings(RoundSettings, WalkSettings):
    """How many rounds there are, and which pairs each is trained on.

    Raises ValueError for a solver that draws noise, and for more pairs than a seed provides.
    """

    group = "reflow"
    num_pairs: int = option(10_000, "of reflow: pairs of each round", parse=cli.positive_int, metavar="N")
    one_step: bool = option(
        False, "of reflow: then teach one more to go from noise to the image of the last one in one step"
    )

    def check(self) -> None:
        super().check()
        check_unique(self.make_solver())
        pair_seeds(0, 0, self.num_pairs)

    @property
    def students(self) -> tuple[str, ...]:
        """What the students are called, in order."""
        names = tuple(f"reflow{k + 1}" for k in range(self.rounds or 1))
        return (*names, f"{names[-1]}_1calls") if self.one_step else names


def check_teacher(loaded: LoadedModel) -> None:
    """Raise ValueError unless a model is a flow of which pairs are made."""
    scheduler, model = loaded.scheduler, loaded.model
    if scheduler.process != "flow" or scheduler.prediction_type != "velocity":
        raise ValueError(
            f"{loaded.file} was trained with the process {scheduler.process_name} and predicts "
            f"{scheduler.prediction_type}, and rectified flow is of the process flow and its velocity; train a teacher "
            "with train_baseline.py --preset flow."
        )
    if model.num_predictions < model.num_scales:
        raise ValueError(
            f"{loaded.file} predicts the fine scale alone, and a coarse one that is made of it follows no flow; train "
            "a teacher with train_baseline.py, or with train_lift.py --model dual."
        )
    loaded.require_pixels("--method reflow")


def check_data(loaded: LoadedModel, settings: TrainingSettings) -> None:
    """Raise ValueError unless the images of a student are those of its teacher, before pairs are made of these."""
    images, _ = cli.load_image_parts(settings)
    if images.fingerprint != loaded.config.get("data_fingerprint"):
        raise ValueError(
            f"the data of the teacher {loaded.file} are other images than those of '{images.name}' here; leave the "
            "flags of data out, or pass another teacher."
        )


def pairs_said(
    loaded: LoadedModel, path: SamplingPath, options: ReflowSettings, precision: str, first_seed: int
) -> dict[str, Any]:
    """What decides the pairs of a teacher: the settings of their folder."""
    config = loaded.config
    return {
        "beta_schedule": config["beta_schedule"],
        "representation": loaded.scheduler.representation.name,
        **{key: config.get(key) for key in ("model_type", "resolution", "channels", "class_names", "data_fingerprint")},
        "teacher_fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "path_fingerprint": path.fingerprint(),
        "solver": options.solver_words,
        "end": options.end,
        "precision": precision,
        "first_seed": first_seed,
        "num_pairs": options.num_pairs,
        "shard_size": SHARD_SIZE,
    }


def pairs_of(
    loaded: LoadedModel,
    path: SamplingPath,
    options: ReflowSettings,
    settings: TrainingSettings,
    number: int,  # of the student among those of the run
    folder: Path,
    processes: Processes,
) -> Pairs:
    """The pairs of a teacher, made where they are missing by all processes together, and read from their folder.

    With `dry_run` nothing is made. Raises what `make_pairs` and `load_pairs` raise.
    """
    if settings.batch_size > options.num_pairs:
        raise ValueError(f"--batch_size {settings.batch_size} exceeds --num_pairs {options.num_pairs}; lower it.")
    seeds = pair_seeds(settings.seed, number, options.num_pairs)
    precision = resolve_precision(processes.device, settings.precision)
    said = pairs_said(loaded, path, options, precision, seeds.start)
    if settings.dry_run and not is_sealed(folder):
        return blank_pairs(said, loaded.model.num_scales)
    shapes = shapes_of(loaded)

    def walk(chosen: range):
        labels, device = labels_of(loaded, chosen), processes.device
        with autocast(device, settings.precision):
            ends = ends_of(
                loaded.denoise, loaded.scheduler, path, chosen, shapes, settings.batch_size, device,
                options.make_solver(), options.end, labels,
            )  # fmt: skip
        return ends, labels

    whole = is_sealed(folder)
    if not settings.dry_run:
        words = folder.name + ", made before" * whole
        part = processes.rank, processes.count
        with Progress(total=num_own(said, part), unit="pair", desc=words, disable=not processes.is_main) as bar:
            made = make_pairs(folder, said, walk, part, bar.update)
        [made] = processes.any(made)  # Waits for all.
        if processes.is_main and (made or not whole):
            seal_pairs(folder, said)
        processes.any(False)
    return load_pairs(folder, said)


def labels_of(loaded: LoadedModel, seeds: range) -> list[int] | None:
    """The class of each seed, in turn; None for a model without."""
    names = loaded.config.get("class_names")
    return [seed % IMAGES_PER_SEED % len(names) for seed in seeds] if names else None


def shapes_of(loaded: LoadedModel) -> list[tuple[int, int, int]]:
    """`(C, H, W)` of each scale of a model."""
    return scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.side)


def measured(loaded: LoadedModel, path: SamplingPath, settings: TrainingSettings) -> dict[str, Any]:
    """The straightness of a model along a path, as files say it."""
    fine_path = divided(path, STRAIGHT_STEPS)
    seeds = pair_seeds(settings.seed, 999, STRAIGHT_IMAGES)  # No round is trained on them.
    with autocast(loaded.device, "fp32"):
        found = straightness(
            loaded.denoise, loaded.scheduler, fine_path, seeds, shapes_of(loaded), settings.batch_size, loaded.device,
            labels_of(loaded, seeds),
        )  # fmt: skip
    values = {name: list(numbers) for name, numbers in zip(("straightness", "error"), found, strict=True)}
    said = {"images": len(seeds), "steps": fine_path.nfe, "path_fingerprint": fine_path.fingerprint()}
    return {"fingerprint": loaded.fingerprint, "weights": loaded.weights} | values | said


def write_straightness(
    file: Path, teacher: LoadedModel, student: LoadedModel, path: SamplingPath, settings: TrainingSettings
) -> None:
    """Measure a teacher and its student along a path, print what is found and write it, unless the file says it."""
    try:
        known = json.loads(file.read_text())
        prints = [known[name]["fingerprint"] for name in ("teacher", "student")]
    except (OSError, ValueError, LookupError, TypeError):
        prints = []
    if prints != [teacher.fingerprint, student.fingerprint]:
        known = {}
        for name, loaded in (("teacher", teacher), ("student", student)):
            known[name] = measured(loaded, path, settings)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
    for name, loaded in (("teacher", teacher), ("student", student)):
        values = zip(known[name]["straightness"], known[name]["error"], strict=True)
        words = ", ".join(
            f"{value:.4g} ± {error:.2g} {scale}"
            for (value, error), scale in zip(values, ("fine", "coarse"), strict=False)
        )
        print(f"straightness of {loaded.file.name}: {words} (per dimension; 0 is straight)")


def reflow(settings: TrainingSettings, options: ReflowSettings, teacher: str | Path, weights: str | None) -> None:
    """Train the students of all rounds, one after the other, from where an earlier run of the same settings stopped.

    All walks are along the path of the first teacher. weights: of the teachers, "raw" or "ema"; None: EMA where there
    is. A stop signal ends it after its step, as it does a training. Raises FileNotFoundError if there is nothing to
    resume where `resume` asks for it, and what `train`, `check_teacher`, `path_of_settings` and `pairs_of` raise.
    """
    first = load_model(teacher, has_ema(teacher, weights))
    check_teacher(first)
    path, _ = path_of_settings(options, first)
    settings = begun(settings, options.students, folder_of(Path(), options.students[0]))
    check_data(first, settings)
    processes = Processes(settings.device, PATIENCE)  # The first one measures while the others wait.
    teacher = Path(teacher)
    for number, student in enumerate(options.students):
        own = of_student(settings, student)
        is_last = student.endswith("_1calls")
        train(own, _teach(own, options, path, teacher, has_ema(teacher, weights), number, is_last), processes)
        file = finished(own)
        if file is None:
            break
        if processes.is_main and is_last:
            print(f"{file} takes one step: generate_with_path_30.py --path_type student")
        elif processes.is_main:
            one, other = (load_model(each, has_ema(each, weights), processes.device) for each in (teacher, file))
            write_straightness(Path(own.log_dir) / own.stem / STRAIGHTNESS_FILE, one, other, path, settings)
        teacher = file
    processes.close()


def folder_of(output: Path, student: str) -> Path:
    """Where the pairs lie that a student is trained on."""
    return output / f"pairs_{student}"


def _teach(
    settings: TrainingSettings,
    options: ReflowSettings,
    path: SamplingPath,
    teacher: Path,
    ema: bool,
    number: int,
    one_step: bool,
) -> Callable[[Processes], Teaching]:
    def teach(processes: Processes) -> Teaching:
        loaded = load_model(teacher, ema, processes.device)
        folder = folder_of(Path(settings.output_dir), settings.student)
        pairs = pairs_of(loaded, path, options, settings, number, folder, processes)
        said = {"coupling": PAIRED, "pairs_fingerprint": pairs.fingerprint}
        if one_step:  # Only the first time is asked for, where there is nothing but noise.
            first, scales = loaded.scheduler.num_train_timesteps - 1, loaded.model.num_scales
            said |= {"only_time": first, "student_points": [[first] * scales, [0] * scales]}
        calls = options.num_pairs * options.calls(path.nfe)
        return Teaching(loaded, said | said_of_cost(loaded.config, 0, calls), pairs)

    return teach
