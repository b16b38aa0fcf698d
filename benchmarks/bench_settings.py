"""Which precision, memory layout, attention backend and compilation train fastest on this machine.

    python benchmarks/bench_settings.py --resolution 32 --hidden_dims 16,32,64,128 --batch_size 32
    python benchmarks/bench_settings.py --compile --device 0        # compiled too; minutes of warm-up on a CPU

Times whole training steps (loss, backward, clipping, AdamW) of the dual model for every combination, in rounds that
visit each combination once so that a busy machine slows all alike. Prints a Markdown table: images/s of the median
step, and the ratio to fp32, contiguous, math attention, eager.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from model import LIFTDualTimestepModel
from planning.regimes import TimestepPairs, resolve_regime
from runtime.device import autocast, select_device
from scheduler import DDIMScheduler
from training.objective import diffusion_loss, draw_batch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# Fused means what PyTorch chooses, which falls back to math where no fused kernel fits.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
BACKENDS = {"math": [SDPBackend.MATH], "fused": FUSED}
WARM_UP_STEPS = 2


def parse_args() -> argparse.Namespace:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--resolution", type=cli.positive_int, default=64, help="side of the fine image (64)")
    add("--hidden_dims", type=cli.hidden_dims, default=(64, 128, 256, 512), help="64,128,256,512")
    add("--batch_size", type=cli.positive_int, default=64, help="(64)")
    add("--rounds", type=cli.positive_int, default=8, help="timed steps of each combination (8)")
    add("--device", default=None, help="0, cuda:1 or cpu (the first GPU if there is one)")
    add("--compile", action="store_true", help="also time every combination compiled")
    return parser.parse_args()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Contestant:
    """One combination: a model of its own with its optimizer, and the times of its steps."""

    def __init__(self, precision: str, layout: str, backend: str, compiled: bool, args, device: torch.device):
        self.precision, self.backend, self.device = precision, backend, device
        self.name = (precision, layout, backend, "compiled" if compiled else "eager")
        torch.manual_seed(0)
        model = LIFTDualTimestepModel(args.hidden_dims).to(device, memory_format=LAYOUTS[layout])
        self.parameters = list(model.parameters())
        self.model = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.seconds: list[float] = []

    def step(self, scheduler: DDIMScheduler, x_64: torch.Tensor, x_32: torch.Tensor) -> None:
        """One training step, timed until the device has finished it."""
        generator = torch.Generator(self.device).manual_seed(0)
        start = time.perf_counter()
        with sdpa_kernel(BACKENDS[self.backend]), autocast(self.device, self.precision):
            batch = draw_batch(TimestepPairs(resolve_regime(None, "dual"), scheduler), x_64, x_32, generator)
            losses = diffusion_loss(self.model, "dual", scheduler, batch)
            self.optimizer.zero_grad(set_to_none=True)
            sum(values.mean() for values in losses.values()).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Time and print."""
    args = parse_args()
    device = select_device(args.device)
    scheduler = DDIMScheduler().to(device)
    x_64 = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    x_32 = nn.functional.avg_pool2d(x_64, 2)
    compilations = (False, True) if args.compile else (False,)
    combinations = itertools.product(("fp32", "bf16"), LAYOUTS, BACKENDS, compilations)
    contestants = [Contestant(*combination, args, device) for combination in combinations]
    for _ in range(WARM_UP_STEPS + args.rounds):
        for contestant in contestants:
            contestant.step(scheduler, x_64, x_32)
    rates = {c.name: args.batch_size / statistics.median(c.seconds[WARM_UP_STEPS:]) for c in contestants}
    reference = rates["fp32", "contiguous", "math", "eager"]
    parameters = sum(p.numel() for p in contestants[0].parameters)
    print(
        f"Dual model, {parameters:,} parameters, {args.resolution}x{args.resolution}, batch {args.batch_size}, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| precision | layout | attention | graph | images/s | ratio |\n|---|---|---|---|---:|---:|")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"| {' | '.join(name)} | {rate:.1f} | {rate / reference:.2f} |")


if __name__ == "__main__":
    cli.run_stage(main)
