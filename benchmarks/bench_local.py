"""How long local score machines take, beside a loop over pixels and beside the rate of matrix products.

    python benchmarks/bench_local.py --output FILE              # 1,000 built-in images in grey at 32x32, 20 steps
    python benchmarks/bench_local.py --dataset path/to/MNIST --pad --windows 3 9 --machines els --threads 1
    python benchmarks/bench_local.py --colour --limit 200 --num_steps 4

Walks every machine with DDIM and takes the time for an image and a step. The plain way is what one writes first: for
each pixel the differences of its window and all training windows, softmax, mean. It is measured at a few pixels of one
step and counted for all of them; laying out the windows once is not counted. Both give the same pixels; the largest
difference, which is printed, is what the plain sums over so many candidates lose in fp32.

The last column is the time that nothing but the products of all windows takes at the rate of the fastest square matrix
product in fp32, measured in the same run, as a share of the time taken. Products that are not computed, as shifts of
images take their place, count as if they were. Prints a report in Markdown.
"""

import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from cli import HardwareSettings, TrainingDataSettings
from data import to_float
from diffusion.sampler import SeededNoise, sample
from machine import describe_machine, matmul_peak, seconds_of
from paths.families import diagonal
from runtime.device import select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler
from truth.local import MACHINES, LocalDenoiser, WindowTable

BORDERS = {"ls": "zeros", "els": "circular", "bbels": "zeros"}
# As calibration finds them: wide in noise, narrow near the image.
FALLING = WindowTable(((-5.0,), (-3.0,), (-1.0,), (1.0,), (3.0,)), (15, 9, 7, 5, 3))


@dataclass(frozen=True, kw_only=True)
class LocalBenchSettings(TrainingDataSettings, HardwareSettings):
    """Which machines are walked, of which images, and how far."""

    dataset: str = option("synthetic", "hub id, folder, or synthetic")
    resolution: int = option(32, "side of the images", parse=cli.positive_int)
    limit: int = option(1000, "training images", parse=cli.positive_int, metavar="N")
    colour: bool = option(False, "leave colours; else images become grey")
    machines: tuple[str, ...] = option(("els", "bbels", "ls"), choices=MACHINES, nargs="+")
    windows: tuple[int, ...] = option(
        (3, 9, 15), "sides, beside windows that fall along the walk", parse=cli.positive_int, nargs="+", metavar="P"
    )
    num_steps: int = option(20, "steps of a walk", parse=cli.positive_int)
    num_images: int = option(1, "images walked at once", parse=cli.positive_int)
    plain_pixels: int = option(4, "pixels at which the plain way is taken", parse=cli.positive_int)
    memory_mib: int | None = option(None, "of intermediate arrays (by the device)", parse=cli.positive_int)
    threads: int | None = option(None, "threads of PyTorch (all)", parse=cli.positive_int)
    output: str | None = option(None, "write the report here too", metavar="FILE")


def parse_args() -> LocalBenchSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(LocalBenchSettings, __doc__, leave_out=("precision",))


