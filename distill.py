"""Distil a trained model into one that needs few calls.

    python distill.py --method progressive --teacher checkpoints/mine/baseline_14ep.pth --from 64 --to 1 --epochs 5
    python distill.py --method progressive --teacher FILE --path_type kl --from 16 --to 2     # along its best path
    python generate_with_path_30.py --checkpoint checkpoints/RUN/baseline_4calls.pth --ema --path_type student
    python eval_fid_batch.py --run RUN --ema --path_type student --metrics swd

Progressive: in every round a student learns to do in one step what its teacher does in two, along the same path, and
teaches the next one. Each round is a training run, --epochs long, and writes {model}_{calls}calls.pth; --resume goes on
in the round where a call ended. What is not said about data, model and training is as the teacher's checkpoint has it.
"""

import runtime.startup  # noqa: F401

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from checkpoint import MODEL_CLASSES, checkpoint_file, describe_model, load_model, peek
from paths.path import Path as SamplingPath
from planning.choice import OnePathSettings, path_of_settings
from planning.presets import preset_of
from planning.students import halved, said_of_cost
from runtime.distributed import Processes
from runtime.settings import REQUIRED, option, parse_settings
from training.progressive import CALLS_EACH
from training.resume import placed
from training.run import train
from training.settings import STUDENT_SETTINGS, TrainingSettings
from training.teaching import Teaching
from training.timesteps import TIMESTEP_WEIGHTS

METHODS = ("progressive",)
# Of a training that are settled here: by the teacher, or by the method.
SETTLED = (
    *STUDENT_SETTINGS, "model_type", "objective", "vlb_weight", "network", "hidden_dims", "process", "beta_schedule",
    "prediction_type", "representation", "preset", "t_law", "times", "t_pairs", "replan_every", "replan_images",
    "perceptual_weight", "vgg_weights", "feature_weight", "num_steps", "coarse_from", "output_dir",
)  # fmt: skip
# Of the teacher's training that its student's need not share.
OWN = ("epochs", "run", "timestep_weights", "min_snr_gamma", "seed", "student")
METHOD = {
    "perceptual_weight": 0.0, "feature_weight": 0.0, "t_law": "uniform", "times": "whole", "t_pairs": None,
    "replan_every": None, "replan_images": None, "vlb_weight": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillSettings(OnePathSettings, TrainingSettings):
    """A teacher, and how it teaches."""

    group = "distillation"
    method: str = option(REQUIRED, "progressive: every round halves the calls", choices=METHODS)
    teacher: str = option(REQUIRED, "checkpoint of the teacher", metavar="FILE")
    teacher_weights: str | None = option(
        None, "weights of the teacher (EMA where there are any)", choices=("raw", "ema")
    )
    from_calls: int = option(64, "calls of the teacher's walk", parse=cli.positive_int, flag="--from", metavar="N")
    to_calls: int = option(1, "calls of the last student", parse=cli.positive_int, flag="--to", metavar="N")
    rounds: int | None = option(
        None, "rounds to do by this call, those that are done among them (all)", parse=cli.positive_int, metavar="K"
    )
    epochs: int = option(20, "passes over the data, of each round", parse=cli.positive_int, recorded=True)
    timestep_weights: str = option(
        "truncated_snr",
        "what errors count at each timestep: truncated_snr, max(SNR, 1) in the clean image; others as in training",
        choices=TIMESTEP_WEIGHTS,
        recorded=True,
        absent="published",
    )
    resume: str | None = option(
        None, "go on in the round, and at the step, where an earlier call ended", nargs="?", const="auto",
        choices=("auto",),
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        kind = MODEL_CLASSES[self.model_type]
        if kind.num_predictions < kind.num_scales:
            raise ValueError(
                f"a '{self.model_type}' model reads a coarse image that it does not predict, so that two of its steps "
                "do not follow from where it is; distil a baseline, dual or shared_t model."
            )
        halvings = self.from_calls / self.to_calls
        if halvings < 2 or halvings != 2 ** (int(halvings).bit_length() - 1):
            raise ValueError(
                f"--from {self.from_calls} --to {self.to_calls} are no rounds that halve the calls; choose --from a "
                "power of two times --to, such as 64 and 1."
            )
        if self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"a teacher that predicts {self.prediction_type} has no student of few steps, as at high noise an "
                "error of the noise says little of the image; train one with --prediction_type v, x0 or velocity."
            )

    @property
    def of_ema(self) -> bool:
        """Whether the EMA weights of the first teacher teach."""
        return self.teacher_weights != "raw" and (
            self.teacher_weights == "ema" or peek(self.teacher).get("ema_state") is not None
        )

    @property
    def calls(self) -> list[int]:
        """Calls of the students, round by round."""
        found = []
        calls = self.from_calls // 2
        while calls >= self.to_calls:
            found.append(calls)
            calls //= 2
        return found[: self.rounds]


def of_teacher(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that are the teacher's, or the method's, where no flag says otherwise."""
    config = describe_model(values["teacher"])["config"]
    known = {field.name for field in dataclasses.fields(TrainingSettings)} - set(OWN)
    said = TrainingSettings.absent() | config | {"preset": preset_of(config)}
    name = f"{config.get('run') or Path(values['teacher']).stem}-{values['method']}"
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in known}
    # Which labels they are a checkpoint does not say; of data with several columns of them `--classes` has to.
    classes = cli.ANY_CLASSES if config.get("class_names") else None
    return found | METHOD | {"run": name, "objective": values["method"], "classes": classes}


def parse_args() -> DistillSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(DistillSettings, __doc__, leave_out=SETTLED, stored=of_teacher)


def path_of_teacher(settings: DistillSettings) -> SamplingPath:
    """The path of the first teacher; raises ValueError if it has not as many steps as `--from` says."""
    teacher = load_model(settings.teacher, settings.of_ema)
    path, kind = path_of_settings(settings.but(num_steps=settings.from_calls), teacher)
    if path.nfe != settings.from_calls:
        raise ValueError(
            f"--from {settings.from_calls} is not the number of steps of path {kind}, which has {path.nfe}; pass "
            f"--from {path.nfe}, or another path."
        )
    return path


def main() -> None:
    """Train student after student, each taught by the one before."""
    settings = parse_args()
    path, file, ema = path_of_teacher(settings), Path(settings.teacher), settings.of_ema
    for calls in settings.calls:
        of_round = settings.but(student=f"{calls}calls")

        def teach(processes: Processes, path=path, file=file, ema=ema) -> Teaching:
            teacher = load_model(file, ema, processes.device)
            points = [list(point) for point in path.points]
            said = {"teacher_points": points, "student_points": points[::2]}
            return Teaching(teacher, said | said_of_cost(teacher.config, CALLS_EACH))

        train(of_round, teach)
        output_dir = placed(of_round)[0].output_dir
        path, file = halved(path), checkpoint_file(output_dir, settings.model_type, settings.epochs, of_round.student)
        ema = settings.ema_decay > 0
        if not file.exists():  # Stopped, or nothing was to be run.
            return


if __name__ == "__main__":
    cli.run_stage(main)
