"""How fast training is, beside a plain loop, beside diffusers, and beside the matrix products of this machine.

    python benchmarks/bench_train.py --output benchmark.md                # all models at the published size
    python benchmarks/bench_train.py --models dual --batch_sizes 4 --steps 2
    python benchmarks/bench_train.py --models dual --batch_sizes 16 64 --precision bf16 --compile
    python benchmarks/bench_train.py --resolution 32 --hidden_dims 16,32,64,128 --batch_sizes 32 --no-diffusers
    python benchmarks/bench_train.py --models baseline --network ddpm_unet --resolution 32 --terms --no-diffusers

Three contestants take steps in turn, so that a busy machine slows all alike, and are judged by their median step:
- plain: what one writes first: fp32, eager, contiguous, DataLoader, AdamW as PyTorch sets it, an EMA loop over the
  parameters, `.item()` every step; convolutions and TF32 are set as in training;
- ours: `training.trainer.Trainer` itself;
- diffusers: the same on a `diffusers.UNet2DModel` of as many parameters as the baseline model, if installed.

With --terms, steps of ours with the perceptual loss, with feature matching and with both take turns with those without,
and the report says how many times as long they take; VGG19 has random weights. The last command is of the size of the
DDPM report.

FLOP are those of convolutions and matrix products, forward and backward, as PyTorch counts them. The peak is the best
rate of square matrix products in the same run, before or after. Images are random bytes, as many as a real epoch has.
Prints a report in Markdown. Compiling takes minutes per network on a CPU.
"""

import copy
import gc
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg19

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import training.trainer
from baseline_model import BaselineModel
from checkpoint import MODEL_CLASSES, build_model
from cli import HardwareSettings
from data import ImageSet, coarse, to_float
from machine import WARM_UP_STEPS, describe_machine, diffusers, matmul_peak, synchronize, turns
from model import ATTENTION_MIN_CHANNELS, ScaleModel, network_name
from networks.blocks import NUM_GROUPS, levels_reason
from planning.regimes import resolve_regime
from runtime.device import AUTOCAST_DTYPES, choose_kernels, resolve_precision, select_device
from runtime.distributed import Processes
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler
from training.objective import Denoising
from training.settings import TrainingSettings

EPOCH_IMAGES = 13_700  # As many as the cat faces.
COMPARED_TO_DIFFUSERS = ("baseline", "dual")
# A GPU runs behind the host, which waits for it at the end of a turn only, as training does at a row of its log.
STEPS_PER_TURN = {"cpu": 1, "cuda": 10}
TERMS = {
    "perceptual": {"perceptual_weight": 0.1},
    "features": {"feature_weight": 0.05},
    "both": {"perceptual_weight": 0.1, "feature_weight": 0.05},
}
# Functions of training.trainer, and what their time is called.
PARTS = {
    "draw": "noise",
    "losses": "forward",
    "_backward": "backward",
    "_update": "optimizer",
    "_average": "EMA",
    "_bin_sums": "log sums",
    "_count": "log sums",
}
# Kind of work: names of its operators. The first kind that fits counts, as the name of a fused kernel names several.
OPERATORS = {
    "optimizer, EMA": "adam|foreach|lerp|optimizer|vector_norm",
    "fused": "triton_|compiled|cpp_fused|fxgraph",
    "convolution": "conv",
    "matmul, attention": "mm|linear|attention",
    "normalisation": "norm",
    "copies": "copy|cat|clone|contiguous|index|empty|fill|zero|resize|memcpy|memset",
    "elementwise": "silu|add|mul|div|sub|sum|mean|mse|sqrt|pow|pool|upsample|where|rand|sigmoid",
}


