"""Error maps without a network: do local score machines predict what is measured of one better than Gaussian images?

    python experiments/local_maps.py trained --checkpoint FILE --ema --num_known 500 --windows 3 5 9 \\
        --output results/local_maps/cats
    python experiments/local_maps.py trained --checkpoint FILE --heatmap FILE --machines els bbels --output NAME
    python experiments/local_maps.py gaussian --output results/local_maps/gaussian     # a control, without files

Denoising errors of a dual model on a grid of pairs of timesteps, and those of denoisers that know --num_known of its
training images and nothing else: Gaussian images of their variances, in closed form and, as their denoiser, on the same
images as the network; their ideal denoiser; and the local score machines of the pair, each with each of --windows, in
blocks of 2x2 pixels. Windows are given and not fitted, as a fit would know the map that it is to predict. The network
and all denoisers see the same images with the same noise. A denoiser that knows an image finds it, so that no known
image is measured: measured are images held out of training, or with --on train some of the training, which are left out
of those known. With --heatmap the map of the network is read from that file, at about even lines of it, and is then of
other images than the rest.

On every map the best path of --nfe steps is sought (the KL path of weight --weight, over --lines lines even in log SNR,
between which maps are interpolated). The predicted path is judged by the measured map: its excess is the cost there
over that of the best path, less 1. The best diagonal of the measured map stands beside it. Errors are those of images
clamped to [-1, 1], where there are such.

`gaussian`: the network is the exact denoiser of Gaussian images, so that the closed form must be right, and local
machines can only be as good as --num_known images allow.

Writes OUTPUT.csv (a row per predictor and number of steps), OUTPUT.md, OUTPUT_maps.png and OUTPUT_paths.png.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(FilePath(__file__).resolve().parent.parent))

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, DataSettings, HardwareSettings
from data import to_float
from evaluation.results_table import write_csv
from figures.maps import plot_maps
from figures.paths import plot_path_comparison
from images.representation import REPRESENTATIONS
from paths.dynamic_programme import Cells
from paths.optimal import kl_path, kl_step_cost, path_cost
from paths.path import GRID_SPACINGS, Path, path_from_cells, timestep_grid
from planning.error_map import error_map
from planning.map_file import load_heatmap
from planning.map_paths import KLProblem, kl_lines, path_mses, representation_of
from planning.regimes import seen_range
from runtime.device import autocast, resolve_precision, select_device
from runtime.reports import markdown_table, print_report
from runtime.settings import option, parse_command
from scheduler import DDIMScheduler
from study import CallsSettings, noisiest_timestep
from truth.gaussian import GaussianDenoiser, ImageVariances, Spectrum, exact_heatmap
from truth.ideal import EmpiricalDenoiser
from truth.local import BORDERS, MACHINES
from truth.local_pair import LocalPairDenoiser

MEASURED, DIAGONAL = "network", "network, diagonal"
CLOSED_FORM, GAUSSIAN, IDEAL = "Gaussian, closed form", "Gaussian denoiser", "ideal"
SCALES = {"64": "fine", "32": "coarse"}


@dataclass(frozen=True, kw_only=True)
class LocalMapSettings(CallsSettings, HardwareSettings):
    """Which maps are predicted from how many images, and which paths are sought on them."""

    num_images: int = option(16, "images measured", parse=cli.positive_int)
    num_known: int = option(500, "images that predictors know", parse=cli.positive_int)
    grid: int = option(8, "grid lines per axis", parse=cli.positive_int)
    grid_spacing: str = option("uniform_t", "of the grid lines", choices=GRID_SPACINGS)
    machines: tuple[str, ...] = option(MACHINES, choices=MACHINES, nargs="+")
    windows: tuple[int, ...] = option((3, 5, 9), "sides in blocks, odd", parse=cli.positive_int, nargs="+", metavar="P")
    borders: str = option("zeros", "of the local machines", choices=BORDERS)
    nfe: tuple[int, ...] = option((6, 10, 18), "steps of the paths", parse=cli.positive_int, nargs="+")
    weight: float = option(1.0, "exponent p of the KL criterion, 0 to 1", parse=cli.unit_interval)
    lines: int = option(60, "per axis, on which paths are sought", parse=cli.positive_int)
    batch_size: int = option(64, "samples per call", parse=cli.positive_int)
    memory_mib: int | None = option(None, "of arrays of local machines (by the device)", parse=cli.positive_int)
    seed: int = option(42, "choice of images, and noise", parse=cli.seed)

    def check(self) -> None:
        super().check()
        even = [side for side in self.windows if side % 2 == 0]
        if even:
            raise ValueError(f"--windows {even[0]} has no middle; windows are odd")
        if self.borders == "circular" and "bbels" in self.machines:
            raise ValueError("--borders circular cut no window, so that bbels would be els; choose --machines ls els")


@dataclass(frozen=True, kw_only=True)
class TrainedMapSettings(LocalMapSettings, CheckpointSettings, DataSettings):
    """The network whose map is predicted."""

    heatmap: str | None = option(None, "read the map of the network from this file", metavar="FILE")
    on: str = option("held_out", "images measured", choices=("held_out", "train"))


@dataclass(frozen=True, kw_only=True)
class GaussianMapSettings(LocalMapSettings):
    """Gaussian images in place of a network's."""

    resolution: int = option(16, "of the images, with the power law", parse=cli.positive_int)
    channels: int = option(1, "of the images", parse=cli.positive_int)
    representation: str = option("overcomplete", choices=tuple(REPRESENTATIONS))


