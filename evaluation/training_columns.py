"""What a row of results says of the training of its model: a column for everything in which trainings may differ.

`describe_training` fills the columns. Tables, figures and the report name those in which the trainings on them differ
(`series`), so that whatever has a column here is never averaged or ranked over unsaid.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import LoadedModel
from planning.presets import PRESETS, fits_preset, loss_weights_of
from planning.students import Cost

SHOWN_CLASSES = 20
CHANGED = " (changed)"  # Behind the name of a preset, some of whose values were given otherwise.


class TrainingColumn(NamedTuple):
    """One setting of a training."""

    value: Callable[[LoadedModel, int | None], Any]  # of a model and the number of its training images, if known
    title: str  # in the name of a series; {} is the value
    form: str = "text"  # or number, or count: a whole number from 0
    # Other columns that settle it as a rule: where they do, their names are enough.
    told_by: tuple[str, ...] = ()
    of_model: bool = False  # Models of different types differ in it by themselves.


def _setting(name: str, default: Any = None) -> Callable[[LoadedModel, int | None], Any]:
    return lambda loaded, num_images: loaded.config.get(name, default)


def _choice(name: str) -> Callable[[LoadedModel, int | None], Any]:
    return lambda loaded, num_images: loaded.config.get(name) or "none"


def _if_any(name: str) -> Callable[[LoadedModel, int | None], Any]:
    # Where 0 is a choice.
    return lambda loaded, num_images: "none" if loaded.config.get(name) is None else loaded.config[name]


def _preset(config: dict[str, Any]) -> str | None:
    # Of the config of a run that named none, the one it fits.
    named, fitting = config.get("preset"), [preset for preset in PRESETS if fits_preset(preset, config)]
    if named is not None:
        return named if named in fitting else named + CHANGED
    return fitting[0] if fitting else None


def _classes(config: dict[str, Any]) -> str | list[str]:
    names = config.get("class_names") or ()
    if not names:
        return "none"
    # A row is one line, and a name may be a path.
    return [" ".join(name.splitlines()) for name in names] if len(names) <= SHOWN_CLASSES else f"{len(names)} classes"


def _latents(config: dict[str, Any]) -> str:
    if config.get("latents") is None:
        return "none"
    # Of a folder its name; which weights it held is said by their fingerprint.
    name = config["latents"]
    name = Path(name).name if config.get("latents_is_here") else name
    return " ".join(f"{name} ({config.get('latents_fingerprint')})".splitlines())


def _start(config: dict[str, Any]) -> str:
    if config.get("degradation") is not None:
        return "degraded images"
    if config.get("start_dataset") is None:
        return "noise"
    name = config["start_dataset"]
    name = Path(name).name if config.get("start_dataset_is_here") else name
    return " ".join(f"{name} ({config.get('start_fingerprint')})".splitlines())


def _cost(config: dict[str, Any], what: str) -> str | int:
    cost = Cost.of(config)
    return "none" if cost is None else getattr(cost, what)


def _lr_schedule(config: dict[str, Any]) -> str | None:
    # Any but a constant rate depends on how long the run was meant to be.
    schedule = config.get("lr_schedule")
    return schedule if schedule in (None, "constant") else f"{schedule} over {config['epochs']} epochs"


def _consistency(config: dict[str, Any]) -> str:
    # Its noise levels depend on how long the run was meant to be.
    form = config.get("consistency")
    return "none" if form is None else f"{form} over {config['epochs']} epochs"


# In the order in which titles name them.
TRAINING_COLUMNS = {
    "run": TrainingColumn(_setting("run"), "run {}"),
    "preset": TrainingColumn(lambda loaded, num_images: _preset(loaded.config), "{}"),
    "process": TrainingColumn(lambda loaded, num_images: loaded.scheduler.process_name, "{}", told_by=("preset",)),
    "prediction": TrainingColumn(
        lambda loaded, num_images: loaded.scheduler.prediction_type, "{} prediction", told_by=("preset",)
    ),
    "loss_weights": TrainingColumn(
        lambda loaded, num_images: loss_weights_of(loaded.config),
        "loss weights {}",
        told_by=("preset", "model_type", "representation"),
        of_model=True,
    ),
    "perceptual_weight": TrainingColumn(
        _setting("perceptual_weight", 0.0), "perceptual weight {}", "number", told_by=("preset",)
    ),
    "feature_weight": TrainingColumn(
        _setting("feature_weight", 0.0), "feature weight {}", "number", told_by=("preset",)
    ),
    "objective": TrainingColumn(_setting("objective", "denoising"), "{} objective", told_by=("preset",)),
    "vlb_weight": TrainingColumn(_choice("vlb_weight"), "bound weight {}", told_by=("preset", "objective")),
    "student": TrainingColumn(_choice("student"), "student {}"),
    "teacher": TrainingColumn(_choice("teacher_fingerprint"), "teacher {}", told_by=("student",)),
    "student_images": TrainingColumn(
        lambda loaded, num_images: _cost(loaded.config, "images"), "{} images of students", told_by=("student",)
    ),
    "teacher_calls": TrainingColumn(
        lambda loaded, num_images: _cost(loaded.config, "teacher_calls"),
        "{} calls of teachers",
        told_by=("student", "student_images"),
    ),
    "consistency": TrainingColumn(
        lambda loaded, num_images: _consistency(loaded.config), "consistency {}", told_by=("preset", "objective")
    ),
    "consistency_solver": TrainingColumn(
        _choice("consistency_solver"), "teacher's steps {}", told_by=("preset", "objective")
    ),
    "degradation": TrainingColumn(_choice("degradation"), "degraded by {}"),
    "severity_schedule": TrainingColumn(_choice("severity_schedule"), "{} severity", told_by=("preset", "degradation")),
    "input_noise": TrainingColumn(_if_any("input_noise"), "input noise {}", told_by=("preset", "degradation")),
    "min_snr_gamma": TrainingColumn(_choice("min_snr_gamma"), "min-SNR {}"),
    "timestep_weights": TrainingColumn(
        _setting("timestep_weights", "published"), "timestep weights {}", told_by=("preset",)
    ),
    "t_law": TrainingColumn(_setting("t_law", "uniform"), "{} timesteps", told_by=("preset",)),
    "times": TrainingColumn(_setting("times", "whole"), "{} times", told_by=("preset",)),
    "coupling": TrainingColumn(
        lambda loaded, num_images: loaded.config.get("coupling") or "independent", "{} coupling"
    ),
    "start_data": TrainingColumn(lambda loaded, num_images: _start(loaded.config), "from {}"),
    "lr": TrainingColumn(_setting("lr"), "lr {}", "number"),
    "lr_schedule": TrainingColumn(lambda loaded, num_images: _lr_schedule(loaded.config), "lr {}"),
    "classes": TrainingColumn(lambda loaded, num_images: _classes(loaded.config), "classes {}"),
    "label_dropout": TrainingColumn(_choice("label_dropout"), "label dropout {}", told_by=("classes",)),
    "batch_size": TrainingColumn(_setting("batch_size"), "batch size {}", "count"),
    "weight_decay": TrainingColumn(_setting("weight_decay"), "weight decay {}", "number"),
    "grad_clip": TrainingColumn(_setting("grad_clip"), "gradient norm {}", "number"),
    "ema_decay": TrainingColumn(_setting("ema_decay"), "EMA decay {}", "number"),
    "ema_rampup_ratio": TrainingColumn(
        _setting("ema_rampup_ratio", 0.0), "EMA ramp-up {}", "number", told_by=("preset",)
    ),
    "replan_every": TrainingColumn(_choice("replan_every"), "epochs between plans {}"),
    "replan_images": TrainingColumn(_choice("replan_images"), "images of plans {}"),
    "network": TrainingColumn(_setting("network", "unet"), "{}", told_by=("preset",)),
    "hidden_dims": TrainingColumn(_setting("hidden_dims"), "widths {}", told_by=("network",)),
    "parameters": TrainingColumn(
        lambda loaded, num_images: sum(weights.numel() for weights in loaded.model.parameters()),
        "{:,} parameters",
        "count",
        told_by=("network", "hidden_dims", "model_type", "representation"),
        of_model=True,
    ),
    "resolution": TrainingColumn(_setting("resolution"), "{} px", "count"),
    "latents": TrainingColumn(lambda loaded, num_images: _latents(loaded.config), "latents {}"),
    "training_images": TrainingColumn(lambda loaded, num_images: num_images, "{:,} training images", "count"),
    "training_data": TrainingColumn(_setting("data_fingerprint"), "data {}", told_by=("training_images", "resolution")),
    "flip": TrainingColumn(_setting("flip"), "flip {}"),
    "training_precision": TrainingColumn(_setting("precision"), "trained in {}"),
    "training_seed": TrainingColumn(_setting("seed"), "training seed {}", "count"),
    "images_seen": TrainingColumn(
        lambda loaded, num_images: loaded.config["step"] * loaded.config["batch_size"],
        "{:,} images per epoch",
        "count",
        told_by=("training_images", "batch_size"),
    ),
}
TRAINING_FIELDS = tuple(TRAINING_COLUMNS)


def describe_training(loaded: LoadedModel, num_images: int | None) -> dict[str, str]:
    """The columns of a model, as text; what its checkpoint does not say is empty.

    num_images: how many it was trained on; None if the images at hand are not those.
    """
    return {name: _text(column.value(loaded, num_images)) for name, column in TRAINING_COLUMNS.items()}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"  # True and False are translated by spreadsheets.
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"  # Without brackets, a spreadsheet takes them for one number.
    return number_text(value) if isinstance(value, float) else str(value)


def number_text(value: float) -> str:
    """A number as columns have it."""
    return repr(value).removesuffix(".0")
