"""What the order of a solver, a path in two dimensions and a representation are each worth, where the truth is known.

    python experiments/solver_paths.py gaussian --spectrum FILE.npz --output results/solvers/gaussian
    python experiments/solver_paths.py gaussian --output results/solvers/power_law     # no file: a power law

Exact squared Wasserstein distance W2² between Gaussian images and what each solver returns along the best path found
for it: with one clock on the image, and for both pairs with tied clocks and with two (as
`experiments/representations.py` does for DDIM). Beside it that of even steps of log SNR with one clock. All start from
pure noise, taken for --start in λ of the image, and end clean. No network, no sampling, no seeds.

Paths are local optima: above DDIM the distance has many, and where it falls below 0.01 a solver exploits its zeros more
than it follows the images. Writes OUTPUT.csv (a row per path, with its points), OUTPUT.md and OUTPUT.png.
"""

import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from diffusion.solvers import with_rule
from evaluation.results_table import write_csv
from figures.costs import plot_distance_against_nfe
from representations import KINDS, ONE_CLOCK, RepresentationSettings, points_text
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_command
from truth.gaussian import Spectrum
from truth.linear_sampler import solver_output, w2_squared
from truth.optimal_points import optimal_points

EVEN = "one clock, even λ"
CLEANEST = 10.0  # λ at which even steps end before the clean image.
COLUMNS = ("solver", "path", "nfe", "w2", "low", "detail", "points")


@dataclass(frozen=True, kw_only=True)
class SolverPathSettings(RepresentationSettings):
    """Which solvers, and how long a path is sought."""

    solvers: tuple[str, ...] = option(tuple(with_rule()), choices=tuple(with_rule()), nargs="+")
    iterations: int = option(150, "of each of three descents of the search", parse=cli.positive_int)


def parse_args() -> SolverPathSettings:
    """The settings of this study, from the flags of its one command."""
    _, settings = parse_command({"gaussian": (SolverPathSettings, "Gaussian images")}, __doc__)
    return settings


def row_of(spectrum: Spectrum, solver: str, kind: str, nfe: int, settings: SolverPathSettings) -> dict[str, Any]:
    """The best path of a kind for a solver, or the even one: W2² in units of x², and its parts by band."""
    representation = KINDS.get(kind, {}).get("representation", "overcomplete")
    if kind == EVEN:
        points = torch.linspace(settings.start, CLEANEST, nfe + 1, dtype=torch.float64)
        points[-1] = math.inf
    else:
        with warnings.catch_warnings(action="ignore"):  # Where the distance is nothing, nor is its slope to be trusted.
            points, _ = optimal_points(
                spectrum, nfe, "w2", settings.start, math.inf, **KINDS[kind], solver=solver,
                max_iterations=settings.iterations,
            )  # fmt: skip
    low, detail = w2_squared(spectrum, solver_output(spectrum, points, solver, representation), by_band=True)
    row = {"solver": solver, "path": kind, "nfe": nfe, "w2": (low + detail).item()}
    return row | {"low": low.item(), "detail": detail.item(), "points": points_text(points)}


def report(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown: W2² of every kind by solver, and the factors by which order, clocks and representation lower it."""
    value = {(row["solver"], row["path"], row["nfe"]): row["w2"] for row in rows}
    solvers, calls = (list(dict.fromkeys(row[name] for row in rows)) for name in ("solver", "nfe"))
    distances = [
        {"solver": solver, "calls": str(nfe)} | {kind: f"{value[solver, kind, nfe]:.3g}" for kind in (EVEN, *KINDS)}
        for solver in solvers
        for nfe in calls
    ]
    worth = []
    for solver in solvers:
        for nfe in calls:
            one = value[solver, ONE_CLOCK, nfe]
            worth.append(
                {
                    "solver": solver,
                    "calls": str(nfe),
                    "best steps over even ones": f"{value[solver, EVEN, nfe] / one:.3g}",
                    "order over ddim": f"{value[solvers[0], ONE_CLOCK, nfe] / one:.3g}",
                    "over-complete pair, second clock": _ratio(value, solver, "overcomplete", nfe),
                    "residual pair, second clock": _ratio(value, solver, "residual", nfe),
                    "residual over over-complete, 2-D": (
                        f"{value[solver, 'overcomplete, 2-D', nfe] / value[solver, 'residual, 2-D', nfe]:.3g}"
                    ),
                }
            )
    return "\n\n".join(
        [
            f"# {title}",
            f"W2² of the best path found:\n\n{markdown_table(distances)}",
            f"Factors by which W2² falls:\n\n{markdown_table(worth)}",
        ]
    )


def _ratio(value: dict[tuple, float], solver: str, pair: str, nfe: int) -> str:
    return f"{value[solver, f'{pair}, diagonal', nfe] / value[solver, f'{pair}, 2-D', nfe]:.3g}"


def main() -> None:
    """Find the best paths, write the rows, the tables and the figure."""
    settings = parse_args()
    spectrum = settings.variances()
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    jobs = [(solver, kind, nfe) for nfe in settings.nfe for solver in settings.solvers for kind in (EVEN, *KINDS)]
    rows = [row_of(spectrum, *job, settings) for job in Progress(jobs, unit="path")]
    write_csv(f"{settings.output}.csv", [{column: row[column] for column in COLUMNS} for row in rows])
    source = f"variances of {FilePath(settings.spectrum).name}" if settings.spectrum else "a power law"
    title = f"Solvers on Gaussian images, {source}, from λ = {settings.start:g}"
    print_report(report(rows, title), f"{settings.output}.md")
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        panels.setdefault(row["solver"], {}).setdefault(row["path"], {})[row["nfe"]] = row["w2"]
    plot_distance_against_nfe(panels, f"{settings.output}.png", title, "W2², units of x²")


if __name__ == "__main__":
    cli.run_stage(main)
