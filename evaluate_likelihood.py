"""Log-likelihoods of images under a trained model, exactly or as a bound, in bits per dimension.

    python evaluate_likelihood.py --checkpoint checkpoints/baseline_400ep.pth --ema --num_images 64
    python evaluate_likelihood.py --run mine --ema --on train --probes 4 --tolerance 1e-5
    python evaluate_likelihood.py --run residual --model_type dual --path_type kl --num_steps 10
    python evaluate_likelihood.py --run mine --ema --method elbo --variance beta --timesteps 100

The probability-flow equation takes each image to noise and adds up how volumes change on the way (arXiv 2011.13456,
eq. 39), by Hutchinson's trace of --probes random directions; grey levels are spread evenly over their width. Path:
the diagonal in one step, which leaves all steps to the tolerance; of the residual pair with two clocks that of the
image, in ten, between which timesteps are straight lines.

With --method elbo in its place the variational bound of the chain of DDPM on the points of the path, by default all
timesteps (arXiv 2006.11239, eq. 5), of the probability of the grey levels; of its steps --timesteps are drawn.

Images are those kept out of training (`--holdout N` there), or with --on train those of the training. Writes into
--output `likelihood.csv`, one row per image, by the fingerprint of its pixels, and `settings.json`, what made them.
What is there already is not computed again.
"""

import runtime.startup  # noqa: F401

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import fingerprint_array
from diffusion.adaptive import MOST_CALLS, TOLERANCE, check_tolerance
from diffusion.elbo import Chain, bits_of_grey_levels, check_timesteps, ddpm_chain, elbo
from diffusion.likelihood import bits_per_dim, dequantised, log_likelihood, why_undefined
from diffusion.solvers import LEARNED, VARIANCES
from diffusion.super_resolution import noise_seeds
from evaluation.given_images import evaluation_images
from evaluation.table_file import csv_line
from image_folder import SETTINGS_FILE, claim, write_settings
from paths.path import Path as SamplingPath
from planning.usual_path import TWO_CLOCK_STEPS, OpenPathSettings, usual_path
from runtime.device import PRECISIONS, exact_autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import replacing, short_name
from runtime.settings import Settings, option, parse_settings

METHODS = ("ode", "elbo")
ALL, DRAWN_TIMESTEPS = "all", 100
TABLE_FILE = "likelihood.csv"


class Row(NamedTuple):
    """The result of one image by the equation, as a row of the table."""

    fingerprint: str  # of its pixels
    bits_per_dim: float
    log_likelihood: float  # nats, of pixels in [-1, 1]
    nfe: int


class BoundRow(NamedTuple):
    """The bound of one image, as a row of the table."""

    fingerprint: str  # of its pixels
    bits_per_dim: float  # the bound; the rest of such columns are parts of it
    bits_error: float  # standard error by what was drawn for this image, rather too large
    bits_prior: float
    bits_last: float  # of the step to the grey levels
    elbo: float  # nats, of the probability of the grey levels
    nfe: int


