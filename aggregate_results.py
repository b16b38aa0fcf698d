"""Mean and standard deviation over seeds of every result, as a CSV and a Markdown table.

    python aggregate_results.py --input results/fid_results.csv --output results/fid_table

Writes {output}.csv and {output}.md and prints the latter.
"""

import argparse

from cli import run_stage
from results_table import aggregate, read_rows, write_csv, write_markdown


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="results/fid_results.csv", help="(results/fid_results.csv)")
    parser.add_argument("--output", default="results/fid_table", help="file name without suffix (results/fid_table)")
    return parser.parse_args()


def main() -> None:
    """Aggregate, write, print."""
    args = parse_args()
    rows = read_rows(args.input)
    if not rows:
        raise ValueError(f"{args.input} holds no result; evaluate a checkpoint first with eval_fid_batch.py.")
    results = aggregate(rows)
    write_csv(f"{args.output}.csv", results)
    write_markdown(f"{args.output}.md", results)
    with open(f"{args.output}.md", encoding="utf-8") as table:
        print(table.read())


if __name__ == "__main__":
    run_stage(main)
