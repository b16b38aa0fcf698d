"""Which precision, memory layout, attention backend and compilation train fastest on this machine.

    python benchmarks/bench_settings.py --resolution 32 --hidden_dims 16,32,64,128 --batch_size 32
    python benchmarks/bench_settings.py --compile --device 0        # compiled too; minutes of warm-up on a CPU

Times whole training steps (loss, backward, clipping, AdamW) of the dual model for every combination, in rounds that
visit each combination once so that a busy machine slows all alike. Prints a Markdown table: images/s of the median
step, and the ratio to fp32, contiguous, math attention, eager.
"""

import functools
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from cli import HardwareSettings
from machine import WARM_UP_STEPS, synchronize
from model import LIFTDualTimestepModel
from planning.regimes import resolve_regime
from runtime.device import autocast, select_device
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler
from training.objective import Denoising

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# Fused means what PyTorch chooses, which falls back to math where no fused kernel fits.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
BACKENDS = {"math": [SDPBackend.MATH], "fused": FUSED}


@dataclass(frozen=True, kw_only=True)
class CombinationSettings(HardwareSettings):
    """What is timed in every combination; precisions are among what is combined."""

    resolution: int = option(64, "side of the fine image", parse=cli.positive_int)
    hidden_dims: tuple[int, ...] = option((64, 128, 256, 512), parse=cli.hidden_dims)
    batch_size: int = option(64, parse=cli.positive_int)
    rounds: int = option(8, "timed steps of each combination", parse=cli.positive_int)
    compile: bool = option(False, "also time every combination compiled")


def parse_args() -> CombinationSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(CombinationSettings, __doc__, leave_out=("precision",))


class Contestant:
    """One combination: a model of its own with its optimizer, and the times of its steps."""

    def __init__(
        self,
        precision: str,
        layout: str,
        backend: str,
        compiled: bool,
        hidden_dims: tuple[int, ...],
        device: torch.device,
    ):
        self.precision, self.backend, self.device = precision, backend, device
        self.name = (precision, layout, backend, "compiled" if compiled else "eager")
        torch.manual_seed(0)
        model = LIFTDualTimestepModel(hidden_dims).to(device, memory_format=LAYOUTS[layout])
        self.parameters = list(model.parameters())
        self.model, self.network = model, torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.seconds: list[float] = []

    def step(self, scheduler: DDIMScheduler, x_64: torch.Tensor, x_32: torch.Tensor) -> None:
        """One training step, timed until the device has finished it."""
        generator = torch.Generator(self.device).manual_seed(0)
        start = time.perf_counter()
        with sdpa_kernel(BACKENDS[self.backend]), autocast(self.device, self.precision):
            objective = Denoising(resolve_regime(None, "dual"), scheduler)
            batch = objective.draw(x_64, x_32, generator)
            losses = objective.losses(functools.partial(self.model.denoise, network=self.network), batch)
            self.optimizer.zero_grad(set_to_none=True)
            sum(values.mean() for values in losses.values()).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Time and print."""
    settings = parse_args()
    device = select_device(settings.device)
    scheduler = DDIMScheduler().to(device)
    batch_size, side = settings.batch_size, settings.resolution
    x_64 = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
    x_32 = nn.functional.avg_pool2d(x_64, 2)
    compilations = (False, True) if settings.compile else (False,)
    combinations = itertools.product(("fp32", "bf16"), LAYOUTS, BACKENDS, compilations)
    contestants = [Contestant(*combination, settings.hidden_dims, device) for combination in combinations]
    for _ in range(WARM_UP_STEPS + settings.rounds):
        for contestant in contestants:
            contestant.step(scheduler, x_64, x_32)
    rates = {c.name: batch_size / statistics.median(c.seconds[WARM_UP_STEPS:]) for c in contestants}
    reference = rates["fp32", "contiguous", "math", "eager"]
    parameters = sum(p.numel() for p in contestants[0].parameters)
    print(
        f"Dual model, {parameters:,} parameters, {side}x{side}, batch {batch_size}, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| precision | layout | attention | graph | images/s | ratio |\n|---|---|---|---|---:|---:|")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"| {' | '.join(name)} | {rate:.1f} | {rate / reference:.2f} |")


if __name__ == "__main__":
    cli.run_stage(main)