@dataclass(frozen=True, kw_only=True)
class TrainingBenchSettings(HardwareSettings):
    """Which models are trained, at which size, and how long they are timed."""

    resolution: int = option(64, "side of the fine image", parse=cli.positive_int)
    hidden_dims: tuple[int, ...] = option((64, 128, 256, 512), parse=cli.hidden_dims)
    network: str | None = option(None, "backbone, as of training", parse=cli.checked(network_name), metavar="NAME")
    models: tuple[str, ...] = option(tuple(MODEL_CLASSES), choices=tuple(MODEL_CLASSES), nargs="+", shown="all")
    batch_sizes: tuple[int, ...] = option((16, 64), parse=cli.positive_int, nargs="+", metavar="N")
    compile: bool | None = option(None, "compile ours and diffusers (with a GPU)", parse=bool)
    steps: int = option(10, "timed turns of each contestant", parse=cli.positive_int)
    seconds: float = option(120, "no further turn after so long", parse=cli.positive_float)
    terms: bool = option(False, "also time ours with further terms of the loss")
    no_diffusers: bool = option(False, "leave diffusers out", flag="--no-diffusers")
    output: str | None = option(None, "write the report here too", metavar="FILE")


def parse_args() -> TrainingBenchSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(TrainingBenchSettings, __doc__)


class Measured(NamedTuple):
    """What a contestant trains, and how fast."""

    num_parameters: int
    forward_flop: int  # Of one image, as the next.
    flop: int
    images_per_second: float
    graph: str  # "eager" or "compiled".

    @property
    def flop_per_second(self) -> float:
        """Of the forward and backward passes."""
        return self.flop * self.images_per_second


class Result(NamedTuple):
    """Everything about one model at one batch size."""

    label: dict[str, str | int]
    measured: dict[str, Measured]  # By contestant.
    parts: dict[str, float]  # Seconds of a step of ours.
    operators: dict[str, float]  # Microseconds of the same.
    idle: float | None
    notes: list[str]
    with_terms: dict[str, float]  # Seconds of a step with each of TERMS, and of "none" in the same turns.


def endless(epoch: Callable[[int], Iterable]) -> Iterator:
    """The batches of epoch 0, 1, ..."""
    return itertools.chain.from_iterable(map(epoch, itertools.count()))


