"""Make one page of all that was measured: scores, curves, error maps, paths, samples, settings, and every row.

    python report.py --results results/fid_results.csv --folder results --output results/report.html
    python report.py --run NAME

The page holds its pictures and needs neither a network nor other files. It takes from --folder what is there: error
maps (heatmap_*ep*.png beside their .pth), paths_*.png, samples_*ep_*.png and the grids of samples/*/. Every number in
its tables links to the rows of the results table it was made of. The same files give the same bytes.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path

from cli import file_of, positive_int, run_stage
from evaluation.report_content import gather
from evaluation.targets import TARGETS
from figures.page import LARGE_PAGE_MB, render
from runtime.runs import SCORES_FILE, places, run_name
from runtime.safe_write import replacing
from runtime.settings import Settings, option, parse_settings


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """What the page is made of."""

    run: str | None = option(None, "run whose results the page shows", parse=run_name, metavar="NAME")
    results: str | None = option(None, "results table (results/fid_results.csv, of a run with a name in its results)")
    folder: str | None = option(None, "where heatmaps, figures and samples lie (results, or those of the run)")
    output: str | None = option(None, "(report.html there)", parse=file_of(".html", ".htm"))
    title: str = option("LIFT: results")
    nfe: int | None = option(None, "network calls of the headline tables (those with most results)", parse=positive_int)

    targets: str | None = option(
        None, "set the scores against the targets of the DDPM report for this data set", choices=tuple(TARGETS)
    )

    def check(self) -> None:
        super().check()
        results = places(self.run).results
        usual = {"results": results / SCORES_FILE, "folder": results, "output": results / "report.html"}
        self._derive(**{name: str(place) for name, place in usual.items() if getattr(self, name) is None})


def parse_args() -> ReportSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(ReportSettings, __doc__)


def main() -> None:
    """Build the page and write it as a whole."""
    settings = parse_args()
    content = gather(Path(settings.results), Path(settings.folder), settings.title, settings.nfe, settings.targets)
    page = render(content).encode(errors="replace")
    with replacing(settings.output) as temporary:
        temporary.write_bytes(page)
    size = len(page) / 1e6
    print(f"{settings.output}, {size:.1f} MB{', mostly pictures' if size > LARGE_PAGE_MB else ''}")


if __name__ == "__main__":
    run_stage(main)
