"""What of a path's gain is spacing, what is offset, and what is terminal SNR: every combination, at equal calls.

    python experiments/factorial.py gaussian --spectrum FILE.npz --output results/factorial/gaussian
    python experiments/factorial.py gaussian --output results/factorial/power_law     # no file: a power law
    python experiments/factorial.py trained --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema \\
        --baseline checkpoints/baseline_400ep.pth --heatmap results/heatmap_30_400ep_ema.pth \\
        --num_images 1000 --seeds 42 43 44 --output results/factorial/afhq

A path is taken apart into its *spacing*, the mean log SNR u of the two scales at every point, and its *offset*, the
curve it follows in the plane of log SNRs as a function of u; any spacing goes with any offset.

- Spacings: uniform in t, uniform in λ, that of the published DP-Total path (factor B, 30 lines, max_jump 5), and that
  of the optimal diagonal.
- Offsets: the diagonal, the curve of DP-Total, the coarse scale ahead or behind by one unit of log SNR, and the curve
  of the optimal path. Optimal spacing with optimal offset is the optimal path itself.
- The single-scale baseline takes every spacing; in `gaussian` the optimal one is its own, in `trained` that of LIFT.

`gaussian`: optimal means least W2² of the exact output of DDIM; schedules are `cosine_clipped`, and `cosine` from the
timestep at which λ = -10 (nearly zero terminal SNR). `trained`: optimal means the KL path of weight 1 over bands on
the heatmap, refined; the value is the sliced Wasserstein distance, and every seed starts all paths from the same noise.

Writes OUTPUT.csv (a row per value; a `trained` run that is started again goes on), OUTPUT.json (what its scores depend
on), OUTPUT.md and OUTPUT.png.
"""

import csv
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import to_uint8
from diffusion.sampler import image_seeds, sample_seeds, scale_shapes
from evaluation.metrics import SlicedWasserstein
from evaluation.results_table import write_csv
from figures.scores import plot_factorial
from images.representation import OVERCOMPLETE
from paths.path import Path, timestep_grid
from planning.map_file import load_heatmap
from planning.map_paths import heatmap_path, kl_refined
from runtime.device import autocast, resolve_precision, select_device
from runtime.reports import markdown_table, print_report
from runtime.safe_write import replacing
from runtime.settings import REQUIRED, Settings, option, parse_command
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap
from truth.linear_sampler import ddim_output, w2_squared
from truth.optimal_points import optimal_points

SPACINGS = ("uniform t", "uniform λ", "published", "optimal")
OFFSETS = ("diagonal", "published", "coarse ahead by 1", "coarse behind by 1", "optimal 2-D")
SHIFTS = {"coarse ahead by 1": 1.0, "coarse behind by 1": -1.0}
SCHEDULES = {"cosine_clipped": "cosine_clipped", "cosine from λ = -10": "cosine"}
NEARLY_ZERO_TERMINAL_LOG_SNR = -10.0
COLUMNS = ("schedule", "model", "spacing", "offset", "nfe", "seed", "value", "detail")


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Where a study writes."""

    output: str = option(REQUIRED, "name of the files without suffix")


@dataclass(frozen=True, kw_only=True)
class CallsSettings(StudySettings):
    """How many network calls the paths have."""

    nfe: tuple[int, ...] = option((6, 10, 18, 36), parse=cli.positive_int, nargs="+")


@dataclass(frozen=True, kw_only=True)
class GaussianSettings(CallsSettings):
    """A study of Gaussian images."""

    spectrum: str | None = option(None, "variances of real images (a power law)", metavar="FILE")
    resolution: int = option(64, "of the power law", parse=cli.positive_int)

    def variances(self) -> Spectrum:
        """Those of the images, of three channels if they follow the power law; raises what `Spectrum.load` raises."""
        return Spectrum.load(self.spectrum) if self.spectrum else Spectrum.power_law(self.resolution)


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(CallsSettings, CheckpointSettings, DataSettings, HardwareSettings):
    """A study of trained networks."""

    checkpoint: str = option(REQUIRED, "of the two-clock model")
    baseline: str = option(REQUIRED, "checkpoint of the baseline")
    heatmap: str = option(REQUIRED, "of the two-clock model, with --maps all")
    num_images: int = option(1000, "per seed", parse=cli.positive_int)
    seeds: tuple[int, ...] = option((42, 43, 44), parse=cli.seed, nargs="+")
    batch_size: int = option(100, parse=cli.positive_int)


def parse_args() -> tuple[str, CallsSettings]:
    """Which of the two, gaussian or trained, and its settings, from the flags."""
    commands = {
        "gaussian": (GaussianSettings, "exact distances of Gaussian images"),
        "trained": (TrainedSettings, "measured scores of networks"),
    }
    return parse_command(commands, __doc__)


def combine(spacing: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The points `[N + 1, 2]` of a curve `[M, 2]` in the plane of log SNRs at which their mean is spacing `[N + 1]`."""
    along = curve.mean(1)
    return np.stack([np.interp(spacing, along, column) for column in curve.T], axis=1)