def timesteps_drawn(text: str) -> int | str:
    """Parse `all` or a number of timesteps of at least 2, of which an error can be estimated."""
    if text == ALL:
        return text
    if (count := cli.positive_int(text)) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is too few; choose 2 or more, or {ALL}")
    return count


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    """By what a likelihood is found.

    Raises ValueError for a setting that belongs to another method.
    """

    group = "method"
    method: str = option(
        "ode",
        "the probability-flow equation, exactly, or the bound of the chain of DDPM",
        choices=METHODS,
    )
    tolerance: float | None = option(
        None,
        "of ode: relative and absolute error of a step, of the image and of the divergence in nats per dimension "
        f"({TOLERANCE:g})",
        parse=cli.positive_float,
    )
    num_calls: int | None = option(
        None, f"of ode: the most network calls for an image ({MOST_CALLS})", parse=cli.positive_int, metavar="N"
    )
    probes: int | None = option(
        None, "of ode: random directions for the trace, each a backward pass per call (1)", parse=cli.positive_int
    )
    variance: str | None = option(None, f"of elbo: of the steps of the chain ({VARIANCES[0]})", choices=VARIANCES)
    timesteps: int | str | None = option(
        None,
        f"of elbo: steps of the chain that are drawn for each image, or {ALL} ({DRAWN_TIMESTEPS}, or {ALL} of fewer)",
        parse=timesteps_drawn,
        metavar=f"K|{ALL}",
    )

    def check(self) -> None:
        super().check()
        usual = {
            "ode": {"tolerance": TOLERANCE, "num_calls": MOST_CALLS, "probes": 1},
            "elbo": {"variance": VARIANCES[0], "timesteps": None},
        }
        for method, values in usual.items():
            for name, value in values.items():
                if method != self.method and getattr(self, name) is not None:
                    raise ValueError(f"--{name} belongs to --method {method}, not to {self.method}; leave it out.")
                if method == self.method and getattr(self, name) is None:
                    self._derive(**{name: value})
        if self.tolerance is not None:
            check_tolerance(self.tolerance)


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(CheckpointSettings, MethodSettings, OpenPathSettings, DataSettings, HardwareSettings):
    """Of which images the likelihood is wanted, and how exactly."""

    num_steps: int | None = option(
        None,
        f"steps of the path, each solved to --tolerance (1; of the residual pair with two clocks {TWO_CLOCK_STEPS}); "
        "of elbo those of the chain (all timesteps)",
        parse=cli.positive_int,
    )
    on: str = option("holdout", "images", choices=("holdout", "train"))
    num_images: int = option(64, "evenly over those there are", parse=cli.positive_int, metavar="N")
    seed: int = option(42, "what is random for an image depends on this and its pixels", parse=cli.seed)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    precision: str = option("fp32", "not auto, as steps would follow the rounding of bf16", choices=PRECISIONS)
    output: str | None = option(
        None,
        "folder (likelihood/{checkpoint}_{weights}_{on}_{path}_{steps} in the run's results; of elbo with "
        "_elbo_{variance}_{timesteps})",
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
    if settings.method == "elbo":
        if settings.variance == LEARNED:
            loaded.check_variance()
        settings = settings.but(num_steps=settings.num_steps or loaded.scheduler.num_train_timesteps - 1)
    return usual_path(settings, loaded)


def read_table(file: Path, kind: type[Row] | type[BoundRow]) -> dict[str, Row | BoundRow]:
    """The rows of a table by fingerprint; none where there is no file. Raises ValueError for a damaged one."""
    if not file.exists():
        return {}
    try:
        header, *lines = csv.reader(file.read_text(encoding="utf-8").splitlines())
        if tuple(header) != kind._fields:
            raise ValueError("another header")
        rows = [kind(print_, *map(float, values), int(nfe)) for print_, *values, nfe in lines]
    except (ValueError, TypeError) as error:  # Of another type for too few or too many cells.
        raise ValueError(f"{file} is damaged ({error}); remove it, or pass another --output.") from error
    return {row.fingerprint: row for row in rows}


def write_table(file: Path, rows: Sequence[Row] | Sequence[BoundRow]) -> None:
    """Replace a table by these rows, one or more of one kind."""
    with replacing(file) as temporary:
        temporary.write_text("".join(csv_line(line) for line in (rows[0]._fields, *rows)), encoding="utf-8")


def measure(
    settings: LikelihoodSettings,
    loaded: LoadedModel,
    path: SamplingPath,
    pixels: torch.Tensor,  # uint8 [N, C, R, R]
    device: torch.device,
) -> list[Row]:
    """The rows of some images by the equation; raises what `log_likelihood` raises."""
    seeds = noise_seeds(pixels, settings.seed)
    images = dequantised(pixels, seeds).to(device)
    with exact_autocast(device, settings.precision):
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


def measure_bound(
    settings: LikelihoodSettings,
    loaded: LoadedModel,
    chain: Chain,
    pixels: torch.Tensor,  # uint8 [N, C, R, R]
    device: torch.device,
) -> list[BoundRow]:
    """The rows of some images by the bound; raises what `elbo` raises."""
    with exact_autocast(device, settings.precision):
        found = elbo(
            loaded.denoise_with_variance, loaded.scheduler, chain, pixels.to(device), drawn_timesteps(settings, chain),
            noise_seeds(pixels, settings.seed),
        )  # fmt: skip
    dims = pixels[0].numel()
    parts = (-found.elbo, found.error, found.prior, found.last)
    bits = torch.stack([bits_of_grey_levels(-part, dims) for part in parts], 1).tolist()
    return [
        BoundRow(fingerprint_array(image), *(round(b, 6) for b in row), round(nats, 4), nfe)
        for image, row, nats, nfe in zip(pixels.numpy(), bits, found.elbo.tolist(), found.nfe.tolist(), strict=True)
    ]


def drawn_timesteps(settings: LikelihoodSettings, chain: Chain) -> int | None:
    """How many steps of a chain are drawn for each image, None for all; raises ValueError for more than there are."""
    if settings.timesteps == ALL:
        return None
    if settings.timesteps is None:
        return DRAWN_TIMESTEPS if DRAWN_TIMESTEPS < len(chain.ratios) else None
    check_timesteps(settings.timesteps, chain)
    return settings.timesteps


def summary(rows: Sequence[Row] | Sequence[BoundRow], settings: LikelihoodSettings, how: str) -> str:
    """The mean over images with its standard error, what it is a mean of, and how it was found."""
    bits = torch.tensor([row.bits_per_dim for row in rows], dtype=torch.float64)
    calls = sum(row.nfe for row in rows) / len(rows)
    error = f" +- {bits.std().item() / math.sqrt(len(rows)):.3f}" if len(rows) > 1 else ""
    said = f"{len(rows)} image{'s' if error else ''} of {settings.on}{', standard error over images' if error else ''}"
    bound = isinstance(rows[0], BoundRow)
    if bound:
        drawn = math.sqrt(sum(row.bits_error**2 for row in rows)) / len(rows)
        said += f", at most {drawn:.3f} by draws"  # Few timesteps overstate it, even beyond the whole error.
    at_most = " at most" if bound else ""
    return f"{bits.mean().item():.3f}{error} bits per dimension{at_most} ({said}; {how}, {calls:.0f} calls)"


def main() -> None:
    """Measure what is missing, and say the mean."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_pixels("evaluate_likelihood.py")
    loaded.require_means("evaluate_likelihood.py")
    path, kind = find_path(settings, loaded)
    pixels = evaluation_images(settings, loaded, settings.checkpoint, settings.on, settings.num_images)
    name = f"{Path(settings.checkpoint).stem}_{loaded.weights}_{settings.on}_{kind}_{path.nfe}"
    said = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        "dataset": settings.dataset or loaded.config["dataset"],
        "of": settings.on,
        "seed": settings.seed,
        "precision": resolve_precision(device, settings.precision),
    }
    if settings.method == "elbo":
        chain = ddpm_chain(loaded.scheduler, path, settings.variance)
        drawn, steps = drawn_timesteps(settings, chain), len(chain.ratios)
        find, kind_of_row = partial(measure_bound, settings, loaded, chain), BoundRow
        name += f"_elbo_{settings.variance}_{drawn or ALL}"
        said |= {"method": "elbo", "variance": settings.variance, "timesteps": drawn or ALL}
        how = f"elbo, variance {settings.variance}, {drawn or ALL} of {steps} step{'s' if steps > 1 else ''}"
    else:
        find, kind_of_row = partial(measure, settings, loaded, path), Row
        said |= {"probes": settings.probes, "tolerance": settings.tolerance}
        how = f"{settings.probes} probe{'s' if settings.probes > 1 else ''}, tolerance {settings.tolerance:g}"
    folder = Path(settings.output or loaded.results / "likelihood" / short_name(name))
    file = folder / TABLE_FILE
    if file.exists() and not (folder / SETTINGS_FILE).exists() and not settings.force:
        raise ValueError(f"{file} does not say what made it; pass --force to replace it, or another --output.")
    # A table without settings, which it cannot be compared with, is replaced too.
    rows = read_table(file, kind_of_row) if claim(folder, said, settings.force, (TABLE_FILE,)) else {}
    folder.mkdir(parents=True, exist_ok=True)  # What stands in its place is said before hours of work.

    prints = [fingerprint_array(image) for image in pixels.numpy()]
    # Equal images are one row.
    missing = list({print_: k for k, print_ in enumerate(prints) if print_ not in rows}.values())
    with Progress(total=len(missing), unit="img", desc="likelihood") as bar:
        for start in range(0, len(missing), settings.batch_size):
            batch = find(pixels[missing[start : start + settings.batch_size]], device)
            write_settings(folder, said)
            rows |= {row.fingerprint: row for row in batch}
            write_table(file, list(rows.values()))
            bar.update(len(batch))
    print(summary([rows[print_] for print_ in prints], settings, how))
    made = f"{len(missing)} new" if missing else "all there already"
    print(f"{file}: {made}; path {path.kind} {path.fingerprint()}, precision {said['precision']}")


if __name__ == "__main__":
    cli.run_stage(main)
