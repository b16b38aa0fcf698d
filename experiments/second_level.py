"""The best noise level for the second call of a consistency model, by search.

    python experiments/second_level.py trained --checkpoint checkpoints/RUN/baseline_consistency.pth --ema \\
        --num_images 500 --output results/RUN/second_level

A consistency model may be called again: its image is noised to a level of choice, and the second call lands from there
(arXiv 2303.01469, section 4). Each candidate is scored by the sliced Wasserstein distance (SWD ×1000) of samples to as
many training images, all from the same noise: first --grid log SNRs, even from that of the largest level (σ/α = 80) to
--highest, then in --rounds rounds those half-way to both neighbours of the best one. The residual pair has its coarse
scale ahead by what it is on the diagonal of the image.

Writes OUTPUT.csv, a row for each level and seed, and OUTPUT.json, the schedule of the best, which
`generate_with_path_30.py --solver consistency --schedule OUTPUT.json` replays; prints a table with one call beside it.
"""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from diffusion.solvers import make_solver
from evaluation.pixel_metrics import SlicedWasserstein
from evaluation.results_table import write_csv
from evaluation.search import search
from paths.families import diagonal, through
from paths.path import Path
from paths.schedule_file import save_schedule
from planning.replay import made_for
from runtime.device import resolve_precision, select_device
from runtime.reports import markdown_table
from runtime.settings import option, parse_command
from study import StudySettings, score
from training.noise_levels import LARGEST

SOLVER = "consistency"


@dataclass(frozen=True, kw_only=True)
class LevelSettings(StudySettings, CheckpointSettings, DataSettings, HardwareSettings):
    """Which model, on how many images, and how fine the search is."""

    num_images: int = option(500, "per seed", parse=cli.positive_int)
    seeds: tuple[int, ...] = option((42,), parse=cli.seed, nargs="+")
    grid: int = option(7, "levels to begin with", parse=cli.positive_int)
    rounds: int = option(2, "of halving the distance to the neighbours of the best", parse=cli.seed)
    highest: float = option(6.0, "log SNR of the cleanest of them", parse=float)
    batch_size: int = option(100, parse=cli.positive_int)


def path_through(loaded: LoadedModel, level: float) -> Path:
    """Two calls: from pure noise, and from the timestep of nearest log SNR."""
    ahead = 0.0 if loaded.model.one_clock else loaded.scheduler.representation.image_lead
    return through((level,), loaded.scheduler.log_snr.cpu().numpy(), loaded.model.num_scales, ahead)


def main() -> None:
    """Score, search, write."""
    _, settings = parse_command({"trained": (LevelSettings, "of one model")}, __doc__)
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.check_solver(make_solver(SOLVER))
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    images = cli.load_training_images(settings, loaded.config).pixels
    metric = SlicedWasserstein(images, settings.num_images, device=device)
    precision = resolve_precision(device, settings.precision)
    rows, scored = [], {}

    def scores_along(path: Path, level: float | None) -> float:
        if path.points not in scored:  # Levels that are nearer than timesteps are one.
            options = settings.num_images, settings.batch_size, precision, metric, device
            scored[path.points] = [score(loaded, path, seed, *options, make_solver(SOLVER)) for seed in settings.seeds]
            rows.extend(
                {"calls": path.nfe, "log_snr": level, "seed": seed, "num_images": settings.num_images, "swd": found}
                for seed, found in zip(settings.seeds, scored[path.points], strict=True)
            )
            write_csv(FilePath(f"{settings.output}.csv"), rows)
        return statistics.mean(scored[path.points])

    once = scores_along(diagonal(1, num_scales=loaded.model.num_scales), None)
    lowest = max(-2 * math.log(LARGEST), loaded.scheduler.log_snr[-2].item())
    found = search(
        lambda level: scores_along(path_through(loaded, level), level),
        lowest, settings.highest, settings.grid, settings.rounds,
    )  # fmt: skip
    best = min(found, key=found.get)
    path = path_through(loaded, best)
    save_schedule(
        path, FilePath(f"{settings.output}.json"), loaded.scheduler.log_snr.cpu().numpy(),
        solver={"name": SOLVER, "end": "clean"}, criterion=f"SWD of {settings.num_images} images", cost=found[best],
        beta_schedule=loaded.config["beta_schedule"], **made_for(path, loaded),
    )  # fmt: skip
    table = [{"calls": 1, "log SNR": "", "σ/α": "", "SWD": f"{once:.2f}"}]
    table += [
        {"calls": 2, "log SNR": f"{level:+.2f}", "σ/α": f"{math.exp(-level / 2):.3g}", "SWD": f"{found[level]:.2f}"}
        for level in sorted(found)
    ]
    print(markdown_table(table))
    print(f"best: log SNR {best:+.2f} (timestep {path.points[1][0]}); schedule in {settings.output}.json")


if __name__ == "__main__":
    cli.run_stage(main)