class Predicted(NamedTuple):
    """The map of a network or of what predicts it, and how long it took."""

    content: dict[str, Any]
    seconds: float


class Planner:
    """Best paths of all maps on the same lines, so that the costs of one map compare to the last bit."""

    def __init__(self, content: dict[str, Any], log_snr: np.ndarray, weight: float, num_lines: int):
        self.t_grid = kl_lines(content, log_snr, None, int(content["t_grid"][-1]), num_lines)
        self.log_snr, self.weight = log_snr[self.t_grid], weight
        self.ahead = representation_of(content).image_lead

    def _problem(self, content: dict[str, Any], log_snr_32: np.ndarray | None = None) -> KLProblem:
        return KLProblem.of(content, self.weight).on_lines(self.log_snr, log_snr_32)

    def best(self, content: dict[str, Any], nfe: int) -> Cells:
        """The best path of a map, in lines of the two scales."""
        problem = self._problem(content)
        return kl_path(*problem[:3], nfe, self.weight, bands=problem.bands)[0]

    def cost(self, content: dict[str, Any], cells: Cells) -> float:
        """What a path costs on a map."""
        problem = self._problem(content)
        return path_cost(
            functools.partial(kl_step_cost, *problem[:3], weight=self.weight, bands=problem.bands), np.array(cells)
        )

    def best_diagonal(self, content: dict[str, Any], nfe: int) -> tuple[np.ndarray, float]:
        """Log SNRs `[N + 1, 2]` of the best path with tied clocks, and its cost; the coarse one waits at the end."""
        tied = np.minimum(self.log_snr + self.ahead, self.log_snr[-1])
        problem = self._problem(content, tied)
        cells, cost = kl_path(
            *problem[:3], nfe, self.weight, bands=problem.bands, diagonal=True, snr_32=np.exp(tied)
        )  # fmt: skip
        lines = [i for i, _ in cells]
        return np.stack([self.log_snr[lines], tied[lines]], 1), cost

    def points(self, cells: Cells) -> np.ndarray:
        """The log SNRs `[N + 1, 2]` of a path."""
        return self.log_snr[np.array(cells)]


def parse_args() -> tuple[str, LocalMapSettings]:
    """Which of the two, trained or gaussian, and its settings, from the flags."""
    commands = {
        "trained": (TrainedMapSettings, "against the map of a dual model"),
        "gaussian": (GaussianMapSettings, "against the exact denoiser of Gaussian images"),
    }
    return parse_command(commands, __doc__)


def predictors(
    settings: LocalMapSettings, scheduler: DDIMScheduler, known: torch.Tensor, variances: ImageVariances
) -> dict[str, Callable]:
    """The denoisers whose errors are measured beside those of a network, by name; known: `[N, C, H, W]`."""
    device = known.device
    models = {
        GAUSSIAN: GaussianDenoiser(scheduler, *variances),
        IDEAL: EmpiricalDenoiser(scheduler, known),
    }
    for machine in settings.machines:
        for side in settings.windows:
            models[f"{machine} {side}"] = LocalPairDenoiser(
                scheduler, known, machine, side, settings.borders, settings.memory_mib
            )
    return {name: model.to(device).denoise for name, model in models.items()}


