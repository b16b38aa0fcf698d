"""Which criterion ranks the paths of a solver: its cost against the distance of samples, on random paths.

    python experiments/rank_solvers.py gaussian --spectrum FILE.npz --output results/solvers/rank_gaussian
    python experiments/rank_solvers.py trained --checkpoint FILE --ema --trajectories FILE --heatmap FILE \\
        --output results/solvers/rank_baseline

Paths have random spacings from noise to clean: powers of log SNR with random ends and steps. With two clocks every
second one leaves the diagonal too, within what was measured. `gaussian`: images whose denoiser is known; the distance
is W2² of the exact output. `trained`: a network; the distance is the mean square, per image in units of x², between its
samples and the ends of its own fine trajectories of the same noises, none of which the criteria have seen; with
--score_images also the SWD of so many images to as many training images.

Criteria: the KL costs (weight 0 and 1, of a heatmap), the sum of the squared losses of single steps of the solver, and
the deviation that planning minimises, where losses are carried to the end and added (`planning.deviation`). For each
solver and number of calls Spearman's ρ with a 95 % interval (bootstrap over paths), and the regret: how many times the
least distance of all the path has that a criterion likes best.

Writes OUTPUT.csv, a row per path and solver, OUTPUT.md, and OUTPUT.png: the paths of one solver under every criterion.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from diffusion.sampler import SeededNoise, image_seeds, sample, scale_shapes
from diffusion.solvers import make_solver, with_rule
from evaluation.pixel_metrics import SlicedWasserstein
from evaluation.results_table import write_csv
from figures.costs import plot_criteria
from images.representation import REPRESENTATIONS
from paths.families import diagonal, log_snr_shift
from paths.path import Path, timestep_grid
from paths.refine import cost_off_grid
from planning.deviation import deviation
from planning.map_file import load_heatmap
from planning.map_paths import KLProblem, trusted
from planning.plan import PlanCriterionSettings
from planning.trajectories import Band, Trajectories
from planning.trajectory_file import TWO_CLOCK_LINES, load_trajectories
from planning.trajectory_plan import TrajectoryPlanner
from runtime.device import autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.reports import markdown_table, print_report
from runtime.settings import REQUIRED, option, parse_command
from scheduler import DDIMScheduler
from study import GaussianSettings, StudySettings, noisiest_timestep, score
from truth.gaussian import Spectrum, exact_heatmap
from truth.linear_sampler import solver_output, w2_squared

CRITERIA = ("KL p=0", "KL p=1", "steps", "deviation")
REPLICATES = 1000


@dataclass(frozen=True, kw_only=True)
class RankSettings(StudySettings):
    """Which paths are ranked."""

    nfe: tuple[int, ...] = option((4, 8, 18), "network calls", parse=cli.positive_int, nargs="+")
    solvers: tuple[str, ...] = option(tuple(with_rule()), choices=tuple(with_rule()), nargs="+")
    paths: int = option(200, "random paths of each number of calls", parse=cli.positive_int)
    seed: int = option(0, "of the paths", parse=cli.seed)


@dataclass(frozen=True, kw_only=True)
class GaussianRankSettings(RankSettings, GaussianSettings):
    """On images whose denoiser is known."""

    nfe: tuple[int, ...] = option((4, 8, 18), "network calls", parse=cli.positive_int, nargs="+")


@dataclass(frozen=True, kw_only=True)
class TrainedRankSettings(RankSettings, CheckpointSettings, DataSettings, HardwareSettings):
    """On a network."""

    trajectories: str = option(REQUIRED, "of the network")
    heatmap: str = option(REQUIRED, "of the network, with --maps mse")
    num_images: int = option(16, "noises, other ones than those of the trajectories", parse=cli.positive_int)
    noise_seed: int = option(1, "of these noises", parse=cli.seed)
    score_images: int = option(0, "also score every path by the SWD of so many images", parse=cli.seed)
    batch_size: int = option(100, "of scored images", parse=cli.positive_int)


def parse_args() -> tuple[str, RankSettings]:
    """Which of the two, and its settings, from the flags."""
    commands = {
        "gaussian": (GaussianRankSettings, "against exact distances of Gaussian images"),
        "trained": (TrainedRankSettings, "against samples of a network"),
    }
    return parse_command(commands, __doc__)


def random_paths(planner: TrajectoryPlanner, nfe: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lines of paths, int `[count, nfe, S]`, on the diagonal and with two clocks every second one off it."""
    known = planner.trajectories.log_snr[:-1, 0].numpy()
    # The most lines that two clocks are measured apart.
    reach = int((planner.trajectories.cells >= 0).sum(1).max()) // 2
    found: list[np.ndarray] = []
    while len(found) < count:
        first, last = rng.uniform(-12, -5), rng.uniform(0, known[-1])
        wanted = first + (last - first) * np.linspace(0, 1, nfe - 1) ** math.exp(0.5 * rng.normal())
        steps = np.diff(wanted, prepend=first - 1) * np.exp(rng.choice([0, 0.2, 0.5]) * rng.normal(size=nfe - 1))
        wanted = first + np.cumsum(steps) - steps[0]
        inner = np.abs(known - wanted[:, None]).argmin(1)
        lines = np.repeat(np.concatenate([[0], inner])[:, None], planner.num_scales, 1)
        if planner.two_clocks and len(found) % 2:
            bend = np.sin(math.pi * np.linspace(0, 1, nfe) ** math.exp(0.5 * rng.normal()))
            lines[1:, 1] += (rng.uniform(-reach, reach) * rng.choice([bend, np.ones(nfe)])).round().astype(int)[1:]
        if planner.valid(lines[None])[0]:
            found.append(lines)
    return np.stack(found)


