"""Log-likelihoods of images under a trained model, exactly, in bits per dimension.

    python evaluate_likelihood.py --checkpoint checkpoints/baseline_400ep.pth --ema --num_images 64
    python evaluate_likelihood.py --run mine --ema --on train --probes 4 --tolerance 1e-5
    python evaluate_likelihood.py --run residual --model_type dual --path_type kl --num_steps 10

The probability-flow equation takes each image to noise and adds up how volumes change on the way (arXiv 2011.13456,
eq. 39), by Hutchinson's trace of --probes random directions; grey levels are spread evenly over their width. Path:
the diagonal in one step, which leaves all steps to the tolerance; of the residual pair with two clocks that of the
image, in ten, between which timesteps are straight lines.

Images are those kept out of training (`--holdout N` there), or with --on train those of the training. Writes into
--output `likelihood.csv`, one row per image, by the fingerprint of its pixels, and `settings.json`, what made them.
What is there already is not computed again.
"""

import runtime.startup  # noqa: F401

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import fingerprint_array
from diffusion.adaptive import MOST_CALLS, TOLERANCE, check_tolerance
from diffusion.likelihood import bits_per_dim, dequantised, log_likelihood, why_undefined
from diffusion.super_resolution import noise_seeds
from evaluation.given_images import evaluation_images
from evaluation.table_file import csv_line
from image_folder import SETTINGS_FILE, claim, write_settings
from paths.path import Path as SamplingPath
from planning.choice import OnePathSettings, path_of_settings
from planning.path_types import PATH_FAMILIES, PATH_TYPES, path_type
from runtime.device import PRECISIONS, autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import replacing, short_name
from runtime.settings import option, parse_settings

TABLE_FILE = "likelihood.csv"
TWO_CLOCK_STEPS = 10  # Straight lines between so many timesteps stay near the diagonal of the image.


class Row(NamedTuple):
    """The result of one image, as a row of the table."""

    fingerprint: str  # of its pixels
    bits_per_dim: float
    log_likelihood: float  # nats, of pixels in [-1, 1]
    nfe: int


@dataclass(frozen=True, kw_only=True)
class UpwardPathSettings(OnePathSettings):
    """The path that likelihoods are computed along, from its end to its start."""

    group = "path"
    num_steps: int | None = option(
        None,
        f"steps of the path, each solved to --tolerance (1; with two clocks {TWO_CLOCK_STEPS})",
        parse=cli.positive_int,
    )
    path_type: str | None = option(
        None,
        "diagonal, for two clocks image_diagonal; or another: "
        f"{', '.join(PATH_TYPES)}; {'; '.join(f'{name}:{words}' for name, words in PATH_FAMILIES.items())}",
        parse=path_type,
        metavar="TYPE",
    )
    tolerance: float = option(
        TOLERANCE,
        "relative and absolute error of a step, of the image and of the divergence in nats per dimension",
        parse=cli.positive_float,
    )
    num_calls: int = option(MOST_CALLS, "the most network calls for an image", parse=cli.positive_int, metavar="N")

    def check(self) -> None:
        super().check()
        check_tolerance(self.tolerance)


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(CheckpointSettings, UpwardPathSettings, DataSettings, HardwareSettings):
    """Of which images the likelihood is wanted, and how exactly."""

    on: str = option("holdout", "images", choices=("holdout", "train"))
    num_images: int = option(64, "evenly over those there are", parse=cli.positive_int, metavar="N")
    probes: int = option(1, "random directions for the trace, each a backward pass per call", parse=cli.positive_int)
    seed: int = option(42, "what is random for an image depends on this and its pixels", parse=cli.seed)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    precision: str = option("fp32", "not auto, as steps would follow the rounding of bf16", choices=PRECISIONS)
    output: str | None = option(
        None, "folder (likelihood/{checkpoint}_{weights}_{on}_{path}_{steps} in the run's results)"
    )
    force: bool = option(False, "replace what --output holds of other settings")


def parse_args() -> LikelihoodSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(LikelihoodSettings, __doc__, leave_out=("coarse_from",))


def find_path(settings: LikelihoodSettings, loaded: LoadedModel) -> tuple[SamplingPath, str]:
    """The path and its name; raises ValueError for a model that gives images no likelihood."""
    model = loaded.model
    if reason := why_undefined(model.num_scales, model.num_predictions, loaded.scheduler.representation):
        raise ValueError(f"{settings.checkpoint} is a '{loaded.config['model_type']}' model: {reason}")
    usual = ("image_diagonal", TWO_CLOCK_STEPS) if model.has_two_clocks() else ("diagonal", 1)
    chosen = {"path_type": settings.path_type or usual[0], "num_steps": settings.num_steps or usual[1]}
    return path_of_settings(settings.but(**chosen), loaded)


