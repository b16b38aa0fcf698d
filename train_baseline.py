"""Train the single-scale baseline.

    python train_baseline.py --epochs 2000 --batch_size 64 --device 0           # AFHQ, published settings
    python train_baseline.py --dataset path/to/images --epochs 200 --device 0   # your own images
    python train_baseline.py --preset flow --dataset path/to/cats --target_dataset path/to/dogs   # from cats to dogs
    python train_baseline.py --dataset synthetic --limit 512 --resolution 32 --hidden_dims 16,32 --epochs 2

Writes checkpoints/baseline_{epoch}ep.pth and logs/baseline/. --resume continues a stopped run.
"""

import runtime.startup  # noqa: F401

from functools import partial

from cli import run_stage
from runtime.settings import parse_settings
from training.resume import stored_settings
from training.run import train
from training.settings import TWO_SCALE_SETTINGS, UNFLAGGED, TrainingSettings


def parse_args() -> TrainingSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(
        TrainingSettings,
        __doc__,
        leave_out=(*TWO_SCALE_SETTINGS, *UNFLAGGED),
        stored=partial(stored_settings, model_types=("baseline",)),
        model_type="baseline",
    )


def main() -> None:
    """Train."""
    train(parse_args())


if __name__ == "__main__":
    run_stage(main)
