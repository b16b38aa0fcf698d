"""Distil a trained model into one that needs few calls.

    python distill.py --method progressive --teacher checkpoints/mine/baseline_14ep.pth --from 64 --to 1 --epochs 5
    python distill.py --method progressive --teacher FILE --path_type kl --from 16 --to 2     # along its best path
    python distill.py --method consistency --teacher FILE --consistency ect
    python distill.py --method reflow --teacher FILE --rounds 2 --num_pairs 50000 --one_step --solver heun
    python generate_with_path_30.py --checkpoint checkpoints/RUN/baseline_4calls.pth --ema --path_type student
    python eval_fid_batch.py --run RUN --ema --path_type student --metrics swd

progressive: in every round a student learns to do in one step what its teacher does in two, along the same path; writes
{model}_{calls}calls.pth. consistency: a student learns where the paths of its teacher end; writes
{model}_consistency.pth. reflow: a student of a flow learns straight lines from noise to what its teacher makes of it;
writes {model}_reflow1.pth and so on, with --one_step {model}_reflow1_1calls.pth, beside them the pairs, and in the logs
straightness.json. A student starts from its teacher's weights; in the next round it is the teacher.

Each round is a training run, --epochs long. What is not said about data, model and training is as the teacher's
checkpoint has it. --resume goes on in the round, at the step or in the pairs, where an earlier call ended.
"""

import runtime.startup  # noqa: F401

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from checkpoint import COARSE_IMAGES, START_IMAGES, describe_model, unmet_need
from planning.presets import preset_of
from runtime.settings import REQUIRED, option, parse_settings
from training.cold import COLD_SETTINGS
from training.distillation import (
    CONSISTENCY_STUDENT,
    HalvingSettings,
    check_halving,
    check_predicts_all,
    consistency,
    progressive,
)
from training.reflow import ReflowSettings, reflow
from training.settings import STUDENT_SETTINGS, TrainingSettings

METHODS = {"progressive": progressive, "consistency": consistency, "reflow": reflow}
# Which settings belong to which methods alone.
OWNERS = {
    "rounds": ("progressive", "reflow"), "from_calls": ("progressive",), "to_calls": ("progressive",),
    "num_pairs": ("reflow",), "one_step": ("reflow",), "num_steps": ("reflow",), "num_calls": ("reflow",),
    "solver": ("reflow",), "end": ("reflow",), "flip": ("progressive", "consistency"),
    "path_type": ("progressive", "reflow"), "schedule": ("progressive", "reflow"), "spacing": ("progressive", "reflow"),
    "heatmap": ("progressive", "reflow"), "max_jump": ("progressive", "reflow"), "factor": ("progressive", "reflow"),
    "normalisation": ("progressive", "reflow"), "kl_weight": ("progressive", "reflow"),
}  # fmt: skip
# Of a training that are settled here, by the teacher or by the method.
SETTLED = (
    *STUDENT_SETTINGS, "model_type", "preset", "objective", "vlb_weight", "network", "hidden_dims", "process",
    "beta_schedule", "prediction_type", "representation", "times", "t_pairs", "replan_every", "replan_images",
    "perceptual_weight", "vgg_weights", "feature_weight", "coupling", "coarse_from", "target_dataset", "start_dataset",
    *COLD_SETTINGS,
)  # fmt: skip
# Of the teacher's training that a student's need not share.
OWN = (*STUDENT_SETTINGS, "epochs", "run", "seed", "coupling", "consistency", "consistency_solver", "start_dataset")
_NO_TERMS = {"perceptual_weight": 0.0, "feature_weight": 0.0, "vlb_weight": None, "min_snr_gamma": None}
_OF_METHOD = {
    "progressive": _NO_TERMS | {
        "objective": "progressive", "timestep_weights": "truncated_snr", "t_law": "uniform", "times": "whole",
        "t_pairs": None, "replan_every": None, "replan_images": None,
    },
    "consistency": _NO_TERMS | {
        "student": CONSISTENCY_STUDENT,  # So that a solver of its teacher may be chosen.
        "objective": "consistency", "timestep_weights": "published", "t_law": "uniform", "times": None, "t_pairs": None,
        "replan_every": None, "replan_images": None,
    },
    # Of students of progressive distillation, too, whose objective asks for points of a path.
    "reflow": {"objective": "denoising", "vlb_weight": None, "flip": False},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillSettings(HalvingSettings, ReflowSettings, TrainingSettings):
    """Which teacher, by which method, and how its students are trained."""

    group = "distillation"
    method: str = option(REQUIRED, "how the teacher teaches", choices=tuple(METHODS))
    teacher: str = option(REQUIRED, "checkpoint of the teacher", metavar="FILE")
    teacher_weights: str | None = option(
        None, "weights of every teacher (EMA where there are any)", choices=("raw", "ema")
    )
    epochs: int = option(20, "passes over the data, of each round", parse=cli.positive_int, recorded=True)

    def check(self) -> None:
        super().check()
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for name, methods in OWNERS.items():
            given = getattr(self, name) not in (usual[name], None) and name not in self._derived
            if given and self.method not in methods:
                flag = {"from_calls": "from", "to_calls": "to"}.get(name, name)
                raise ValueError(f"--{flag} belongs to --method {' and '.join(methods)}; leave it out.")
        if self.method == "progressive":
            check_halving(self, self)
        if self.method == "consistency":
            check_predicts_all(self)


def of_teacher(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that are the teacher's, or the method's, where no flag says otherwise."""
    config = describe_model(values["teacher"])["config"]
    if problem := unmet_need(values["teacher"], config, (START_IMAGES, COARSE_IMAGES)):
        raise ValueError(problem)
    known = {field.name for field in dataclasses.fields(TrainingSettings)} - set(OWN)
    said = TrainingSettings.absent() | config | {"preset": preset_of(config)}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known}
    # Which labels they are a checkpoint does not say; of data with several columns of them `--classes` has to.
    found["classes"] = cli.ANY_CLASSES if config.get("class_names") else None
    found["run"] = f"{config.get('run') or Path(values['teacher']).stem}-{values['method']}"
    return found | _OF_METHOD[values["method"]]


def parse_args() -> DistillSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(DistillSettings, __doc__, leave_out=SETTLED, stored=of_teacher)


def main() -> None:
    """Train the students."""
    settings = parse_args()
    METHODS[settings.method](settings, settings, settings.teacher, settings.teacher_weights)


if __name__ == "__main__":
    cli.run_stage(main)
