"""Take given images to the noise they come from under a model, and back; or latents, edited or not, to images.

    python encode.py --checkpoint checkpoints/baseline_400ep.pth --ema --input A.png B.png
    python encode.py --run mine --ema --input my_images --resize --tolerance 1e-5 --output encoded
    python encode.py --run mine --ema --decode encoded/latents.npz
    python encode.py --run mine --ema --decode edited.npz --solver heun --num_steps 18 --output edited
    python encode.py --run mine --ema --input my_images --class cat --output encoded_as_cats

With --input, files or one folder, the probability-flow equation takes each image up to its latents, the noise that
`--solver ode` starts from, and the latents down again (arXiv 2011.13456, section 4.3), both to --tolerance along one
path. Nothing is clamped on the way, which has no inverse, and the way down ends where that up began, at timestep 0.

Writes into --output `latents.npz` (arrays `fine`, of a pair also `coarse`, and what made them), one PNG per image, what
it came back as, `figures/grid.png` with both, and settings.json; prints the calls and the differences of each image.
What is there already is not made again. With --decode: one PNG per row of such a file.
"""

import runtime.startup  # noqa: F401

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import cli
from checkpoint import load_model
from cli import CheckpointSettings, HardwareSettings
from data import fingerprint_array, read_png, save_png, to_float, to_uint8
from diffusion.adaptive import MOST_CALLS, TOLERANCE
from diffusion.latents import Latents, decode, load_latents, save_latents
from diffusion.sampler import ENDS, SeededNoise, check_finite
from diffusion.solvers import SOLVERS
from diffusion.super_resolution import noise_seeds
from evaluation.given_latents import check_fits, check_latents_exist, encode_pixels
from figures.images import plot_samples
from figures.style import WEIGHTS_TITLES
from image_folder import SETTINGS_FILE, as_in_training, check_apart, claim, claim_images, evenly, read_given
from planning.choice import WalkSettings
from planning.conditions import OneClassSettings
from planning.usual_path import OpenPathSettings, usual_path
from runtime.device import PRECISIONS, exact_autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import beside, short_name
from runtime.settings import option, parse_settings
from scheduler import Denoiser

LATENTS_FILE, GRID_FILE = "latents.npz", "figures/grid.png"
GRID_IMAGES = 8
GREY_LEVELS = 127.5  # In a unit of images in [-1, 1].
# What is measured of an image, and how a table shows it.
COLUMNS = {"calls_up": "calls up", "calls_down": "calls down", "rms": "rms difference", "largest": "largest difference"}


@dataclass(frozen=True, kw_only=True)
class EncodingSettings(OneClassSettings, CheckpointSettings, OpenPathSettings, WalkSettings, HardwareSettings):
    """Which images or latents, along which path, how exactly."""

    input: tuple[str, ...] | None = option(
        None, "images of the size of the model, or one folder of them, to encode", nargs="+", metavar="IMAGE"
    )
    decode: str | None = option(None, "file of latents to make images of", metavar="FILE")
    resize: bool = option(
        False,
        "bring images of --input to the size of the model: shorter side, then the centre; of one trained with --pad "
        "pad them",
    )
    solver: str = option("ode", "of --decode", choices=tuple(SOLVERS))
    end: str = option("t0", "of --decode: on timestep 0, where encoding begins, or on the clean image", choices=ENDS)
    seed: int = option(42, "of --decode: of what a solver draws for an image, with its latents", parse=cli.seed)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    precision: str = option("fp32", "not auto, as steps would follow the rounding of bf16", choices=PRECISIONS)
    output: str | None = option(None, "folder (one named after all of these in latents of the run's results)")
    force: bool = option(False, "replace what --output holds of other settings")

    def check(self) -> None:
        super().check()
        if (self.input is None) == (self.decode is None):
            raise ValueError("either --input, images to encode, or --decode, a file of latents, is needed; pass one")
        if self.decode is not None and self.resize:
            raise ValueError("--resize is for images of --input; leave it out")
        if self.input is not None and (self.solver != "ode" or self.end != "t0"):
            raise ValueError(
                "--solver and --end are for --decode; images of --input come back by ode from where they went"
            )


def parse_args() -> EncodingSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(EncodingSettings, __doc__, leave_out=("coarse_from",))


