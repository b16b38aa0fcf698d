"""How fast evaluation is, beside a plain loop and the matrix products of this machine, and what speed does to images.

    python benchmarks/bench_eval.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --output benchmark.md
    python benchmarks/bench_eval.py --parts sampling --resolution 32 --hidden_dims 16,32,64,128 --batch_size 16

- sampling: images/s of 18 network calls. Plain is what one writes first: fp32, eager, contiguous, tables looked up for
  every image at every step. The others are `diffusion.sampler.sample_seeds` with the layout of `load_model`, in fp32 or
  under autocast, eager or compiled. All have the same weights and noise and take turns, so that a busy machine slows
  all alike; one that takes SLOW times as long as plain has one turn.
- overhead: the share of the time of the fastest of ours that passes outside the network, noise included.
- inception: features/s, by the filter that makes the images 299x299. Weights are random, as speed does not see them.
- frechet: seconds of the Fréchet distance of 2048 features, beside the matrix square root of SciPy.
- images: how far the images of each variant are from those of plain, in grey levels, and from the training images, in
  SWD; this part needs --checkpoint.

FLOP are those of convolutions and matrix products of a forward pass, as PyTorch counts them. The peak is the best rate
of square matrix products in the same run, before or after, of the same precision or fp32: where bf16 is emulated, that
is the faster one. On a GPU PyTorch runs convolutions of fp32 in TF32, and the matrix products of its peak not.
Resolution, widths and channels are those of the checkpoint, if one is given. Prints a report in Markdown. Compiling
takes 40 s per network and precision on a CPU; where bf16 is emulated, that variant is left out.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from checkpoint import build_model, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import to_uint8
from diffusion.sampler import (
    Denoiser,
    Images,
    SeededNoise,
    compile_denoiser,
    image_seeds,
    sample_seeds,
    scale_shapes,
)
from evaluation import inception
from evaluation.feature_metrics import frechet_distance
from evaluation.inception import RESIZES, extract, load_inception
from evaluation.pixel_metrics import SlicedWasserstein
from machine import describe_machine, matmul_peak, seconds_of, turns
from paths.families import diagonal
from paths.path import Path as SamplingPath
from runtime.device import AUTOCAST_DTYPES, autocast, has_fast_bf16, memory_format, select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler

# By name: precision and whether compiled. Plain comes first, as all are compared with it.
VARIANTS = {
    "plain": ("fp32", False),
    "fp32": ("fp32", False),
    "fp32 compiled": ("fp32", True),
    "bf16": ("bf16", False),
    "bf16 compiled": ("bf16", True),
}
MODELS = ("dual", "baseline")
PARTS = ("sampling", "overhead", "inception", "frechet", "images")
DTYPES = {"fp32": torch.float32, **AUTOCAST_DTYPES}
SLOW = 4
OVERHEAD_ROUNDS = 3
INCEPTION_BATCH = 32
FRECHET_FEATURES = 2048


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchSettings(CheckpointSettings, DataSettings, HardwareSettings):
    """What of an evaluation is timed, at which size, and how long; precisions are those of the variants."""

    checkpoint: str | None = option(None, "of a dual or baseline model, for its sizes and for the part images")
    resolution: int | None = option(None, "(that of the checkpoint, else 64)", parse=cli.positive_int)
    hidden_dims: tuple[int, ...] | None = option(
        None, "(those of the checkpoint, else 64,128,256,512)", parse=cli.hidden_dims
    )
    models: tuple[str, ...] = option(MODELS, "to sample with", choices=MODELS, nargs="+", shown="both")
    variants: tuple[str, ...] | None = option(
        None, "beside plain (all; see above)", choices=tuple(VARIANTS)[1:], nargs="+"
    )
    parts: tuple[str, ...] | None = option(None, "(all that can be measured)", choices=PARTS, nargs="+")
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    num_steps: int = option(18, "network calls per image", parse=cli.positive_int)
    num_images: int = option(200, "of the part images", parse=cli.positive_int)
    steps: int = option(10, "timed turns of each variant after the first", parse=cli.positive_int)
    seconds: float = option(20, "no further turn after so long, per table", parse=cli.positive_float)
    output: str | None = option(None, "write the report here too", metavar="FILE")

    @property
    def needs_checkpoint(self) -> bool:
        return False


def parse_args() -> EvaluationBenchSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(EvaluationBenchSettings, __doc__, leave_out=("precision",))


@torch.no_grad()
def plain_sample(
    model: nn.Module, scheduler: DDIMScheduler, path: SamplingPath, noise: Sequence[torch.Tensor]
) -> Images:
    """DDIM to the clean image as one writes it first, for paths on which every scale moves at every step."""
    xs = tuple(noise)
    for k, (point, next_point) in enumerate(zip(path.points, path.points[1:], strict=False)):
        ts = tuple(torch.full((len(x),), t, device=x.device) for x, t in zip(xs, point, strict=True))
        predictions = model.denoise(xs, ts)
        moved = []
        for x, t, t_next, epsilon in zip(xs, ts, next_point, predictions, strict=True):
            alpha_bar = scheduler.alphas_cumprod.to(x.device)[t].float().view(-1, 1, 1, 1)  # [B, 1, 1, 1]
            alpha_bar_next = scheduler.alphas_cumprod.to(x.device)[torch.full_like(t, t_next)].float().view(-1, 1, 1, 1)
            if k == path.nfe - 1:
                alpha_bar_next = torch.ones_like(alpha_bar_next)
            x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()  # [B, C, H, W]
            x0 = x0.clamp(-1, 1)
            epsilon = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
            moved.append(alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next).sqrt() * epsilon)
        xs = tuple(moved)
    return xs


class Contestant:
    """One way to sample from a model."""

    def __init__(
        self, variant: str, model: nn.Module, scheduler: DDIMScheduler, resolution: int, batch_size: int, device
    ):
        self.variant, self.scheduler, self.device, self.batch_size = variant, scheduler, device, batch_size
        self.precision, compiled = VARIANTS[variant]
        self.graph, self.note = "compiled" if compiled else "eager", ""
        layout = torch.contiguous_format if variant == "plain" else memory_format(device)
        self.model = copy.deepcopy(model).to(device, memory_format=layout).eval().requires_grad_(False)
        self.shapes = scale_shapes(model.num_scales, model.channels, resolution)
        self.denoise: Denoiser = self.model.denoise
        if compiled:
            start = time.perf_counter()
            self.denoise, note = compile_denoiser(self.denoise, self.shapes, batch_size, device, self.precision)
            print(f"{variant}: {note or f'compiled in {time.perf_counter() - start:.0f} s'}", file=sys.stderr)
            if note:
                self.graph, self.note = "eager", f"{variant}: {note}"

    def images(self, path: SamplingPath, seeds: Sequence[int], denoise: Denoiser | None = None) -> Iterator[Images]:
        """Images along a path, batch by batch, with another denoiser if one is given."""
        if self.variant == "plain":
            for start in range(0, len(seeds), self.batch_size):
                source = SeededNoise(seeds[start : start + self.batch_size])
                noise = [source.draw(shape, self.device) for shape in self.shapes]
                yield plain_sample(self.model, self.scheduler, path, noise)
            return
        batches = sample_seeds(
            denoise or self.denoise, self.scheduler, path, seeds, self.shapes, self.batch_size, self.device
        )
        with autocast(self.device, self.precision):
            for _, samples in batches:
                yield samples.images

    def batch(self, path: SamplingPath, denoise: Denoiser | None = None) -> Images:
        """One batch, always the same."""
        return next(self.images(path, image_seeds(0, self.batch_size), denoise))


def race(
    contestants: dict[str, Callable[[], Any]], max_turns: int, max_seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every turn of each contestant; one that is slow beside the first has the first turn only."""
    seconds = {name: [seconds_of(run, device)[0]] for name, run in contestants.items()}
    first = next(iter(contestants))
    taking_part = [name for name in contestants if seconds[name][0] < SLOW * seconds[first][0]]
    for _ in turns(max_turns, max_seconds):
        for name in taking_part:
            seconds[name].append(seconds_of(contestants[name], device)[0])
    return seconds


