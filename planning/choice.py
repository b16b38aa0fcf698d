"""From the flags of a stage to the path it samples along.

Types of paths are names, such as `diagonal`, or families with parameters:

    cascade:L[,K]   the coarse scale first, in K steps (half of all), to log SNR L (inf: timestep 0); then the fine one
    cascade:best    the cascade of least KL divergence on the heatmap
    shift:D         the diagonal of --spacing with λ_32 = λ_64 + D, λ = log SNR; D > 0: the coarse scale is ahead
    lead:K          that diagonal with the coarse scale K points ahead
    heuristic:F     that diagonal with t_32 = F t_64, 0 < F <= 1
    schedule:FILE   the path of a schedule file
"""

import argparse
import math
import re
import sys
from pathlib import Path as FilePath
from typing import NamedTuple

import numpy as np
import torch

import cli
from checkpoint import MODEL_CLASSES, LoadedModel
from diffusion.sampler import COARSE_FEEDS, coarse_feed
from images.representation import REPRESENTATIONS, Overcomplete
from paths.families import cascade, diagonal, heuristic, lead, log_snr_shift
from paths.map_interpolation import interpolate_map, nearest_in_row
from paths.optimal import best_cascade, find_optimal_path_n_steps_lambda, kl_path
from paths.path import SPACINGS, Path, path_from_cells, timestep_grid
from paths.refine import Refined, refine_path
from paths.schedule_file import load_schedule
from planning.error_map import CHAIN_RULE_FACTORS, CLIPPED_MSES, MSES, NORMALISATIONS, load_heatmap, published_errors
from planning.regimes import off_regime_note, seen_range

# Optima on a heatmap.
OPTIMA = ("dp_64", "dp_total", "kl", "kl_diagonal")
PATH_TYPES = ("diagonal", "image_diagonal", *OPTIMA)
PATH_FAMILIES = {
    "cascade": "LOG_SNR[,STEPS] or best",
    "shift": "LOG_SNR",
    "lead": "POINTS",
    "heuristic": "FACTOR in (0, 1]",
    "schedule": "FILE",
}
NO_CASCADE = (
    "cascade:best needs a model that was trained on all pairs of timesteps, and this one was not; use --path_type kl."
)
# Their scales share one timestep.
ONE_CLOCK = ("baseline", "shared_t")
# What a heatmap's published paths were found with, beside the map itself.
PATH_SETTINGS = ("factor", "normalisation", "num_steps", "max_jump")


class PathType(NamedTuple):
    """A type of path and the parameters of a family, which are numbers, `best` or a file."""

    name: str
    parameters: tuple[float | int | str, ...] = ()

    def __str__(self) -> str:
        words = (word if isinstance(word, str) else repr(word).removesuffix(".0") for word in self.parameters)
        return ":".join([self.name, ",".join(words)] if self.parameters else [self.name])

    @property
    def needs_heatmap(self) -> bool:
        """Whether the path is an optimum on an error map."""
        return self.name in OPTIMA or (self.name == "cascade" and self.parameters == ("best",))

    @property
    def file_name(self) -> str:
        """The type as a part of file names: letters, digits, `_`, `-`, `.` and `+`; of a file its name alone."""
        text = f"{self.name}_{FilePath(self.parameters[0]).stem}" if self.name == "schedule" else str(self)
        return re.sub(r"[^\w.+-]+", "_", text)


def parse_path_type(text: str) -> PathType:
    """The type of path that a text such as `dp_64` or `cascade:2,6` names. Raises ValueError for any other text."""
    name, colon, words = text.partition(":")
    if not colon and name in PATH_TYPES:
        return PathType(name)
    if not colon or name not in PATH_FAMILIES:
        known = ", ".join([*PATH_TYPES, *(f"{family}:{words}" for family, words in PATH_FAMILIES.items())])
        raise ValueError(f"'{text}' is no type of path; choose one of {known}")
    try:
        parameters = _parameters(name, words)
    except ValueError as error:
        raise ValueError(f"'{text}' is no type of path: {name} needs {PATH_FAMILIES[name]}") from error
    return PathType(name, parameters)


