"""Train the single-scale baseline.

    python train_baseline.py --epochs 2000 --batch_size 64 --device 0           # AFHQ, published settings
    python train_baseline.py --dataset path/to/images --epochs 200 --device 0   # your own images
    python train_baseline.py --dataset synthetic --limit 512 --resolution 32 --hidden_dims 16,32 --epochs 2

Writes checkpoints/baseline_{epoch}ep.pth and logs/baseline/. --resume continues a stopped run.
"""

import argparse

from cli import run_stage
from training.trainer import add_training_arguments, train


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, two_scales=False)
    return parser.parse_args()


def main() -> None:
    """Train."""
    train("baseline", parse_args())


if __name__ == "__main__":
    run_stage(main)
