"""How long an error map takes, beside the plain way, at equal standard error.

    python benchmarks/bench_heatmap.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --output FILE
    python benchmarks/bench_heatmap.py --checkpoint FILE --lines 3 --rounds 1 --no-full

The plain way is what one writes first: for every cell and probe two forward-mode passes (JVPs), one tangent per input
scale, fp32, eager, math attention, 4 probes. Its contestants are `planning.error_map.error_map` with 4 probes, with 1,
and without any (denoising errors alone). All take the same cells, lines x lines of the grid, in turn, on the same
images.

A contestant with fewer probes has larger standard errors. It is charged for that: its time is multiplied by the
largest, over the four blocks, of the median over cells of (its standard error / that of the plain way)², as if it took
so many more images. A factor below 1 counts as 1.

Then the whole grid with one probe, and thinned (`--coarse`), whose error is taken at all cells off the measured lines.
Prints a report in Markdown.
"""

import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import coarse as two_by_two_mean
from data import to_float
from machine import describe_machine, seconds_of
from paths.path import timestep_grid
from planning.error_map import BLOCKS, draw_noise_and_probes, error_map
from runtime.device import autocast, resolve_precision, select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_settings

PLAIN_PROBES = 4


@dataclass(frozen=True, kw_only=True)
class MapBenchSettings(CheckpointSettings, DataSettings, HardwareSettings):
    """Whose maps are timed, on how many cells, and how often."""

    grid: int = option(30, parse=cli.positive_int)
    lines: int = option(4, "lines per axis that all contestants take", parse=cli.positive_int)
    coarse: int = option(10, "lines per axis of the thinned map", parse=cli.positive_int)
    num_images: int = option(16, parse=cli.positive_int)
    batch_size: int = option(64, "samples per call of ours", parse=cli.positive_int)
    rounds: int = option(3, "turns of each contestant", parse=cli.positive_int)
    no_full: bool = option(False, "leave the whole grid out", flag="--no-full")
    output: str | None = option(None, "write the report here too", metavar="FILE")


def parse_args() -> MapBenchSettings:
    """The settings of this benchmark, from its flags."""
    return parse_settings(MapBenchSettings, __doc__)


def plain_map(loaded: LoadedModel, x_64: torch.Tensor, timesteps: np.ndarray) -> dict[str, torch.Tensor]:
    """Standard errors of the four blocks `[n, n]`, by forward-mode passes one cell and probe at a time."""
    images = (x_64, two_by_two_mean(x_64))
    noise, probes = draw_noise_and_probes(images, PLAIN_PROBES, seed=0)
    zeros = tuple(torch.zeros_like(x) for x in images)
    norms = torch.zeros(len(BLOCKS), PLAIN_PROBES, len(timesteps), len(timesteps), len(x_64))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for i, t_64 in enumerate(timesteps.tolist()):
            for j, t_32 in enumerate(timesteps.tolist()):
                ts = tuple(torch.full((len(x_64),), t, device=x_64.device) for t in (t_64, t_32))
                xs = tuple(loaded.scheduler.add_noise(*pair) for pair in zip(images, noise, (t_64, t_32), strict=True))
                for k in range(PLAIN_PROBES):
                    for scale in (0, 1):
                        tangents = [zeros[0], zeros[1]]
                        tangents[scale] = probes[scale][k]
                        columns = torch.func.jvp(lambda *x, ts=ts: loaded.denoise(x, ts), xs, tuple(tangents))[1]
                        for out, column in enumerate(columns):
                            norms[2 * out + scale, k, i, j] = column.flatten(1).square().sum(1).cpu()
    errors = norms.mean(1).std(-1) / len(x_64) ** 0.5  # [4, n, n]
    return dict(zip(BLOCKS, errors, strict=True))


