"""Restore degraded images with a model of cold diffusion (train_baseline.py --preset cold).

    python restore.py --checkpoint FILE --ema --input blurred --severity 0.5 --output sharp
    python restore.py --checkpoint FILE --ema --input blurred --degradation blur:8 --severity 0.5 --solver direct
    python restore.py --checkpoint FILE --ema --severity 0.25 0.5 1
    python restore.py --checkpoint FILE --ema --on train --num_images 200

The severity is that of the training, from 0, the image, to 1, the most that the model was trained on; a walk starts at
the nearest of its timesteps. The solver `cold` is algorithm 2 of arXiv 2208.09392, `cold_naive` algorithm 1, and
`direct` one call of the network.

With --input: one PNG per image of a folder, all of which have suffered the degradation to --severity, named after it,
in --output; what is there already is skipped.
Without: images kept out of training (`--holdout N` there) are degraded to each --severity, restored in all three ways,
and compared with what they were; the table is printed and written to restoration.csv, and restoration.png shows some of
them, both in --output.
"""

import runtime.startup  # noqa: F401

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cli
from checkpoint import DEGRADED_IMAGES, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import fingerprint_array, save_png, to_float, to_uint8
from diffusion.degradations import parse_degradation
from diffusion.sampler import check_finite, sample_seeds, scale_shapes
from diffusion.solvers import COLD_SOLVERS, make_solver
from diffusion.starts import Starts
from diffusion.super_resolution import Quality, image_quality
from evaluation.given_images import evaluation_images
from evaluation.table_file import write_rows
from figures.images import plot_super_resolution
from figures.style import WEIGHTS_TITLES
from image_folder import claim, claim_images, evenly, read_to_change, write_settings
from paths.families import diagonal
from paths.path import Path as SamplingPath
from runtime.device import autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import short_name
from runtime.settings import option, parse_settings

METRICS_FILE, FIGURE_FILE = "restoration.csv", "restoration.png"
FIGURE_IMAGES = 2  # Of each severity.
DIRECT = "direct"
METHODS = (DIRECT, *COLD_SOLVERS)
HEADINGS = {"degraded": "degraded", DIRECT: "direct", "cold_naive": "algorithm 1", "cold": "algorithm 2"}
SEVERITIES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class RestorationSettings(CheckpointSettings, DataSettings, HardwareSettings):
    """What is restored, or on what the model is measured."""

    input: str | None = option(None, "folder of degraded images, to restore")
    degradation: str | None = option(
        None,
        "what has happened to them, which must be what the model was trained on (that)",
        parse=cli.checked(parse_degradation),
        metavar="NAME[:EXTENT]",
    )
    severity: tuple[float, ...] | None = option(
        None,
        f"how far, above 0 and up to 1; of --input one, else one or more ({' '.join(f'{s:g}' for s in SEVERITIES)})",
        parse=cli.unit_interval,
        metavar="S",
        nargs="+",
    )
    solver: str | None = option(None, "of --input: how a walk goes, or one call (cold)", choices=METHODS)
    num_steps: int = option(18, "steps of a walk, each one network call", parse=cli.positive_int)
    resize: bool = option(
        False,
        "bring images of --input to the size of the model: their shorter side, then the centre; of one trained with "
        "--pad pad them",
    )
    on: str | None = option(None, "images to measure on (holdout)", choices=("holdout", "train"))
    num_images: int | None = option(None, "evenly over those there are (all)", parse=cli.positive_int, metavar="N")
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    output: str | None = option(
        None, "folder (restoration/{checkpoint}_{weights}_{steps}[_{input}] in the run's results)"
    )
    force: bool = option(False, "replace what --output holds of other settings")

    def check(self) -> None:
        super().check()
        if self.input is None:
            for name in ("solver", "resize"):
                if getattr(self, name):
                    raise ValueError(f"--{name} is for --input; without it, images are restored in every way")
            if self.severity is None:
                self._derive(severity=SEVERITIES)
            if self.on is None:
                self._derive(on="holdout")
        else:
            if self.on is not None:
                raise ValueError("--input and --on exclude each other; leave one of them out")
            if self.severity is None or len(self.severity) > 1:
                raise ValueError("--input needs the --severity to which all of its images are degraded, one number")
            if self.solver is None:
                self._derive(solver="cold")
        if 0 in self.severity:
            raise ValueError("--severity 0 leaves nothing to restore; choose a number above 0, up to 1")


def parse_args() -> RestorationSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(RestorationSettings, __doc__)