class PlainWindows:
    """The windows of all training images laid out once, and a pixel of the els machine on the torus from them."""

    def __init__(self, images: torch.Tensor, side: int):
        self.side = side
        windows = F.unfold(F.pad(images, [side // 2] * 4, "circular"), side)  # [N, C P², places]
        self.windows = windows.transpose(1, 2).flatten(0, 1)  # [N places, C P²]
        self.centres = images.flatten(2).transpose(1, 2).flatten(0, 1)  # [N places, C]

    def pixel(self, x: torch.Tensor, alpha: float, sigma: float, place: tuple[int, int]) -> torch.Tensor:
        """The clean pixel `[C]` at a place of noisy x `[1, C, H, W]`."""
        padded = F.pad(x, [self.side // 2] * 4, "circular")
        rows, columns = (slice(start, start + self.side) for start in place)
        own = padded[0, :, rows, columns].flatten()
        logits = -(own - alpha * self.windows).square().sum(1) / (2 * sigma**2)
        return logits.softmax(0) @ self.centres


def plain_seconds(
    images: torch.Tensor, denoiser: LocalDenoiser, scheduler: DDIMScheduler, side: int, count: int
) -> tuple[float, float]:
    """Seconds of the plain way for a pixel, the median of some, and by how much the denoiser gives another one."""
    t = scheduler.num_train_timesteps // 2
    x = scheduler.add_noise(images[:1], SeededNoise([0]).draw(images.shape[1:], images.device), t)
    clean = scheduler.predict_x0(denoiser(x, torch.full((1,), t, device=x.device)), t, x)
    alpha, sigma = (each.item() for each in scheduler.scales(t, x))
    plain = PlainWindows(images, side)
    generator = torch.Generator().manual_seed(0)
    places = [tuple(torch.randint(size, (), generator=generator).item() for size in x.shape[2:]) for _ in range(count)]
    seconds, errors = [], []
    for place in places[:1] + places:  # The first is slower.
        spent, pixel = seconds_of(lambda place=place: plain.pixel(x, alpha, sigma, place), x.device)
        seconds.append(spent)
        errors.append((pixel - clean[0, :, place[0], place[1]]).abs().max().item())
    return statistics.median(seconds[1:]), max(errors)


def main() -> None:
    """Measure, print and write."""
    settings = parse_args()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = select_device(settings.device)
    images = to_float(torch.tensor(cli.load_training_images(settings).pixels)).to(device)
    images = images if settings.colour else images.mean(1, keepdim=True)
    scheduler, path = DDIMScheduler(), diagonal(settings.num_steps, num_scales=1)
    noise = SeededNoise(range(settings.num_images)).draw(images.shape[1:], device)
    count, channels, height, width = images.shape
    peak, _ = matmul_peak(torch.float32, device)

    def denoiser_of(machine: str, window: int | WindowTable) -> LocalDenoiser:
        made = LocalDenoiser(scheduler, images, machine, window, BORDERS[machine], settings.memory_mib)
        return made.to(device)

    # What window each step has.
    falling = [FALLING(scheduler.log_snr[t].item()) for (t,) in path.points[:-1]]
    walks = {str(side): (side, [side] * settings.num_steps) for side in settings.windows}
    walks[f"{max(falling)} to {min(falling)}"] = FALLING, falling
    every = sorted({side for _, sides in walks.values() for side in sides})
    plain = {
        side: plain_seconds(images, denoiser_of("els", side), scheduler, side, settings.plain_pixels) for side in every
    }
    rows = []
    for name, (window, sides) in walks.items():
        for machine in settings.machines:
            denoiser = denoiser_of(machine, window)
            walk = lambda: sample(denoiser.denoise, scheduler, path, (noise,))  # noqa: B023, E731
            spent = seconds_of(walk, device)[0] / settings.num_images
            row = {"machine": machine, "borders": BORDERS[machine], "P": name, "s per image": spent}
            row |= {"s per image and step": spent / settings.num_steps}
            if machine != "ls":
                products = 2 * channels * sum(side**2 for side in sides) * count * (height * width) ** 2
                row |= {
                    "plain / it": sum(plain[side][0] for side in sides) * height * width / spent,
                    "products at the peak / it": products / peak / spent,
                }
            rows.append(row)
    rows = [dict.fromkeys(itertools.chain(*rows), "-") | row for row in rows]
    text = "\n\n".join(
        [
            f"# Local score machines, {count:,} images of {channels} x {height} x {width}, {settings.num_steps} steps, "
            f"{settings.num_images} at once, fp32",
            f"{describe_machine(device)}; matrix products at {peak / 1e9:,.0f} GFLOP/s",
            f"The plain way at {settings.plain_pixels} pixels of one step, of els for all machines; els differs from "
            f"it by at most {max(error for _, error in plain.values()):.1e}.",
            markdown_table(rows),
        ]
    )
    print_report(text, settings.output)


if __name__ == "__main__":
    cli.run_stage(main)