def images_factors(errors: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict[str, float]:
    """By block, how many times the images a contestant needs for the standard error of the plain way."""
    return {block: ((errors[block] / plain[block]) ** 2).flatten().quantile(0.5).item() for block in BLOCKS}


def interpolation_rows(thinned: dict, whole: dict) -> list[dict[str, Any]]:
    """Relative error of an interpolated map at every cell that it did not measure, and what it said itself."""
    rows = []
    away = ~thinned["measured"]
    titles = {block: block for block in BLOCKS} | {"mse_64": "fine error", "mse_32": "coarse error"}
    for name, title in titles.items():
        one, truth = (m["jacobian"][name] if name in BLOCKS else m[name] for m in (thinned, whole))
        if not truth.any():
            continue
        spread = whole["jacobian_se"][name] if name in BLOCKS else whole[f"{name}_se"]
        error, said = (one / truth - 1).abs()[away], thinned["interpolation_error"][name]
        rows.append(
            {
                "map": title,
                "median": f"{error.median():.2%}",
                "95 %": f"{error.quantile(0.95):.2%}",
                "largest": f"{error.max():.2%}",
                "median by the held-out cells": f"{said['median']:.2%}",
                "largest by them": f"{said['max']:.2%}",
                "standard error of the map, median": f"{(spread / truth)[away].median():.2%}",
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_pixels("bench_heatmap.py")
    images = cli.load_training_images(settings, loaded.config)
    chosen = np.random.default_rng(0).choice(len(images), settings.num_images, replace=False)
    x_64 = to_float(torch.from_numpy(images.pixels[np.sort(chosen)])).to(device)
    precision = resolve_precision(device, settings.precision)
    grid = timestep_grid(settings.grid)
    few = grid[np.rint(np.linspace(0, settings.grid - 1, settings.lines)).astype(int)]

    def ours(timesteps: np.ndarray, num_probes: int, maps: str = "blocks", **options) -> dict[str, Any]:
        return error_map(
            loaded.denoise, loaded.scheduler, x_64, timesteps, num_probes, batch_size=settings.batch_size,
            autocast=functools.partial(autocast, device, precision), progress=False, maps=maps, **options,
        )  # fmt: skip

    contestants = {
        f"plain, K={PLAIN_PROBES}": lambda: {"jacobian_se": plain_map(loaded, x_64, few)},
        f"ours, K={PLAIN_PROBES}": lambda: ours(few, PLAIN_PROBES),
        "ours, K=1": lambda: ours(few, 1),
        "ours, denoising errors": lambda: ours(few, 1, "mse"),
    }
    for run in contestants.values():  # The first call is slower.
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    for _ in range(settings.rounds):
        for name, run in contestants.items():
            spent, results[name] = seconds_of(run, device)
            seconds[name].append(spent / len(few) ** 2)
    plain = f"plain, K={PLAIN_PROBES}"
    per_cell = {name: statistics.median(values) for name, values in seconds.items()}
    plain_errors = results[plain]["jacobian_se"]
    factors = {n: images_factors(r["jacobian_se"], plain_errors) for n, r in results.items() if "jacobian_se" in r}
    charges = {name: max(1.0, *by_block.values()) for name, by_block in factors.items()}
    rows = [
        {
            "way": name,
            "ms per cell": 1000 * value,
            "plain / it": per_cell[plain] / value,
            "plain / it at equal standard error": per_cell[plain] / value / charges[name] if name in charges else "",
        }
        for name, value in per_cell.items()
    ]
    parameters = sum(p.numel() for p in loaded.model.parameters())
    sections = {
        f"{len(few) ** 2} cells, {settings.num_images} images, median of {settings.rounds} turns": markdown_table(rows),
        "How many times the images for the standard error of the plain way, median over cells": markdown_table(
            [{"way": name} | by_block for name, by_block in factors.items()]
        ),
    }
    if not settings.no_full:
        whole_seconds, whole = seconds_of(lambda: ours(grid, 1, "all"), device)
        thin_seconds, thinned = seconds_of(lambda: ours(grid, 1, "all", coarse=settings.coarse), device)
        plain_seconds = per_cell[plain] * settings.grid**2
        sections[f"The whole grid of {settings.grid} x {settings.grid}, K=1, denoising errors with it"] = (
            markdown_table(
                [
                    {
                        "way": name,
                        "s": spent,
                        "plain / it": plain_seconds / spent,
                        "plain / it at equal standard error": plain_seconds / spent / charges["ours, K=1"],
                    }
                    for name, spent in (("whole", whole_seconds), (f"--coarse {settings.coarse}", thin_seconds))
                ]
            )
        )
        sections[f"Relative error of --coarse {settings.coarse} at the cells it did not measure"] = markdown_table(
            interpolation_rows(thinned, whole)
        )
    title = (
        f"# Error maps, {parameters:,} parameters at {x_64.shape[-2]}x{x_64.shape[-1]}, {precision} (plain: fp32)\n\n"
        f"{describe_machine(device)}"
    )
    text = "\n\n".join([title, *(f"## {name}\n\n{content}" for name, content in sections.items())])
    print_report(text, settings.output)


if __name__ == "__main__":
    cli.run_stage(main)
