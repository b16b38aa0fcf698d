"""How well trained models denoise each band of an image, when all get the image with the same amount of noise.

    python experiments/band_errors.py baseline=FILE.pth residual=FILE.pth --ema --num_images 1000 \\
        --output results/errors

Every model is on the diagonal of the image, where its clocks are tied (λ_coarse = λ_fine, in the residual pair
λ_fine + log 4), at lines log 4 apart in the log SNR of the image. The error E‖x - x̂‖² is split into low band, the 2x2
mean, and details; the residual pair predicts them apart. A baseline and a residual pair are told the same there, an
over-complete pair a little more: its coarse scale adds a quarter to the SNR of the low band. Images are those held out
of training (--on held_out), noise is drawn for each model, and the ratios to the first model are of equal images.

Writes OUTPUT.csv (a row per model and line: errors of a whole image in units of x², with standard errors), and
OUTPUT.md: the first model's errors, and the ratio of the others to it.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import DataSettings, HardwareSettings, named
from data import to_float
from evaluation.results_table import write_csv
from images.representation import RESIDUAL
from planning.error_map import error_map, per_image
from runtime.device import autocast, resolve_precision, select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import REQUIRED, option, parse_settings

LINE_SPACING = math.log(4)  # in log SNR, so that the coarse line of a residual pair is the next one
BANDS = ("low", "detail")


@dataclass(frozen=True, kw_only=True)
class BandSettings(DataSettings, HardwareSettings):
    """Which models are compared, on which images and lines."""

    checkpoints: tuple[str, ...] = option(
        REQUIRED, "the first is what the others are compared with", flag="checkpoints", nargs="+", metavar="NAME=FILE"
    )
    ema: bool = option(False, "use the EMA weights")
    on: str = option("held_out", "images of the first checkpoint", choices=("held_out", "train"))
    num_images: int = option(256, "images averaged over", parse=cli.positive_int)
    noisiest: float = option(-12.0, "log SNR of the image on the first line", parse=float, shown="-12")
    lines: int = option(16, "number of lines", parse=cli.positive_int)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "choice of images, and noise", parse=cli.seed)
    output: str = option(REQUIRED, "name of the files without suffix")


def parse_args() -> BandSettings:
    """The settings of this study, from its flags."""
    return parse_settings(BandSettings, __doc__)


def band_errors(
    loaded: LoadedModel,
    images: torch.Tensor,  # [B, C, H, W], in [-1, 1]
    log_snr: np.ndarray,  # [L], of the image, rising by LINE_SPACING
    **options: Any,  # of `error_map`
) -> dict[str, torch.Tensor]:
    """E‖x - x̂‖² in either band of every image at the timesteps nearest to `log_snr`, float64 `[L, B]`, in units of x².

    Raises ValueError for lines that the schedule of the model does not reach.
    """
    schedule = loaded.scheduler.log_snr.cpu().numpy()  # [T], falling
    residual = loaded.scheduler.representation is RESIDUAL
    lines = np.append(log_snr, log_snr[-1] + LINE_SPACING) if residual else log_snr
    reach = schedule[np.isfinite(schedule)]
    if lines[0] < reach.min() or lines[-1] > reach.max():
        asked, there = (
            f"{least:.3g} to {most:.3g}" for least, most in ((lines[0], lines[-1]), (reach.min(), reach.max()))
        )
        raise ValueError(
            f"Lines of log SNR {asked} are not all on a schedule of {there}; change --noisiest or --lines."
        )
    timesteps = np.abs(schedule[:, None] - lines).argmin(0)
    rows = np.arange(len(lines))
    columns = np.minimum(rows + residual, len(lines) - 1)  # The last coarse line has no fine one, and is not read.
    cells = torch.zeros(len(lines), len(lines), dtype=torch.bool)
    cells[rows, columns] = True
    if loaded.model.num_scales > 1:
        options["cells"] = cells
    content = error_map(
        loaded.denoise,
        loaded.scheduler,
        images,
        timesteps.tolist(),
        maps="mse",
        num_predictions=loaded.model.num_predictions,
        num_scales=loaded.model.num_scales,
        **options,
    )

    def errors(name: str) -> torch.Tensor:
        return per_image(content, name)[rows, columns][: len(log_snr)].double()

    if residual:
        return {"low": 4 * errors("mse_32"), "detail": errors("mse_64")}
    low = errors("mse_64_low")
    return {"low": low, "detail": errors("mse_64") - low}


def ratio(errors: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """The ratio of two means over the same B images `[B]`, and its standard error to first order."""
    value = errors.mean() / reference.mean()
    spread = (errors - value * reference).std() / reference.mean() / math.sqrt(len(errors))
    return value.item(), spread.item()


def rows_of(log_snr: np.ndarray, models: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """A row per model and line: mean errors per band and together, with standard errors and ratios to the first."""
    first = with_image(next(iter(models.values())))
    rows = []
    for name, bands in models.items():
        for k, line in enumerate(log_snr):
            row = {"model": name, "log_snr": line.item(), "num_images": len(bands["low"][k])}
            for band, errors in with_image(bands).items():
                value, spread = ratio(errors[k], first[band][k])
                row |= {band: errors[k].mean().item(), f"{band}_se": _standard_error(errors[k])}
                row |= {f"{band}_ratio": value, f"{band}_ratio_se": spread}
            rows.append(row)
    return rows


def with_image(bands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The errors of the bands, and of the image, which is both."""
    return {name: bands[name] for name in BANDS} | {"image": bands["low"] + bands["detail"]}


