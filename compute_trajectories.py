"""Measure what a network sees along its own fine trajectories: all that is needed to plan for a solver.

    python compute_trajectories.py --checkpoint checkpoints/baseline_400ep.pth --ema
    python compute_trajectories.py --run NAME --model_type dual --ema --lines 100
    python compute_trajectories.py --run NAME --ema --reach 0          # two clocks, but schedules that tie them alone

Trajectories lead from noise to images in many small steps along the diagonal of the image. With two clocks the network
is also called beside it, with the fine image of one step and the coarse one of another. No images are needed. Costs
--lines calls for each of --num_images noises, and with two clocks one for every pair of lines within --reach.

Writes results/trajectories_[{model}_]{epoch}ep[_ema].pth (of a run with a name: in results/NAME), which
`plan_path.py --criterion trajectory --solver NAME` plans with.
"""

import runtime.startup  # noqa: F401

import cli
from planning.trajectory_file import TrajectorySettings, compute
from runtime.settings import parse_settings


def parse_args() -> TrajectorySettings:
    """The settings of this stage, from its flags."""
    return parse_settings(TrajectorySettings, __doc__)


def main() -> None:
    """Measure or reuse, and say what it cost."""
    settings = parse_args()
    trajectories, said, file = compute(settings)
    lines = len(trajectories.points) - 1
    print(
        f"{said['num_images']} trajectories of {lines} steps, {trajectories.nfe} network calls each"
        + (f", of which {trajectories.nfe - lines} beside the diagonal" if trajectories.nfe > lines else "")
    )
    print(f"trajectories {file}")


if __name__ == "__main__":
    cli.run_stage(main)
