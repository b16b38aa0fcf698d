"""What an orthogonal pair of scales can win, where the truth is known: best paths of every representation.

    python experiments/representations.py gaussian --spectrum FILE.npz --output results/representation/gaussian
    python experiments/representations.py gaussian --output results/representation/power_law     # no file: a power law

Exact squared Wasserstein distance W2² between Gaussian images and what DDIM returns, split into low and detail band,
along the path that makes it least: of the baseline's one clock on the image; of the over-complete and the residual pair
on the diagonal of the image (isotropic noise: λ_coarse = λ_fine, and λ_coarse = λ_fine + log 4); and of both with two
clocks, which in the residual pair is a schedule of its own for every band. All start from pure noise, taken for --start
in λ of the image, and end clean. No network, no sampling, no seeds.

Writes OUTPUT.csv (a row per path, with its points), and OUTPUT.md: the distances, and how far the coarse scale is ahead
of the diagonal of the image.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from evaluation.results_table import write_csv
from images.representation import REPRESENTATIONS
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_command
from study import GaussianSettings
from truth.gaussian import Spectrum
from truth.linear_sampler import ddim_output, w2_squared
from truth.optimal_points import optimal_points

ONE_CLOCK = "one clock"
KINDS = {
    ONE_CLOCK: dict(single_scale=True),
    "overcomplete, diagonal": dict(diagonal=True),
    "overcomplete, 2-D": {},
    "residual, diagonal": dict(diagonal=True, representation="residual"),
    "residual, 2-D": dict(representation="residual"),
}
COLUMNS = ("path", "nfe", "w2", "low", "detail", "lead_mean", "lead_min", "lead_max", "points")


@dataclass(frozen=True, kw_only=True)
class RepresentationSettings(GaussianSettings):
    """How many network calls the paths have, and where they start."""

    nfe: tuple[int, ...] = option((4, 6, 8, 10, 18, 36), parse=cli.positive_int, nargs="+")
    start: float = option(-10.0, "log SNR of the image at the first point", parse=float, shown="-10")


def parse_args() -> RepresentationSettings:
    """The settings of this study, from the flags of its one command."""
    _, settings = parse_command({"gaussian": (RepresentationSettings, "Gaussian images")}, __doc__)
    return settings


def row_of(spectrum: Spectrum, kind: str, nfe: int, start: float) -> dict[str, Any]:
    """The best path of a kind: W2² in units of x², the lead of the coarse scale over the image at the inner points."""
    options = KINDS[kind]
    representation = options.get("representation", "overcomplete")
    points, value = optimal_points(spectrum, nfe, "w2", start, math.inf, **options)
    low, detail = (v.item() for v in w2_squared(spectrum, ddim_output(spectrum, points, representation), by_band=True))
    row = {"path": kind, "nfe": nfe, "w2": value, "low": low, "detail": detail}
    inner = points[1:-1]
    if kind != ONE_CLOCK and len(inner):
        lead = inner[:, 1] - inner[:, 0] - REPRESENTATIONS[representation].image_lead
        row |= {"lead_mean": lead.mean().item(), "lead_min": lead.min().item(), "lead_max": lead.max().item()}
    return row | {"points": points_text(points)}


def points_text(points: torch.Tensor) -> str:
    """Log SNRs `[N + 1, 2]` or `[N + 1]` as a cell of a table: points by spaces, scales by slashes."""
    return " ".join("/".join(f"{v:.4f}" for v in point) for point in points.reshape(len(points), -1).tolist())


def report(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown: W2² by band of every kind, what separate schedules win, and where they put the coarse scale."""
    by_key = {(row["path"], row["nfe"]): row for row in rows}
    distances, leads = [], []
    for nfe in sorted({row["nfe"] for row in rows}):
        paths = {kind: by_key[kind, nfe] for kind in KINDS}
        texts = {k: f"{r['w2']:.4g} ({r['low']:.4g} + {r['detail']:.4g})" for k, r in paths.items()}
        level, own = paths["residual, diagonal"], paths["residual, 2-D"]
        ratios = {f"{band} error, diagonal / 2-D": f"{level[band] / own[band]:.2f}" for band in ("low", "detail")}
        distances.append({"NFE": str(nfe), **texts, **ratios})
        moving = ((k, r) for k, r in paths.items() if k.endswith("2-D"))
        leads.append({"NFE": str(nfe), **{k: _lead(r) for k, r in moving}})
    parts = [
        f"# {title}",
        f"W2² (low band + details) of the best path:\n\n{markdown_table(distances)}",
        "Lead of the coarse scale over the diagonal of the image, λ_coarse - λ_fine less 0 (over-complete) or "
        f"log 4 (residual), mean (least to largest) over the inner points:\n\n{markdown_table(leads)}",
    ]
    return "\n\n".join(parts)


def _lead(row: dict[str, Any]) -> str:
    if "lead_mean" not in row:
        return "–"  # A single step has no inner points.
    return f"{row['lead_mean']:+.2f} ({row['lead_min']:+.2f} to {row['lead_max']:+.2f})"


def main() -> None:
    """Find the best paths, write the rows and the table."""
    settings = parse_args()
    if not math.isfinite(settings.start):
        raise ValueError(f"--start is {settings.start} but must be a finite log SNR, such as -10.")
    spectrum = settings.variances()
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, nfe) for nfe in settings.nfe for kind in KINDS]
    rows = [row_of(spectrum, kind, nfe, settings.start) for kind, nfe in Progress(jobs, unit="path")]
    write_csv(f"{settings.output}.csv", [{column: row.get(column) for column in COLUMNS} for row in rows])
    source = f"variances of {FilePath(settings.spectrum).name}" if settings.spectrum else "a power law"
    text = report(rows, f"Best paths of DDIM on Gaussian images, {source}, from λ = {settings.start:g}")
    print_report(text, f"{settings.output}.md")


if __name__ == "__main__":
    cli.run_stage(main)