def read_table(file: Path) -> dict[str, Row]:
    """The rows of a table by fingerprint; none where there is no file. Raises ValueError for a damaged one."""
    if not file.exists():
        return {}
    try:
        header, *lines = csv.reader(file.read_text(encoding="utf-8").splitlines())
        rows = [Row(print_, float(bits), float(nats), int(nfe)) for print_, bits, nats, nfe in lines]
        if tuple(header) != Row._fields:
            raise ValueError("another header")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, or pass another --output.") from error
    return {row.fingerprint: row for row in rows}


def write_table(file: Path, rows: Sequence[Row]) -> None:
    """Replace a table by these rows."""
    with replacing(file) as temporary:
        temporary.write_text("".join(csv_line(line) for line in (Row._fields, *rows)), encoding="utf-8")


def measure(
    settings: LikelihoodSettings,
    loaded: LoadedModel,
    path: SamplingPath,
    pixels: torch.Tensor,  # uint8 [N, C, R, R]
    device: torch.device,
) -> list[Row]:
    """The rows of some images; raises what `log_likelihood` raises."""
    seeds = noise_seeds(pixels, settings.seed)
    images = dequantised(pixels, seeds).to(device)
    # GPUs would round what convolutions of fp32 read to 10 bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast(device, settings.precision):
        scales = loaded.scheduler.representation.split(images) if path.num_scales > 1 else (images,)
        found = log_likelihood(
            loaded.denoise, loaded.scheduler, path, scales, settings.probes, seeds, settings.tolerance,
            settings.num_calls,
        )  # fmt: skip
    bits = bits_per_dim(found.log_likelihood, images[0].numel())
    prints = (fingerprint_array(image) for image in pixels.numpy())
    values = zip(bits.tolist(), found.log_likelihood.tolist(), found.nfe.tolist(), strict=True)
    return [
        Row(print_, round(b, 6), round(nats, 4), nfe) for print_, (b, nats, nfe) in zip(prints, values, strict=True)
    ]


def summary(rows: Sequence[Row], settings: LikelihoodSettings) -> str:
    """The mean over images with its standard error, and what it is a mean of."""
    bits = torch.tensor([row.bits_per_dim for row in rows], dtype=torch.float64)
    calls = sum(row.nfe for row in rows) / len(rows)
    error = f" +- {bits.std().item() / math.sqrt(len(rows)):.3f}" if len(rows) > 1 else ""
    said = f"{len(rows)} image{'s' if error else ''} of {settings.on}{', standard error over images' if error else ''}"
    probes = f"{settings.probes} probe{'s' if settings.probes > 1 else ''}"
    return (
        f"{bits.mean().item():.3f}{error} bits per dimension ({said}; {probes}, tolerance {settings.tolerance:g}, "
        f"{calls:.0f} calls)"
    )


def main() -> None:
    """Measure what is missing, and say the mean."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    path, kind = find_path(settings, loaded)
    pixels = evaluation_images(settings, loaded, settings.checkpoint, settings.on, settings.num_images)
    name = f"{Path(settings.checkpoint).stem}_{loaded.weights}_{settings.on}_{kind}_{path.nfe}"
    folder = Path(settings.output or loaded.results / "likelihood" / short_name(name))
    said = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        "dataset": settings.dataset or loaded.config["dataset"],
        "of": settings.on,
        "probes": settings.probes,
        "tolerance": settings.tolerance,
        "seed": settings.seed,
        "precision": resolve_precision(device, settings.precision),
    }
    file = folder / TABLE_FILE
    if file.exists() and not (folder / SETTINGS_FILE).exists() and not settings.force:
        raise ValueError(f"{file} does not say what made it; pass --force to replace it, or another --output.")
    # A table without settings, which it cannot be compared with, is replaced too.
    rows = read_table(file) if claim(folder, said, settings.force, (TABLE_FILE,)) else {}
    folder.mkdir(parents=True, exist_ok=True)  # What stands in its place is said before hours of work.

    prints = [fingerprint_array(image) for image in pixels.numpy()]
    # Equal images are one row.
    missing = list({print_: k for k, print_ in enumerate(prints) if print_ not in rows}.values())
    with Progress(total=len(missing), unit="img", desc="likelihood") as bar:
        for start in range(0, len(missing), settings.batch_size):
            batch = measure(settings, loaded, path, pixels[missing[start : start + settings.batch_size]], device)
            write_settings(folder, said)
            rows |= {row.fingerprint: row for row in batch}
            write_table(file, list(rows.values()))
            bar.update(len(batch))
    print(summary([rows[print_] for print_ in prints], settings))
    made = f"{len(missing)} new" if missing else "all there already"
    print(f"{file}: {made}; path {path.kind} {path.fingerprint()}, precision {said['precision']}")


if __name__ == "__main__":
    cli.run_stage(main)