def two_scales(pixels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch from its images, on the host."""
    x_64 = to_float(torch.from_numpy(np.stack(pixels)))  # [B, C, H, W]
    return x_64, coarse(x_64)


class Plain:
    """The plain loop; its loss is ours, as the formula is not what is compared."""

    def __init__(self, settings: TrainingSettings, images: ImageSet, device: torch.device):
        self.settings, self.device = settings, device
        self.model = build_model(settings.recorded() | {"channels": images.channels}).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.scheduler, self.generator = DDIMScheduler().to(device), torch.Generator(device)
        self.objective = Denoising(resolve_regime(None, settings.model_type), self.scheduler)
        gpu = device.type == "cuda"
        workers = settings.num_workers if gpu else 0  # On a CPU they would take cores from the network.
        options = {"num_workers": workers, "persistent_workers": gpu, "pin_memory": gpu, "collate_fn": two_scales}
        loader = DataLoader(images.pixels, settings.batch_size, shuffle=True, drop_last=True, **options)
        self.batches = endless(lambda epoch: loader)

    def step(self) -> None:
        """One training step."""
        x_64, x_32 = (x.to(self.device) for x in next(self.batches))
        losses = self.objective.losses(self.model.denoise, self.objective.draw(x_64, x_32, self.generator))
        loss = sum(values.mean() for values in losses.values())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        decay = self.settings.ema_decay
        for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        self.loss = loss.item()


class Ours:
    """The trainer of this project, ready to take steps."""

    def __init__(self, settings: TrainingSettings, images: ImageSet):
        self.trainer = training.trainer.Trainer(settings, images, Processes(settings.device))
        self.trainer.prepare()
        self.batches = endless(self.trainer.batches.epoch)

    def step(self) -> None:
        """One training step, for which nobody waits."""
        self.trainer.train_step(*next(self.batches)[:2])

    def measured(self, images_per_second: float) -> Measured:
        """The facts, with FLOP counted over a forward and a backward pass of one image."""
        trainer = self.trainer
        batch = trainer.draw(*next(self.batches)[:2]).rows(slice(1))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            losses = trainer.objective.losses(trainer.model.denoise, batch)
            forward = counter.get_total_flops()
            sum(values.mean() for values in losses.values()).backward()
        num_parameters = sum(p.numel() for p in trainer.parameters)
        graph = "eager" if trainer.network is trainer.model else "compiled"
        return Measured(num_parameters, forward, counter.get_total_flops(), images_per_second, graph)


class DiffusersBaseline(ScaleModel):
    """`diffusers.UNet2DModel` in the form of the baseline model, with as many parameters.

    Widths and places of attention are ours, but the last width is changed until the parameters fit.
    """

    num_scales, num_predictions, one_clock = 1, 1, True
    inputs = BaselineModel.inputs

    def __init__(self, hidden_dims: tuple[int, ...], channels: int, network: str = "unet"):
        super().__init__()
        step = max(NUM_GROUPS, hidden_dims[0] // 2)
        kinds = ["Attn" if width >= ATTENTION_MIN_CHANNELS else "" for width in hidden_dims]

        def build(last_width: int) -> nn.Module:
            widths = (*hidden_dims[:-1], last_width)
            return diffusers.UNet2DModel(
                in_channels=channels,
                out_channels=channels,
                block_out_channels=widths,
                down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
                up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
                attention_head_dim=math.gcd(*widths),
                norm_num_groups=NUM_GROUPS,
            )

        def count(model: nn.Module) -> int:
            return sum(p.numel() for p in model.parameters())

        with torch.device("meta"):
            wanted = count(BaselineModel(hidden_dims, channels))
            candidates = range(step, 2 * hidden_dims[-1] + 1, step)
            last_width = min(candidates, key=lambda width: abs(count(build(width)) - wanted))
        self.unet = build(last_width)
        # Which the trainer asks for.
        self.unet.stride, self.unet.stride_reason = 2 ** (len(hidden_dims) - 1), levels_reason(hidden_dims)

    def forward(self, x_64: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(x_64, t).sample


def race(
    contestants: dict[str, Plain | Ours], max_turns: int, max_seconds: float, device: torch.device
) -> dict[str, float]:
    """Seconds per step of the median turn of each contestant."""

    def turn(contestant: Plain | Ours, steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            contestant.step()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    for contestant in contestants.values():
        turn(contestant, WARM_UP_STEPS)
    steps = STEPS_PER_TURN[device.type]
    rounds = [[turn(contestant, steps) for contestant in contestants.values()] for _ in turns(max_turns, max_seconds)]
    return dict(zip(contestants, map(statistics.median, zip(*rounds, strict=True)), strict=True))


class Stopwatch:
    """Seconds per part of a step, waiting for the device around each; what is inside another counts once."""

    def __init__(self, device: torch.device):
        self.device, self.inside, self.seconds = device, 0.0, Counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """`function` that adds its time to `part`."""

        def run(*arguments):
            synchronize(self.device)
            outside, self.inside, start = self.inside, 0.0, time.perf_counter()
            result = function(*arguments)
            synchronize(self.device)
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self.inside
            self.inside = outside + elapsed
            return result

        return run


def time_parts(ours: Ours, max_steps: int, max_seconds: float) -> dict[str, float]:
    """Seconds of each part of a step of the trainer, medians over the steps."""
    trainer, rows = ours.trainer, []
    for _ in turns(max_steps, max_seconds):
        watch = Stopwatch(trainer.device)
        batch = watch.timed("data", next)(ours.batches)
        with ExitStack() as stack:
            for name, part in PARTS.items():
                owner = trainer.objective if name == "losses" else trainer
                stack.enter_context(mock.patch.object(owner, name, watch.timed(part, getattr(owner, name))))
            watch.timed("rest", trainer.train_step)(*batch[:2])
        rows.append(watch.seconds)
    return {part: statistics.median(row[part] for row in rows) for part in rows[0]}


def profile(ours: Ours) -> tuple[dict[str, float], float | None]:
    """Microseconds in each kind of operator, and on a GPU the share of the time in which it runs no kernel.

    The latter is at most as much without the profiler, which slows the host.
    """
    device, activities = ours.trainer.device, [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (device.type == "cuda")
    for _ in range(2):  # The first time the profiler itself warms up.
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(STEPS_PER_TURN[device.type]):
                ours.step()
            synchronize(device)
    spent = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # A kernel counts for the operator that launched it.
            on_cpu, on_gpu = event.self_cpu_time_total, event.self_device_time_total
            spent[operator_kind(event.key)] += on_cpu if device.type == "cpu" else on_gpu
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return spent, idle_share(kernels) if kernels else None


def operator_kind(name: str) -> str:
    """One of OPERATORS, or "other"."""
    return next((kind for kind, pattern in OPERATORS.items() if re.search(pattern, name.lower())), "other")


def idle_share(intervals: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no interval covers."""
    first = end = min(intervals)[0]
    busy = 0.0
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - first)


