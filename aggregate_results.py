"""Mean and standard deviation over seeds of every result, and the tables of the published study made of them.

    python aggregate_results.py --input results/fid_results.csv --output results/fid_table
    python aggregate_results.py --input host_a/fid_results.csv host_b/fid_results.csv --metric fid kid

Writes {output}.csv (one line per checkpoint, path and setting) and the tables as {output}.md, {output}.tex and
{output}_tables.csv, and prints {output}.md. Published numbers stand beside measured ones of the same kind.
"""

import argparse
from pathlib import Path

from cli import run_stage
from evaluation.result_layout import layout_tables, render_markdown, write_tables
from evaluation.results_table import METRICS, aggregate, read_rows, write_csv


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", default=["results/fid_results.csv"], help="results tables (results/fid_results.csv)")
    add("--output", default="results/fid_table", help="file name without suffix (results/fid_table)")
    add("--metric", nargs="+", choices=METRICS, default=METRICS, help="only these (all that were measured)")
    return parser.parse_args()


def main() -> None:
    """Aggregate, write, print."""
    args = parse_args()
    if Path(f"{args.output}.csv").resolve() in [Path(file).resolve() for file in args.input]:
        raise ValueError(f"--output {args.output} would overwrite the results in {args.output}.csv; name another file.")
    rows = []
    for file in args.input:
        found = read_rows(file)
        if not found:
            raise ValueError(f"{file} holds no result; evaluate a checkpoint first with eval_fid_batch.py.")
        rows += found
    rows = [row for row in rows if row["metric"] in args.metric]
    if not rows:
        raise ValueError(f"{' and '.join(args.input)} hold no result of --metric {' '.join(args.metric)}.")
    tables = layout_tables(rows)
    write_csv(f"{args.output}.csv", aggregate(rows))
    for suffix in (".md", ".tex", "_tables.csv"):
        write_tables(f"{args.output}{suffix}", tables)
    print(render_markdown(tables))


if __name__ == "__main__":
    run_stage(main)
