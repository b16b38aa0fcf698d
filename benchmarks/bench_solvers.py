"""What solvers cost beside the calls of the network that they make.

    python benchmarks/bench_solvers.py                          # the default network, batches of 8, on this machine
    python benchmarks/bench_solvers.py --hidden_dims 16,32,64,128 --resolution 32

Walks the diagonal of the dual model with every solver and takes the time between calls, in rounds that visit every
solver once so that a busy machine slows all alike. Prints a Markdown table: milliseconds between calls for each call
(median over rounds), and the ratio to the median time of a call of the network.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from cli import HardwareSettings
from diffusion.sampler import sample_seeds, scale_shapes
from diffusion.solvers import SOLVERS, make_solver
from machine import describe_machine, seconds_of
from model import LIFTDualTimestepModel
from paths.families import diagonal
from runtime.device import autocast, memory_format, select_device
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler

# Networks that have not been trained ask for small steps.
OPTIONS = {"ode": {"tolerance": 1.0}}


@dataclass(frozen=True, kw_only=True)
class SolverBenchmarkSettings(HardwareSettings):
    """The network, and how often it is walked."""

    resolution: int = option(64, "side of the fine image", parse=cli.positive_int)
    hidden_dims: tuple[int, ...] = option((64, 128, 256, 512), parse=cli.hidden_dims)
    batch_size: int = option(8, parse=cli.positive_int)
    num_steps: int = option(4, "steps of a walk", parse=cli.positive_int)
    rounds: int = option(3, "walks with each solver", parse=cli.positive_int)


def parse_args() -> SolverBenchmarkSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(SolverBenchmarkSettings, __doc__)


def main() -> None:
    """Time every solver."""
    settings = parse_args()
    device = select_device(settings.device)
    model = LIFTDualTimestepModel(settings.hidden_dims).to(device, memory_format=memory_format(device)).eval()
    scheduler, path = DDIMScheduler(), diagonal(settings.num_steps)
    shapes = scale_shapes(2, 3, settings.resolution)
    calls: list[float] = []

    def timed(xs, ts):
        seconds, predictions = seconds_of(lambda: model.denoise(xs, ts), device)
        calls.append(seconds)
        return predictions

    def walk(name: str) -> float:
        """Seconds between calls, for each of them."""
        before = len(calls)
        made = sample_seeds(
            timed, scheduler, path, range(settings.batch_size), shapes, settings.batch_size, device,
            solver=make_solver(name, **OPTIONS.get(name, {})),
        )  # fmt: skip
        seconds, _ = seconds_of(lambda: list(made), device)
        return (seconds - sum(calls[before:])) / (len(calls) - before)

    between: dict[str, list[float]] = {name: [] for name in SOLVERS}
    with torch.no_grad(), autocast(device, settings.precision):
        walk("ddim")
        calls.clear()
        for _ in range(settings.rounds):
            for name, found in between.items():
                found.append(walk(name))
    call = statistics.median(calls)
    print(f"{describe_machine(device)}; a call of the network: {1e3 * call:.1f} ms\n")
    print("| solver | ms between calls | share of a call |\n|---|---:|---:|")
    for name, found in between.items():
        print(f"| {name} | {1e3 * statistics.median(found):.2f} | {statistics.median(found) / call:.2%} |")


if __name__ == "__main__":
    cli.run_stage(main)