def shifted_diagonal(first: float, last: float, shift: float) -> np.ndarray:
    """The curve λ_32 = λ_64 + shift between the ends (first, first) and (last, last), within which both scales stay."""
    u = np.linspace(first, last, 1001)
    points = np.stack([u - shift / 2, u + shift / 2], axis=1).clip(first, last)
    points[0], points[-1] = first, last
    return points


def all_combinations(spacings: dict[str, np.ndarray], curves: dict[str, np.ndarray]) -> Iterator[tuple[str, str, Any]]:
    """Every spacing with every offset; the optimal pair is a path of its own, `curves["optimal 2-D"]`."""
    for spacing in SPACINGS:
        for offset in OFFSETS:
            whole = spacing == "optimal" and offset == "optimal 2-D"
            yield spacing, offset, curves[offset] if whole else combine(spacings[spacing], curves[offset])


def optimum(spectrum: Spectrum, nfe: int, first: float, last: float, **kind: bool) -> np.ndarray:
    """The points of least W2² from log SNR first to clean; those beyond `last`, the schedule's end, are put there."""
    points = optimal_points(spectrum, nfe, "w2", first, math.inf, **kind)[0].numpy().clip(max=last)
    points[-1] = last
    return points


def noisiest_timestep(scheduler: DDIMScheduler) -> int:
    """The last timestep whose log SNR is at least `NEARLY_ZERO_TERMINAL_LOG_SNR`: 999 where the schedule ends above."""
    return int(np.flatnonzero(scheduler.log_snr.numpy() >= NEARLY_ZERO_TERMINAL_LOG_SNR)[-1])


def gaussian_rows(settings: GaussianSettings) -> list[dict[str, Any]]:
    """The exact values for Gaussian images."""
    spectrum = settings.variances()
    rows = []
    progress = tqdm(total=len(SCHEDULES) * len(settings.nfe), unit="NFE")
    for label, name in SCHEDULES.items():
        scheduler = DDIMScheduler(beta_schedule=name, prediction_type="v")
        log_snr, start = scheduler.log_snr.numpy(), noisiest_timestep(scheduler)
        first, last = log_snr[start], log_snr[0]
        heatmap = exact_heatmap(spectrum, scheduler, timestep_grid(30, start=start))
        for nfe in settings.nfe:
            published = log_snr[np.array(heatmap_path(heatmap, "dp_total", nfe)[0].points)]
            spacings = {
                "uniform t": np.interp(np.linspace(start, 0, nfe + 1), np.arange(len(log_snr)), log_snr),
                "uniform λ": np.linspace(first, last, nfe + 1),
                "published": published.mean(1),
                "optimal": optimum(spectrum, nfe, first, last, diagonal=True)[:, 0],
            }
            curves = {"diagonal": shifted_diagonal(first, last, 0.0), "published": published}
            curves |= {offset: shifted_diagonal(first, last, shift) for offset, shift in SHIFTS.items()}
            curves["optimal 2-D"] = optimum(spectrum, nfe, first, last)
            single = spacings | {"optimal": optimum(spectrum, nfe, first, last, single_scale=True)}
            paths = [("LIFT", s, o, points) for s, o, points in all_combinations(spacings, curves)]
            paths += [("baseline", s, "", single[s]) for s in SPACINGS]
            for model, spacing, offset, points in paths:
                output = ddim_output(spectrum, np.concatenate([points[:-1], np.full_like(points[-1:], math.inf)]))
                low, high = (v.item() for v in w2_squared(spectrum, output, by_band=True))
                values = (label, model, spacing, offset, nfe, "", low + high, f"low {low:.5g}, high {high:.5g}")
                rows.append(dict(zip(COLUMNS, values, strict=True)))
            progress.update()
    progress.close()
    return rows


