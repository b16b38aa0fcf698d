"""Train LIFT: one network that denoises an image and its half-size version, each with its own timestep.

    python train_lift.py --epochs 2000 --batch_size 64 --device 0            # AFHQ, published settings
    python train_lift.py --model single_t --epochs 2000 --device 0           # ablation: fine timestep only
    python train_lift.py --model cascade --epochs 2000 --device 0            # a stage for generate_cascade.py
    python train_lift.py --dataset synthetic --limit 512 --resolution 32 --hidden_dims 16,32 --epochs 2

Writes checkpoints/lift_dual_timestep_{epoch}ep.pth (or shared_t_, single_t_, no_t_, cascade_) and a folder of
the same name in logs/. --resume continues a stopped run.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from functools import partial

from checkpoint import MODEL_CLASSES
from cli import run_stage
from runtime.settings import option, parse_settings
from training.resume import stored_settings
from training.run import train
from training.settings import UNFLAGGED, TrainingSettings

MODEL_TYPES = tuple(name for name, kind in MODEL_CLASSES.items() if kind.num_scales > 1)


@dataclass(frozen=True, kw_only=True)
class LIFTSettings(TrainingSettings):
    """A training run of a model of two scales."""

    model_type: str = option(
        "dual",
        "dual: fine and coarse timestep; shared_t: one clock; single_t: fine timestep only; no_t: none; cascade: both, "
        "of a coarse image that is given and not predicted",
        choices=MODEL_TYPES,
        flag="--model",
        recorded=True,
    )


def parse_args() -> LIFTSettings:
    """The settings of this stage, from its flags."""
    stored = partial(stored_settings, model_types=MODEL_TYPES)
    return parse_settings(LIFTSettings, __doc__, leave_out=UNFLAGGED, stored=stored)


def main() -> None:
    """Train."""
    train(parse_args())


if __name__ == "__main__":
    run_stage(main)
