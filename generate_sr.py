"""Super-resolution, 32x32 to 64x64: zero-shot with a dual model, which was trained for nothing of the sort, or with a
stage of a cascade (`train_lift.py --model cascade`), which was.

    python generate_sr.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --input my_images --output big
    python generate_sr.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema
    python generate_sr.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --on train --num_images 200
    python generate_sr.py --checkpoint FILE --ema --input my_images --class cat --guidance_scale 2

The coarse image is given clean (at timestep 0) and the fine one denoised from noise, N steps for N network calls; then
the 2x2 mean of the result is made to equal the input. A model of --resolution 32 takes 16x16 images, and so on.

With --input: one PNG per image of a folder, named after it, in --output; what is there already is skipped.
Without: images kept out of training (`--holdout N` there) are halved, enlarged again, and compared with what they were;
the table is printed and written to sr_metrics.csv, and sr.png shows some of them, both in --output.
"""

import runtime.startup  # noqa: F401

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cli
from checkpoint import COARSE_IMAGES, load_model
from cli import CheckpointSettings, CompileSettings, DataSettings, HardwareSettings
from data import coarse, fingerprint_array, save_png, to_float, to_uint8
from diffusion.sampler import compile_denoiser
from diffusion.super_resolution import (
    Quality,
    Upscaled,
    image_quality,
    lpips_distance,
    lpips_missing,
    make_consistent,
    mean_deviation,
    noise_seeds,
    super_resolution_path,
    super_resolve,
    upscale_all,
)
from evaluation.given_images import evaluation_images
from evaluation.table_file import write_rows
from figures.images import plot_super_resolution
from figures.style import WEIGHTS_TITLES
from image_folder import claim, claim_images, evenly, read_to_change, write_settings
from paths.families import diagonal
from paths.path import SPACINGS
from paths.path import Path as SamplingPath
from planning.choice import SolverSettings
from planning.conditions import OneClassSettings
from planning.regimes import off_regime_note
from runtime.device import autocast, resolve_compile, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import short_name
from runtime.settings import Settings, option, parse_settings

METRICS_FILE, FIGURE_FILE = "sr_metrics.csv", "sr.png"
FIGURE_IMAGES = 4
FIGURE_COLUMNS = {
    "input": "input",
    "bicubic": "bicubic",
    "lanczos": "Lanczos",
    "lift": "LIFT",
    "lift consistent": "LIFT consistent",
    "original": "original",
}


@dataclass(frozen=True, kw_only=True)
class FinePathSettings(Settings):
    """The path of the fine clock; the coarse one stands at the clean image."""

    group = "path"
    num_steps: int = option(18, "steps", parse=cli.positive_int)
    spacing: str = option("uniform_t", "of the fine timesteps", choices=SPACINGS)
    start: int | None = option(None, "first fine timestep, of pure noise (the noisiest)", parse=cli.positive_int)


@dataclass(frozen=True, kw_only=True)
class SuperResolutionSettings(
    OneClassSettings,
    CheckpointSettings,
    FinePathSettings,
    SolverSettings,
    DataSettings,
    CompileSettings,
    HardwareSettings,
):
    """What is enlarged, or on what the model is measured."""

    input: str | None = option(None, "folder of images of the coarse size, to enlarge")
    resize: bool = option(
        False,
        "bring images of --input to the coarse size of the model: their shorter side, then the centre; of one trained "
        "with --pad pad them",
    )
    on: str | None = option(None, "images to measure on (holdout)", choices=("holdout", "train"))
    num_images: int | None = option(None, "evenly over those there are (all)", parse=cli.positive_int, metavar="N")
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "the noise of an image depends on this and its pixels", parse=cli.seed)
    no_consistency: bool = option(False, "with --input: keep what the network returns")
    output: str | None = option(
        None, "folder (super_resolution/{checkpoint}_{weights}_{steps}[_{input}] in the run's results)"
    )
    force: bool = option(False, "replace what --output holds of other settings")

    def check(self) -> None:
        super().check()
        if self.input is not None and self.on is not None:
            raise ValueError("--input and --on exclude each other; leave one of them out")
        if self.no_consistency and self.input is None:
            raise ValueError("--no_consistency is for --input; without it, results with and without are measured")
        if self.resize and self.input is None:
            raise ValueError("--resize is for --input; images of a data set have their size")
        if self.input is None and self.on is None:
            self._derive(on="holdout")


def parse_args() -> SuperResolutionSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(SuperResolutionSettings, __doc__)


