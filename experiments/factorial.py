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

import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from combinations import OFFSETS, SHIFTS, SPACINGS, all_combinations, shifted_diagonal, trained_paths
from evaluation.pixel_metrics import SlicedWasserstein
from evaluation.results_table import write_csv
from figures.scores import plot_factorial
from images.representation import OVERCOMPLETE
from paths.path import timestep_grid
from planning.map_file import load_heatmap
from planning.map_paths import heatmap_path
from runtime.device import resolve_precision, select_device
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.safe_write import replacing
from runtime.settings import REQUIRED, option, parse_command
from scheduler import DDIMScheduler
from study import COLUMNS, SCHEDULES, CallsSettings, GaussianSettings, means, noisiest_timestep, read_csv, score
from truth.gaussian import Spectrum, exact_heatmap
from truth.linear_sampler import ddim_output, w2_squared
from truth.optimal_points import optimal_points


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(CallsSettings, CheckpointSettings, DataSettings, HardwareSettings):
    """A study of trained networks."""

    checkpoint: str | None = option(None, "of the two-clock model")
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


def optimum(spectrum: Spectrum, nfe: int, first: float, last: float, **kind: bool) -> np.ndarray:
    """The points of least W2² from log SNR first to clean; those beyond `last`, the schedule's end, are put there."""
    points = optimal_points(spectrum, nfe, "w2", first, math.inf, **kind)[0].numpy().clip(max=last)
    points[-1] = last
    return points


def gaussian_rows(settings: GaussianSettings) -> list[dict[str, Any]]:
    """The exact values for Gaussian images."""
    spectrum = settings.variances()
    rows = []
    progress = Progress(total=len(SCHEDULES) * len(settings.nfe), unit="NFE")
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
    for row, path in Progress(missing, unit="path"):
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