def predicted_maps(
    settings: LocalMapSettings,
    scheduler: DDIMScheduler,
    network: Callable | dict[str, Any],  # a denoiser of pairs, or its map
    images: torch.Tensor,  # [B, C, H, W] in [-1, 1], measured
    known: torch.Tensor,  # [N, C, H, W], none of them measured
    t_grid: Sequence[int],  # [n]
    precision: str = "fp32",  # of the network
    model: tuple[Spectrum, ImageVariances] | None = None,  # the Gaussian images; None for those of the variances known
) -> dict[str, Predicted]:
    """The maps of the network and of all that predicts it, in this order, by name."""
    device = images.device

    def measured(denoise: Callable, **options: Any) -> Predicted:
        began = time.perf_counter()
        content = error_map(
            denoise,
            scheduler,
            images,
            t_grid,
            maps="mse",
            seed=settings.seed,
            batch_size=settings.batch_size,
            **options,
        )
        return Predicted(content, time.perf_counter() - began)

    if isinstance(network, dict):
        maps = {MEASURED: Predicted(network, 0.0)}
    else:
        maps = {MEASURED: measured(network, autocast=functools.partial(autocast, device, precision))}
    spectrum, variances = model or Spectrum.of_images(known.cpu())
    began = time.perf_counter()
    exact = exact_heatmap(spectrum, scheduler, t_grid, images.shape[1])
    maps[CLOSED_FORM] = Predicted(exact, time.perf_counter() - began)
    return maps | {
        name: measured(denoise) for name, denoise in predictors(settings, scheduler, known, variances).items()
    }


def rows_of(
    maps: Mapping[str, Predicted], log_snr: np.ndarray, settings: LocalMapSettings
) -> tuple[list[dict[str, Any]], dict[str, dict[int, Path]]]:
    """A row for every predictor and number of steps, the network itself first, and the best paths on every map."""
    network = maps[MEASURED].content
    planner = Planner(network, log_snr, settings.weight, max(settings.lines, 2 * max(settings.nfe)))
    rows, paths = [], {name: {} for name in maps}
    for nfe in settings.nfe:
        best = planner.best(network, nfe)
        least = planner.cost(network, best)
        for name, (content, seconds) in maps.items():
            cells = planner.best(content, nfe)
            paths[name][nfe] = path_from_cells(cells, planner.t_grid, name, {})
            row = {"predictor": name, "nfe": nfe} | agreement(content, network)
            row |= lead_of(planner.points(cells), planner.ahead)
            row |= {"distance": distance(planner.points(cells), planner.points(best))}
            cost = planner.cost(network, cells)
            rows.append(row | {"cost": cost, "excess": cost / least - 1, "seconds": seconds})
        points, cost = planner.best_diagonal(network, nfe)
        row = dict.fromkeys(rows[-1]) | {"predictor": DIAGONAL, "nfe": nfe} | lead_of(points, planner.ahead)
        row |= {"distance": distance(points, planner.points(best))}
        rows.append(row | {"cost": cost, "excess": cost / least - 1})
    return rows, paths


def agreement(content: dict[str, Any], network: dict[str, Any]) -> dict[str, float]:
    """Spearman's ρ with the errors of the network over the cells, and how far their logarithms are off, by scale.

    `log_error` is the mean of the absolute difference, `log_bias` that of the difference itself.
    """
    found = {}
    for scale, one, other in zip(SCALES, path_mses(content), path_mses(network), strict=False):
        one, other = content[one].flatten().numpy(), network[other].flatten().numpy()
        off = np.log(one / other)
        found |= {f"rho_{scale}": float(spearmanr(one, other).statistic)}
        found |= {f"log_error_{scale}": float(np.abs(off).mean()), f"log_bias_{scale}": float(off.mean())}
    return found


def lead_of(points: np.ndarray, ahead: float) -> dict[str, Any]:
    """How far, in log SNR, the coarse scale leads the diagonal of the image at the inner of the points `[N + 1, 2]`."""
    lead = (points[:, 1] - points[:, 0] - ahead)[1:-1]
    counts = {"points_ahead": int((lead > 1e-9).sum()), "points_behind": int((lead < -1e-9).sum())}
    if not len(lead):  # A single step has no inner points.
        return dict.fromkeys(("lead_mean", "lead_min", "lead_max")) | counts
    return {"lead_mean": float(lead.mean()), "lead_min": float(lead.min()), "lead_max": float(lead.max())} | counts


def distance(points: np.ndarray, others: np.ndarray) -> float | None:
    """The mean difference of the log SNRs of two paths of equally many points, over inner points and scales."""
    return float(np.abs(points - others)[1:-1].mean()) if len(points) > 2 else None