class Upscaler:
    """A model along a path of super-resolution, with what the settings say of how to run it."""

    def __init__(self, settings: SuperResolutionSettings):
        self.settings, self.device = settings, select_device(settings.device)
        self.loaded = load_model(settings.checkpoint, settings.ema, self.device, given=(COARSE_IMAGES,))
        self.loaded.require_pixels("generate_sr.py")
        self.loaded.require_means("generate_sr.py")
        self.loaded.check_solver(settings.make_solver())
        self.loaded.require_enlarging()
        self.conditions = settings.conditions(self.loaded)
        if settings.make_solver().reads_variance:
            self.loaded.check_variance()
        log_snr = self.loaded.scheduler.log_snr.numpy()
        base = diagonal(settings.num_steps, settings.spacing, 1, log_snr, len(log_snr), settings.start)  # One scale.
        self.path: SamplingPath = super_resolution_path(base)
        note = off_regime_note(self.path, self.loaded.config, self.loaded.scheduler)
        if note:
            print(f"warning: {note}", file=sys.stderr)
        self.said = {
            "weights_fingerprint": self.loaded.fingerprint,
            "path_fingerprint": self.path.fingerprint(),
            **settings.solver_said,
            "seed": settings.seed,
            "precision": resolve_precision(self.device, settings.precision),
            **self.conditions.said,
        }

    def run(self, coarse_pixels: torch.Tensor) -> Iterator[tuple[slice, Upscaled]]:
        """`super_resolve` for uint8 `[N, C, H, W]` with a progress bar: the place of each batch, and the batch."""
        settings, (count, channels, height, width) = self.settings, coarse_pixels.shape
        conditions, batch_size = self.conditions, min(settings.batch_size, count)
        denoise = conditions.told_classes(self.loaded.denoise_with_variance)
        calls = settings.make_solver().calls(self.path.nfe) * conditions.calls
        if resolve_compile(self.device, settings.compile, count * calls):
            shapes = [(channels, 2 * height, 2 * width), (channels, height, width)]
            denoise, note = compile_denoiser(
                denoise, shapes, batch_size, self.device, settings.precision, with_labels=bool(conditions.names)
            )
            if note:
                print(note)
        denoise = conditions.of_the_class(denoise, self.loaded)
        seeds = noise_seeds(coarse_pixels, settings.seed)
        batches = super_resolve(
            denoise, self.loaded.scheduler, self.path, to_float(coarse_pixels), seeds, batch_size,
            self.device, solver=settings.make_solver(),
        )  # fmt: skip
        start = 0
        with (
            autocast(self.device, settings.precision),
            Progress(total=count, unit="img", desc="super-resolution") as bar,
        ):
            for fine, nfe in batches:
                yield slice(start, start + len(fine)), Upscaled(fine.float().cpu(), nfe)
                start += len(fine)
                bar.update(len(fine))


def enlarge(upscaler: Upscaler, source: Path, folder: Path) -> None:
    """A PNG of twice the size for every image of a folder, unless it is there already."""
    settings, config = upscaler.settings, upscaler.loaded.config
    images, reading = read_to_change(
        source, folder, config["resolution"] // 2, config, settings.resize, settings.num_images
    )
    said = upscaler.said | {"of": "input", "consistent": not settings.no_consistency}
    said |= reading
    prints = {name: fingerprint_array(pixels.numpy()) for name, pixels in images.items()}
    missing = claim_images(folder, said, prints, settings.force, (METRICS_FILE, FIGURE_FILE))

    deviation = nfe = 0
    if missing:
        pixels = torch.stack([images[name] for name in missing])
        for batch, (fine, calls) in upscaler.run(pixels):
            nfe = calls
            rounded = to_uint8(fine if settings.no_consistency else make_consistent(fine, to_float(pixels[batch])))
            deviation = max(deviation, mean_deviation(rounded, pixels[batch]).max().item())
            for name, image in zip(missing[batch], rounded, strict=True):
                save_png(image, folder / f"{name}.png")
    said = f"{len(missing)} new with {nfe} network calls each" if missing else "all there already"
    print(f"{len(images)} images in {folder}: {said}; path {upscaler.path.kind} {upscaler.path.fingerprint()}")
    if missing:
        print(f"the 2x2 mean of a PNG is off its input by {deviation:.3g} grey levels at most")


