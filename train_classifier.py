"""Train a classifier of noisy images, which guides what models sample, and judges it.

    python train_classifier.py --epochs 200 --batch_size 64 --device 0           # AFHQ
    python train_classifier.py --dataset path/to/classes --holdout 500 --preset improved --scales 2 --device 0
    python train_classifier.py --dataset synthetic --limit 512 --resolution 32 --hidden_dims 16,32 --epochs 2

Writes checkpoints/classifier_{epoch}ep.pth (of both scales classifier_pair_) and a folder of the same name in logs/.
It serves models of the same process and data: pass theirs as --preset or --process and --beta_schedule. Images held
out by --holdout say how often it is right, at each saved epoch. --resume continues a stopped run.
"""

import runtime.startup  # noqa: F401

import argparse
from dataclasses import dataclass
from functools import partial

import cli
from checkpoint import CLASSIFIERS
from networks.ema import USUAL_RAMPUP
from runtime.settings import option, parse_settings
from training.resume import stored_settings
from training.run import train
from training.settings import IMAGE_SETTINGS, STUDENT_SETTINGS, TrainingSettings

BY_SCALES = {str(kind.num_scales): name for name, kind in CLASSIFIERS.items()}


def of_scales(text: str) -> str:
    """The type of classifier that reads so many scales, or of that name."""
    if text not in (*BY_SCALES, *CLASSIFIERS):
        raise argparse.ArgumentTypeError(f"'{text}' is neither {' nor '.join(BY_SCALES)}")
    return BY_SCALES.get(text, text)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(TrainingSettings):
    """A training run of a classifier."""

    model_type: str = option(
        "classifier",
        "scales it reads: 1, the fine image at its clock; 2, both images, each at its own",
        parse=of_scales,
        shown="1",
        flag="--scales",
        metavar="1|2",
        recorded=True,
    )
    classes: str = option(
        cli.ANY_CLASSES,
        "the classes: those of the folders of the images or of their label column, or by name of one of several "
        "columns or `folder`",
        metavar="BY",
        nargs="?",
        const=cli.ANY_CLASSES,
        shown="",
    )
    hidden_dims: tuple[int, ...] = option((64, 128, 256), "channels per level", parse=cli.hidden_dims, recorded=True)
    ema_rampup_ratio: float | None = option(
        USUAL_RAMPUP,
        "half-life of the EMA as a share of the steps so far, at most; 0 leaves it to --ema_decay",
        parse=cli.unit_interval,
        metavar="RATIO",
        recorded=True,
        absent=0.0,
    )


def parse_args() -> ClassifierSettings:
    """The settings of this stage, from its flags."""
    stored = partial(stored_settings, model_types=tuple(CLASSIFIERS), flag="--scales")
    return parse_settings(ClassifierSettings, __doc__, leave_out=(*IMAGE_SETTINGS, *STUDENT_SETTINGS), stored=stored)


def main() -> None:
    """Train."""
    train(parse_args())


if __name__ == "__main__":
    cli.run_stage(main)
