"""Draw the figures that need more than one file.

    python make_figures.py losses logs/baseline logs/lift_dual_timestep --output results/losses.png
    python make_figures.py paths results/samples/*/schedule.json --output results/paths.png
    python make_figures.py scores results/fid_results.csv --metric swd --output results/swd.png
    python make_figures.py nfe "EMA=results/fid_results.csv" --path_type diagonal kl --output results/nfe.png
    python make_figures.py paths_epochs results/heatmap_30_*ep*.pth --output results/paths_epochs.png
    python make_figures.py t_pairs independent same shift:2 heuristic:0.8 band:image,1 --output results/t_pairs.png
    python make_figures.py samples "Baseline=results/samples/a" "LIFT=results/samples/b" --output results/rows.png

One heatmap is drawn by compute_heatmap_30.py, one sampling trajectory by generate_with_path_30.py.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import checked, positive_int, run_stage
from data import read_png
from evaluation.result_layout import series_of
from evaluation.results_table import GROUP_FIELDS, VALUE_FIELDS, aggregate, read_rows
from figures.images import plot_samples
from figures.losses import plot_losses
from figures.paths import plot_path_comparison, plot_paths_across_epochs, plot_timestep_pairs
from figures.scores import METRIC_TITLES, check_comparable, plot_scores, plot_scores_against_nfe
from paths.path import Path as PathOfTimesteps
from paths.schedule_file import load_schedule
from planning.choice import PATH_SETTINGS, path_type
from planning.error_map import load_heatmap
from planning.regimes import TimestepPairs, default_regime, parse_regime, resolve_regime
from scheduler import SCHEDULE_NAMES, DDIMScheduler
from training.run_log import METRICS_FILE, read_metrics

STAGES_OF_A_RUN = 100  # At which the width of a band that changes is drawn from.


def parse_args() -> argparse.Namespace:
    """The figure, its inputs and its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="figure", required=True)
    for name, inputs, text in (
        ("losses", "log folder, or NAME=FOLDER", "training loss against the step"),
        ("paths", "schedule file, or NAME=FILE", "paths beside each other"),
        ("paths_epochs", "heatmap file", "published paths, epochs side by side"),
        ("scores", "results table", "a metric against the epoch, or beside each other for one epoch"),
        ("nfe", "results table, or NAME=FILE", "a metric against network calls, a panel for each table"),
        ("samples", "NAME=FOLDER of PNGs", "samples of equal seeds beside each other"),
        ("t_pairs", "regime as of train_lift.py --t_pairs", "pairs of timesteps that a training draws"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
        kind.add_argument("--output", required=True, help="PNG file")
        if name != "losses":
            kind.add_argument("--title", default="")
        if name in ("scores", "nfe"):
            kind.add_argument("--metric", choices=VALUE_FIELDS, default="fid")
        if name == "nfe":
            kind.add_argument("--path_type", nargs="+", type=path_type, help="only paths of these types")
            text = "of models that had a choice, only those trained on these pairs (--t_pairs)"
            kind.add_argument("--regime", nargs="+", type=checked(parse_regime), help=text)
            kind.add_argument("--hide_regime", action="store_true", help="name curves without these pairs")
        if name == "scores":
            kind.add_argument("--num_images", type=positive_int, help="only results over this many images")
            kind.add_argument("--nfe", type=positive_int, help="only results of this many network calls")
        if name == "t_pairs":
            kind.add_argument("--beta_schedule", choices=SCHEDULE_NAMES, default="cosine_clipped")
            kind.add_argument("--num_pairs", type=positive_int, default=200_000, help="draws of each (200000)")
        if name == "samples":
            kind.add_argument("--columns", type=positive_int, default=12, help="images per row (12)")
    return parser.parse_args()


def named(texts: list[str]) -> dict[str, Path]:
    """Split each NAME=FILE; without a name, the file's folder names it, and a folder names itself."""
    places = {}
    for text in texts:
        name, _, place = text.rpartition("=")
        name = name or (Path(place) if Path(place).is_dir() else Path(place).parent).name
        if name in places:
            raise ValueError(f"Two inputs are called '{name}'; give each a name of its own as NAME={place}.")
        places[name] = Path(place)
    return places


def draw_losses(args: argparse.Namespace) -> None:
    """One curve per log folder."""
    runs = {}
    for name, folder in named(args.inputs).items():
        file = folder / METRICS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give the log folder of a training run.")
        runs[name] = read_metrics(file)
    plot_losses(runs, args.output)


def draw_paths(args: argparse.Namespace) -> None:
    """Paths of one noise schedule, whose log SNR is on the second axis."""
    paths = {name: load_schedule(file) for name, file in named(args.inputs).items()}
    log_snr = log_snr_table({path.provenance.get("beta_schedule") for path in paths.values()})
    plot_path_comparison(paths, log_snr, args.output, args.title)


def log_snr_table(schedules: set[str | None]) -> np.ndarray:
    """Log SNR of every timestep of the one noise schedule that paths share."""
    if len(schedules) > 1 or None in schedules:
        known = ", ".join(sorted(str(name) for name in schedules))
        raise ValueError(f"These paths are of noise schedules {known}; draw one figure for each known one.")
    return DDIMScheduler(beta_schedule=schedules.pop(), prediction_type="v").log_snr.numpy()


def load_jacobians(file: Path) -> dict[str, Any]:
    """A heatmap file that holds Jacobian blocks."""
    content = load_heatmap(file)
    if "jacobian" not in content:
        raise ValueError(f"{file} holds denoising errors only, of which no published path is made.")
    return content


def draw_paths_epochs(args: argparse.Namespace) -> None:
    """Published paths of one rule, as each heatmap holds them."""
    contents, panels = [load_jacobians(Path(file)) for file in args.inputs], {}
    for file, content in zip(args.inputs, contents, strict=True):
        if "timesteps_64" not in content:
            raise ValueError(f"{file} holds no paths yet; run the compute_heatmap_30.py that made it again.")
    for name in PATH_SETTINGS:
        values = sorted({str(content[name]) for content in contents})
        if len(values) > 1:
            raise ValueError(f"These heatmaps hold paths of {name} {' and '.join(values)}; draw one figure for each.")
    for file, content in zip(args.inputs, contents, strict=True):
        key = content["epoch"], content["weights"]
        if key in panels:
            raise ValueError(f"{file} is a second heatmap of epoch {key[0]} with {key[1]} weights; pass one of each.")
        panels[key] = {
            f"DP-{name.title()}": PathOfTimesteps(content[f"timesteps_{name}"], f"dp_{name}", {})
            for name in ("64", "total")
            if f"timesteps_{name}" in content  # A model that predicts the fine scale alone has the first one.
        }
    log_snr = log_snr_table({content["beta_schedule"] for content in contents})
    plot_paths_across_epochs(panels, log_snr, args.output, args.title)


def read_samples(folder: Path, count: int) -> dict[str, np.ndarray]:
    """The first `count` images of a folder of generate_with_path_30.py, by file name (the seed)."""
    files = sorted(file for file in folder.glob("*.png") if file.stem.isdigit())[:count]
    if not files:
        raise FileNotFoundError(f"{folder} holds no generated images; make some with generate_with_path_30.py.")
    return {file.name: read_png(file).numpy() for file in files}


def draw_samples(args: argparse.Namespace) -> None:
    """Only seeds that every folder has are shown."""
    rows = {name: read_samples(folder, args.columns) for name, folder in named(args.inputs).items()}
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise ValueError("The folders share no seed; generate them with the same --seed.")
    stacks = {name: np.stack([row[file] for file in shared]) for name, row in rows.items()}
    plot_samples(stacks, args.output, args.title)


def draw_scores(args: argparse.Namespace) -> None:
    """Mean and deviation over seeds; of several evaluations of one point of a curve, the last one written counts."""
    wanted = {name: str(value) for name in ("num_images", "nfe") if (value := getattr(args, name)) is not None}
    rows = [row for file in args.inputs for row in read_rows(file)]
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def point(row: dict[str, str]) -> tuple[str, ...]:
        return (*series_of(row), *(row[name] for name in ("metric", "weights", "epoch")))

    def group(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in GROUP_FIELDS)

    last = {point(row): group(row) for row in rows}
    rows = [row for row in rows if group(row) == last[point(row)]]
    results = sorted(aggregate(rows), key=lambda result: series_of(result).rank)
    # A curve is a series, which the figure knows by two of its fields.
    named_rows = [result | {"model_type": series_of(result).title, "path_type": ""} for result in results]
    plot_scores(named_rows, args.metric, args.output, args.title)


def draw_against_nfe(args: argparse.Namespace) -> None:
    """Mean and deviation over seeds, one curve for each series of a table; settings of tables must agree."""
    panels: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}
    drawn = []
    regimes = None if args.regime is None else [str(parse_regime(text)) for text in args.regime]
    for name, file in named(args.inputs).items():
        rows = [row for row in read_rows(file) if args.path_type is None or row["path_type"] in args.path_type]
        if regimes is not None:
            rows = [r for r in rows if default_regime(r["model_type"]) != "independent" or r["regime"] in regimes]
        results = [result for result in aggregate(rows) if result[f"{args.metric}_mean"] is not None]
        if not results:
            raise ValueError(f"{file} holds no {args.metric} of what is asked for; score it with eval_fid_batch.py.")
        for result in sorted(results, key=lambda result: series_of(result).rank):
            series = series_of(result)
            title = series._replace(regime="").title if args.hide_regime else series.title
            points = panels.setdefault(name, {}).setdefault(title, {})
            if int(result["nfe"]) in points:
                raise ValueError(
                    f"{file} holds two results of {title} at {result['nfe']} calls, such as of two epochs, of raw and "
                    "EMA weights, or of two regimes that --hide_regime does not name; keep them in tables of their own."
                )
            points[int(result["nfe"])] = result[f"{args.metric}_mean"], result.get(f"{args.metric}_sd")
        drawn += results
    check_comparable(drawn, but=("nfe",))
    label = f"{METRIC_TITLES.get(args.metric, args.metric)}, {int(drawn[0]['num_images']):,} images"
    plot_scores_against_nfe(panels, args.output, args.title, label)


def draw_timestep_pairs(args: argparse.Namespace) -> None:
    """A histogram of each regime, of pairs as a training on that noise schedule draws them from start to end."""
    scheduler = DDIMScheduler(beta_schedule=args.beta_schedule, prediction_type="v")
    panels = {}
    for text in args.inputs:
        regime = parse_regime(text)
        if "path" in (regime.name, regime.around):
            regime = regime._replace(parameter=Path(regime.parameter).name)
        pairs = TimestepPairs(resolve_regime(text, "dual"), scheduler)
        generator = torch.Generator().manual_seed(0)
        parts = np.array_split(np.arange(args.num_pairs), STAGES_OF_A_RUN if regime.changes else 1)
        draws = [
            pairs.at(progress).draw(len(part), generator)
            for progress, part in zip(np.linspace(0, 1, len(parts)), parts, strict=True)
        ]
        panels[str(regime)] = tuple(torch.cat(clock) for clock in zip(*draws, strict=True))
    plot_timestep_pairs(panels, scheduler.num_train_timesteps, args.output, args.title)


def main() -> None:
    """Draw one figure."""
    args = parse_args()
    draw = {
        "losses": draw_losses,
        "paths": draw_paths,
        "paths_epochs": draw_paths_epochs,
        "scores": draw_scores,
        "nfe": draw_against_nfe,
        "samples": draw_samples,
        "t_pairs": draw_timestep_pairs,
    }
    draw[args.figure](args)
    print(args.output)


if __name__ == "__main__":
    run_stage(main)