def forward_flop(model: nn.Module, resolution: int, device: torch.device) -> int:
    """FLOP of one network call on one image."""
    shapes = scale_shapes(model.num_scales, model.channels, resolution)
    xs = tuple(torch.zeros(1, *shape, device=device) for shape in shapes)
    ts = tuple(torch.zeros(1, dtype=torch.long, device=device) for _ in shapes)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.denoise(xs, ts)
    return counter.get_total_flops()


def sampling_rows(
    contestants: dict[str, Contestant],
    seconds: dict[str, list[float]],
    flop: int,
    batch_size: int,
    num_steps: int,
    peak: dict[str, float],
) -> list[dict[str, Any]]:
    """A row for each variant; ratios to plain are medians over the turns that both took."""
    rows = []
    for name, contestant in contestants.items():
        images_per_second = batch_size / statistics.median(seconds[name])
        rate = flop * num_steps * images_per_second
        ratios = [plain / it for plain, it in zip(seconds["plain"], seconds[name], strict=False)]
        rows.append(
            {
                "variant": "plain" if name == "plain" else "ours",
                "precision": contestant.precision,
                "graph": contestant.graph,
                "images/s": images_per_second,
                "GFLOP/s": rate / 1e9,
                "of peak": f"{rate / peak[contestant.precision]:.1%}",
                "it / plain": statistics.median(ratios),
                "turns": len(seconds[name]),
            }
        )
    return rows


