"""Which criterion for paths agrees with the truth: rank correlation of its cost with exact or measured distances.

    python experiments/rank_criteria.py gaussian --spectrum FILE.npz --output results/criteria/gaussian
    python experiments/rank_criteria.py gaussian --output results/criteria/power_law          # no file: a power law
    python experiments/rank_criteria.py trained --heatmap results/heatmap_30_400ep_ema.pth \\
        --scores results/factorial/afhq.csv --output results/criteria/afhq

`gaussian`: for images whose denoiser is known, over families x spacings x number of steps (diagonal, shifts, leads,
cascades, fine first), and the optimum of every criterion in turn; distances are W2² and KL of the exact output of DDIM
(KL of the images before the last step's noise is gone, at t = 0), and KL of the frozen-drift chain. On `cosine_clipped`
as published, and on `cosine` from the last timestep above λ = -10, where the start is nearly right.
`trained`: over the paths that `experiments/factorial.py trained` scored, on the maps of a network; the distance is the
score.

For every criterion: Spearman's ρ within each number of steps, averaged over them (fewer calls are always worse, which
no criterion needs to know), and the regret, the distance of the path it likes best over the least distance of all
paths, less 1, likewise averaged. Writes OUTPUT.md and OUTPUT_{schedule}.png or OUTPUT.png.
"""

import itertools
import operator
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from combinations import trained_paths
from criteria import KL_WEIGHTS, evaluate, gaussian_reader, measured_reader, sizes
from figures.costs import plot_criteria
from paths.families import cascade, diagonal, fine_first, lead, log_snr_shift
from paths.path import Path, timestep_grid
from planning.error_map import CHAIN_RULE_FACTORS
from planning.map_file import load_heatmap
from planning.map_paths import heatmap_path, kl_refined
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import REQUIRED, option, parse_command
from scheduler import DDIMScheduler
from study import SCHEDULES, GaussianSettings, StudySettings, means, noisiest_timestep, read_csv
from truth.gaussian import Spectrum, exact_heatmap
from truth.linear_sampler import chain_kl, ddim_output, kl, w2_squared

SPACINGS = ("uniform_t", "uniform_log_snr", "karras")
SHIFTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
LEADS = (-2, -1, 1, 2, 4)
SHOWN = (
    "DP-64 B", "DP-Total B published", "DP-Total B per_dim", "DP-Total B sum", "DP-Total A published",
    "DP-Total C published", "DP-Total D published", "J = I DP-Total B published", "KL p=0", "KL p=0.5 bands",
    "KL p=1 scales", "KL p=1 bands",
)  # fmt: skip


class Candidate(NamedTuple):
    """A path with what is compared: what each criterion says of it, and how far from the truth it ends."""

    family: str
    nfe: int
    costs: dict[str, float]
    distances: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ScoresSettings(StudySettings):
    """A study of scores that were measured."""

    heatmap: str = option(REQUIRED, "of the network, with --maps all")
    scores: str = option(REQUIRED, "the CSV file of experiments/factorial.py trained")


def parse_args() -> tuple[str, StudySettings]:
    """Which of the two, gaussian or trained, and its settings, from the flags."""
    commands = {
        "gaussian": (GaussianSettings, "against exact distances of Gaussian images"),
        "trained": (ScoresSettings, "against measured scores of a network"),
    }
    return parse_command(commands, __doc__)


def hand_made(nfe: int, log_snr: np.ndarray, start: int) -> Iterator[tuple[str, Path]]:
    """(family, path) of every family and spacing with so many steps."""
    options = {"log_snr": log_snr, "start": start}
    level = int(np.abs(log_snr).argmin())  # λ = 0, where the coarse scale of a cascade may wait.
    for spacing in SPACINGS:
        base = diagonal(nfe, spacing, **options)
        yield "diagonal", base
        yield from (("shift", log_snr_shift(base, shift, log_snr)) for shift in SHIFTS)
        yield from (("lead", lead(base, k)) for k in LEADS)
        yield from (("cascade", cascade(nfe, remaining=t, spacing=spacing, **options)) for t in (0, level))
        yield "fine first", fine_first(nfe, spacing=spacing, **options)


def optimised(nfe: int, heatmap: dict, log_snr: np.ndarray) -> Iterator[tuple[str, Path]]:
    """(family, path) of the optima of the criteria on a heatmap."""
    yield "published DP", heatmap_path(heatmap, "dp_64", nfe)[0]
    for factor in CHAIN_RULE_FACTORS:
        yield "published DP", heatmap_path(heatmap, "dp_total", nfe, factor=factor)[0]
    for normalisation in ("per_dim", "sum"):
        yield "published DP", heatmap_path(heatmap, "dp_total", nfe, normalisation=normalisation)[0]
    for weight, on_diagonal in itertools.product((0.0, *KL_WEIGHTS), (False, True)):
        yield "KL path", kl_refined(heatmap, log_snr, nfe, weight, on_diagonal).path