def report(rows: Sequence[dict[str, Any]], title: str, said: str) -> str:
    """Markdown: how well every map agrees with the measured one, and what its paths are worth there."""
    first = rows[0]["nfe"]
    agreements = [
        {"map of": row["predictor"]}
        | {f"ρ, {word}": f"{row[f'rho_{scale}']:.3f}" for scale, word in SCALES.items()}
        | {
            f"Δ log, {word}": f"{row[f'log_error_{scale}']:.3f} ({row[f'log_bias_{scale}']:+.3f})"
            for scale, word in SCALES.items()
        }
        | {"seconds": f"{row['seconds']:.1f}"}
        for row in rows
        if row["nfe"] == first and row["predictor"] != DIAGONAL
    ]
    parts = [
        f"# {title}",
        said,
        "Errors over the grid against those of the network: Spearman's ρ, and the mean absolute difference of the "
        f"logarithms (the mean difference).\n\n{markdown_table(agreements)}",
    ]
    for nfe in dict.fromkeys(row["nfe"] for row in rows):
        table = [
            {
                "best path of": row["predictor"],
                "lead of coarse, log SNR": _lead(row),
                "inner points ahead, behind": f"{row['points_ahead']}, {row['points_behind']}",
                "off, log SNR": "–" if row["distance"] is None else f"{row['distance']:.2f}",
                "excess": f"{row['excess']:+.2%}",
            }
            for row in rows
            if row["nfe"] == nfe
        ]
        parts.append(f"Paths of {nfe} steps on the map of the network:\n\n{markdown_table(table)}")
    return "\n\n".join(parts)


def _lead(row: dict[str, Any]) -> str:
    if row["lead_mean"] is None:
        return "–"
    return f"{row['lead_mean']:+.2f} ({row['lead_min']:+.2f} to {row['lead_max']:+.2f})"