def report(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown: the errors of the first model, and the ratio of every other one to it."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    by_model = {name: [row for row in rows if row["model"] == name] for name in names}
    lines = []
    for k, row in enumerate(by_model[names[0]]):
        line = {"λ of the image": f"{row['log_snr']:+.2f}"}
        line |= {f"{names[0]}, {band}": f"{row[band]:.4g}" for band in BANDS}
        for name in names[1:]:
            other = by_model[name][k]
            line |= {f"{name}, {b}": f"{other[f'{b}_ratio']:.3f} ± {other[f'{b}_ratio_se']:.3f}" for b in BANDS}
        lines.append(line)
    what = f"Error of {names[0]}, in units of x² of a whole image; of the others the ratio to it ± its standard error."
    return f"# {title}\n\n{what}\n\n{markdown_table(lines)}"


def _standard_error(values: torch.Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def main() -> None:
    """Measure the models, write the rows and the table."""
    settings = parse_args()
    device = select_device(settings.device)
    files = named(settings.checkpoints)
    loaded = {name: load_model(file, settings.ema, device) for name, file in files.items()}
    config = next(iter(loaded.values())).config
    for name, model in loaded.items():
        model.require_pixels("band_errors.py")
        if model.config["data_fingerprint"] != config["data_fingerprint"]:
            raise ValueError(f"{files[name]} was trained on other images than {next(iter(files.values()))}.")
    parts = cli.load_image_parts(settings, config)
    images = parts[settings.on == "held_out"]
    if images is None:
        raise ValueError(f"{next(iter(files.values()))} was trained on all its images; pass --on train.")
    if not 2 <= settings.num_images <= len(images):
        raise ValueError(f"--num_images is {settings.num_images} but must be 2 to {len(images)}, the images there are.")
    chosen = np.random.default_rng(settings.seed).choice(len(images), settings.num_images, replace=False)
    x = to_float(torch.from_numpy(images.pixels[np.sort(chosen)])).to(device)
    log_snr = settings.noisiest + LINE_SPACING * np.arange(settings.lines)
    options = {"seed": settings.seed, "batch_size": settings.batch_size}
    options["autocast"] = functools.partial(autocast, device, resolve_precision(device, settings.precision))
    rows = rows_of(log_snr, {name: band_errors(model, x, log_snr, **options) for name, model in loaded.items()})
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    write_csv(f"{settings.output}.csv", rows)
    shown = f"{'EMA' if settings.ema else 'raw'} weights, {settings.num_images} {settings.on.replace('_', '-')} images"
    print_report(report(rows, f"Denoising error by band, {shown}"), f"{settings.output}.md")


if __name__ == "__main__":
    cli.run_stage(main)