class Encoder:
    """A model along a path, with what the settings say of how to run it."""

    def __init__(self, settings: EncodingSettings):
        self.settings, self.device = settings, select_device(settings.device)
        self.loaded = load_model(settings.checkpoint, settings.ema, self.device)
        self.loaded.require_pixels("encode.py")
        self.loaded.require_means("encode.py")
        check_latents_exist(self.loaded, settings.checkpoint)
        self.conditions = settings.conditions(self.loaded)
        self.path, kind = usual_path(settings, self.loaded)
        self.said = {
            "weights_fingerprint": self.loaded.fingerprint,
            "path_fingerprint": self.path.fingerprint(),
            "precision": resolve_precision(self.device, settings.precision),
            **self.conditions.said,
        }
        self.name = f"{Path(settings.checkpoint).stem}_{self.loaded.weights}_{kind}_{self.path.nfe}"
        self.name += self.conditions.suffix

    def folder(self, *words: str) -> Path:
        """Where results go, by default a folder named after these words too."""
        name = short_name("_".join([self.name, *words]))
        return Path(self.settings.output or self.loaded.results / "latents" / name)

    def told(self, denoise: Denoiser) -> Denoiser:
        """The model as a denoiser, told of the class if there is one."""
        return self.conditions.of_the_class(self.conditions.told_classes(denoise), self.loaded)

    def encode(self, images: dict[str, torch.Tensor], made_by: dict[str, Any]) -> tuple[Latents, torch.Tensor]:
        """The latents of images, uint8 `[C, R, R]` by name, with what is measured of each, and what comes back."""
        settings, loaded = self.settings, self.loaded
        pixels = torch.stack(list(images.values()))
        with exact_autocast(self.device, settings.precision):
            latents, up = encode_pixels(
                loaded, self.path, pixels.to(self.device), settings.tolerance or TOLERANCE,
                settings.most_calls or MOST_CALLS, self.told(loaded.denoise),
            )  # fmt: skip
            back, down = decode(
                self.told(loaded.denoise_with_variance), loaded.scheduler, self.path, latents, settings.make_solver()
            )
        check_finite(back, list(images))
        apart = ((back.double().cpu() - to_float(pixels).double()) * GREY_LEVELS).flatten(1)
        figures = (up, down, apart.square().mean(1).sqrt(), apart.abs().amax(1))
        measured = {name: tuple(values.tolist()) for name, values in zip(COLUMNS, figures, strict=True)}
        prints = tuple(fingerprint_array(image.numpy()) for image in images.values())
        scales = tuple(x.float().cpu() for x in latents)
        return Latents(scales, tuple(images), made_by, prints, measured), to_uint8(back).cpu()

    def decode(self, latents: Latents, rows: list[int]) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Name, image (uint8 `[C, R, R]`) and calls of some rows of latents, batch by batch."""
        settings, loaded = self.settings, self.loaded
        denoise = self.told(loaded.denoise_with_variance)
        for start in range(0, len(rows), settings.batch_size):
            chosen = rows[start : start + settings.batch_size]
            scales = tuple(x[chosen] for x in latents.scales)
            noise = SeededNoise(noise_seeds(scales[0], settings.seed))
            with exact_autocast(self.device, settings.precision):
                images, calls = decode(
                    denoise, loaded.scheduler, self.path, tuple(x.to(self.device) for x in scales),
                    settings.make_solver(), settings.end, lambda shape, noise=noise: noise.draw(shape, self.device),
                )  # fmt: skip
            names = [latents.names[k] for k in chosen]
            check_finite(images, names)
            yield from zip(names, to_uint8(images).cpu(), calls.tolist(), strict=True)


def read_own(folder: Path, said: dict[str, Any], force: bool) -> Latents | None:
    """The latents that a folder holds, made a folder of these settings; None where there are none."""
    file = folder / LATENTS_FILE
    if file.exists() and not (folder / SETTINGS_FILE).exists() and not force:
        raise ValueError(f"{file} does not say what made it; pass --force to replace it, or another --output.")
    if not claim(folder, said, force, (LATENTS_FILE, GRID_FILE)) or not file.exists():
        return None
    latents = load_latents(file, "remove it, and run again")
    if latents.settings != said or set(latents.measured) != set(COLUMNS):
        raise ValueError(f"{file} is not what this stage wrote there; move it away, or pass another --output.")
    return latents


def print_table(latents: Latents, names: list[str]) -> None:
    """What is measured of some images; a difference of grey levels is that before rounding to them."""
    width = min(40, max(map(len, ("image", *names))))
    rows = {name: k for k, name in enumerate(latents.names)}
    print(f"{'image':{width}} {'  '.join(COLUMNS.values())}")
    for name in names:
        values = latents.row(rows[name]).measured
        shown = f"{values['calls_up'][0]:8.0f}  {values['calls_down'][0]:10.0f}"
        print(f"{name:{width}} {shown}  {values['rms'][0]:14.4f}  {values['largest'][0]:18.4f}")


def to_latents_and_back(encoder: Encoder) -> None:
    """Latents, images that come back, a table and a grid for given images, as far as they are missing."""
    settings, config = encoder.settings, encoder.loaded.config
    reading = as_in_training(config, settings.resize)
    images = read_given(settings.input, config["resolution"], config["channels"], **reading)
    folder = encoder.folder(*(Path(place).resolve().stem for place in settings.input))
    check_apart(folder, settings.input)
    said = encoder.said | {"of": "input", "tolerance": settings.tolerance or TOLERANCE}
    said |= {name: reading[name] for name in ("resize_filter", "pad")}
    prints = {name: fingerprint_array(pixels.numpy()) for name, pixels in images.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # Others may encode into the folder at the same time; each then adds to what it finds.
    lock = FileLock(beside(folder / LATENTS_FILE, ".lock"))
    with lock:
        own = read_own(folder, said, settings.force)
        missing = set(claim_images(folder, said, prints, settings.force, (LATENTS_FILE, GRID_FILE)))
    encoded = {} if own is None else dict(zip(own.names, own.fingerprints, strict=True))
    missing = [name for name in images if name in missing or encoded.get(name) != prints[name]]
    with Progress(total=len(missing), unit="img", desc="encoding") as bar:
        for start in range(0, len(missing), settings.batch_size):
            names = missing[start : start + settings.batch_size]
            found, back = encoder.encode({name: images[name] for name in names}, said)
            with lock:
                own = read_own(folder, said, force=False)
                own = found if own is None else own.with_others(found)
                save_latents(folder / LATENTS_FILE, own)
            for name, pixels in zip(names, back, strict=True):
                save_png(pixels, folder / f"{name}.png")
            bar.update(len(names))
    names = list(images)
    shown = [names[k] for k in evenly(min(GRID_IMAGES, len(names)), len(names), "the figure")]
    pairs = {
        "given": torch.stack([images[name] for name in shown]).numpy(),
        "decoded": torch.stack([read_png(folder / f"{name}.png") for name in shown]).numpy(),
    }
    title = f"To latents and back, epoch {config['epoch']}, {WEIGHTS_TITLES[encoder.loaded.weights]}"
    title += encoder.conditions.title
    plot_samples(pairs, folder / GRID_FILE, title)
    print_table(own, names)
    made = f"{len(missing)} new" if missing else "all there already"
    path = encoder.path
    print(f"{len(names)} images in {folder}: {made}; differences in grey levels; path {path.kind} {path.fingerprint()}")


def to_images(encoder: Encoder) -> None:
    """A PNG for every row of a file of latents, unless it is there already."""
    settings, path = encoder.settings, encoder.path
    latents = load_latents(settings.decode)
    check_fits(latents, settings.decode, encoder.loaded, settings.checkpoint)
    if latents.settings["path_fingerprint"] != path.fingerprint():
        print(f"note: {settings.decode} was encoded along another path than {path.kind} {path.fingerprint()}")
    was = latents.settings.get("guidance")
    if was != encoder.said.get("guidance"):
        print(f"note: {settings.decode} was encoded with {was or 'no class'}, and other images come out")
    folder = encoder.folder(settings.solver, Path(settings.decode).resolve().stem)
    check_apart(folder, [settings.decode])
    solver = settings.make_solver()
    said = encoder.said | {"of": "latents", "solver": settings.solver_words, "end": settings.end}
    said |= {"seed": settings.seed if solver.draws else None}
    prints = {
        name: "".join(fingerprint_array(x[k].numpy()) for x in latents.scales) for k, name in enumerate(latents.names)
    }
    missing = claim_images(folder, said, prints, settings.force, (LATENTS_FILE, GRID_FILE))
    rows, calls = {name: k for k, name in enumerate(latents.names)}, []
    with Progress(total=len(missing), unit="img", desc="decoding") as bar:
        for name, pixels, spent in encoder.decode(latents, [rows[name] for name in missing]):
            save_png(pixels, folder / f"{name}.png")
            calls.append(spent)
            bar.update()
    made = f"{len(calls)} new with {sum(calls) / len(calls):.0f} network calls each" if calls else "all there already"
    print(f"{len(latents)} images in {folder}: {made}; path {path.kind} {path.fingerprint()}")


def main() -> None:
    """Encode and come back, or decode."""
    settings = parse_args()
    encoder = Encoder(settings)
    (to_latents_and_back if settings.decode is None else to_images)(encoder)


if __name__ == "__main__":
    cli.run_stage(main)