def draw(maps: Mapping[str, Predicted], paths: dict[str, dict[int, Path]], log_snr: np.ndarray, output: str) -> None:
    """The maps of both scales, a row for each predictor, and the best paths of the middle number of steps."""
    network = maps[MEASURED].content
    shown, shared = {}, {}
    for k, word in enumerate(SCALES.values()):
        names = {f"{name}, {word}": content[path_mses(content)[k]] for name, (content, _) in maps.items()}
        shown |= names
        shared[f"{word} error, units of $x^2$"] = tuple(names)
    t_grid, log_snr_grid = network["t_grid"].numpy(), network["log_snr_grid"].numpy()
    plot_maps(shown, log_snr_grid, t_grid, f"{output}_maps.png", "denoising errors", shared=shared)
    numbers = sorted(next(iter(paths.values())))
    nfe = numbers[len(numbers) // 2]
    chosen = {name: found[nfe] for name, found in paths.items()}
    plot_path_comparison(chosen, log_snr, f"{output}_paths.png", f"best paths of {nfe} steps on each map")


def write(maps: Mapping[str, Predicted], log_snr: np.ndarray, settings: LocalMapSettings, title: str) -> None:
    """Rows, report and figures."""
    rows, paths = rows_of(maps, log_snr, settings)
    FilePath(settings.output).parent.mkdir(parents=True, exist_ok=True)
    write_csv(f"{settings.output}.csv", rows)
    said = (
        f"{settings.num_images} images measured, {settings.num_known} others known; {settings.grid} lines per axis, "
        f"borders {settings.borders}, weight {settings.weight:g}, seed {settings.seed}."
    )
    print_report(report(rows, title, said), f"{settings.output}.md")
    draw(maps, paths, log_snr, settings.output)


def trained(settings: TrainedMapSettings) -> None:
    """The study of a network."""
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_pixels("local_maps.py")
    loaded.require_means("local_maps.py")
    if loaded.model.num_predictions != 2 or loaded.model.one_clock or loaded.is_cold:
        raise ValueError(
            f"{settings.checkpoint} is a '{loaded.config['model_type']}' model; pass one that predicts two scales with "
            "two clocks (train_lift.py)."
        )
    if seen_range(loaded.config, loaded.scheduler) is not None:
        raise ValueError(
            f"{settings.checkpoint} was not trained on all pairs of timesteps, so that its map says little elsewhere; "
            "pass one that was."
        )
    log_snr = loaded.scheduler.log_snr.cpu().numpy()
    network, t_grid = loaded.denoise, None
    if settings.heatmap:
        network = thinned(load_heatmap(settings.heatmap), settings, loaded)
        t_grid = network["t_grid"].tolist()
    else:
        t_grid = grid_lines(settings, loaded.scheduler)
    images, known = chosen_images(settings, loaded, device)
    precision = resolve_precision(device, settings.precision)
    maps = predicted_maps(settings, loaded.scheduler, network, images, known, t_grid, precision)
    weights = "EMA" if settings.ema else "raw"
    where = "held-out" if settings.on == "held_out" else "training"
    write(maps, log_snr, settings, f"Error maps of a network predicted without it: {weights} weights, {where} images")


def grid_lines(settings: LocalMapSettings, scheduler: DDIMScheduler) -> list[int]:
    """The timesteps of the grid, from the first whose log SNR is at least -10."""
    log_snr = scheduler.log_snr.cpu().numpy()
    start = noisiest_timestep(scheduler)
    return timestep_grid(settings.grid, len(log_snr), settings.grid_spacing, start, log_snr).tolist()


def chosen_images(
    settings: TrainedMapSettings, loaded: LoadedModel, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images measured and images known, floats on the device, none of the first among the second."""
    train, held_out = cli.load_image_parts(settings, loaded.config)
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(train))
    if settings.on == "held_out":
        if held_out is None:
            raise ValueError(f"{settings.checkpoint} was trained on all its images; pass --on train.")
        most, first, pixels = len(held_out), 0, held_out.pixels
        measured = rng.permutation(len(held_out))[: settings.num_images]
    else:
        most, first, pixels = len(train) - 2, settings.num_images, train.pixels
        measured = order[: settings.num_images]
    if settings.num_images > most:
        raise ValueError(f"--num_images is {settings.num_images} but must be at most {max(most, 0)}.")
    if not 2 <= settings.num_known <= len(train) - first:
        raise ValueError(
            f"--num_known is {settings.num_known} but must be 2 to {len(train) - first}, the images left to know."
        )
    known = order[first : first + settings.num_known]
    parts = (pixels[np.sort(measured)], train.pixels[np.sort(known)])
    return tuple(to_float(torch.from_numpy(part)).to(device) for part in parts)


def thinned(heatmap: dict[str, Any], settings: TrainedMapSettings, loaded: LoadedModel) -> dict[str, Any]:
    """The map of a heatmap file on about even lines of its grid; raises ValueError for one of other weights."""
    if heatmap["fingerprint"] != loaded.fingerprint:
        raise ValueError(f"{settings.heatmap} is not of these weights of {settings.checkpoint}; measure it anew.")
    if "mse_32" not in heatmap:
        raise ValueError(f"{settings.heatmap} holds no denoising errors; compute it again with --maps mse.")
    there = len(heatmap["t_grid"])
    if settings.grid > there:
        raise ValueError(f"--grid is {settings.grid} but {settings.heatmap} has {there} lines.")
    lines = torch.linspace(0, there - 1, settings.grid, dtype=torch.float64).round().long()
    kept = {name: heatmap[name][lines] for name in ("t_grid", "snr_grid", "log_snr_grid")}
    kept |= {name: heatmap[name][lines][:, lines] for name in (*path_mses(heatmap), "mse_64", "mse_32", "mse_64_low")}
    return kept | {"representation": representation_of(heatmap).name}


def gaussian(settings: GaussianMapSettings) -> None:
    """The control: Gaussian images, of which the network knows everything."""
    device = select_device(settings.device)
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", representation=settings.representation)
    model = gaussian_images(settings.resolution, settings.channels)
    denoiser = GaussianDenoiser(scheduler, *model[1])
    drawn = denoiser.draw(settings.num_images + settings.num_known, torch.Generator().manual_seed(settings.seed))
    images, known = drawn.to(device).split([settings.num_images, settings.num_known])
    log_snr = scheduler.log_snr.numpy()
    maps = predicted_maps(
        settings, scheduler, denoiser.to(device).denoise, images, known, grid_lines(settings, scheduler), model=model
    )
    title = (
        f"Error maps of Gaussian images, {settings.representation} pair, {settings.resolution}x{settings.resolution}"
    )
    write(maps, log_snr, settings, title)


def gaussian_images(resolution: int, channels: int) -> tuple[Spectrum, ImageVariances]:
    """Images of the power law, as a spectrum and as what their denoiser takes."""
    spectrum, half = Spectrum.power_law(resolution, channels), resolution // 2
    low, high = spectrum.low.view(channels, half, half), spectrum.high.view(3, channels, half, half)
    mean = torch.zeros(channels, resolution, resolution, dtype=torch.float64)
    return spectrum, ImageVariances(low, high, torch.eye(channels, dtype=torch.float64), mean)


def main() -> None:
    """Measure, predict, compare, write."""
    command, settings = parse_args()
    {"trained": trained, "gaussian": gaussian}[command](settings)


if __name__ == "__main__":
    cli.run_stage(main)
