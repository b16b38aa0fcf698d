"""Make one page of all that was measured: scores, curves, error maps, paths, samples, settings, and every row.

    python report.py --results results/fid_results.csv --folder results --output results/report.html

The page holds its pictures and needs neither a network nor other files. It takes from --folder what is there: error
maps (heatmap_*ep*.png beside their .pth), paths_*.png, samples_*ep_*.png and samples/*/grid.png. Every number in its
tables links to the rows of the results table it was made of. The same files give the same bytes.
"""

import argparse
from pathlib import Path

from cli import positive_int, run_stage
from evaluation.report_content import gather
from figures.page import LARGE_PAGE_MB, render
from runtime.safe_write import replacing


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", default="results/fid_results.csv", help="results table (results/fid_results.csv)")
    add("--folder", default="results", help="where heatmaps, figures and samples lie (results)")
    add("--output", default="results/report.html", help="(results/report.html)")
    add("--title", default="LIFT: results", help="(LIFT: results)")
    add("--nfe", type=positive_int, help="network calls of the headline tables (those with most results)")
    return parser.parse_args()


def main() -> None:
    """Build the page and write it as a whole."""
    args = parse_args()
    page = render(gather(Path(args.results), Path(args.folder), args.title, args.nfe)).encode()
    with replacing(args.output) as temporary:
        temporary.write_bytes(page)
    size = len(page) / 1e6
    print(f"{args.output}, {size:.1f} MB{', mostly pictures' if size > LARGE_PAGE_MB else ''}")


if __name__ == "__main__":
    run_stage(main)