def kl_costs(heatmap: dict, log_snr: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """The KL costs of points `[N + 1, 2]` in timesteps."""
    costs = {}
    for weight in (0.0, 1.0):
        problem = KLProblem.of(trusted(heatmap, log_snr), weight)
        costs[f"KL p={weight:g}"] = cost_off_grid(
            heatmap["t_grid"].numpy(), *problem[:2], log_snr, criterion="kl", weight=weight, bands=problem.bands
        )
    return costs


def compare(
    model: str,
    planner: TrajectoryPlanner,
    heatmap: dict,
    settings: RankSettings,
    measure: Callable[[Path, str], dict[str, float]],  # what a solver samples along a path: "distance", and a "score"
) -> list[dict[str, Any]]:
    """A row for every random path and solver."""
    rng, rows = np.random.default_rng(settings.seed), []
    by_kl = kl_costs(heatmap, planner.log_snr)
    noisiest = int(heatmap["t_grid"][0])
    for nfe in settings.nfe:
        lines = random_paths(planner, nfe, settings.paths, rng)
        paths = [planner.path_of(each, "random") for each in lines]
        shared = []
        for path in paths:
            points = np.minimum(np.array(path.points)[:, [0, -1]], noisiest)
            shared.append({name: cost(points) for name, cost in by_kl.items()})
        for solver in settings.solvers:
            rule = make_solver(solver).rule
            steps, carried = (deviation(planner.trajectories, rule, kept)(lines) for kept in (False, True))
            for k, path in enumerate(Progress(paths, desc=f"{model}, {solver}, {nfe} calls", unit="path")):
                row = {"model": model, "solver": solver, "nfe": nfe, "path": path.fingerprint()}
                row["offset"] = "diagonal" if (lines[k] == lines[k, :, :1]).all() else "2-D"
                row |= shared[k] | {"steps": float(steps[k]), "deviation": float(carried[k])}
                rows.append(row | measure(path, solver))
    return rows


def exact_trajectories(spectrum: Spectrum, scheduler: DDIMScheduler, path: Path) -> Trajectories:
    """Trajectories of Gaussian images from N(0, I), in closed form: of one scale, or of the residual pair.

    On them a mode is sqrt((alpha² s + sigma²) / (alpha_0² s + sigma_0²)) of what it was at the start. Of the residual
    pair the cells are those that differ by up to half the lines, as nothing seen there hangs on the other scale.
    """
    points = torch.tensor(path.points)
    log_snr = scheduler.log_snr[points]
    log_snr[-1] = math.inf
    n, num_scales = len(points) - 1, points.shape[1]
    bands = []
    modes = {0: spectrum.high, 1: spectrum.low} if num_scales == 2 else {0: torch.cat([spectrum.low, spectrum.high])}
    for scale, variances in modes.items():
        signal, noise = log_snr[:, scale, None].sigmoid(), (-log_snr[:, scale, None]).sigmoid()
        # Twice the coarse image is the low modes, with twice its noise.
        twice = 2 if scale else 1
        noise = twice**2 * noise
        size = twice / (signal[0] * variances + noise[0]).sqrt()
        states = size * (signal * variances + noise).sqrt()
        seen = size * signal.sqrt() * variances / (signal * variances + noise).sqrt()
        bands.append(((scale,), 0, variances, states[None], seen[None, :-1]))
    cells = torch.full((n, n), -1)
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= (n // 2 if num_scales == 2 else 0)
    places = near.nonzero()
    cells[tuple(places.T)] = torch.arange(len(places))
    bands = [Band(*band[:4], band[4][:, places[:, band[0][0]]]) for band in bands]
    return Trajectories(points, log_snr, cells, tuple(bands), len(places))


def gaussian(settings: GaussianRankSettings) -> list[dict[str, Any]]:
    """Rows of Gaussian images: one clock, and the residual pair."""
    spectrum, rows = settings.variances(), []
    for name, representation, num_scales in (("one clock", "overcomplete", 1), ("residual pair", "residual", 2)):
        scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", representation=representation)
        log_snr, start = scheduler.log_snr.numpy(), noisiest_timestep(scheduler)
        path = diagonal(TWO_CLOCK_LINES, "uniform_log_snr", num_scales, log_snr=log_snr, start=start)
        if num_scales == 2:
            path = log_snr_shift(path, REPRESENTATIONS[representation].image_lead, log_snr)
        said = {"num_train_timesteps": len(log_snr), "beta_schedule": "cosine", "representation": representation}
        planner = TrajectoryPlanner(
            exact_trajectories(spectrum, scheduler, path),
            said | {"fingerprint": name},
            PlanCriterionSettings(criterion="trajectory"),
        )
        grid = timestep_grid(60, spacing="uniform_log_snr", start=start, log_snr=log_snr)
        heatmap = exact_heatmap(spectrum, scheduler, grid, representation=representation)
        heatmap |= {"model_type": "baseline" if num_scales == 1 else "dual"}

        def measure(path: Path, solver: str, log_snr=log_snr, representation=representation) -> dict[str, float]:
            points = torch.from_numpy(log_snr[np.array(path.points)])
            points[-1] = math.inf
            points = points if path.num_scales == 2 else points[:, 0]
            law = solver_output(spectrum, points, solver, representation)
            return {"distance": w2_squared(spectrum, law).item()}

        rows += compare(name, planner, heatmap, settings, measure)
    return rows


def trained(settings: TrainedRankSettings) -> list[dict[str, Any]]:
    """Rows of a network."""
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    trajectories, said = load_trajectories(settings.trajectories)
    heatmap = load_heatmap(settings.heatmap)
    if {said["fingerprint"], heatmap["fingerprint"]} != {loaded.fingerprint}:
        raise ValueError("The trajectories, the heatmap and the checkpoint must be of the same weights.")
    planner = TrajectoryPlanner(trajectories, said, PlanCriterionSettings(criterion="trajectory"))
    shapes = scale_shapes(loaded.model.num_scales, loaded.config["channels"], loaded.side)
    source = SeededNoise(image_seeds(settings.noise_seed, settings.num_images))
    noise = tuple(source.draw(shape, device) for shape in shapes)
    precision = resolve_precision(device, settings.precision)

    def run(path: Path, solver: str) -> torch.Tensor:
        with autocast(device, precision):
            return sample(loaded.denoise, loaded.scheduler, path, noise, solver=make_solver(solver)).images[0].double()

    ends = run(Path(trajectories.points.tolist(), "lines", {}), "dpmpp_2m")

    metric = None
    if settings.score_images:
        real = cli.load_training_images(settings, loaded.config).pixels
        metric = SlicedWasserstein(real, settings.score_images, device=device)

    def measure(path: Path, solver: str) -> dict[str, float]:
        found = {"distance": (run(path, solver) - ends).square().flatten(1).sum(1).mean().item()}
        if metric is None:
            return found
        options = (settings.noise_seed, settings.score_images, settings.batch_size, precision, metric, device)
        return found | {"score": score(loaded, path, *options, make_solver(solver))}

    return compare(loaded.config["model_type"], planner, heatmap, settings, measure)


def interval(costs: np.ndarray, distances: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Spearman's ρ, and the ends of its 95 % interval."""
    draws = rng.integers(len(costs), size=(REPLICATES, len(costs)))
    replicates = [spearmanr(costs[draw], distances[draw]).statistic for draw in draws]
    low, high = np.nanquantile(replicates, [0.025, 0.975])
    return spearmanr(costs, distances).statistic, low, high


def report(rows: Sequence[dict[str, Any]], title: str, seed: int) -> str:
    """Markdown: ρ and regret of every criterion by model, solver and number of calls; of scores too, where they are."""
    said = f"ρ [95 % interval] ×regret. {len({row['path'] for row in rows})} paths."
    parts = [f"# {title}", said]
    for against in ("distance", "score"):
        if against in rows[0]:
            criteria = CRITERIA if against == "distance" else (*CRITERIA, "distance")
            parts += [f"Against the {against}:", markdown_table(ranks(rows, against, criteria, seed))]
    return "\n\n".join(parts)


def ranks(rows: Sequence[dict[str, Any]], against: str, criteria: Sequence[str], seed: int) -> list[dict[str, str]]:
    """The lines of a table."""
    table = []
    for key in dict.fromkeys((row["model"], row["solver"], row["nfe"]) for row in rows):
        among = [row for row in rows if (row["model"], row["solver"], row["nfe"]) == key]
        distances = np.array([float(row[against]) for row in among])
        line = dict(zip(("model", "solver", "calls"), map(str, key), strict=True))
        line[f"least, median {against}"] = f"{distances.min():.3g}, {np.median(distances):.3g}"
        for criterion in criteria:
            costs = np.array([float(row[criterion]) for row in among])
            rho, low, high = interval(costs, distances, np.random.default_rng(seed))
            regret = distances[costs.argmin()] / distances.min()
            line[criterion] = f"{rho:+.3f} [{low:+.2f}, {high:+.2f}] ×{regret:.3g}"
        table.append(line)
    return table


def draw(rows: Sequence[dict[str, Any]], file: str) -> None:
    """What every criterion says of paths of the second solver, or the only one, against how far samples are."""
    solver = list(dict.fromkeys(row["solver"] for row in rows))[:2][-1]
    calls = sorted({row["nfe"] for row in rows})
    chosen = rows[-1]["model"], solver, calls[len(calls) // 2]
    among = [row for row in rows if (row["model"], row["solver"], row["nfe"]) == chosen]
    distances = np.array([float(row["distance"]) for row in among])
    costs = {criterion: np.array([float(row[criterion]) for row in among]) for criterion in CRITERIA}
    rho = {criterion: spearmanr(values, distances).statistic for criterion, values in costs.items()}
    points = {criterion: (values, distances) for criterion, values in costs.items()}
    title = "{}, {}, {} calls".format(*chosen)
    plot_criteria(points, [row["offset"] for row in among], file, title, rho, "distance of samples, x² per image")


def main() -> None:
    """Compare, write the rows, the table and the figure."""
    command, settings = parse_args()
    rows = {"gaussian": gaussian, "trained": trained}[command](settings)
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    write_csv(f"{settings.output}.csv", rows)
    what = {"gaussian": "Gaussian images", "trained": "a trained network"}[command]
    print_report(
        report(rows, f"Criteria against the distance of samples: {what}", settings.seed), f"{settings.output}.md"
    )
    draw(rows, f"{settings.output}.png")


if __name__ == "__main__":
    cli.run_stage(main)