class TimedDenoiser:
    """A denoiser and the seconds spent in it, waiting for the device around each call."""

    def __init__(self, denoise: Denoiser, device: torch.device):
        self.denoise, self.device, self.seconds = denoise, device, 0.0

    def __call__(self, xs: Images, ts: Images) -> Images:
        spent, predictions = seconds_of(lambda: self.denoise(xs, ts), self.device)
        self.seconds += spent
        return predictions


def overhead_row(contestant: Contestant, path: SamplingPath) -> dict[str, Any]:
    """Where the time of one batch goes, medians over OVERHEAD_ROUNDS.

    Around the network: what of the batch is not spent in network calls, while the device is waited for around each.
    Free network: what a batch takes with a network that returns its input, as a share of the same.
    """
    whole, around, free = [], [], []
    for _ in range(OVERHEAD_ROUNDS):
        timed = TimedDenoiser(contestant.denoise, contestant.device)
        whole.append(seconds_of(lambda: contestant.batch(path, timed), contestant.device)[0])  # noqa: B023
        around.append((whole[-1] - timed.seconds) / whole[-1])
        idle = seconds_of(lambda: contestant.batch(path, lambda xs, ts: xs), contestant.device)[0]
        free.append(idle / whole[-1])
    return {
        "ours": contestant.variant,
        "ms per batch": 1000 * statistics.median(whole),
        "around the network": f"{statistics.median(around):.2%}",
        "free network": f"{statistics.median(free):.2%}",
    }


def random_inception(folder: str, device: torch.device, resize: str) -> nn.Module:
    """The Inception network with random weights."""
    import pytorch_fid.inception as library

    file = Path(folder) / "inception.pth"
    if not file.exists():
        with (
            mock.patch.object(library, "load_state_dict_from_url", lambda *_, **__: None),
            mock.patch.object(library.torchvision.models.Inception3, "load_state_dict", lambda *_: None),
        ):
            network = library.fid_inception_v3()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # Which keeps the signal alive through the depth.
        torch.save(network.state_dict(), file)
    return load_inception(file, device, resize)


def inception_speeds(
    resolution: int, max_turns: int, max_seconds: float, device: torch.device
) -> tuple[int, dict[str, float]]:
    """FLOP of an image, and images/s by the filter; the filters take turns."""
    shape = (INCEPTION_BATCH, 3, resolution, resolution)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        networks = {resize: random_inception(folder, device, resize) for resize in RESIZES}
    side = inception.INPUT_SIZE
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        networks[RESIZES[0]].embed(torch.zeros(1, 3, side, side, device=device))
    runs = {name: lambda it=it: extract(it, pixels, INCEPTION_BATCH) for name, it in networks.items()}
    for run in runs.values():
        run()
    seconds = race(runs, max_turns, max_seconds, device)
    return counter.get_total_flops(), {name: INCEPTION_BATCH / statistics.median(s) for name, s in seconds.items()}