def training_settings(
    model_type: str, batch_size: int, settings: TrainingBenchSettings, folder: str
) -> TrainingSettings:
    """A run of `train_lift.py` with the published settings where this benchmark has none."""
    return TrainingSettings(
        model_type=model_type,
        batch_size=batch_size,
        resolution=settings.resolution,
        hidden_dims=settings.hidden_dims,
        network=settings.network,
        compile=settings.compile,
        device=settings.device,
        precision=settings.precision,
        output_dir=folder,
        log_dir=folder,
    )


def write_vgg(folder: str) -> str:
    """A file of random weights of the features of VGG19, for which a step takes as long as for those of ImageNet."""
    with torch.device("meta"):
        layers = vgg19(weights=None, init_weights=False).features
    file = Path(folder) / "vgg.pth"
    torch.save({name: torch.randn(value.shape) / 20 for name, value in layers.state_dict().items()}, file)
    return str(file)


def time_terms(ours: Ours, run: TrainingSettings, images: ImageSet, folder: str, limits: tuple) -> dict[str, float]:
    """Seconds per step of ours without further terms of the loss, and with each of TERMS, taking turns."""
    contestants, vgg = {"none": ours}, write_vgg(folder)
    for name, weights in TERMS.items():
        file = vgg if "perceptual_weight" in weights else None
        contestants[name] = Ours(run.but(**weights, vgg_weights=file), images)
    return race(contestants, *limits, ours.trainer.device)


def measure(model_type: str, batch_size: int, settings: TrainingBenchSettings, images: ImageSet, folder: str) -> Result:
    """Race the contestants, then take a step of ours apart."""
    run = training_settings(model_type, batch_size, settings, folder)
    ours = Ours(run, images)
    device = ours.trainer.device
    trainers = {"ours": ours}
    if diffusers is not None and not settings.no_diffusers and model_type in COMPARED_TO_DIFFUSERS:
        with mock.patch.dict(MODEL_CLASSES, baseline=DiffusersBaseline):
            trainers["diffusers"] = Ours(training_settings("baseline", batch_size, settings, folder), images)
    limits = settings.steps, settings.seconds
    seconds = race({"plain": Plain(run, images, device), **trainers}, *limits, device)
    measured = {name: trainer.measured(batch_size / seconds[name]) for name, trainer in trainers.items()}
    measured["plain"] = measured["ours"]._replace(images_per_second=batch_size / seconds["plain"], graph="eager")
    label = {"model": model_type, "batch": batch_size}
    notes = [f"{name}: {note}" for name, trainer in trainers.items() for note in trainer.trainer.notes]
    with_terms = time_terms(ours, run, images, folder, limits) if settings.terms else {}
    return Result(label, measured, time_parts(ours, *limits), *profile(ours), notes, with_terms)


def network_rows(results: list[Result]) -> list[dict[str, Any]]:
    """Each network once, with the size of its work."""
    networks = {result.label["model"]: result.measured["ours"] for result in results}
    for result in results:
        networks |= {name: it for name, it in result.measured.items() if name == "diffusers"}
    return [
        {
            "network": name,
            "parameters": f"{network.num_parameters:,}",
            "GFLOP/image forward": f"{network.forward_flop / 1e9:.4g}",
            "and backward": f"{network.flop / 1e9:.4g}",
            "as multiple of forward": f"{network.flop / network.forward_flop:.3f}",
        }
        for name, network in networks.items()
    ]


