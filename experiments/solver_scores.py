"""Scores of a trained network by solver, plan and number of calls.

    python experiments/solver_scores.py trained --checkpoint FILE --ema --trajectories FILE --heatmap FILE \\
        --dataset DATASET --name baseline --output results/solvers/scores

Sliced Wasserstein distance (SWD ×1000) of samples to as many training images, along the schedule of least KL with tied
clocks (`kl_diagonal`, which is planned for DDIM), and along those of least deviation for the solver, with tied clocks
and with two (`plan_path.py --criterion trajectory`). Image k of a seed starts from the same noise everywhere.

Adds rows of one model, by --name, to OUTPUT.csv, one after another, so that a study that is stopped goes on; draws all
that the table holds in OUTPUT.md and OUTPUT.png.
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from diffusion.solvers import make_solver, with_rule
from evaluation.pixel_metrics import SlicedWasserstein
from evaluation.results_table import write_csv
from figures.costs import plot_distance_against_nfe
from paths.path import Path
from planning.map_file import load_heatmap
from planning.map_paths import kl_refined
from planning.plan import PlanCriterionSettings
from planning.trajectory_file import load_trajectories
from planning.trajectory_plan import TrajectoryPlanner
from runtime.device import resolve_precision, select_device
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import REQUIRED, option, parse_command
from study import StudySettings, read_csv, score

KL, TIED, TWO_CLOCKS = "kl_diagonal", "trajectory, tied", "trajectory, two clocks"
PLANS = (KL, TIED, TWO_CLOCKS)
COLUMNS = ("model", "solver", "plan", "nfe", "seed", "num_images", "swd", "path", "weights")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(StudySettings, CheckpointSettings, DataSettings, HardwareSettings):
    """Which network is scored, how it is sampled, and on how many images."""

    trajectories: str = option(REQUIRED, "of the network")
    heatmap: str = option(REQUIRED, "of the network, with --maps mse")
    name: str = option(REQUIRED, "of the network in the table")
    nfe: tuple[int, ...] = option((4, 6, 8, 10, 18), "network calls", parse=cli.positive_int, nargs="+")
    solvers: tuple[str, ...] = option(tuple(with_rule()), choices=tuple(with_rule()), nargs="+")
    plans: tuple[str, ...] = option(PLANS, "two clocks of a model that has them", choices=PLANS, nargs="+")
    num_images: int = option(500, "per seed", parse=cli.positive_int)
    seeds: tuple[int, ...] = option((42, 43), parse=cli.seed, nargs="+")
    batch_size: int = option(100, parse=cli.positive_int)


def parse_args() -> ScoreSettings:
    """The settings of this study, from the flags of its one command."""
    _, settings = parse_command({"trained": (ScoreSettings, "scores of one network")}, __doc__)
    return settings


def planned(loaded: LoadedModel, settings: ScoreSettings) -> dict[tuple[str, str, int], Path]:
    """The path of each solver, plan and number of calls, where the network has such a plan."""
    trajectories, said = load_trajectories(settings.trajectories)
    heatmap = load_heatmap(settings.heatmap)
    if {said["fingerprint"], heatmap["fingerprint"]} != {loaded.fingerprint}:
        raise ValueError("The trajectories, the heatmap and the checkpoint must be of the same weights.")
    log_snr, paths = loaded.scheduler.log_snr.cpu().numpy(), {}
    families = {"optimal diagonal": TIED, "optimal": TWO_CLOCKS}
    for solver, nfe in itertools.product(settings.solvers, settings.nfe):
        if KL in settings.plans:
            path = kl_refined(heatmap, log_snr, nfe, diagonal=True).path
            points = [point[: loaded.model.num_scales] for point in path.points]
            paths[solver, KL, nfe] = Path(points, KL, path.provenance)
        options = PlanCriterionSettings(criterion="trajectory", solver=solver)
        for plan in TrajectoryPlanner(trajectories, said, options).families(nfe):
            if families.get(plan.family) in settings.plans:
                paths[solver, families[plan.family], nfe] = plan.path
    return paths


def measure(settings: ScoreSettings) -> list[dict[str, Any]]:
    """All rows of the table, with those of this network that were missing added one by one."""
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    file = FilePath(f"{settings.output}.csv")
    rows = read_csv(file) if file.exists() else []
    if any(row["model"] == settings.name and row["weights"] != loaded.fingerprint for row in rows):
        raise ValueError(f"{file} has rows of other weights by the name {settings.name}; pass another --name.")
    done = {(row["model"], row["solver"], row["path"], row["seed"], row["num_images"]): row["swd"] for row in rows}
    known = {tuple(row[name] for name in COLUMNS[:6]) for row in rows}
    paths = planned(loaded, settings)
    metric = SlicedWasserstein(
        cli.load_training_images(settings, loaded.config).pixels, settings.num_images, device=device
    )
    precision = resolve_precision(device, settings.precision)
    jobs = [(key, path, seed) for key, path in paths.items() for seed in settings.seeds]
    for (solver, plan, nfe), path, seed in Progress(jobs, unit="score"):
        row = dict(zip(COLUMNS, map(str, (settings.name, solver, plan, nfe, seed, settings.num_images)), strict=False))
        if tuple(row.values()) in known:
            continue
        same = (settings.name, solver, path.fingerprint(), str(seed), str(settings.num_images))
        if same not in done:
            options = (seed, settings.num_images, settings.batch_size, precision, metric, device)
            done[same] = f"{score(loaded, path, *options, make_solver(solver)):.4f}"
        rows.append(row | {"swd": done[same], "path": path.fingerprint(), "weights": loaded.fingerprint})
        write_csv(file, rows)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, dict[str, dict[int, float]]]]:
    """Markdown, and the means as curves of `plot_distance_against_nfe`."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["plan"], row["solver"], int(row["nfe"])), []).append(float(row["swd"]))
    calls = sorted({key[3] for key in groups})
    lines, panels = [], {}
    for model, plan, solver in dict.fromkeys(key[:3] for key in groups):
        values = {nfe: groups[model, plan, solver, nfe] for nfe in calls if (model, plan, solver, nfe) in groups}
        shown = {str(nfe): _text(values[nfe]) if nfe in values else "" for nfe in calls}
        lines.append({"model": model, "plan": plan, "solver": solver} | shown)
        means = {nfe: statistics.mean(each) for nfe, each in values.items()}
        panels.setdefault(model, {})[f"{solver}, {plan}"] = means
    seeds, images = (len({row[name] for row in rows}) for name in ("seed", "num_images"))
    count = rows[0]["num_images"] if images == 1 else "several numbers of"
    text = f"SWD ×1000 of {count} images by number of calls, mean ± deviation over {seeds} sampling seeds."
    return f"# Scores by solver\n\n{text}\n\n{markdown_table(lines)}", panels


def _text(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Score what is missing, then write the table and the figure."""
    settings = parse_args()
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    rows = measure(settings)
    text, panels = report(rows)
    print_report(text, f"{settings.output}.md")
    least = 0.8 * min(value for curves in panels.values() for curve in curves.values() for value in curve.values())
    plot_distance_against_nfe(panels, f"{settings.output}.png", "SWD by solver and plan", "SWD ×1000", least)


if __name__ == "__main__":
    cli.run_stage(main)