def to_path(points: np.ndarray, log_snr: np.ndarray, kind: str) -> Path:
    """The path through the timesteps nearest to points in log SNR; equal ones are moved apart towards noise."""
    nearest = np.abs(log_snr - points[..., None]).argmin(-1)  # [N+1, 2]
    nearest[-1] = 0
    for k in range(len(nearest) - 2, -1, -1):
        nearest[k] = np.maximum(nearest[k], nearest[k + 1])
        if (nearest[k] == nearest[k + 1]).all():
            nearest[k] += 1
    return Path(nearest.tolist(), kind, {})


def trained_paths(heatmap: dict, log_snr: np.ndarray, nfe: int) -> Iterator[tuple[str, str, str, Path]]:
    """(model, spacing, offset, path) of every combination for a network."""
    t_grid = heatmap["t_grid"].tolist()
    first, last = log_snr[t_grid[0]], log_snr[0]
    published = log_snr[np.array(heatmap_path(heatmap, "dp_total", nfe)[0].points)]
    diagonal, plane = (
        log_snr[np.array(kl_refined(heatmap, log_snr, nfe, 1.0, diagonal=d).path.points)] for d in (True, False)
    )
    spacings = {
        "uniform t": log_snr[np.rint(np.linspace(t_grid[0], 0, nfe + 1)).astype(int)],
        "uniform λ": np.linspace(first, last, nfe + 1),
        "published": published.mean(1),
        "optimal": diagonal[:, 0],
    }
    curves = {"diagonal": shifted_diagonal(first, last, 0.0), "published": published, "optimal 2-D": plane}
    curves |= {offset: shifted_diagonal(first, last, shift) for offset, shift in SHIFTS.items()}
    for spacing, offset, points in all_combinations(spacings, curves):
        yield "LIFT", spacing, offset, to_path(points, log_snr, f"{spacing}, {offset}")
    for spacing in SPACINGS:
        yield "baseline", spacing, "", to_path(spacings[spacing][:, None], log_snr, spacing)


def trained_rows(settings: TrainedSettings) -> list[dict[str, Any]]:
    """Measured values of networks; every row is written at once, and those in the file are not measured again."""
    device = select_device(settings.device)
    files = {"LIFT": settings.checkpoint, "baseline": settings.baseline}
    models = {name: load_model(file, settings.ema, device) for name, file in files.items()}
    lift = models["LIFT"]
    if lift.scheduler.representation is not OVERCOMPLETE:
        raise ValueError("The factorial takes apart paths of over-complete pairs; pass such a --checkpoint.")
    heatmap = load_heatmap(settings.heatmap)
    if heatmap["fingerprint"] != lift.fingerprint:
        raise ValueError(
            f"Heatmap {settings.heatmap} was computed with other weights than {settings.checkpoint} holds."
        )
    log_snr = lift.scheduler.log_snr.numpy()
    images = cli.load_training_images(settings, lift.config)
    metric = SlicedWasserstein(images.pixels, settings.num_images, device=device)
    file = FilePath(f"{settings.output}.csv")
    said = {f"weights_{name}": model.fingerprint for name, model in models.items()}
    said |= {"images": images.fingerprint, "num_images": settings.num_images}
    said["precision"] = resolve_precision(device, settings.precision)
    rows = read_csv(file) if file.exists() else []
    done = {(r["seed"], r["model"], r["detail"]): r["value"] for r in rows}
    known = {tuple(str(r[c]) for c in COLUMNS[:6]): r["detail"] for r in rows}
    paths = [(nfe, *job) for nfe in settings.nfe for job in trained_paths(heatmap, log_snr, nfe)]
    missing = []
    for seed, (nfe, model, spacing, offset, path) in itertools.product(settings.seeds, paths):
        row = dict(
            zip(COLUMNS, (models[model].config["beta_schedule"], model, spacing, offset, nfe, seed), strict=False)
        )
        scored = known.get(tuple(map(str, row.values())))
        if scored is None:
            missing.append((row, path))
        elif scored != path.fingerprint():
            raise ValueError(
                f"{file} holds a score of {spacing}, {offset or model}, {nfe} calls along another path than this "
                "heatmap gives; pass another --output."
            )
    check_settings(FilePath(f"{settings.output}.json"), said)
    for row, path in tqdm(missing, unit="path"):
        same = (str(row["seed"]), row["model"], path.fingerprint())
        if same not in done:
            done[same] = score(
                models[row["model"]],
                path,
                row["seed"],
                settings.num_images,
                settings.batch_size,
                settings.precision,
                metric,
                device,
            )
        row |= {"value": done[same], "detail": path.fingerprint()}
        rows.append({name: str(value) for name, value in row.items()})
        write_csv(file, rows)
    return rows