def speed_rows(result: Result, precision: str, peak: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Each contestant, beside what the rate of matrix products would allow, and compared with ours."""
    ours = result.measured["ours"]
    for name in sorted(result.measured, key=["plain", "ours", "diffusers"].index):
        it, used = result.measured[name], "fp32" if name == "plain" else precision
        yield result.label | {
            "loop": name,
            "precision": used,
            "graph": it.graph,
            "images/s": it.images_per_second,
            "GFLOP/s": it.flop_per_second / 1e9,
            "of peak": f"{it.flop_per_second / peak[used]:.1%}",
            "images/s at peak": peak[used] / it.flop,
            "ours / it": ours.images_per_second / it.images_per_second,
            "per FLOP": ours.flop_per_second / it.flop_per_second,
            "s per epoch": EPOCH_IMAGES / it.images_per_second,
        }


def share_row(result: Result, spent: dict[str, float], names: Iterable[str]) -> dict[str, Any]:
    """Each name with its share of all that was spent."""
    return result.label | {name: f"{spent.get(name, 0) / sum(spent.values()):.1%}" for name in names}


def terms_rows(result: Result) -> Iterator[dict[str, Any]]:
    """A step with each of TERMS, beside one without."""
    for name, seconds in result.with_terms.items():
        ratio = seconds / result.with_terms["none"]
        yield result.label | {"terms": name, "ms per step": 1000 * seconds, "times a step without": f"{ratio:.3f}"}


def report(
    results: list[Result], peaks: dict[str, list[tuple[float, int]]], settings: TrainingBenchSettings, machine: str
) -> str:
    """The whole report; `peaks` holds what was measured before and after, of which the better one counts."""
    peak = {name: max(both)[0] for name, both in peaks.items()}
    sections = {
        "Rate of matrix products": [
            {"precision": name, "size": max(both)[1], "GFLOP/s before": both[0][0] / 1e9, "after": both[1][0] / 1e9}
            for name, both in peaks.items()
        ],
        "Networks": network_rows(results),
        f"Speed; an epoch has {EPOCH_IMAGES:,} images": [
            row for r in results for row in speed_rows(r, settings.precision, peak)
        ],
        "Further terms of the loss": [row for r in results for row in terms_rows(r)],
        "Parts of a step of ours, waiting for the device after each": [
            share_row(r, r.parts, r.parts) | {"ms in all": 1000 * sum(r.parts.values())} for r in results
        ],
        "Operators in a step of ours": [share_row(r, r.operators, [*OPERATORS, "other"]) for r in results],
        "Time in which the GPU runs nothing": [
            r.label | {"idle": f"{r.idle:.1%}"} for r in results if r.idle is not None
        ],
    }
    side, widths = settings.resolution, ",".join(map(str, settings.hidden_dims))
    title = f"# Training at {side}x{side}, widths {widths}"
    notes = sorted({note for r in results for note in r.notes})
    notes += ["diffusers is not installed, and was not compared with."] * (diffusers is None)
    tables = [f"## {name}\n\n{markdown_table(rows)}" for name, rows in sections.items() if rows]
    return "\n\n".join([title, machine, *notes, *tables])


def main() -> None:
    """Measure, print and write."""
    settings = parse_args()
    device = select_device(settings.device)
    choose_kernels(device, deterministic=False)
    settings = settings.but(precision=resolve_precision(device, settings.precision))
    dtypes = {name: {"fp32": torch.float32, **AUTOCAST_DTYPES}[name] for name in ("fp32", settings.precision)}
    peaks = {name: [matmul_peak(dtype, device)] for name, dtype in dtypes.items()}
    shape = (EPOCH_IMAGES, 3, settings.resolution, settings.resolution)
    images = ImageSet(np.random.default_rng(0).integers(0, 256, shape, np.uint8), "random", "random")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model_type, batch_size in itertools.product(settings.models, settings.batch_sizes):
            results.append(measure(model_type, batch_size, settings, images, folder))
            rates = {name: round(it.images_per_second, 2) for name, it in results[-1].measured.items()}
            print(f"{model_type}, batch {batch_size}, images/s: {rates}", file=sys.stderr)
            # Otherwise the next batch size would make PyTorch compile for any size, which is slower.
            torch.compiler.reset()
            gc.collect()
    for name, dtype in dtypes.items():
        peaks[name].append(matmul_peak(dtype, device))
    text = report(results, peaks, settings, describe_machine(device))
    print_report(text, settings.output)


if __name__ == "__main__":
    cli.run_stage(main)
