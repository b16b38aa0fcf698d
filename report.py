"""Make one page of all that was measured: scores, curves, error maps, paths, samples, settings, and every row.

    python report.py --results results/fid_results.csv --folder results --output results/report.html

The page holds its pictures and needs neither a network nor other files. It takes from --folder what is there: error
maps (heatmap_*ep*.png beside their .pth), paths_*.png, samples_*ep_*.png and samples/*/grid.png. Every number in its
tables links to the rows of the results table it was made of. The same files give the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from cli import positive_int, run_stage
from evaluation.report_content import gather
from figures.page import LARGE_PAGE_MB, render
from runtime.safe_write import replacing
from runtime.settings import Settings, option, parse_settings


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """What the page is made of."""

    results: str = option("results/fid_results.csv", "results table")
    folder: str = option("results", "where heatmaps, figures and samples lie")
    output: str = option("results/report.html")
    title: str = option("LIFT: results")
    nfe: int | None = option(None, "network calls of the headline tables (those with most results)", parse=positive_int)


def parse_args() -> ReportSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(ReportSettings, __doc__)


def main() -> None:
    """Build the page and write it as a whole."""
    settings = parse_args()
    page = render(gather(Path(settings.results), Path(settings.folder), settings.title, settings.nfe)).encode()
    with replacing(settings.output) as temporary:
        temporary.write_bytes(page)
    size = len(page) / 1e6
    print(f"{settings.output}, {size:.1f} MB{', mostly pictures' if size > LARGE_PAGE_MB else ''}")


if __name__ == "__main__":
    run_stage(main)