class Restored(NamedTuple):
    """Images that were restored, uint8 `[N, C, R, R]`, and the network calls that each took."""

    pixels: torch.Tensor
    nfe: int


class Restorer:
    """A model of cold diffusion, with what the settings say of how to run it."""

    def __init__(self, settings: RestorationSettings):
        self.settings, self.device = settings, select_device(settings.device)
        self.loaded = load_model(settings.checkpoint, settings.ema, self.device, given=(DEGRADED_IMAGES,))
        if not self.loaded.is_cold:
            raise ValueError(
                f"{settings.checkpoint} was trained on noise, not on degraded images; pass a checkpoint of a training "
                "with --preset cold."
            )
        self.scheduler = self.loaded.scheduler
        self._check_degradation()
        self.said = {
            "weights_fingerprint": self.loaded.fingerprint,
            "degradation": str(self.scheduler.degradation),
            "num_steps": settings.num_steps,
            "precision": resolve_precision(self.device, settings.precision),
        }

    def _check_degradation(self) -> None:
        trained = self.scheduler.degradation
        if self.settings.degradation is None:
            return
        name, extent = parse_degradation(self.settings.degradation)
        if name != trained.name or extent not in (None, trained.extent):
            raise ValueError(
                f"--degradation {self.settings.degradation} is not what {self.settings.checkpoint} was trained to "
                f"undo, which is {trained}, at severity 1; leave it out, or pass another checkpoint."
            )

    def path(self, severity: float, method: str) -> SamplingPath:
        """From the timestep of a severity, in as many steps as there are to take and timesteps to take them at."""
        start, count = self.scheduler.timestep_of(severity), self.scheduler.num_train_timesteps
        steps = 1 if method == DIRECT else min(self.settings.num_steps, start)
        return diagonal(steps, "uniform_t", 1, num_train_timesteps=count, start=start)

    def degraded(self, originals: torch.Tensor, severity: float) -> torch.Tensor:
        """D of uint8 `[N, C, R, R]`, as a PNG holds it."""
        parts = originals.split(self.settings.batch_size)
        return torch.cat([to_uint8(self.scheduler.degradation(to_float(part), severity)) for part in parts])

    def run(self, pixels: torch.Tensor, severity: float, method: str) -> Iterator[tuple[slice, Restored]]:
        """Restore uint8 `[N, C, R, R]` of a severity by one of METHODS: the place of each batch, and the batch."""
        loaded, settings = self.loaded, self.settings
        # One step of the naive walk is the clean image that is seen.
        solver = make_solver("cold_naive" if method == DIRECT else method)
        shapes = scale_shapes(1, loaded.config["channels"], loaded.side)
        batches = sample_seeds(
            loaded.denoise_with_variance, self.scheduler, self.path(severity, method), range(len(pixels)), shapes,
            min(settings.batch_size, len(pixels)), self.device, solver=solver,
            starts=partial(Starts(pixels.numpy()).scales, num_scales=1, device=self.device),
        )  # fmt: skip
        name = f"severity {severity:g}, {method}"
        with autocast(self.device, settings.precision), Progress(total=len(pixels), unit="img", desc=name) as bar:
            for rows, samples in batches:
                check_finite(samples.images[0], rows)
                made = loaded.space.pixels(samples.images[0]).cpu()
                yield slice(rows[0], rows[-1] + 1), Restored(made, samples.nfe)
                bar.update(len(rows))

    def all(self, pixels: torch.Tensor, severity: float, method: str) -> Restored:
        """The same, all at once."""
        batches = [batch for _, batch in self.run(pixels, severity, method)]
        return Restored(torch.cat([batch.pixels for batch in batches]), batches[0].nfe)


def restore(restorer: Restorer, source: Path, folder: Path) -> None:
    """A PNG for every image of a folder, unless it is there already."""
    settings, config = restorer.settings, restorer.loaded.config
    [severity] = settings.severity
    images, reading = read_to_change(source, folder, config["resolution"], config, settings.resize, settings.num_images)
    said = restorer.said | {"of": "input", "severity": severity, "solver": settings.solver} | reading
    prints = {name: fingerprint_array(pixels.numpy()) for name, pixels in images.items()}
    missing = claim_images(folder, said, prints, settings.force, (METRICS_FILE, FIGURE_FILE))
    calls = 0
    if missing:
        pixels = torch.stack([images[name] for name in missing])
        for batch, (made, calls) in restorer.run(pixels, severity, settings.solver):  # noqa: B007 - said below
            for name, image in zip(missing[batch], made, strict=True):
                save_png(image, folder / f"{name}.png")
    made = f"{len(missing)} new with {calls} network calls each" if missing else "all there already"
    print(f"{len(images)} images in {folder}: {made}; undone: {restorer.scheduler.degradation} to {severity:g}")