def gaussian_candidates(spectrum: Spectrum, name: str, numbers_of_steps: Sequence[int]) -> list[Candidate]:
    """All paths on one noise schedule, in the model whose truth is known."""
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type="v")
    log_snr, start = scheduler.log_snr.numpy(), noisiest_timestep(scheduler)
    read, size = gaussian_reader(spectrum), sizes(len(spectrum.low) + len(spectrum.high))
    heatmap = exact_heatmap(spectrum, scheduler, timestep_grid(30, start=start))
    end = spectrum.noised(log_snr[0])
    found: dict[tuple, Candidate] = {}
    for nfe in Progress(numbers_of_steps, desc=name, unit="NFE"):
        paths = [*hand_made(nfe, log_snr, start), *optimised(nfe, heatmap, log_snr)]
        for family, path in paths:
            points = log_snr[np.array(path.points)]
            clean = np.concatenate([points[:-1], np.full((1, 2), np.inf)])
            distances = {
                "W2²": w2_squared(spectrum, ddim_output(spectrum, clean)),
                "KL": kl(end, ddim_output(spectrum, points)),
                "chain KL": chain_kl(spectrum, points),
            }
            distances = {name: value.item() for name, value in distances.items()}
            # A path that two families share counts once.
            found.setdefault(path.points, Candidate(family, nfe, evaluate(points, read, size), distances))
    return list(found.values())


def trained_candidates(heatmap: dict, scores: list[dict[str, Any]]) -> list[Candidate]:
    """The paths that were scored with a network, mean over seeds.

    Raises ValueError if no score is of such a path, or if those of this heatmap have other points than were scored.
    """
    schedule = heatmap["beta_schedule"]
    log_snr = DDIMScheduler(heatmap["num_train_timesteps"], schedule, prediction_type="v").log_snr.numpy()
    channels = heatmap["num_dims_64"] // heatmap["num_pixels_64"]
    read, size = measured_reader(heatmap, log_snr), sizes(heatmap["num_dims_64"], channels)
    key = operator.itemgetter("model", "spacing", "offset", "nfe")
    values = {key(row): row["value"] for row in means(scores)}
    scored: dict[tuple, set[str]] = {}
    for row in scores:
        scored.setdefault(key(row), set()).add(row["detail"])
    found: dict[tuple, Candidate] = {}
    for nfe in sorted({int(row["nfe"]) for row in scores}):
        for model, spacing, offset, path in trained_paths(heatmap, log_snr, nfe):
            combination = (model, spacing, offset, str(nfe))
            if model == "LIFT" and combination in values:
                if scored[combination] != {path.fingerprint()}:
                    raise ValueError(
                        f"The scores of {spacing}, {offset}, {nfe} calls are of another path than this heatmap gives; "
                        "pass the heatmap they were measured with."
                    )
                costs = evaluate(log_snr[np.array(path.points)], read, size)
                found.setdefault(path.points, Candidate(offset, nfe, costs, {"SWD": values[combination]}))
    if not found:
        raise ValueError("There is no score of a LIFT path; pass the CSV file of experiments/factorial.py trained.")
    return list(found.values())


def agreement(candidates: list[Candidate], criterion: str, distance: str) -> tuple[float, float]:
    """Spearman's ρ and the regret of a criterion, each within a number of steps and averaged over these."""
    rhos, regrets = [], []
    for nfe in sorted({c.nfe for c in candidates}):
        among = [c for c in candidates if c.nfe == nfe]
        costs, distances = [c.costs[criterion] for c in among], [c.distances[distance] for c in among]
        rhos.append(spearmanr(costs, distances).statistic)
        regrets.append(distances[int(np.argmin(costs))] / min(distances) - 1)
    return statistics.mean(rhos), statistics.mean(regrets)


def report(candidates: list[Candidate], title: str) -> str:
    """Markdown: a row per criterion, with ρ and regret for every distance."""
    counts = ", ".join(
        f"{sum(c.nfe == n for c in candidates)} of {n} steps" for n in sorted({c.nfe for c in candidates})
    )
    rows = []
    for criterion in candidates[0].costs:
        row = {"criterion": criterion}
        for distance in candidates[0].distances:
            rho, regret = agreement(candidates, criterion, distance)
            row |= {f"ρ, {distance}": f"{rho:+.2f}", f"regret, {distance}": f"{regret:.1%}"}
        rows.append(row)
    return f"## {title}\n\n{len(candidates)} paths: {counts}.\n\n{markdown_table(rows)}"


def draw(candidates: list[Candidate], distance: str, file: str, title: str) -> None:
    """Cost against distance for the criteria of SHOWN."""
    distances = [c.distances[distance] for c in candidates]
    points = {name: ([c.costs[name] for c in candidates], distances) for name in SHOWN}
    rho = {name: agreement(candidates, name, distance)[0] for name in SHOWN}
    plot_criteria(points, [c.family for c in candidates], file, title, rho, distance)


def main() -> None:
    """Evaluate, print, write and draw."""
    kind, settings = parse_args()
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    parts = []
    if kind == "gaussian":
        spectrum = settings.variances()
        source = FilePath(settings.spectrum).name if settings.spectrum else "power law"
        for label, name in SCHEDULES.items():
            candidates = gaussian_candidates(spectrum, name, settings.nfe)
            parts.append(report(candidates, label))
            title = f"Criteria against W2² of DDIM, {source}, {label}"
            draw(candidates, "W2²", f"{settings.output}_{name}.png", title)
        heading = f"# Criteria against exact distances, {source}"
    else:
        heatmap = load_heatmap(settings.heatmap)
        candidates = trained_candidates(heatmap, read_csv(FilePath(settings.scores)))
        parts.append(report(candidates, FilePath(settings.scores).stem))
        heading = f"# Criteria against measured scores, epoch {heatmap['epoch']}, {heatmap['weights']} weights"
        draw(candidates, "SWD", f"{settings.output}.png", heading.removeprefix("# "))
    text = "\n\n".join([heading, *parts])
    print_report(text, f"{settings.output}.md")


if __name__ == "__main__":
    cli.run_stage(main)
