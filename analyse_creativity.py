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

Of a model of both scales machines see windows of both images, and windows count blocks of 2x2 pixels.

Beside the windows stands how far the network looks by its gradients: the window that holds --share of the squared
gradient of the clean pixels that it predicts.

Pearson's r of each pair of images and r² are given as medians with intervals of 95 %; beside them r of images of
different seeds, which is what all images of a set have in common.

All training images count, so that a step takes seconds for each image and 1,000 training images at 32x32. Writes into
--output: walks.npz, the images, after each batch, from which a stopped run goes on; windows.json, the calibration;
likeness.csv, a row for each image; summary.csv; receptive_field.csv; and the figures pairs.png, windows.png and
receptive_field.png.
"""

import runtime.startup  # noqa: F401

import json
import math
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
from evaluation.receptive_field import ReceptiveField, measure_receptive_fields, share_by_scale
from evaluation.table_file import write_rows
from figures.images import plot_samples
from figures.style import WEIGHTS_TITLES
from figures.windows import plot_window_shares, plot_windows
from image_folder import claim, evenly, write_settings
from planning.choice import OnePathSettings, WalkSettings, path_of_settings
from runtime.device import autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.reports import markdown_table
from runtime.safe_write import replacing, short_name
from runtime.settings import option, parse_settings
from truth.ideal import EmpiricalDenoiser
from truth.local import BORDERS, MACHINES, LocalDenoiser, WindowTable
from truth.local_pair import LocalPairDenoiser
from truth.local_windows import Calibration, LocalPairPixels, LocalPixels, State, calibrate
from truth.posterior_mean import PosteriorMean

IDEAL, NETWORK = "ideal", "network"
WINDOWS = (3, 5, 7, 9, 11, 15, 21, 31)
WALKS_FILE, WINDOWS_FILE = "walks.npz", "windows.json"
TABLES = ("likeness.csv", "summary.csv", "receptive_field.csv")
FIGURES = ("pairs.png", "windows.png", "receptive_field.png")
SHOWN_PAIRS, SHOWN_LEVELS = 12, 6
FIELD_PIXELS = 4  # Of each image, whose gradients are taken.


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
    share: float = option(0.9, "of the squared gradient, which says how far the network looks", parse=cli.proper_share)
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
        # Wider ones would see no more.
        self.windows = tuple(sorted({each for each in settings.windows if each < 2 * side // self.num_scales}))
        if not self.windows:
            raise ValueError(
                f"--windows {min(settings.windows)} is wider than images of {side} pixels need; choose less."
            )
        self.shapes = scale_shapes(self.num_scales, *self.images.shape[1:3])

    @property
    def num_scales(self) -> int:
        """Of the network: 1, or 2."""
        return self.loaded.model.num_scales

    def _check(self) -> None:
        loaded, file = self.loaded, self.settings.checkpoint
        loaded.require_pixels("analyse_creativity.py")
        loaded.require_means("analyse_creativity.py")
        if loaded.model.num_predictions < loaded.model.num_scales:
            raise ValueError(
                f"{file} is a '{loaded.config['model_type']}' model, whose coarse image is made on the way; pass a "
                "baseline, or a model that predicts both scales."
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
            "share": settings.share,
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

    def states(self, seeds: Sequence[int]) -> list[State]:
        """What the network makes of its walks at every point of the path but the last."""
        settings, scheduler, found = self.settings, self.scheduler, []

        def see(k: int, xs: Images) -> None:
            if k < self.path.nfe:
                point = self.path.points[k]
                ts = tuple(torch.full((len(xs[0]),), t, device=self.device) for t in point)
                x0s = scheduler.predict_clean(self.loaded.denoise(xs, ts), point, xs)
                level = tuple(scheduler.log_snr[t].item() for t in point)
                found.append(State(xs, ts, scheduler.representation.compose(x0s).float(), level))

        with autocast(self.device, settings.precision):
            source = SeededNoise(seeds)
            sample(
                self.loaded.denoise_with_variance, scheduler, self.path,
                [source.draw(shape, self.device) for shape in self.shapes], callback=see, end=settings.end,
                solver=settings.make_solver(),
            )  # fmt: skip
        return found

    def machine(self, name: str, window: int | WindowTable, pixels: bool = False) -> PosteriorMean | LocalDenoiser:
        """A machine of the training images; pixels: whether it is asked for single ones."""
        borders, memory = "zeros" if name == "bbels" else self.borders, self.settings.memory_mib
        if self.num_scales == 2:
            if name == IDEAL:
                return EmpiricalDenoiser(self.scheduler, self.images).to(self.device)
            kind = LocalPairPixels if pixels else LocalPairDenoiser
        else:
            kind = LocalPixels if pixels else LocalDenoiser
            if name == IDEAL:  # All of the torus, which every pixel sees.
                name, window, borders = "ls", 2 * max(self.images.shape[2:]) + 1, "circular"
        return kind(self.scheduler, self.images, name, window, borders, memory).to(self.device)

    def machine_walks(self, machine: PosteriorMean | LocalDenoiser, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Its images from the noise of seeds, `[B, C, H, W]` batch by batch."""
        settings = self.settings
        batches = sample_seeds(
            machine.denoise, self.scheduler, self.path, seeds, self.shapes, settings.batch_size, self.device,
            end=settings.end, solver=settings.make_solver(),
        )  # fmt: skip
        for _, samples in batches:
            yield samples.images[0]

    def receptive_fields(self, states: Sequence[State]) -> list[tuple[ReceptiveField, ...]]:
        """Those of the clean fine image in every scale that is read, at every level."""
        circular = padding_of(self.loaded.model) == "circular"
        return [
            measure_receptive_fields(
                self.loaded.denoise, self.scheduler, state.xs, [t[0].item() for t in state.ts],
                num_pixels=FIELD_PIXELS, circular=circular, seed=self.settings.seed,
            )
            for state in Progress(states, unit="level", desc="receptive fields")
        ]  # fmt: skip


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