def inception_rows(flop: int, speeds: dict[str, float], peak: float) -> list[dict[str, Any]]:
    """A row for each filter."""
    return [
        {
            "resize": name,
            "precision": "fp32",
            "images/s": speed,
            "GFLOP/s": flop * speed / 1e9,
            "of peak": f"{flop * speed / peak:.1%}",
        }
        for name, speed in speeds.items()
    ]


def frechet_rows() -> list[dict[str, Any]]:
    """Ours and the trace of SciPy's matrix square root, on covariances of twice as many samples as features."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((2 * FRECHET_FEATURES, FRECHET_FEATURES)) for _ in range(2)]
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in features]
    (mean_1, cov_1), (mean_2, cov_2) = moments

    def by_sqrtm() -> float:
        root = scipy.linalg.sqrtm(cov_1 @ cov_2)
        return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root).real)

    cpu = torch.device("cpu")
    theirs_seconds, theirs = seconds_of(by_sqrtm, cpu)
    ours_seconds, ours = seconds_of(lambda: frechet_distance(mean_1, cov_1, mean_2, cov_2), cpu)
    return [
        {"by": name, "s": spent, "sqrtm / it": theirs_seconds / spent, "distance": f"{value:.8g}"}
        for name, spent, value in (("sqrtm", theirs_seconds, theirs), ("ours", ours_seconds, ours))
    ]


def image_rows(pixels: dict[str, torch.Tensor], distance: Callable[[torch.Tensor], float]) -> list[dict[str, Any]]:
    """Each variant beside plain; pixels are uint8 `[N, C, H, W]` of equal seeds."""
    rows = []
    for name, it in pixels.items():
        difference = (it.int() - pixels["plain"].int()).abs()
        rows.append(
            {
                "variant": name,
                "SWD": f"{distance(it):.3f}",
                "largest difference": difference.max().item(),
                "mean difference": f"{difference.float().mean().item():.2g}",
                "values that differ": f"{(difference > 0).float().mean().item():.3%}",
            }
        )
    return rows


class Bench:
    """What the parts share, and the notes they leave."""

    def __init__(self, settings: EvaluationBenchSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.loaded = load_model(settings.checkpoint, settings.ema) if settings.checkpoint else None
        if self.loaded:
            self.loaded.require_pixels("bench_eval.py")
        config = self.loaded.config if self.loaded else {"hidden_dims": (64, 128, 256, 512), "resolution": 64}
        self.hidden_dims = tuple(settings.hidden_dims or config["hidden_dims"])
        self.channels = config.get("channels", 3)
        self.resolution = settings.resolution or config["resolution"]
        self.parts = settings.parts or [part for part in PARTS if part != "images" or self.loaded]
        if "images" in self.parts and not self.loaded:
            raise ValueError("The part images needs a trained model; pass --checkpoint or leave it out of --parts.")
        self.variants = ["plain", *(settings.variants or tuple(VARIANTS)[1:])]
        self.notes = []
        if settings.variants is None and not has_fast_bf16(device):
            self.variants.remove("bf16 compiled")
            self.notes.append("This machine emulates bf16; compiled bf16 was not measured.")

    def contestants(self, model: nn.Module, scheduler: DDIMScheduler, resolution: int) -> dict[str, Contestant]:
        """All variants of one model."""
        made = {
            v: Contestant(v, model, scheduler, resolution, self.settings.batch_size, self.device) for v in self.variants
        }
        self.notes += [it.note for it in made.values() if it.note and it.note not in self.notes]
        return made

    def sampling(self, model_type: str) -> tuple[dict[str, Contestant], dict[str, list[float]], int, dict[str, Any]]:
        """All variants of one kind of model, the seconds of their turns, FLOP of a call, and the overhead of ours."""
        torch.manual_seed(0)
        config = {"model_type": model_type, "hidden_dims": self.hidden_dims, "channels": self.channels}
        model = build_model(config).to(self.device)
        path = diagonal(self.settings.num_steps, num_scales=model.num_scales)
        made = self.contestants(model, DDIMScheduler(), self.resolution)
        for it in made.values():  # The first calls are slower.
            it.batch(diagonal(2, num_scales=model.num_scales))
        runs = {name: lambda it=it: it.batch(path) for name, it in made.items()}
        seconds = race(runs, self.settings.steps, self.settings.seconds, self.device)
        overhead = {}
        if "overhead" in self.parts:
            fastest = min(self.variants[1:], key=lambda name: statistics.median(seconds[name]))
            overhead = {"model": model_type} | overhead_row(made[fastest], path)
        return made, seconds, forward_flop(model, self.resolution, self.device), overhead

    def images(self) -> list[dict[str, Any]]:
        """The part of that name."""
        model, scheduler, config = self.loaded[:3]
        training = cli.load_training_images(self.settings, config)
        swd = SlicedWasserstein(training.pixels, self.settings.num_images, device=self.device)
        path = diagonal(self.settings.num_steps, num_scales=model.num_scales)
        seeds = image_seeds(42, self.settings.num_images)
        pixels = {
            name: torch.cat([to_uint8(images[0]).cpu() for images in it.images(path, seeds)])
            for name, it in self.contestants(model, scheduler, config["resolution"]).items()
        }
        return image_rows(pixels, lambda it: statistics.mean(swd.distance(it).values()))


def main() -> None:
    """Measure, print and write."""
    settings = parse_args()
    device = select_device(settings.device)
    bench = Bench(settings, device)
    dtypes = {name: DTYPES[name] for name in dict.fromkeys(VARIANTS[v][0] for v in bench.variants)}
    peaks = {name: [matmul_peak(dtype, device)] for name, dtype in dtypes.items()}
    sampled, sections = {}, {}
    if {"sampling", "overhead"} & set(bench.parts):
        sampled = {model_type: bench.sampling(model_type) for model_type in settings.models}
    speeds = None
    if "inception" in bench.parts:
        speeds = inception_speeds(bench.resolution, settings.steps, settings.seconds, device)
    if "frechet" in bench.parts:
        sections[f"Fréchet distance of {FRECHET_FEATURES} features, on the CPU"] = frechet_rows()
    if "images" in bench.parts:
        title = f"{settings.num_images} images of {Path(settings.checkpoint).name}, {bench.loaded.weights}"
        sections[f"{title}, beside plain; differences in grey levels"] = bench.images()
    for name, dtype in dtypes.items():
        peaks[name].append(matmul_peak(dtype, device))
    peak = {name: max(*both, *peaks["fp32"])[0] for name, both in peaks.items()}
    rates = {}
    for model_type, (made, seconds, flop, _) in sampled.items():
        title = f"Sampling, {model_type}: {flop / 1e9:.4g} GFLOP per call and image"
        rates[f"{title}, {settings.num_steps} calls, batch {settings.batch_size}"] = sampling_rows(
            made, seconds, flop, settings.batch_size, settings.num_steps, peak
        )
    if overheads := [overhead for *_, overhead in sampled.values() if overhead]:
        rates["Time outside the network, for the fastest of ours"] = overheads
    if speeds is not None:
        title = f"Inception features: {speeds[0] / 1e9:.4g} GFLOP per image, batch {INCEPTION_BATCH}"
        rates[title] = inception_rows(*speeds, peak["fp32"])
    rates["Rate of matrix products"] = [
        {"precision": name, "size": max(both)[1], "GFLOP/s before": both[0][0] / 1e9, "after": both[1][0] / 1e9}
        for name, both in peaks.items()
    ]
    widths = ",".join(map(str, bench.hidden_dims))
    title = f"# Evaluation at {bench.resolution}x{bench.resolution}, widths {widths}"
    tables = [f"## {name}\n\n{markdown_table(rows)}" for name, rows in (rates | sections).items()]
    text = "\n\n".join([title, describe_machine(device), *bench.notes, *tables])
    print_report(text, settings.output)


if __name__ == "__main__":
    cli.run_stage(main)
