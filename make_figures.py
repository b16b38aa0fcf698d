"""Draw the figures that need more than one file.

    python make_figures.py losses logs/baseline logs/lift_dual_timestep --output results/losses.png
    python make_figures.py paths results/samples/*/schedule.json --output results/paths.png
    python make_figures.py scores results/fid_results.csv --metric swd --output results/swd.png
    python make_figures.py nfe "EMA=results/fid_results.csv" --path_type diagonal kl --output results/nfe.png
    python make_figures.py guidance results/fid_results.csv --output results/guidance.png
    python make_figures.py students Progressive=results/p/fid_results.csv Reflow=results/r/fid_results.csv --output FILE
    python make_figures.py paths_epochs results/heatmap_30_*ep*.pth --output results/paths_epochs.png
    python make_figures.py t_pairs independent same shift:2 heuristic:0.8 band:image,1 --output results/t_pairs.png
    python make_figures.py samples "Baseline=results/samples/a" "LIFT=results/samples/b" --output results/rows.png
    python make_figures.py overview results/samples/b --output results/overview.png

One heatmap is drawn by compute_heatmap_30.py, one sampling trajectory by generate_with_path_30.py.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import checked, file_of, named, positive_int, run_stage
from data import read_png
from evaluation.results_table import VALUE_FIELDS, read_rows
from evaluation.series import guided_results, named_results
from figures.guidance import plot_guidance
from figures.images import plot_samples
from figures.losses import plot_losses
from figures.paths import plot_path_and_samples, plot_path_comparison, plot_paths_across_epochs, plot_timestep_pairs
from figures.scores import METRIC_TITLES, check_comparable, plot_scores, plot_scores_against_nfe
from figures.students import StudentScore, plot_students
from paths.path import Path as PathOfTimesteps
from paths.schedule_file import load_schedule
from planning.heatmap import PATH_SETTINGS
from planning.map_file import load_heatmap
from planning.path_types import path_type
from planning.regimes import TimestepPairs, default_regime, parse_regime, resolve_regime
from runtime.errors import need_file
from runtime.settings import REQUIRED, Settings, option, parse_command
from scheduler import ALL_SCHEDULES, DDIMScheduler
from training.run_log import METRICS_FILE, read_metrics

DISTANCES = ("fid", "fd", "fid_infinity", "kid", "swd")
STAGES_OF_A_RUN = 100  # At which the width of a band that changes is drawn from.


def _inputs(what: str) -> tuple[str, ...]:
    return option(REQUIRED, what, flag="inputs", nargs="+", metavar="INPUT")


@dataclass(frozen=True, kw_only=True)
class FigureSettings(Settings):
    """What is drawn, and where it goes."""

    inputs: tuple[str, ...] = _inputs("what is drawn")
    output: str = option(REQUIRED, "PNG file", parse=file_of(".png"))


@dataclass(frozen=True, kw_only=True)
class TitledSettings(FigureSettings):
    """A figure with a title."""

    title: str = option("")


@dataclass(frozen=True, kw_only=True)
class LossesSettings(FigureSettings):
    """Curves of training."""

    inputs: tuple[str, ...] = _inputs("log folder, or NAME=FOLDER")


@dataclass(frozen=True, kw_only=True)
class PathsSettings(TitledSettings):
    """Paths beside each other."""

    inputs: tuple[str, ...] = _inputs("schedule file, or NAME=FILE")


@dataclass(frozen=True, kw_only=True)
class PathsOfEpochsSettings(TitledSettings):
    """Published paths, epochs side by side."""

    inputs: tuple[str, ...] = _inputs("heatmap file")


@dataclass(frozen=True, kw_only=True)
class ScoresSettings(TitledSettings):
    """A metric by epoch."""

    inputs: tuple[str, ...] = _inputs("results table")
    metric: str = option("fid", choices=VALUE_FIELDS)
    num_images: int | None = option(None, "only results over this many images", parse=positive_int)
    nfe: int | None = option(None, "only results of this many network calls", parse=positive_int)


@dataclass(frozen=True, kw_only=True)
class AgainstCallsSettings(TitledSettings):
    """A metric by number of calls."""

    inputs: tuple[str, ...] = _inputs("results table, or NAME=FILE")
    metric: str = option("fid", choices=VALUE_FIELDS)
    path_type: tuple[str, ...] | None = option(None, "only paths of these types", parse=path_type, nargs="+")
    regime: tuple[str, ...] | None = option(
        None,
        "of models that had a choice, only those trained on these pairs (--t_pairs)",
        parse=checked(parse_regime),
        nargs="+",
    )
    hide_regime: bool = option(False, "name curves without these pairs")


@dataclass(frozen=True, kw_only=True)
class StudentsFigureSettings(TitledSettings):
    """A metric of students by their calls and their cost."""

    inputs: tuple[str, ...] = _inputs("NAME=FILE, a results table for each curve")
    metric: str = option("fid", choices=VALUE_FIELDS)
    weights: str | None = option(None, "only results of these weights", choices=("raw", "ema"))


@dataclass(frozen=True, kw_only=True)
class GuidanceFigureSettings(TitledSettings):
    """Quality by scale of guidance."""

    inputs: tuple[str, ...] = _inputs("results table")
    metric: str | None = option(
        None, f"distance (the first that there is of {', '.join(DISTANCES)})", choices=DISTANCES
    )


@dataclass(frozen=True, kw_only=True)
class SamplesSettings(TitledSettings):
    """Images of equal seeds in rows."""

    inputs: tuple[str, ...] = _inputs("NAME=FOLDER of PNGs")
    columns: int = option(12, "images per row", parse=positive_int)
    real: str | None = option(
        None, "folder of training images for a first row, such as eval_fid_batch.py --write_reference writes"
    )


@dataclass(frozen=True, kw_only=True)
class OverviewSettings(TitledSettings):
    """A path and its samples."""

    inputs: tuple[str, ...] = _inputs("FOLDER of generate_with_path_30.py")
    images: int = option(24, "images beside the path", parse=positive_int)


@dataclass(frozen=True, kw_only=True)
class TimestepPairsSettings(TitledSettings):
    """Histograms of pairs of timesteps."""

    inputs: tuple[str, ...] = _inputs("regime as of train_lift.py --t_pairs")
    beta_schedule: str = option("cosine_clipped", choices=ALL_SCHEDULES)
    num_pairs: int = option(200_000, "draws of each", parse=positive_int)


def parse_args() -> tuple[str, FigureSettings]:
    """The figure that is asked for, a key of `FIGURES`, and its settings."""
    commands = {name: (settings, text) for name, (settings, text, _) in FIGURES.items()}
    return parse_command(commands, __doc__)


def draw_losses(settings: LossesSettings) -> None:
    """One curve per log folder."""
    runs = {}
    for name, folder in named(settings.inputs).items():
        file = need_file(folder / METRICS_FILE, "Log", "give the log folder of a training run")
        runs[name] = read_metrics(file)
    plot_losses(runs, settings.output)


def draw_paths(settings: PathsSettings) -> None:
    """Paths of one noise schedule, whose log SNR is on the second axis."""
    paths = {name: load_schedule(file) for name, file in named(settings.inputs).items()}
    log_snr = log_snr_table({path.provenance.get("beta_schedule") for path in paths.values()})
    plot_path_comparison(paths, log_snr, settings.output, settings.title)


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


def draw_paths_epochs(settings: PathsOfEpochsSettings) -> None:
    """Published paths of one rule, as each heatmap holds them."""
    contents, panels = [load_jacobians(Path(file)) for file in settings.inputs], {}
    for file, content in zip(settings.inputs, contents, strict=True):
        if "timesteps_64" not in content:
            raise ValueError(f"{file} holds no paths yet; run the compute_heatmap_30.py that made it again.")
    for name in PATH_SETTINGS:
        values = sorted({str(content[name]) for content in contents})
        if len(values) > 1:
            raise ValueError(f"These heatmaps hold paths of {name} {' and '.join(values)}; draw one figure for each.")
    runs = sorted({content["run"] for content in contents if content.get("run")})
    if len(runs) > 1:
        raise ValueError(f"These heatmaps are of the runs {' and '.join(runs)}; draw one figure for each.")
    for file, content in zip(settings.inputs, contents, strict=True):
        key = content["epoch"], content["weights"]
        if key in panels:
            raise ValueError(f"{file} is a second heatmap of epoch {key[0]} with {key[1]} weights; pass one of each.")
        panels[key] = {
            f"DP-{name.title()}": PathOfTimesteps(content[f"timesteps_{name}"], f"dp_{name}", {})
            for name in ("64", "total")
            if f"timesteps_{name}" in content  # A model that predicts the fine scale alone has the first one.
        }
    log_snr = log_snr_table({content["beta_schedule"] for content in contents})
    plot_paths_across_epochs(panels, log_snr, settings.output, settings.title)


def read_samples(folder: Path, count: int) -> dict[str, np.ndarray]:
    """The first `count` images of a folder of generate_with_path_30.py, by file name (the seed)."""
    files = sorted(file for file in folder.glob("*.png") if file.stem.isdigit())[:count]
    if not files:
        raise FileNotFoundError(f"{folder} holds no generated images; make some with generate_with_path_30.py.")
    return {file.name: read_png(file).numpy() for file in files}


def first_images(folder: Path, count: int) -> np.ndarray:
    """The first images of a folder, uint8 `[count, C, H, W]`; raises ValueError for fewer."""
    images = list(read_samples(folder, count).values())
    if len(images) < count:
        raise ValueError(f"{folder} holds {len(images)} images for a row of {count}; write more, or lower --columns.")
    return np.stack(images)


def draw_samples(settings: SamplesSettings) -> None:
    """Only seeds that every folder has are shown, below as many training images."""
    rows = {name: read_samples(folder, settings.columns) for name, folder in named(settings.inputs).items()}
    shared = sorted(set.intersection(*(set(row) for row in rows.values())))
    if not shared:
        raise ValueError("The folders share no seed; generate them with the same --seed.")
    stacks = {name: np.stack([row[file] for file in shared]) for name, row in rows.items()}
    if settings.real is not None:
        stacks = {"Training images": first_images(Path(settings.real), len(shared))} | stacks
    plot_samples(stacks, settings.output, settings.title)


def draw_overview(settings: OverviewSettings) -> None:
    """The path and the first images of one folder of samples."""
    if len(settings.inputs) > 1:
        raise ValueError(f"An overview is of one folder of samples, not {len(settings.inputs)}; draw one for each.")
    folder = Path(settings.inputs[0])
    path = load_schedule(folder / "schedule.json")
    samples = np.stack(list(read_samples(folder, settings.images).values()))
    num_train_timesteps = len(log_snr_table({path.provenance.get("beta_schedule")}))
    plot_path_and_samples(path, samples, num_train_timesteps, settings.output, settings.title)


def table_rows(file: str | Path) -> list[dict[str, str]]:
    """The rows of a results table, which must be there."""
    return read_rows(need_file(file, "Results table", "give one that eval_fid_batch.py wrote"))


def draw_scores(settings: ScoresSettings) -> None:
    """Mean and deviation over seeds, one curve for each series and kind of weights."""
    wanted = {name: str(value) for name in ("num_images", "nfe") if (value := getattr(settings, name)) is not None}
    rows = [row for file in settings.inputs for row in table_rows(file)]
    results = named_results(row for row in rows if all(row[name] == value for name, value in wanted.items()))
    results = sorted(results, key=lambda result: result["series"].rank)
    named_rows = [result | {"name": result["series"].title} for result in results]
    plot_scores(named_rows, settings.metric, settings.output, settings.title)


def draw_against_nfe(settings: AgainstCallsSettings) -> None:
    """Mean and deviation over seeds, one curve for each series of a table; settings of tables must agree."""
    panels: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}
    drawn = []
    regimes = None if settings.regime is None else [str(parse_regime(text)) for text in settings.regime]
    for name, file in named(settings.inputs).items():
        rows = [row for row in table_rows(file) if settings.path_type is None or row["path_type"] in settings.path_type]
        if regimes is not None:
            rows = [r for r in rows if default_regime(r["model_type"]) != "independent" or r["regime"] in regimes]
        results = [result for result in named_results(rows) if result[f"{settings.metric}_mean"] is not None]
        if not results:
            raise ValueError(
                f"{file} holds no {settings.metric} of what is asked for; score it with eval_fid_batch.py."
            )
        for result in sorted(results, key=lambda result: result["series"].rank):
            series = result["series"]
            title = series._replace(regime="").title if settings.hide_regime else series.title
            points = panels.setdefault(name, {}).setdefault(title, {})
            if int(result["nfe"]) in points:
                raise ValueError(
                    f"{file} holds two results of {title} at {result['nfe']} calls, such as of two epochs, of raw and "
                    "EMA weights, or of two regimes that --hide_regime does not name; keep them in tables of their own."
                )
            points[int(result["nfe"])] = result[f"{settings.metric}_mean"], result.get(f"{settings.metric}_sd")
        drawn += results
    check_comparable(drawn, but=("nfe",))
    label = f"{METRIC_TITLES.get(settings.metric, settings.metric)}, {int(drawn[0]['num_images']):,} images"
    plot_scores_against_nfe(panels, settings.output, settings.title, label)


def draw_students(settings: StudentsFigureSettings) -> None:
    """Mean and deviation over seeds, one curve for each table, of whatever it holds by number of calls."""
    curves: dict[str, dict[int, StudentScore]] = {}
    drawn = []
    for name, file in named(settings.inputs).items():
        rows = [row for row in table_rows(file) if settings.weights in (None, row["weights"])]
        results = [result for result in named_results(rows) if result[f"{settings.metric}_mean"] is not None]
        if not results:
            raise ValueError(
                f"{file} holds no {settings.metric} of what is asked for; score it with eval_fid_batch.py."
            )
        points = curves.setdefault(name, {})
        for result in results:
            calls = int(result["nfe"])
            if calls in points:
                raise ValueError(
                    f"{file} holds two results at {calls} calls, such as of two solvers or of raw and EMA weights; "
                    "keep them in tables of their own, or name --weights."
                )
            spent = [result[field] for field in ("student_images", "teacher_calls")]
            cost = sum(map(int, spent)) if all(text.isdecimal() for text in spent) else None
            score = result[f"{settings.metric}_mean"], result.get(f"{settings.metric}_sd")
            points[calls] = StudentScore(*score, cost)
        drawn += results
    check_comparable(drawn, but=("nfe",))
    label = f"{METRIC_TITLES.get(settings.metric, settings.metric)}, {int(drawn[0]['num_images']):,} images"
    plot_students(curves, settings.output, settings.title, label)


def draw_guidance(settings: GuidanceFigureSettings) -> None:
    """Precision against recall, and a distance against the scale, mean and deviation over seeds, a curve per series."""
    where = " and ".join(settings.inputs)
    try:
        results = guided_results(row for file in settings.inputs for row in table_rows(file))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    there = [name for name in DISTANCES if any(result[f"{name}_mean"] is not None for result in results)]
    metric = settings.metric or next(iter(there), DISTANCES[0])
    titles = [METRIC_TITLES[name] for name in ("manifold_recall", "manifold_precision", metric)]
    panels, counts = [], []
    for fields, scored in ((("manifold_recall", "manifold_precision"), "pr"), ((metric,), metric)):
        drawn = [result for result in results if all(result[f"{field}_mean"] is not None for field in fields)]
        if not drawn:
            raise ValueError(f"{where}: no row of a guidance scale has {' and '.join(fields)}; score it with "
                             f"eval_fid_batch.py --guidance_scale G --metrics {scored}.")  # fmt: skip
        check_comparable(drawn, but=("nfe",))
        curves: dict[str, dict[float, tuple]] = {}
        for result in drawn:
            points = curves.setdefault(result["curve"], {})
            if result["scale"] in points:
                raise ValueError(
                    f"{where}: there are two results of {result['curve']} at guidance scale {result['scale']:g}, such "
                    "as of two paths of one type; keep them in tables of their own."
                )
            points[result["scale"]] = tuple((result[f"{name}_mean"], result.get(f"{name}_sd")) for name in fields)
        panels.append(curves)
        counts.append(f", {int(drawn[0]['num_images']):,} images")
    quality, distances = panels
    distances = {name: {scale: score for scale, (score,) in points.items()} for name, points in distances.items()}
    labels = [f"{title}{count}" for title, count in zip(titles, (counts[0], "", counts[1]), strict=True)]
    plot_guidance(quality, distances, settings.output, settings.title, labels)


def draw_timestep_pairs(settings: TimestepPairsSettings) -> None:
    """A histogram of each regime, of pairs as a training on that noise schedule draws them from start to end."""
    scheduler = DDIMScheduler(beta_schedule=settings.beta_schedule, prediction_type="v")
    panels = {}
    for text in settings.inputs:
        regime = parse_regime(text)
        if "path" in (regime.name, regime.around):
            regime = regime._replace(parameter=Path(regime.parameter).name)
        pairs = TimestepPairs(resolve_regime(text, "dual"), scheduler)
        generator = torch.Generator().manual_seed(0)
        parts = np.array_split(np.arange(settings.num_pairs), STAGES_OF_A_RUN if regime.changes else 1)
        draws = [
            pairs.at(progress).draw(len(part), generator)
            for progress, part in zip(np.linspace(0, 1, len(parts)), parts, strict=True)
        ]
        panels[str(regime)] = tuple(torch.cat(clock) for clock in zip(*draws, strict=True))
    plot_timestep_pairs(panels, scheduler.num_train_timesteps, settings.output, settings.title)


# By the first word of the command: settings, help and what draws it.
FIGURES = {
    "losses": (LossesSettings, "training loss against the step", draw_losses),
    "paths": (PathsSettings, "paths beside each other", draw_paths),
    "paths_epochs": (PathsOfEpochsSettings, "published paths, epochs side by side", draw_paths_epochs),
    "scores": (ScoresSettings, "a metric against the epoch, or beside each other for one epoch", draw_scores),
    "nfe": (AgainstCallsSettings, "a metric against network calls, a panel for each table", draw_against_nfe),
    "students": (StudentsFigureSettings, "a metric of students by their calls, and by their cost", draw_students),
    "guidance": (GuidanceFigureSettings, "precision, recall and a distance by scale of guidance", draw_guidance),
    "samples": (SamplesSettings, "samples of equal seeds beside each other", draw_samples),
    "overview": (OverviewSettings, "a path and what was sampled along it", draw_overview),
    "t_pairs": (TimestepPairsSettings, "pairs of timesteps that a training draws", draw_timestep_pairs),
}


def main() -> None:
    """Draw one figure."""
    figure, settings = parse_args()
    _, _, draw = FIGURES[figure]
    draw(settings)
    print(settings.output)


if __name__ == "__main__":
    run_stage(main)