def _parameters(family: str, words: str) -> tuple[float | int | str, ...]:
    if family == "schedule" and words:
        return (words,)
    if family == "cascade" and words == "best":
        return (words,)
    if family == "lead":
        return (int(words),)
    first, *rest = words.split(",")
    # -0 and 0 are one number, and have one name.
    value, steps = float(first) + 0.0, tuple(map(int, rest))
    good = {
        "cascade": value > -math.inf and len(rest) <= 1 and min(steps, default=1) >= 1,
        "shift": math.isfinite(value) and not rest,
        "heuristic": 0 < value <= 1 and not rest,
    }
    if not good.get(family):
        raise ValueError(words)
    return (value, *steps)


def path_type(text: str) -> str:
    """Parse the text of `--path_type`; of several ways to write a type there is one that comes out."""
    try:
        return str(parse_path_type(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def why_not(model_type: str, path_type: str) -> str:
    """Why a type of model cannot follow a type of path, as a sentence, or an empty text.

    Raises what `parse_path_type` and, for a schedule, `load_schedule` raise.
    """
    kind, model = parse_path_type(path_type), MODEL_CLASSES[model_type]
    if kind.name == "schedule":
        path = load_schedule(kind.parameters[0])
        two_clocks = any(len(set(point)) > 1 for point in path.points)
        if path.num_scales == model.num_scales and not (two_clocks and model_type in ONE_CLOCK):
            return ""
        return (
            f"Schedule {kind.parameters[0]} moves {path.num_scales} scale(s){' by two clocks' if two_clocks else ''}, "
            f"which a '{model_type}' model cannot follow; pass one made for it."
        )
    one_clock = ("diagonal", "kl_diagonal") if model.num_scales == 1 else ("diagonal",)
    if kind.name not in one_clock and model_type in ONE_CLOCK:
        return (
            f"--path_type {path_type} needs a model with two clocks, but this one is '{model_type}'; use --path_type "
            f"{' or '.join(one_clock)}."
        )
    if kind.needs_heatmap and kind.name != "dp_64" and model.num_predictions < model.num_scales:
        return (
            f"--path_type {path_type} counts the error of the coarse prediction, which a '{model_type}' model does not "
            "make; use dp_64, or a path that needs no heatmap, such as cascade:2."
        )
    return ""


def add_path_arguments(parser: argparse.ArgumentParser, several_steps: bool = False) -> None:
    """The flags that decide a path, other than its type; --num_steps gives a list where there may be several."""
    group = parser.add_argument_group("path")
    steps = {"nargs": "+", "default": [18]} if several_steps else {"default": 18}
    group.add_argument("--num_steps", type=cli.positive_int, help="steps, each one network call (18)", **steps)
    group.add_argument("--spacing", choices=SPACINGS, default="uniform_t", help="of the diagonal (uniform_t)")
    add_criterion_arguments(parser)


def add_criterion_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that decide what an optimal path minimises."""
    group = parser.add_argument_group("criterion")
    group.add_argument("--max_jump", type=cli.positive_int, default=5, help="cells a dp step may move per axis (5)")
    group.add_argument("--factor", choices=tuple(CHAIN_RULE_FACTORS), default="B", help="chain-rule factor (B)")
    text = "what a dp error is divided by: pixels squared, dimensions, or nothing (published)"
    group.add_argument("--normalisation", choices=tuple(NORMALISATIONS), default="published", help=text)
    text = "of the kl paths: 0 is KL, 1 weighs log SNR evenly (1)"
    group.add_argument("--kl_weight", type=cli.unit_interval, default=1.0, help=text)


def add_path_type_argument(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """`--path_type`, a list where there may be several."""
    families = "; ".join(f"{name}:{words}" for name, words in PATH_FAMILIES.items())
    text = f"{', '.join(PATH_TYPES)}; {families} (diagonal)"
    options = {"nargs": "+", "default": ["diagonal"]} if several else {"default": "diagonal"}
    parser.add_argument("--path_type", type=path_type, metavar="TYPE", help=text, **options)


def add_one_path_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a stage that samples along one path, for `path_of_flags`."""
    add_path_type_argument(parser)
    parser.add_argument("--schedule", help="follow the path of this schedule file instead of --path_type")
    text = "for dp, kl and cascade:best (results/heatmap_30_[{model}_]{epoch}ep[_ema].pth)"
    parser.add_argument("--heatmap", help=text)
    text = "coarse image that a model reads and does not predict: of its clean or of its noisy fine image (x0)"
    parser.add_argument("--coarse_from", choices=COARSE_FEEDS, default="x0", help=text)
    add_path_arguments(parser)


def path_of_flags(args: argparse.Namespace, loaded: LoadedModel) -> tuple[Path, str]:
    """The path that the flags of `add_one_path_arguments` name, and what to call it in the name of a file.

    Prints a warning if it leads far from what the model was trained on. Raises what `choose_path` raises.
    """
    config = loaded.config
    file = heatmap_file("results", config["epoch"], loaded.weights, model_type=config["model_type"])
    path = choose_path(args, args.path_type, loaded, args.heatmap or file, args.schedule)
    note = off_regime_note(path, config, loaded.scheduler, coarse_feed(loaded.model, args.coarse_from))
    if note:
        print(f"warning: {note}", file=sys.stderr)
    return path, path.kind if args.schedule else parse_path_type(args.path_type).file_name


def heatmap_file(folder: str, epoch: int, weights: str, grid: int = 30, model_type: str = "dual") -> FilePath:
    """`{folder}/heatmap_{grid}_{epoch}ep.pth`, with `_ema` before the suffix for EMA weights.

    Types of models other than dual are named: `heatmap_30_single_t_400ep.pth`.
    """
    model = "" if model_type == "dual" else f"{model_type}_"
    return FilePath(folder) / f"heatmap_{grid}_{model}{epoch}ep{'_ema' if weights == 'ema' else ''}.pth"


def path_errors(
    heatmap: dict, path_type: str, factor: str, normalisation: str = "published"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """error_64 and error_32 `[n, n]` as a dp type counts them, `dp_64` without the coarse one, and log SNR `[n]`."""
    error_64, error_32 = published_errors(heatmap, factor, normalisation)
    if path_type == "dp_64":
        error_32 = torch.zeros_like(error_32)
    return error_64.numpy(), error_32.numpy(), heatmap["log_snr_grid"].numpy()


def representation_of(heatmap: dict) -> Overcomplete:
    """The representation that a heatmap is of; one that does not say is from before there was a choice."""
    return REPRESENTATIONS[heatmap.get("representation", "overcomplete")]


def path_mses(heatmap: dict) -> tuple[str, ...]:
    """The names of the three denoising errors that paths go by: clamped, as the sampler clamps, where measured."""
    return CLIPPED_MSES if CLIPPED_MSES[0] in heatmap else MSES


def beyond_seen(heatmap: dict, points: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """How far points `[..., 2]` in (fractional) timesteps are from what was trained on, in log SNR of the coarse scale.

    Zero within the range that the heatmap gives for t_64 (`seen_32`), and everywhere for one that gives none.
    """
    if "seen_32" not in heatmap:
        return np.zeros(points.shape[:-1])
    timesteps = np.arange(len(log_snr))
    finite = np.maximum(log_snr, log_snr[int(heatmap["t_grid"][0])])
    t_64, t_32 = np.moveaxis(points, -1, 0)
    least, most = (np.interp(t_64, timesteps, np.maximum(ends, finite[-1])) for ends in heatmap["seen_32"].numpy())
    here = np.interp(t_32, timesteps, finite)
    return np.maximum(np.maximum(least - here, here - most), 0)


def seen_cells(heatmap: dict, t_grid: np.ndarray, log_snr: np.ndarray) -> np.ndarray | None:
    """The cells `[n, n]` of a grid where the network was trained, at least the nearest for each t_64; None for all."""
    if "seen_32" not in heatmap:
        return None
    off = beyond_seen(heatmap, np.stack(np.meshgrid(t_grid, t_grid, indexing="ij"), -1), log_snr)
    return off <= off.min(1, keepdims=True)


def trusted(heatmap: dict, log_snr: np.ndarray) -> dict:
    """The heatmap with denoising errors where the network was trained, and elsewhere those of the nearest such t_32.

    What the errors of a network are where it was never trained says nothing about the images. A path that goes by how
    errors fall would see information lost on the way there, and count that as a gain.
    """
    t_grid = heatmap["t_grid"].numpy()
    seen = seen_cells(heatmap, t_grid, log_snr)
    if seen is None:
        return heatmap
    rows, columns = torch.arange(len(t_grid))[:, None], torch.from_numpy(nearest_in_row(seen, log_snr[t_grid]))
    changed = {name: heatmap[name][rows, columns] for name in MSES + CLIPPED_MSES if name in heatmap}
    if "mse_per_image" in heatmap:
        changed["mse_per_image"] = heatmap["mse_per_image"][:, rows, columns]
    return heatmap | changed


class KLProblem(NamedTuple):
    """What the KL paths minimise on a heatmap, as `kl_path` and `refine_path` take it.

    Weight 0 is the KL divergence of the sampler's chain from the true one and counts the errors of both scales. A
    weight p > 0 counts the bands of the fine image (docs/theory.md, section 5): the details with the error measured
    there, mse_64 - mse_64_low, and the low band with the lesser of mse_64_low and 4 mse_32, that of the prediction that
    knows more. These two are equal for a perfect denoiser. A network may leave one of them large where the other scale
    is nearly clean, and then a path would see no cost in moving the clock that it leaves unread.
    Errors are those of the clamped image, which is what the sampler goes by: at high noise that of a network's raw
    prediction can be several times the variance of the images.

    In the residual representation the scales are the bands already. That of the coarse one, summed over the image,
    counts four times and is seen at a quarter of its SNR; together that is a factor of 4^p. One clock on one scale
    sees both bands at one SNR, where the parts of their costs add up to that of the whole image.
    """

    mse_64: np.ndarray  # [n, n], totals in x-space, as the next
    mse_32: np.ndarray  # of the coarse image, or with bands a quarter of that of the low band
    snr: np.ndarray  # [n]
    weight: float
    bands: bool

    @classmethod
    def of(cls, heatmap: dict, weight: float) -> "KLProblem":
        """The problem of the mean maps of a heatmap. Raises ValueError for one without those of all its scales."""
        if "mse_64" not in heatmap:
            raise ValueError("This heatmap holds no denoising errors; compute it again with --maps all.")
        if "mse_32" not in heatmap and heatmap.get("model_type") == "baseline":
            mse_64 = heatmap[path_mses(heatmap)[0]].numpy()
            return cls(mse_64, np.zeros_like(mse_64), heatmap["snr_grid"].numpy(), weight, bands=False)
        if "mse_32" not in heatmap:
            raise ValueError(
                "This heatmap is of a model that predicts the fine image alone, and KL paths count the error of the "
                "coarse one too; use dp_64."
            )
        maps = (heatmap[name].numpy() for name in path_mses(heatmap))
        return cls.of_maps(*maps, heatmap["snr_grid"].numpy(), weight, representation_of(heatmap).name)

    @classmethod
    def of_maps(
        cls,
        mse_64: np.ndarray,
        mse_32: np.ndarray,
        mse_64_low: np.ndarray,
        snr: np.ndarray,
        weight: float,
        representation: str = "overcomplete",
    ) -> "KLProblem":
        """The same from the three maps `[n, n]` themselves."""
        if representation == "residual":
            return cls(mse_64, 4**weight * mse_32, snr, weight, bands=False)
        if weight == 0:
            return cls(mse_64, mse_32, snr, weight, bands=False)
        low = np.minimum(mse_64_low, 4 * mse_32)
        return cls(mse_64 - mse_64_low + low, low / 4, snr, weight, bands=True)

    def on_lines(self, log_snr: np.ndarray, log_snr_32: np.ndarray | None = None) -> "KLProblem":
        """The same problem with the maps interpolated to other grid lines, the coarse ones at `log_snr_32` if given."""
        maps = interpolate_map(np.stack([self.mse_64, self.mse_32]), np.log(self.snr), log_snr, log_snr_32)
        return self._replace(mse_64=maps[0], mse_32=maps[1], snr=np.exp(log_snr))


def heatmap_path(
    heatmap: dict,
    path_type: str,  # dp_64 or dp_total
    num_steps: int = 18,
    max_jump: int = 5,
    factor: str = "B",
    normalisation: str = "published",
) -> tuple[Path, float]:
    """The published optimum on a heatmap as a path through timesteps, and its cost.

    Raises ValueError if num_steps steps of at most max_jump cells do not reach the end.
    """
    errors = path_errors(heatmap, path_type, factor, normalisation)
    cells, cost = find_optimal_path_n_steps_lambda(*errors, num_steps, max_jump)
    criterion = f"{path_type}, factor {factor}, max_jump {max_jump}"
    if normalisation != "published":
        criterion += f", normalisation {normalisation}"
    if heatmap.get("of", "eps") != "eps":
        criterion += f", Jacobian of {heatmap['of']}"
    provenance = {
        "criterion": criterion,
        "cost": cost,
        "cells": [list(cell) for cell in cells],
        "heatmap_weights": heatmap.get("fingerprint"),
    }
    return path_from_cells(cells, heatmap["t_grid"].numpy(), path_type, provenance), cost


def kl_refined(
    heatmap: dict,
    log_snr: np.ndarray,  # [num_train_timesteps]
    num_steps: int,
    weight: float = 1.0,
    diagonal: bool = False,
    start: int | None = None,  # timestep of the first point; None for the noisiest of the heatmap
    end: int = 0,  # timestep at which the cost ends; the last step goes on to clean
    num_lines: int = 60,  # of the grid on which the optimum is first sought, at least 2 for each step
) -> Refined:
    """The KL optimum on a heatmap whose points may lie anywhere: on a finer grid, even in log SNR, then off it.

    The last of `points` is at `end`, that of `path` at 0 as of every path. The diagonal is that of the image: in the
    residual representation t_32 follows t_64 at λ_32 = λ_64 + log 4, as in `path.log_snr_shift`. Any other path keeps
    to where the network was trained (`seen_cells`), and goes by its errors there (`trusted`). Raises ValueError for a
    heatmap without denoising errors, one of a single scale but for the diagonal, a start that is not on the map, and
    for what `kl_path` and `refine_path` refuse.
    """
    if heatmap.get("model_type") == "baseline" and not diagonal:
        raise ValueError("This heatmap is of a model of one scale, whose points lie on the diagonal; use kl_diagonal.")
    t_grid = kl_lines(heatmap, log_snr, start, end, max(num_lines, 2 * num_steps))
    ahead = representation_of(heatmap).image_lead if diagonal else 0.0
    # Where the coarse clock would be beyond the map it waits at its end.
    log_snr_32 = np.minimum(log_snr + ahead, log_snr[end]) if ahead else log_snr
    problem = KLProblem.of(trusted(heatmap, log_snr), weight).on_lines(log_snr[t_grid], log_snr_32[t_grid])
    options = {"weight": weight, "diagonal": diagonal, "bands": problem.bands}
    seen = None if diagonal else seen_cells(heatmap, t_grid, log_snr)
    cells, _ = kl_path(*problem[:3], num_steps, **options, snr_32=np.exp(log_snr_32[t_grid]), allowed=seen)
    allowed = None
    if seen is not None:
        inner = t_grid[np.array(cells[1:-1], dtype=int).reshape(-1, 2)]
        # Where grid lines or timesteps are farther apart than the band is wide they may be off it.
        reach = beyond_seen(heatmap, inner, log_snr).max(initial=0)

        def allowed(points: np.ndarray) -> np.ndarray:
            return beyond_seen(heatmap, points + end, log_snr) <= reach

    # A schedule that begins at `end` is like any other.
    options |= {"log_snr_32": log_snr_32[end:], "allowed": allowed}
    refined = refine_path(cells, t_grid - end, *problem[:2], log_snr[end:], **options)
    grid_path = [[t + end for t in point] for point in refined.path.provenance["grid_path"]]
    provenance = refined.path.provenance | {"grid_path": grid_path, "start": int(t_grid[0]), "end": end}
    path = lift_path(refined.path, end, provenance)
    if ahead:
        points = log_snr_shift(Path([(t,) for t, _ in path.points], "diagonal", {}), ahead, log_snr).points
        path = Path(points, path.kind, provenance)
    return refined._replace(points=refined.points + end, path=path)


def kl_cascade(
    heatmap: dict,
    log_snr: np.ndarray,  # [num_train_timesteps]
    num_steps: int,
    weight: float = 1.0,
    start: int | None = None,  # as of `kl_refined`, and so is end
    end: int = 0,
    num_lines: int = 200,  # of the grid, at least 2 for each step
) -> Path:
    """The cascade of least KL divergence on a heatmap, over a grid of many lines even in log SNR.

    Its provenance has the cost on that grid, `first_steps` of the coarse scale, and the timestep `remaining` at which
    it waits, also as `waits_at_log_snr`. Raises ValueError as `kl_refined` does, for a network that was not trained on
    all pairs of timesteps, and for what `best_cascade` refuses.
    """
    if "seen_32" in heatmap:
        raise ValueError(NO_CASCADE)
    t_grid = kl_lines(heatmap, log_snr, start, end, max(num_lines, 2 * num_steps))
    problem = KLProblem.of(heatmap, weight).on_lines(log_snr[t_grid])
    cells, cost = best_cascade(*problem[:3], num_steps, weight, bands=problem.bands)
    waits = cells[-2][1]
    provenance = {
        "cost": cost,
        "weight": weight,
        "start": int(t_grid[0]),
        "end": end,
        "first_steps": sum(i == 0 for i, _ in cells) - 1,
        "remaining": int(t_grid[waits]),
        "waits_at_log_snr": float(log_snr[t_grid[waits]]),
    }
    points = [(int(t_grid[i]), int(t_grid[j])) for i, j in cells[:-1]]
    return Path([*points, (0, 0)], "cascade", provenance)


def lift_path(path: Path, end: int, provenance: dict | None = None) -> Path:
    """The path over timesteps that are `end` higher, but for its last point, which is clean."""
    points = [tuple(t + end for t in point) for point in path.points[:-1]] + [(0,) * path.num_scales]
    return Path(points, path.kind, path.provenance | {"end": end} if provenance is None else provenance)


def kl_lines(heatmap: dict, log_snr: np.ndarray, start: int | None, end: int, num_lines: int) -> np.ndarray:
    """Timesteps of at most num_lines lines from start to end, even in log SNR.

    Raises ValueError unless noisiest timestep of the heatmap >= start > end >= 0.
    """
    noisiest = int(heatmap["t_grid"][0])
    start = noisiest if start is None else start
    if not noisiest >= start > end >= 0:
        raise ValueError(
            f"A path from timestep {start} to {end} is not on this heatmap, which spans {noisiest} to 0; choose within."
        )
    return end + timestep_grid(
        min(num_lines, start - end + 1), len(log_snr) - end, "uniform_log_snr", start - end, log_snr[end:]
    )


def check_followed(path_type: str, loaded: LoadedModel) -> None:
    """Raise ValueError if a loaded model cannot follow a type of path, because of its type or of its training."""
    reason = why_not(loaded.config["model_type"], path_type)
    is_best_cascade = parse_path_type(path_type) == PathType("cascade", ("best",))
    if not reason and is_best_cascade and seen_range(loaded.config, loaded.scheduler) is not None:
        reason = NO_CASCADE
    if reason:
        raise ValueError(reason)


def choose_path(
    args: argparse.Namespace,
    path_type: str,
    loaded: LoadedModel,
    heatmap: str | FilePath | None = None,
    schedule: str | None = None,
) -> Path:
    """The path of `--schedule`, or of a path type for a loaded model.

    Raises ValueError if the model cannot follow such a path (`check_followed`), if the heatmap was computed with other
    weights, and what the path functions and the files raise.
    """
    path_type = path_type if schedule is None else f"schedule:{schedule}"
    kind = parse_path_type(path_type)
    check_followed(path_type, loaded)
    if kind.name == "schedule":
        return load_schedule(kind.parameters[0])
    if kind.needs_heatmap:
        return _optimal_path(args, kind, loaded, heatmap)
    log_snr = loaded.scheduler.log_snr.numpy()
    table = {"log_snr": log_snr, "num_train_timesteps": len(log_snr)}
    if kind.name == "cascade":
        level, *steps = kind.parameters
        # inf is equally far from all timesteps, of which the first one counts.
        remaining = int(np.abs(log_snr - level).argmin())
        if remaining == len(log_snr) - 1:
            raise ValueError(
                f"--path_type {path_type} waits at timestep {remaining}, where it starts; choose a log SNR above "
                f"{log_snr[-2]:.4g}."
            )
        return cascade(
            args.num_steps, coarse_steps=next(iter(steps), None), remaining=remaining, spacing=args.spacing, **table
        )
    base = diagonal(args.num_steps, args.spacing, loaded.model.num_scales, **table)
    if kind.name == "image_diagonal":
        ahead = loaded.scheduler.representation.image_lead
        return Path(log_snr_shift(base, ahead, log_snr).points, "image_diagonal", {"base": base.provenance})
    if kind.name == "shift":
        return log_snr_shift(base, *kind.parameters, log_snr)
    families = {"lead": lead, "heuristic": heuristic}
    return families[kind.name](base, *kind.parameters) if kind.name in families else base


def _optimal_path(
    args: argparse.Namespace, kind: PathType, loaded: LoadedModel, heatmap: str | FilePath | None
) -> Path:
    content = load_heatmap(heatmap)
    if content["fingerprint"] != loaded.fingerprint:
        raise ValueError(
            f"Heatmap {heatmap} was computed with other weights than the {loaded.weights} ones of this checkpoint; "
            "compute it again (compute_heatmap_30.py --force) or name another."
        )
    if kind.name.startswith("dp"):
        return heatmap_path(content, kind.name, args.num_steps, args.max_jump, args.factor, args.normalisation)[0]
    seen = seen_range(loaded.config, loaded.scheduler)
    content |= {} if seen is None else {"seen_32": seen}  # Older files do not say.
    log_snr = loaded.scheduler.log_snr.numpy()
    if kind.name == "cascade":
        path = kl_cascade(content, log_snr, args.num_steps, args.kl_weight)
    else:
        path = kl_refined(content, log_snr, args.num_steps, args.kl_weight, kind.name == "kl_diagonal").path
        if loaded.model.num_scales == 1:
            path = Path([point[:1] for point in path.points], path.kind, path.provenance)
    criterion = {"criterion": f"{kind}, weight {args.kl_weight:g}", "heatmap_weights": content["fingerprint"]}
    return Path(path.points, kind.name, path.provenance | criterion)
