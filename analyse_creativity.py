"""Predict image by image what a network makes, from its training images alone (arXiv 2412.20292).

    python analyse_creativity.py --checkpoint checkpoints/baseline_400ep.pth --ema
    python analyse_creativity.py --checkpoint FILE --ema --num_images 100 --num_steps 20 --machines ideal els bbels
    python analyse_creativity.py --checkpoint FILE --ema --windows 3 5 7 9 15 --calibration_places 32

The theory is a local score machine (docs/theory.md, section 20): the best denoiser of the images of the training that
sees a window around each pixel, and so cannot know which image it is in. The side of that window is the one thing left
open. It is calibrated at every point of the path, against the clean images that the network sees on its walks from
other seeds. Then network and machines walk from the same noise, by the same solver over the same timesteps:

    ideal   the best denoiser that sees everything; it gives training images back, and is the floor
    ls      local: what may be at a pixel is what training images have there
    els     equivariant and local: what they have anywhere
    bbels   what they have anywhere at the same distance from the border, as far as the window reaches it

Pearson's r of each pair of images and r² are given as medians with intervals of 95 %; beside them r of images of
different seeds, which is what all images of a set have in common.

All training images count, so that a step takes seconds for each image and 1,000 training images at 32x32. Writes into
--output: walks.npz, the images, after each batch, from which a stopped run goes on; windows.json, the calibration;
likeness.csv, a row for each image; summary.csv; and pairs.png and windows.png.
"""

import runtime.startup  # noqa: F401

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
from checkpoint import load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import fingerprint_array, to_float, to_uint8
from diffusion.sampler import Images, SeededNoise, check_finite, image_seeds, sample, sample_seeds, scale_shapes
from evaluation.likeness import correlation, median_of
from evaluation.table_file import write_rows
from figures.images import plot_samples
from figures.style import WEIGHTS_TITLES
from figures.windows import plot_windows
from image_folder import claim, write_settings
from planning.choice import OnePathSettings, WalkSettings, path_of_settings
from runtime.device import autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.reports import markdown_table
from runtime.safe_write import replacing, short_name
from runtime.settings import option, parse_settings
from truth.local import BORDERS, MACHINES, LocalDenoiser, WindowTable
from truth.local_windows import Calibration, LocalPixels, calibrate

IDEAL, NETWORK = "ideal", "network"
WINDOWS = (3, 5, 7, 9, 11, 15, 21, 31)
WALKS_FILE, WINDOWS_FILE = "walks.npz", "windows.json"
TABLES = ("likeness.csv", "summary.csv")
FIGURES = ("pairs.png", "windows.png")
SHOWN_PAIRS = 12


@dataclass(frozen=True, kw_only=True)
class CreativitySettings(CheckpointSettings, OnePathSettings, WalkSettings, DataSettings, HardwareSettings):
    """Which network, which machines, and how many images."""

    num_steps: int = option(20, "steps, each one network call by ddim", parse=cli.positive_int)
    machines: tuple[str, ...] = option((IDEAL, *MACHINES), "of the theory", choices=(IDEAL, *MACHINES), nargs="+")
    borders: str | None = option(
        None, "of ls and els: circular, or zeros (those that the network pads with)", choices=BORDERS
    )
    windows: tuple[int, ...] = option(
        WINDOWS, "sides to choose from, odd", parse=cli.positive_int, metavar="P", nargs="+"
    )
    num_images: int = option(24, "images to compare", parse=cli.positive_int)
    seed: int = option(42, "image k has seed 1000000 * SEED + k", parse=cli.seed)
    calibration_images: int = option(4, "other images, whose walks calibrate", parse=cli.positive_int)
    calibration_places: int = option(24, "pixels of each at which windows are compared", parse=cli.positive_int)
    batch_size: int = option(4, "images that a machine walks at once", parse=cli.positive_int)
    memory_mib: int | None = option(None, "of a machine's intermediate arrays (by the device)", parse=cli.positive_int)
    output: str | None = option(None, "folder (creativity/{checkpoint}_{weights}_{path}_{steps} in the run's results)")
    force: bool = option(False, "replace what --output holds of other settings")

    def check(self) -> None:
        super().check()
        if even := [side for side in self.windows if side % 2 == 0]:
            raise ValueError(f"--windows {even[0]} is even, and a window has a pixel in its middle; choose odd sides.")
        if self.make_solver().draws:
            raise ValueError(f"--solver {self.solver_words} draws noise on the way; choose one that does not, as ddim.")