def check_settings(file: FilePath, settings: dict[str, Any]) -> None:
    """Write what the scores depend on, or refuse to add to scores made with something else."""
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name, value in settings.items() if saved.get(name) != value]
        if different:
            raise ValueError(f"The scores beside {file} have another {', '.join(different)}; pass another --output.")
        return
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def score(
    loaded: LoadedModel,
    path: Path,
    seed: int,
    num_images: int,
    batch_size: int,
    precision: str,
    metric: SlicedWasserstein,
    device: torch.device,
) -> float:
    """Sliced Wasserstein distance (x1000, mean over levels) of images along a path."""
    shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.config["resolution"])
    seeds = image_seeds(seed, num_images)
    batches = sample_seeds(loaded.model.denoise, loaded.scheduler, path, seeds, shapes, batch_size, device)
    with autocast(device, precision):
        pixels = torch.cat([to_uint8(samples.images[0]).cpu() for _, samples in batches])
    return statistics.mean(metric.distance(pixels).values())


def read_csv(file: FilePath) -> list[dict[str, str]]:
    """The rows of an earlier run."""
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every combination, in the order of the rows."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[c] for c in COLUMNS[:5]), []).append(float(row["value"]))
    return [
        dict(zip(COLUMNS[:5], key, strict=True))
        | {"value": statistics.mean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "n": len(v)}
        for key, v in groups.items()
    ]


def report(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown: a table per schedule and NFE, offsets down, spacings across."""
    parts = [f"# {title}"]
    by_key = {tuple(str(r[c]) for c in COLUMNS[:5]): r for r in rows}
    for schedule in dict.fromkeys(str(r["schedule"]) for r in rows):
        for nfe in sorted({int(r["nfe"]) for r in rows}):
            lines = []
            for model, offset in (("baseline", ""), *(("LIFT", o) for o in OFFSETS)):
                cells = {s: by_key.get((schedule, model, s, offset, str(nfe))) for s in SPACINGS}
                texts = {s: "" if r is None else _text(r) for s, r in cells.items()}
                lines.append({"offset": offset or "baseline", **texts})
            parts.append(f"## {schedule}, {nfe} calls\n\n{markdown_table(lines)}")
    return "\n\n".join(parts)


def _text(row: dict[str, Any]) -> str:
    return f"{row['value']:.2f}" + ("" if row["sd"] is None else f" ± {row['sd']:.2f}")


def main() -> None:
    """Measure, write the rows, the table and the figure."""
    kind, settings = parse_args()
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    if kind == "gaussian":
        rows = gaussian_rows(settings)
        write_csv(FilePath(f"{settings.output}.csv"), rows)
        source = f"variances of {FilePath(settings.spectrum).name}" if settings.spectrum else "a power law"
        title, label = f"W2² of DDIM on Gaussian images, {source}", "W2² to the images, units of x²"
    else:
        rows = trained_rows(settings)
        name = f"{FilePath(settings.checkpoint).stem}{' EMA' if settings.ema else ''}"
        title = f"SWD x1000 of {name}, {settings.num_images} images, {len(settings.seeds)} seeds"
        label = "sliced Wasserstein distance x1000"
    summary = means(rows)
    text = report(summary, title)
    print_report(text, f"{settings.output}.md")
    plot_factorial(summary, f"{settings.output}.png", title, label)


if __name__ == "__main__":
    cli.run_stage(main)