def calibrations(comparison: Comparison, states: Sequence[State], file: Path) -> dict[str, Calibration]:
    """The windows of each machine that has one to choose, from the file or anew."""
    known = json.loads(file.read_text()) if file.exists() else {}
    wanted = [name for name in comparison.settings.machines if name != IDEAL]
    shape = comparison.images.shape[2:]
    count = min(comparison.settings.calibration_places, math.prod(shape))
    drawn = np.random.default_rng(comparison.settings.seed).choice(math.prod(shape), count, replace=False)
    places = torch.from_numpy(np.stack(np.unravel_index(drawn, shape), 1)).to(comparison.device)
    for name in wanted:
        if name in known:
            continue
        machines = [comparison.machine(name, side, pixels=True) for side in comparison.windows]
        levels = Progress(states, unit="level", desc=f"windows of {name}")
        parts = [calibrate(machines, [state], places) for state in levels]
        found = Calibration(
            tuple(part.levels[0] for part in parts), comparison.windows, tuple(part.errors[0] for part in parts)
        )
        known[name] = {"levels": found.levels, "windows": found.windows, "errors": found.errors, "sides": found.sides}
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
    return {
        name: Calibration(
            tuple(map(tuple, known[name]["levels"])),
            tuple(known[name]["windows"]),
            tuple(map(tuple, known[name]["errors"])),
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


def field_rows(
    comparison: Comparison, states: Sequence[State], fields: Sequence[tuple[ReceptiveField, ...]]
) -> list[dict[str, Any]]:
    """How far the network looks: a row for each point of the path and each scale that it reads."""
    return [
        {
            "point": k,
            "scale": comparison.shapes[s][1],
            **{f"t_{shape[1]}": t[0].item() for shape, t in zip(comparison.shapes, state.ts, strict=True)},
            "log_snr": state.level[s],
            # Nothing comes from a scale that the network does not heed.
            "side": field.side_of(comparison.settings.share) if field.total > 0 else None,
            "share": comparison.settings.share,
            "of_all_scales": share_by_scale(by_scale)[s].item(),
        }
        for k, (state, by_scale) in enumerate(zip(states, fields, strict=True))
        for s, field in enumerate(by_scale)
    ]


def draw(
    comparison: Comparison,
    found: dict[str, Calibration],
    walks: Walks,
    fields: Sequence[tuple[ReceptiveField, ...]],
    folder: Path,
) -> None:
    """The figures of pairs, of windows, and of gradients."""
    config, settings = comparison.loaded.config, comparison.settings
    what = (
        f"epoch {config['epoch']}, {WEIGHTS_TITLES[comparison.loaded.weights]}, {len(comparison.images):,} training "
        f"images, {comparison.path.nfe} steps"
    )
    count = min(SHOWN_PAIRS, settings.num_images)
    rows = {name: to_uint8(walks.images[name][:count]).numpy() for name in (NETWORK, *settings.machines)}
    plot_samples(rows, folder / FIGURES[0], f"The network and machines, from the same noise; {what}")
    # In pixels of the fine image.
    curves = {name: [comparison.num_scales * side for side in each.sides] for name, each in found.items()}
    gradients = [by_scale[0].side_of(settings.share) for by_scale in fields]
    curves[f"network, {settings.share:.0%} of the gradient"] = gradients
    plot_windows(curves, folder / FIGURES[1], f"How far machines and network look; {what}")
    shown = evenly(min(SHOWN_LEVELS, len(fields)), len(fields), "the figure")
    panels = {}
    for s, shape in enumerate(comparison.shapes):
        read = {f"point {k}": fields[k][s] for k in shown if fields[k][s].total > 0}
        if read:
            panels[f"{shape[1]}x{shape[2]}"] = {
                name: dict(zip(field.sides, field.shares().tolist(), strict=True)) for name, field in read.items()
            }
    plot_window_shares(panels, folder / FIGURES[2], "Where the gradient of a clean pixel comes from", (settings.share,))


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
    states = comparison.states(comparison.seeds()[1])
    fields = comparison.receptive_fields(states)
    write_rows(folder / TABLES[2], field_rows(comparison, states, fields))
    found = calibrations(comparison, states, folder / WINDOWS_FILE)
    walks = Walks(folder / WALKS_FILE)
    walk_all(comparison, found, walks)
    rows, summary = compare(comparison, walks)
    write_rows(folder / TABLES[0], rows)
    write_rows(folder / TABLES[1], summary)
    draw(comparison, found, walks, fields, folder)
    print_summary(summary)
    print(f"{folder}: {', '.join((*TABLES, *FIGURES))}")


if __name__ == "__main__":
    cli.run_stage(main)