def parse_args() -> CreativitySettings:
    """The settings of this stage, from its flags."""
    return parse_settings(CreativitySettings, __doc__)


def padding_of(model: torch.nn.Module) -> str:
    """What a network continues images with: circular if any of its convolutions does, else zeros."""
    modes = {each.padding_mode for each in model.modules() if isinstance(each, torch.nn.Conv2d)}
    return "circular" if "circular" in modes else "zeros"


class Comparison:
    """A network, the images that it was trained on, and the walk that it shares with all machines."""

    def __init__(self, settings: CreativitySettings):
        self.settings, self.device = settings, select_device(settings.device)
        self.loaded = load_model(settings.checkpoint, settings.ema, self.device)
        self.scheduler = self.loaded.scheduler
        self._check()
        self.path, self.path_name = path_of_settings(settings, self.loaded)
        self.images = self._training_images().to(self.device)
        self.borders = settings.borders or padding_of(self.loaded.model)
        side = self.images.shape[-1]
        self.windows = tuple(sorted({each for each in settings.windows if each < 2 * side}))
        self.shapes = scale_shapes(1, *self.images.shape[1:3])

    def _check(self) -> None:
        loaded, file = self.loaded, self.settings.checkpoint
        loaded.require_pixels("analyse_creativity.py")
        loaded.require_means("analyse_creativity.py")
        if loaded.model.num_scales > 1:
            raise ValueError(
                f"{file} is a '{loaded.config['model_type']}' model; local score machines here have one scale, so pass "
                "a checkpoint of train_baseline.py."
            )
        if loaded.config.get("class_names"):
            raise ValueError(
                f"{file} is told classes, and local score machines know of none; pass a checkpoint of a training "
                "without --classes."
            )

    def _training_images(self) -> torch.Tensor:
        config = self.loaded.config
        images = cli.load_training_images(self.settings, config)
        if images.fingerprint != config["data_fingerprint"]:
            print(
                f"note: '{images.name}' is not what the network was trained on, so that theory speaks of other images"
            )
        pixels = to_float(torch.from_numpy(np.array(images.pixels)))
        if pixels.shape[1] != self.loaded.image_channels:
            raise ValueError(
                f"The images of '{images.name}' have {pixels.shape[1]} channel(s) but {self.settings.checkpoint} was "
                f"trained on {self.loaded.image_channels}; pass another --dataset."
            )
        # Trained on with its mirror image, each image is two.
        return torch.cat([pixels, pixels.flip(3)]) if config.get("flip") else pixels

    @property
    def said(self) -> dict[str, Any]:
        """What decides the results."""
        settings = self.settings
        return {
            "weights_fingerprint": self.loaded.fingerprint,
            "path_fingerprint": self.path.fingerprint(),
            "images_fingerprint": fingerprint_array(to_uint8(self.images).cpu().numpy()),
            "num_training_images": len(self.images),
            "borders": self.borders,
            "windows": list(self.windows),
            "seed": settings.seed,
            "calibration_images": settings.calibration_images,
            "calibration_places": settings.calibration_places,
            **settings.solver_said,
            "end": settings.end,
            "precision": resolve_precision(self.device, settings.precision),
        }

    def seeds(self) -> tuple[range, range]:
        """Of the images to compare, and of those that calibrate."""
        count, others = self.settings.num_images, self.settings.calibration_images
        every = image_seeds(self.settings.seed, count + others)
        return every[:count], every[count:]

    def network_walks(self, seeds: Sequence[int]) -> torch.Tensor:
        """Images `[N, C, H, W]` of the network."""
        settings, denoise = self.settings, self.loaded.denoise_with_variance
        with autocast(self.device, settings.precision):
            batches = sample_seeds(
                denoise, self.scheduler, self.path, seeds, self.shapes, 64, self.device, end=settings.end,
                solver=settings.make_solver(),
            )  # fmt: skip
            images = torch.cat([samples.images[0] for _, samples in batches])
        check_finite(images, seeds)
        return images

    def states(self, seeds: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of every point of the path but the last: noisy images of the network's walk, timesteps, its clean images."""
        found = []

        def see(k: int, xs: Images) -> None:
            if k < self.path.nfe:
                ts = tuple(torch.full((len(xs[0]),), t, device=self.device) for t in self.path.points[k])
                x0s = self.scheduler.predict_clean(self.loaded.denoise(xs, ts), self.path.points[k], xs)
                found.append((xs[0], ts[0], x0s[0].float()))

        settings = self.settings
        with autocast(self.device, settings.precision):
            noise = SeededNoise(seeds).draw(self.shapes[0], self.device)
            sample(
                self.loaded.denoise_with_variance, self.scheduler, self.path, (noise,), callback=see, end=settings.end,
                solver=settings.make_solver(),
            )  # fmt: skip
        return found

    def machine(self, name: str, window: int | WindowTable, kind: type[LocalDenoiser] = LocalDenoiser) -> LocalDenoiser:
        """A machine of the training images."""
        if name == IDEAL:  # All of the torus, which every pixel sees.
            name, window, borders = "ls", 2 * max(self.images.shape[2:]) + 1, "circular"
        else:
            borders = "zeros" if name == "bbels" else self.borders
        made = kind(self.scheduler, self.images, name, window, borders, self.settings.memory_mib)
        return made.to(self.device)

    def machine_walks(self, machine: LocalDenoiser, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Its images from the noise of seeds, `[B, C, H, W]` batch by batch."""
        settings = self.settings
        batches = sample_seeds(
            machine.denoise, self.scheduler, self.path, seeds, self.shapes, settings.batch_size, self.device,
            end=settings.end, solver=settings.make_solver(),
        )  # fmt: skip
        for _, samples in batches:
            yield samples.images[0]


class Walks:
    """The images made so far, float32 by name, kept in a file after every batch."""

    def __init__(self, file: Path):
        self.file, self.images = file, {}
        if file.exists():
            with np.load(file) as saved:
                self.images = {name: torch.from_numpy(saved[name]) for name in saved.files}

    def count(self, name: str) -> int:
        """Images there are."""
        return len(self.images.get(name, ()))

    def add(self, name: str, images: torch.Tensor) -> None:
        """Add some, and save all."""
        images = images.float().cpu()
        self.images[name] = torch.cat([self.images[name], images]) if name in self.images else images
        with replacing(self.file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **{name: each.numpy() for name, each in self.images.items()})


def calibrations(comparison: Comparison, file: Path) -> dict[str, Calibration]:
    """The windows of each machine that has one to choose, from the file or anew."""
    known = json.loads(file.read_text()) if file.exists() else {}
    wanted = [name for name in comparison.settings.machines if name != IDEAL]
    missing = [name for name in wanted if name not in known]
    if missing:
        _, seeds = comparison.seeds()
        states = comparison.states(seeds)
        height, width = comparison.images.shape[2:]
        drawn = np.random.default_rng(comparison.settings.seed).choice(
            height * width, min(comparison.settings.calibration_places, height * width), replace=False
        )
        places = torch.from_numpy(np.stack(np.unravel_index(drawn, (height, width)), 1)).to(comparison.device)
        for name in missing:
            machines = [comparison.machine(name, side, LocalPixels) for side in comparison.windows]
            levels = Progress(states, unit="level", desc=f"windows of {name}")
            parts = [calibrate(machines, [state], places) for state in levels]
            known[name] = {
                "log_snrs": [part.log_snrs[0] for part in parts],
                "windows": list(comparison.windows),
                "errors": [list(part.errors[0]) for part in parts],
                "sides": [part.sides[0] for part in parts],
            }
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n")
    return {
        name: Calibration(
            tuple(known[name]["log_snrs"]), tuple(known[name]["windows"]), tuple(map(tuple, known[name]["errors"]))
        )
        for name in wanted
    }


def walk_all(comparison: Comparison, found: dict[str, Calibration], walks: Walks) -> None:
    """Make what is missing of the images of the network and of every machine."""
    seeds, _ = comparison.seeds()
    if walks.count(NETWORK) < len(seeds):
        walks.add(NETWORK, comparison.network_walks(seeds[walks.count(NETWORK) :]))
    for name in comparison.settings.machines:
        window = 1 if name == IDEAL else found[name].table()
        with Progress(total=len(seeds), initial=walks.count(name), unit="img", desc=f"walks of {name}") as bar:
            for images in comparison.machine_walks(comparison.machine(name, window), seeds[walks.count(name) :]):
                walks.add(name, images)
                bar.update(len(images))


def compare(comparison: Comparison, walks: Walks) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of every image, and of every machine."""
    seeds, _ = comparison.seeds()
    made = {name: images[: len(seeds)] for name, images in walks.images.items()}
    rows, summary = [], []
    for name in comparison.settings.machines:
        r = correlation(made[NETWORK], made[name])
        other = correlation(made[NETWORK], made[name].roll(1, 0)) if len(seeds) > 1 else np.full(1, np.nan)
        differences = (made[NETWORK] - made[name]).square().flatten(1).mean(1).numpy()
        rows += [
            {"machine": name, "seed": seed, "r": r[k], "r2": r[k] ** 2, "r_other": other[k], "mse": differences[k]}
            for k, seed in enumerate(seeds)
        ]
        line = {"machine": name, "num_images": int(np.isfinite(r).sum())}
        for column, values in (("r", r), ("r2", r**2), ("r_other", other)):
            if np.isfinite(values).any():
                median = median_of(values)
                line |= {column: median.value, f"{column}_low": median.low, f"{column}_high": median.high}
            else:
                line |= dict.fromkeys((column, f"{column}_low", f"{column}_high"), np.nan)
        summary.append(line | {"mse": float(np.median(differences))})
    return rows, summary


def draw(comparison: Comparison, found: dict[str, Calibration], walks: Walks, folder: Path) -> None:
    """The figures of pairs and of windows."""
    config = comparison.loaded.config
    what = (
        f"epoch {config['epoch']}, {WEIGHTS_TITLES[comparison.loaded.weights]}, {len(comparison.images):,} training "
        f"images, {comparison.path.nfe} steps"
    )
    count = min(SHOWN_PAIRS, comparison.settings.num_images)
    rows = {name: to_uint8(walks.images[name][:count]).numpy() for name in (NETWORK, *comparison.settings.machines)}
    plot_samples(rows, folder / FIGURES[0], f"The network and machines, from the same noise; {what}")
    curves = {name: each.sides for name, each in found.items()}
    if curves:
        plot_windows(curves, folder / FIGURES[1], f"Windows that predict the network best; {what}")


def print_summary(summary: list[dict[str, Any]]) -> None:
    """The table of medians with their intervals."""

    def text(line: dict[str, Any], column: str) -> str:
        value, low, high = (line[f"{column}{end}"] for end in ("", "_low", "_high"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    print(
        markdown_table(
            [
                {
                    "machine": line["machine"],
                    "median r": text(line, "r"),
                    "median r²": text(line, "r2"),
                    "r of other seeds": text(line, "r_other"),
                    "images": line["num_images"],
                }
                for line in summary
            ]
        )
    )


def main() -> None:
    """Calibrate, walk, compare and draw; whatever is there already stays."""
    settings = parse_args()
    comparison = Comparison(settings)
    loaded, path = comparison.loaded, comparison.path
    name = f"{Path(settings.checkpoint).stem}_{loaded.weights}_{comparison.path_name}_{path.nfe}"
    name += settings.solver_suffix
    folder = Path(settings.output or loaded.results / "creativity" / short_name(name))
    claim(folder, comparison.said, settings.force, (WALKS_FILE, WINDOWS_FILE, *TABLES, *FIGURES))
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, comparison.said)
    found = calibrations(comparison, folder / WINDOWS_FILE)
    walks = Walks(folder / WALKS_FILE)
    walk_all(comparison, found, walks)
    rows, summary = compare(comparison, walks)
    write_rows(folder / TABLES[0], rows)
    write_rows(folder / TABLES[1], summary)
    draw(comparison, found, walks, folder)
    print_summary(summary)
    print(f"{folder}: {', '.join((*TABLES, *FIGURES))}")


if __name__ == "__main__":
    cli.run_stage(main)