def measure(upscaler: Upscaler, folder: Path) -> None:
    """Halve images, enlarge them by every method, and say how near that comes: a table and a figure."""
    settings, config = upscaler.settings, upscaler.loaded.config
    originals = evaluation_images(settings, upscaler.loaded, settings.checkpoint, settings.on, settings.num_images)
    said = upscaler.said | {
        "of": "train" if settings.on == "train" else "holdout",
        "images_fingerprint": fingerprint_array(originals.numpy()),
    }
    # Whatever refuses these images does so before an hour of sampling.
    image_quality(originals[:1], originals[:1])
    claim(folder, said, settings.force, (METRICS_FILE, FIGURE_FILE))
    write_settings(folder, said)
    reason = lpips_missing(config["resolution"])
    if reason:
        print(f"note: LPIPS is left out: {reason}")
    coarse_pixels = to_uint8(coarse(to_float(originals)))
    batches = [batch for _, batch in upscaler.run(coarse_pixels)]
    fine, nfe = torch.cat([batch.images for batch in batches]), batches[0].nfe
    results = upscale_all(coarse_pixels, fine)
    qualities = {name: image_quality(pixels, originals) for name, pixels in results.items()}
    error = (coarse(make_consistent(fine, to_float(coarse_pixels))) - to_float(coarse_pixels)).abs().max()

    rows = [
        {
            "method": name,
            **quality.columns,
            "lpips": "" if reason else round(lpips_distance(results[name], originals), 6),
            "mean_deviation": round(mean_deviation(results[name], coarse_pixels).max().item(), 4),
            "num_images": len(originals),
            "nfe": nfe if name.startswith("lift") else 0,
            "spacing": settings.spacing,
            "start": upscaler.path.points[0][0],
            "weights": upscaler.loaded.weights,
            "epoch": config["epoch"],
            "dataset": settings.dataset or config["dataset"],
            "checkpoint": settings.checkpoint,
        }
        | {name: value for name, value in said.items() if name != "classes"}  # Which "guidance" says, too.
        for name, quality in qualities.items()
    ]
    write_rows(folder / METRICS_FILE, rows)
    draw(upscaler, originals, coarse_pixels, results, qualities, nfe, folder / FIGURE_FILE)
    print_table(rows)
    print(f"before rounding, the 2x2 mean of LIFT consistent is off its input by {error.item():.1e} of [-1, 1] at most")
    print(f"{folder / METRICS_FILE} and {folder / FIGURE_FILE}; path {upscaler.path.fingerprint()}")


def draw(
    upscaler: Upscaler,
    originals: torch.Tensor,
    coarse_pixels: torch.Tensor,
    results: dict[str, torch.Tensor],
    qualities: dict[str, Quality],
    nfe: int,
    file: Path,
) -> None:
    """The figure of some of the images."""
    shown = evenly(min(FIGURE_IMAGES, len(originals)), len(originals), "the figure")
    columns = results | {"input": coarse_pixels, "original": originals}
    sizes = [f"{images.shape[2]} × {images.shape[3]}" for images in (coarse_pixels, originals)]
    captions = {
        FIGURE_COLUMNS[name]: [f"{quality.psnr[k]:.2f} dB" for k in shown]
        for name, quality in qualities.items()
        if name in FIGURE_COLUMNS
    } | dict(zip(("input", "original"), ([size] * len(shown) for size in sizes), strict=True))
    kind = "training" if upscaler.settings.on == "train" else "held-out"
    config = upscaler.loaded.config
    title = (
        f"Super-resolution of {kind} images, {nfe} network calls, "
        f"epoch {config['epoch']}, {WEIGHTS_TITLES[upscaler.loaded.weights]}{upscaler.conditions.title}"
    )
    plot_super_resolution(
        {heading: columns[name][shown].numpy() for name, heading in FIGURE_COLUMNS.items()}, file, title, captions
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    """The scores by method."""
    print(f"{'method':20} {'PSNR':>7} {'± sd':>6} {'SSIM':>7} {'LPIPS':>7} {'2x2 mean off by':>16}")
    for row in rows:
        scores = f"{row['psnr']:7.2f} {row['psnr_sd']:6.2f} {row['ssim']:7.4f} {row['lpips'] or '-':>7}"
        print(f"{row['method']:20} {scores} {row['mean_deviation']:10.2f} levels")


def main() -> None:
    """Enlarge a folder, or measure."""
    settings = parse_args()
    upscaler = Upscaler(settings)
    name = f"{Path(settings.checkpoint).stem}_{upscaler.loaded.weights}_{settings.num_steps}{settings.solver_suffix}"
    name = short_name(name + upscaler.conditions.suffix)
    results = upscaler.loaded.results / "super_resolution"
    if settings.input is None:
        measure(upscaler, Path(settings.output or results / name))
    else:
        source = Path(settings.input)
        name = short_name(f"{name}_{source.resolve().name}")
        enlarge(upscaler, source, Path(settings.output or results / name))


if __name__ == "__main__":
    cli.run_stage(main)
