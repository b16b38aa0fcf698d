"""Train LIFT: one UNet that denoises an image and its half-size version, each with its own timestep.

    python train_lift.py --epochs 2000 --batch_size 64 --device 0            # AFHQ, published settings
    python train_lift.py --model single_t --epochs 2000 --device 0           # ablation: fine timestep only
    python train_lift.py --dataset synthetic --limit 512 --resolution 32 --hidden_dims 16,32 --epochs 2

Writes checkpoints/lift_dual_timestep_{epoch}ep.pth (or shared_t_, single_t_, no_t_) and a folder of the same
name in logs/. --resume continues a stopped run.
"""

import argparse

from cli import run_stage
from training.trainer import add_training_arguments, train


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, two_scales=True)
    parser.add_argument(
        "--model",
        choices=("dual", "shared_t", "single_t", "no_t"),
        default="dual",
        help="dual: fine and coarse timestep; shared_t: one clock; single_t: fine timestep only; no_t: none (dual)",
    )
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    train(args.model, args)


if __name__ == "__main__":
    run_stage(main)
