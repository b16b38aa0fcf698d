"""Draw the figures that need more than one file.

    python make_figures.py losses logs/baseline logs/lift_dual_timestep --output results/losses.png
    python make_figures.py paths results/samples/*/schedule.json --output results/paths.png
    python make_figures.py scores results/fid_results.csv --metric swd --output results/swd.png
    python make_figures.py samples "Baseline=results/samples/a" "LIFT=results/samples/b" --output results/rows.png

Heatmaps are drawn by compute_heatmap_30.py, one sampling trajectory by generate_with_path_30.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cli import positive_int, run_stage
from generate_with_path_30 import read_png
from path import load_schedule
from plots import plot_losses, plot_path_comparison, plot_samples, plot_scores
from results_table import COLUMN_TITLES, VALUE_FIELDS, aggregate, read_rows
from scheduler import SCHEDULE_NAMES, DDIMScheduler


def parse_args() -> argparse.Namespace:
    """The figure, its inputs and its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="figure", required=True)
    for name, inputs, text in (
        ("losses", "log folder, or NAME=FOLDER", "training loss against the step"),
        ("paths", "schedule file, or NAME=FILE", "paths beside each other"),
        ("scores", "results table", "a metric against the epoch, or beside each other for one epoch"),
        ("samples", "NAME=FOLDER of PNGs", "samples of equal seeds beside each other"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
        kind.add_argument("--output", required=True, help="PNG file")
        if name != "losses":
            kind.add_argument("--title", default="")
        if name == "scores":
            kind.add_argument("--metric", choices=VALUE_FIELDS, default="fid")
            kind.add_argument("--num_images", type=positive_int, help="only results over this many images")
            kind.add_argument("--nfe", type=positive_int, help="only results of this many network calls")
        if name == "paths":
            kind.add_argument("--beta_schedule", choices=SCHEDULE_NAMES, default="cosine_clipped")
        if name == "samples":
            kind.add_argument("--columns", type=positive_int, default=12, help="images per row (12)")
    return parser.parse_args()


def named(text: str) -> tuple[str, Path]:
    """Split NAME=FILE; without a name, the file's folder names it."""
    name, _, file = text.rpartition("=")
    return name or Path(file).parent.name, Path(file)


def read_log(folder: str) -> list[dict]:
    """The rows of `metrics.jsonl` in a log folder."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the log folder of a training run.")
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_samples(folder: Path, count: int) -> dict[str, np.ndarray]:
    """The first `count` images of a folder of generate_with_path_30.py, by file name (the seed)."""
    files = sorted(file for file in folder.glob("*.png") if file.stem.isdigit())[:count]
    if not files:
        raise FileNotFoundError(f"{folder} holds no generated images; make some with generate_with_path_30.py.")
    return {file.name: read_png(file).numpy() for file in files}


def draw_samples(args: argparse.Namespace) -> None:
    """Only seeds that every folder has are shown."""
    rows = {name: read_samples(folder, args.columns) for name, folder in map(named, args.inputs)}
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise ValueError("The folders share no seed; generate them with the same --seed.")
    stacks = {name: np.stack([row[file] for file in shared]) for name, row in rows.items()}
    plot_samples(stacks, args.output, args.title)


def draw_losses(args: argparse.Namespace) -> None:
    """One curve per log folder, under its own name, or NAME of NAME=FOLDER."""
    runs = {}
    for text in args.inputs:
        name, _, folder = text.rpartition("=")
        name = name or Path(folder).name
        if name in runs:
            raise ValueError(f"Two log folders are called '{name}'; give each a name as NAME=FOLDER.")
        runs[name] = read_log(folder)
    plot_losses(runs, args.output)


def draw_scores(args: argparse.Namespace) -> None:
    """Mean and deviation over seeds of the rows that the filters leave."""
    wanted = {name: str(value) for name in ("num_images", "nfe") if (value := getattr(args, name)) is not None}
    rows = [row for file in args.inputs for row in read_rows(file)]
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    plot_scores(aggregate(rows), args.metric, args.output, args.title, COLUMN_TITLES)


def main() -> None:
    """Draw one figure."""
    args = parse_args()
    if args.figure == "losses":
        draw_losses(args)
    elif args.figure == "paths":
        paths = {name: load_schedule(file) for name, file in map(named, args.inputs)}
        log_snr = DDIMScheduler(beta_schedule=args.beta_schedule, prediction_type="v").log_snr.numpy()
        plot_path_comparison(paths, log_snr, args.output, args.title)
    elif args.figure == "scores":
        draw_scores(args)
    else:
        draw_samples(args)
    print(args.output)


if __name__ == "__main__":
    run_stage(main)