def measure(restorer: Restorer, folder: Path) -> None:
    """Degrade images, restore them in every way, and say how near that comes: a table and a figure."""
    settings, config = restorer.settings, restorer.loaded.config
    originals = evaluation_images(settings, restorer.loaded, settings.checkpoint, settings.on, settings.num_images)
    said = restorer.said | {
        "of": settings.on,
        "severities": list(settings.severity),
        "images_fingerprint": fingerprint_array(originals.numpy()),
    }
    # Whatever refuses these images does so before an hour of sampling.
    image_quality(originals[:1], originals[:1])
    claim(folder, said, settings.force, (METRICS_FILE, FIGURE_FILE))
    write_settings(folder, said)
    rows, columns = [], {}
    for severity in settings.severity:
        degraded = restorer.degraded(originals, severity)
        results = {"degraded": Restored(degraded, 0)}
        results |= {method: restorer.all(degraded, severity, method) for method in METHODS}
        qualities = {name: image_quality(made.pixels, originals) for name, made in results.items()}
        rows += [
            {
                "severity": severity,
                "method": name,
                **quality.columns,
                "num_images": len(originals),
                "nfe": results[name].nfe,
                "start": restorer.scheduler.timestep_of(severity),
                "weights": restorer.loaded.weights,
                "epoch": config["epoch"],
                "dataset": settings.dataset or config["dataset"],
                "checkpoint": settings.checkpoint,
            }
            | {name: value for name, value in said.items() if name != "severities"}
            for name, quality in qualities.items()
        ]
        columns[severity] = results, qualities
    write_rows(folder / METRICS_FILE, rows)
    draw(restorer, originals, columns, folder / FIGURE_FILE)
    print_table(rows)
    print(f"{folder / METRICS_FILE} and {folder / FIGURE_FILE}; {restorer.scheduler.degradation}")


def draw(
    restorer: Restorer,
    originals: torch.Tensor,
    columns: dict[float, tuple[dict[str, Restored], dict[str, Quality]]],
    file: Path,
) -> None:
    """The figure of some of the images at each severity."""
    shown = evenly(min(FIGURE_IMAGES, len(originals)), len(originals), "the figure")
    pictures: dict[str, torch.Tensor] = {}
    captions: dict[str, list[str]] = {}
    for name, heading in HEADINGS.items():
        pictures[heading] = torch.cat([results[name].pixels[shown] for results, _ in columns.values()])
        captions[heading] = [
            f"severity {severity:g}, {qualities[name].psnr[k]:.2f} dB" if name == "degraded"
            else f"{qualities[name].psnr[k]:.2f} dB"
            for severity, (_, qualities) in columns.items()
            for k in shown
        ]  # fmt: skip
    pictures["original"] = torch.cat([originals[shown]] * len(columns))
    kind = "Training" if restorer.settings.on == "train" else "Held-out"
    title = (
        f"{kind} images after {restorer.scheduler.degradation}, walks of {restorer.settings.num_steps} network calls, "
        f"epoch {restorer.loaded.config['epoch']}, {WEIGHTS_TITLES[restorer.loaded.weights]}"
    )
    plot_super_resolution({name: images.numpy() for name, images in pictures.items()}, file, title, captions)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The scores by severity and method."""
    print(f"{'severity':>8}  {'method':12} {'PSNR':>7} {'± sd':>6} {'SSIM':>7} {'± sd':>6} {'calls':>6}")
    for row in rows:
        scores = f"{row['psnr']:7.2f} {row['psnr_sd']:6.2f} {row['ssim']:7.4f} {row['ssim_sd']:6.4f} {row['nfe']:6}"
        print(f"{row['severity']:8g}  {row['method']:12} {scores}")


def main() -> None:
    """Restore a folder, or measure."""
    settings = parse_args()
    restorer = Restorer(settings)
    name = f"{Path(settings.checkpoint).stem}_{restorer.loaded.weights}_{settings.num_steps}"
    results = restorer.loaded.results / "restoration"
    if settings.input is None:
        measure(restorer, Path(settings.output or results / short_name(name)))
    else:
        source = Path(settings.input)
        name = short_name(f"{name}_{settings.solver}_{settings.severity[0]:g}_{source.resolve().name}")
        restore(restorer, source, Path(settings.output or results / name))


if __name__ == "__main__":
    cli.run_stage(main)
