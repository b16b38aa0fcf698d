"""How much the two scales go by each other: cross-Jacobians, a direct test of coupling, and the leads of paths.

    python compute_cross_jacobian.py --device 0                             # every epoch found, raw and EMA weights
    python compute_cross_jacobian.py --epochs 400 2000 --weights ema --coupling_images 256
    python compute_cross_jacobian.py --run NAME
    python compute_cross_jacobian.py --checkpoint_dir checkpoints/a --heatmap_dir results/a --output_dir results/a
    torchrun --standalone --nproc_per_node=4 compute_cross_jacobian.py      # missing heatmaps on four GPUs

Writes into --output_dir, for every epoch (of a student {student}_{epoch}ep in place of {epoch}ep):
    cross_jacobian_{epoch}ep.csv             the four blocks and the ratios HL / HH and LH / LL in every cell
    cross_jacobian_analysis_{epoch}ep.png    the ratios over the plane, and HL / HH along the noisiest fine timestep
    coupling_{epoch}ep.csv, .png             the error of the fine image with other coarse inputs (planning/coupling.py)
and over all epochs:
    path_statistics.csv                      where the coarse and where the fine scale leads along DP-64 and DP-Total
    path_comparison_across_epochs.png        these paths, of raw weights; path_comparison_ema_across_epochs.png of EMA

Blocks are squared Frobenius norms, means over images, so that the ratios are those of squared norms; `_se` is a
standard error. A heatmap that is missing in --heatmap_dir is computed. Paths are found with the settings of their
heatmap unless flags say otherwise.
"""

import runtime.startup  # noqa: F401

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
from checkpoint import LoadedModel, find_checkpoints, load_model
from evaluation.results_table import write_csv
from figures.coupling import plot_coupling, plot_cross_jacobian
from figures.paths import plot_paths_across_epochs
from figures.style import WEIGHTS_TITLES
from images.representation import OVERCOMPLETE
from paths.optimal import check_steps
from paths.path import Path as PathOfTimesteps
from paths.path import leads, timestep_grid
from planning.choice import StepSettings
from planning.coupling import CONDITIONS, COUPLING_ERRORS, against_own, measure_coupling, ratio_of_means
from planning.error_map import BLOCKS, CHAIN_RULE_FACTORS, NORMALISATIONS
from planning.heatmap import PATH_SETTINGS, MissingMapSettings, compute_missing, heatmap_file
from planning.map_file import load_heatmap
from planning.map_paths import heatmap_path, representation_of
from planning.students import file_words
from runtime.device import autocast
from runtime.distributed import PATIENCE, Processes
from runtime.runs import places, run_name
from runtime.safe_write import replacing
from runtime.settings import Settings, option, parse_settings

DP_TYPES = {"dp_64": "DP-64", "dp_total": "DP-Total"}
RATIOS = {"ratio_HL": ("HL", "HH"), "ratio_LH": ("LH", "LL")}
SETTINGS_FILE = "cross_jacobian.json"  # Of whose weights the results in a folder are.
COUPLING_TITLES = {"mse_64": "as predicted", "clipped_mse_64": "clamped to [-1, 1]"}
# Published J_HL/J_HH of AFHQ 64x64 at (t_64, t_32), given there in per cent.
PUBLISHED_RATIOS = {
    (999, 999): 0.0004,
    (999, 826): 0.0007,
    (999, 654): 0.0011,
    (999, 482): 0.0016,
    (999, 310): 0.0020,
    (999, 137): 0.0072,
}


@dataclass(frozen=True, kw_only=True)
class CouplingSettings(Settings):
    """How the coupling of the scales is measured."""

    group = "coupling"
    coupling_images: int = option(64, "images averaged over", parse=cli.positive_int)
    coupling_timesteps: int = option(8, "fine timesteps, even in log SNR", parse=cli.positive_int)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "choice of images, noise and partners", parse=cli.seed)


@dataclass(frozen=True, kw_only=True)
class OwnPathSettings(Settings):
    """The rule of the published paths."""

    group = "paths, by default as each heatmap has them"
    num_steps: int | None = option(None, "steps", parse=cli.positive_int)
    max_jump: int | None = option(None, "cells a step may move per axis", parse=cli.positive_int)
    factor: str | None = option(None, "chain-rule factor", choices=tuple(CHAIN_RULE_FACTORS))
    normalisation: str | None = option(None, "what an error is divided by", choices=tuple(NORMALISATIONS))


@dataclass(frozen=True, kw_only=True)
class CrossJacobianSettings(CouplingSettings, OwnPathSettings, MissingMapSettings):
    """Which models, and where the results go."""

    run: str | None = option(None, "run whose checkpoints these are", parse=run_name, metavar="NAME")
    checkpoint_dir: str | None = option(None, "folder of lift_dual_timestep_{epoch}ep.pth (that of the run)")
    epochs: tuple[int, ...] | None = option(None, "(all found)", parse=cli.positive_int, nargs="+")
    weights: tuple[str, ...] = option(("raw", "ema"), choices=tuple(WEIGHTS_TITLES), nargs="+")
    output_dir: str | None = option(None, "folder (the results of the run)")
    force: bool = option(False, "replace what --output_dir holds of other models")

    def check(self) -> None:
        super().check()
        if self.run is not None and self.checkpoint_dir is not None:
            raise ValueError("--run and --checkpoint_dir exclude each other; leave one of them out")
        if self.checkpoint_dir is None:
            self._derive(checkpoint_dir=str(places(self.run).checkpoints))


def parse_args() -> CrossJacobianSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(CrossJacobianSettings, __doc__)


def claimed_epochs(
    folder: Path, heatmaps: dict[int, dict[str, dict]], names: dict[int, str], force: bool
) -> dict[str, dict[str, str]]:
    """Of whose weights the files of every epoch in a folder will be; raises ValueError, unless forced, for others."""
    file = folder / SETTINGS_FILE
    known = json.loads(file.read_text()) if file.exists() else {}
    for epoch, of_epoch in heatmaps.items():
        prints = {weights: heatmap["fingerprint"] for weights, heatmap in of_epoch.items()}
        name = names[epoch].removesuffix("ep")
        before = known.get(name, prints)
        if not force and any(before.get(weights, value) != value for weights, value in prints.items()):
            raise ValueError(
                f"{folder} holds results of another model at epoch {name}; pass --force to replace them, or another "
                "--output_dir."
            )
        known[name] = prints
    return known


def heatmap_of(
    settings: CrossJacobianSettings, loaded: LoadedModel, checkpoint: Path, processes: Processes
) -> dict[str, Any]:
    """The heatmap of a model, computed if there is none; refused if it is of other weights or another derivative."""
    file = heatmap_file(
        settings.heatmap_dir or loaded.results, loaded.config, loaded.config["epoch"], loaded.weights, settings.grid
    )
    if processes.any(not file.exists())[0]:
        # A heatmap that is made here has no settings of its own, and takes those of the published paths.
        usual = StepSettings()
        check_steps(settings.grid, settings.num_steps or usual.num_steps, settings.max_jump or usual.max_jump)
        if processes.is_main:
            print(f"{checkpoint.name} {loaded.weights}: computing {file} first")
        compute_missing(settings, checkpoint, loaded.weights, file, processes)
    content = load_heatmap(file)
    if content["fingerprint"] != loaded.fingerprint:
        raise ValueError(
            f"Heatmap {file} was computed with other weights than the {loaded.weights} ones of {checkpoint}; compute "
            "it again (compute_heatmap_30.py --force) or name another --heatmap_dir."
        )
    if "jacobian" not in content or content["of"] != "eps":
        held = f"the Jacobian of {content['of']}" if "jacobian" in content else "denoising errors only"
        raise ValueError(
            f"Heatmap {file} holds {held}; compute it again (compute_heatmap_30.py --force --maps all --of eps)."
        )
    return content


def jacobian_ratios(heatmap: dict[str, Any]) -> dict[str, torch.Tensor]:
    """ratio_HL = HL / HH and ratio_LH = LH / LL, of squared norms, with `_se` by the delta method; float64 `[n, n]`."""
    per_image = dict(zip(BLOCKS, heatmap["jacobian_per_image"], strict=True))  # [n, n, B] each.
    ratios = {}
    for name, (above, below) in RATIOS.items():
        ratios[name], ratios[f"{name}_se"] = ratio_of_means(per_image[above], per_image[below])
    return ratios


def jacobian_rows(key: tuple[int, str], heatmap: dict[str, Any], ratios: dict[str, torch.Tensor]) -> list[dict]:
    """One row per cell of a heatmap."""
    columns = {}
    for block in BLOCKS:
        columns |= {block: heatmap["jacobian"][block], f"{block}_se": heatmap["jacobian_se"][block]}
    columns |= ratios
    lines = list(zip(heatmap["t_grid"].tolist(), heatmap["log_snr_grid"].tolist(), strict=True))
    return [
        {"epoch": key[0], "weights": key[1], "t_64": t_64, "t_32": t_32}
        | {"log_snr_64": log_snr_64, "log_snr_32": log_snr_32}
        | {name: values[i, j].item() for name, values in columns.items()}
        for i, (t_64, log_snr_64) in enumerate(lines)
        for j, (t_32, log_snr_32) in enumerate(lines)
    ]


def comparable_ratios(heatmap: dict[str, Any], dataset: str) -> dict[tuple[int, int], float] | None:
    """The published ratios, for a heatmap of AFHQ at 64x64 in the published noise schedule that has their line.

    Residuals are other images, and have ratios of their own.
    """
    published = (int(heatmap["t_grid"][0]), heatmap["num_pixels_64"], heatmap["beta_schedule"])
    comparable = "afhq" in Path(dataset).name.lower() and representation_of(heatmap) is OVERCOMPLETE
    return PUBLISHED_RATIOS if comparable and published == (999, 64**2, "cosine_clipped") else None


def write_jacobians(
    epoch: int,
    name: str,  # in those of its files
    heatmaps: dict[str, dict],
    published: dict[tuple[int, int], float] | None,
    folder: Path,
) -> None:
    """Table, figure and summary of the cross-Jacobian of one epoch, from its heatmaps by kind of weights."""
    ratios = {weights: jacobian_ratios(heatmap) for weights, heatmap in heatmaps.items()}
    rows = [row for weights in heatmaps for row in jacobian_rows((epoch, weights), heatmaps[weights], ratios[weights])]
    write_csv(folder / f"cross_jacobian_{name}.csv", rows)
    first = next(iter(heatmaps.values()))
    t_grid = first["t_grid"].tolist()
    panels = {WEIGHTS_TITLES[weights]: maps for weights, maps in ratios.items()}
    file = folder / f"cross_jacobian_analysis_{name}.png"
    plot_cross_jacobian(panels, first["log_snr_grid"], t_grid, file, f"epoch {epoch}", published)
    print(f"\nepoch {epoch}: |J_HL|² / |J_HH|² along fine timestep {t_grid[0]}")
    print("coarse timestep" + "".join(f"{WEIGHTS_TITLES[weights]:>26s}" for weights in ratios))
    for j, t_32 in enumerate(t_grid):
        values = (f"{maps['ratio_HL'][0, j]:.4g} ± {maps['ratio_HL_se'][0, j]:.2g}" for maps in ratios.values())
        print(f"{t_32:15d}" + "".join(f"{value:>26s}" for value in values))
    for weights, maps in ratios.items():
        for name, (above, below) in RATIOS.items():
            ends = []
            for place in (maps[name].argmin().item(), maps[name].argmax().item()):
                i, j = divmod(place, len(t_grid))
                ends.append(f"{maps[name][i, j]:.3g} at fine timestep {t_grid[i]}, coarse {t_grid[j]}")
            print(f"{WEIGHTS_TITLES[weights]}: |J_{above}|² / |J_{below}|² from {ends[0]} to {ends[1]}")
    print(f"figure {file}")


def coupling_of(
    settings: CrossJacobianSettings, loaded: LoadedModel, start: int, device: torch.device
) -> dict[str, Any]:
    """What `measure_coupling` finds for a model from the noisiest fine timestep `start` on, with log SNRs beside it."""
    images = cli.load_training_images(settings, loaded.config)
    if images.channels != loaded.image_channels:
        raise ValueError(
            f"The images of '{images.name}' have {images.channels} channel(s) but the model was trained on "
            f"{loaded.image_channels}; pass another --dataset."
        )
    if settings.coupling_images > len(images):
        raise ValueError(f"--coupling_images {settings.coupling_images} exceeds the {len(images)} of '{images.name}'.")
    chosen = np.random.default_rng(settings.seed).choice(len(images), settings.coupling_images, replace=False)
    log_snr = loaded.scheduler.log_snr
    t_64 = timestep_grid(settings.coupling_timesteps, len(log_snr), "uniform_log_snr", start, log_snr.numpy()).tolist()
    measured = measure_coupling(
        loaded.denoise,
        loaded.scheduler,
        loaded.space.clean(images, np.sort(chosen), settings.seed, settings.cache_dir, device),
        t_64,
        settings.seed,
        settings.batch_size,
        lambda: autocast(device, settings.precision),
    )
    return measured | {"log_snr_64": log_snr[t_64], "log_snr_32": log_snr[measured["t_32"]]}


def coupling_rows(key: tuple[int, str], measured: dict[str, Any]) -> list[dict]:
    """One row per fine timestep and condition: each error, its paired difference to `own`, and its ratio to it."""
    columns = {}
    for error in COUPLING_ERRORS:
        compared = against_own(measured[error])
        columns |= {error: compared.pop("mean"), f"{error}_se": compared.pop("mean_se")}
        columns |= {f"{error}_{name}": values for name, values in compared.items()}
    return [
        {"epoch": key[0], "weights": key[1], "t_64": t_64, "log_snr_64": measured["log_snr_64"][i].item()}
        | {"condition": condition, "t_32": measured["t_32"][i, k].item()}
        | {"log_snr_32": measured["log_snr_32"][i, k].item(), "images": measured[COUPLING_ERRORS[0]].shape[-1]}
        | {name: values[i, k].item() for name, values in columns.items()}
        for i, t_64 in enumerate(measured["t_64"].tolist())
        for k, condition in enumerate(CONDITIONS)
    ]


def write_coupling(epoch: int, name: str, measured: dict[str, dict], folder: Path) -> None:
    """Table, figure and summary of the coupling of one epoch, by kind of weights."""
    rows = [row for weights, content in measured.items() for row in coupling_rows((epoch, weights), content)]
    write_csv(folder / f"coupling_{name}.csv", rows)
    panels = {}
    for error, title in COUPLING_TITLES.items():
        for weights, content in measured.items():
            compared = against_own(content[error])
            curves = zip(compared["ratio"].T, compared["ratio_se"].T, strict=True)
            panels[WEIGHTS_TITLES[weights], title] = dict(zip(CONDITIONS, curves, strict=True))
            print(f"\nepoch {epoch}, {WEIGHTS_TITLES[weights]}, {title}: own, and the others as a multiple of it")
            print("fine timestep" + f"{'own':>12s}" + "".join(f"{name:>20s}" for name in CONDITIONS[1:]))
            for i, t_64 in enumerate(content["t_64"].tolist()):
                pairs = zip(compared["ratio"][i, 1:], compared["ratio_se"][i, 1:], strict=True)
                values = "".join(f"{f'{ratio:.4g} ± {error:.2g}':>20s}" for ratio, error in pairs)
                print(f"{t_64:13d}{compared['mean'][i, 0]:12.5g}{values}")
    first = next(iter(measured.values()))
    file = folder / f"coupling_{name}.png"
    count = first[COUPLING_ERRORS[0]].shape[-1]
    plot_coupling(panels, first["log_snr_64"], first["t_64"], file, f"epoch {epoch}, {count} images")
    print(f"figure {file}")


def path_statistics(path: PathOfTimesteps, t_grid: torch.Tensor, log_snr_grid: torch.Tensor) -> dict[str, Any]:
    """Which scale of a path leads, at how many of its points, and by how much at most.

    largest_lead_cells and largest_lead_lambda are the leads of largest magnitude, each over all points: above 0 t_32
    is ahead, by so many cells of the grid or by λ_32 - λ_64, and below 0 t_64 is. Of equal ones the first counts.
    """
    count = leads(path, t_grid)
    index = {t: k for k, t in enumerate(t_grid.tolist())}
    cells = [(index[t_64], index[t_32]) for t_64, t_32 in path.points]
    log_snr = log_snr_grid.tolist()
    return {
        "points": count["points"],
        "t_32_leads": count["ahead"],
        "t_64_leads": count["behind"],
        "equal": count["equal"],
        "largest_lead_cells": max((j - i for i, j in cells), key=abs),
        "largest_lead_lambda": max((log_snr[j] - log_snr[i] for i, j in cells), key=abs),
    }


def paths_of(settings: CrossJacobianSettings, heatmap: dict[str, Any]) -> dict[str, PathOfTimesteps]:
    """The published paths on a heatmap by type, with its own settings where flags name no others."""
    rule = {name: getattr(settings, name) or heatmap.get(name) for name in PATH_SETTINGS}
    rule = {name: value for name, value in rule.items() if value is not None}
    return {path_type: heatmap_path(heatmap, path_type, **rule)[0] for path_type in DP_TYPES}


def statistics_of(key: tuple[int, str], heatmap: dict[str, Any], paths: dict[str, PathOfTimesteps]) -> list[dict]:
    """The rows of path_statistics.csv of one heatmap."""
    return [
        {"epoch": key[0], "weights": key[1], "path_type": path_type, "num_steps": path.nfe}
        | {"criterion": path.provenance["criterion"]}
        | path_statistics(path, heatmap["t_grid"], heatmap["log_snr_grid"])
        for path_type, path in paths.items()
    ]


def draw_paths(paths: dict[tuple[int, str], dict[str, PathOfTimesteps]], log_snr: np.ndarray, folder: Path) -> None:
    """One figure of the paths of every epoch for each set of weights, raw and EMA."""
    for weights, infix in (("raw", ""), ("ema", "ema_")):
        panels = {
            key: {DP_TYPES[path_type]: path for path_type, path in of_key.items()}
            for key, of_key in paths.items()
            if key[1] == weights
        }
        if panels:
            plot_paths_across_epochs(panels, log_snr, folder / f"path_comparison_{infix}across_epochs.png")


def print_statistics(rows: list[dict]) -> None:
    """The published table: leads in points, and the largest one, in which the fine scale leads where it is negative."""
    print("\n| epoch | weights | path | coarse leads | fine leads | largest lead, cells | largest lead, log SNR |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for row in rows:
        shares = (f"{row[name]} of {row['points']}" for name in ("t_32_leads", "t_64_leads"))
        largest = f"{row['largest_lead_cells']:+d}", f"{row['largest_lead_lambda']:+.2f}"
        words = str(row["epoch"]), WEIGHTS_TITLES[row["weights"]], DP_TYPES[row["path_type"]], *shares, *largest
        print(f"| {' | '.join(words)} |")


def main() -> None:
    """All heatmaps and paths first, so that what is refused is refused before anything is written."""
    settings = parse_args()
    processes = Processes(settings.device, PATIENCE)
    found = find_checkpoints(settings.checkpoint_dir, "dual", settings.epochs)
    checkpoints = {(epoch, weights): file for epoch, file in found.items() for weights in settings.weights}
    heatmaps: dict[int, dict[str, dict]] = {}
    published, names = {}, {}
    paths: dict[tuple[int, str], dict[str, PathOfTimesteps]] = {}
    statistics = []
    for (epoch, weights), checkpoint in checkpoints.items():
        loaded = load_model(checkpoint, weights == "ema", processes.device)
        names[epoch] = file_words(loaded.config, loaded.config["epoch"])
        heatmap = heatmap_of(settings, loaded, checkpoint, processes)
        of_epoch = heatmaps.setdefault(epoch, {})
        of_epoch[weights] = heatmap
        if not torch.equal(heatmap["log_snr_grid"], next(iter(of_epoch.values()))["log_snr_grid"]):
            raise ValueError(
                f"The heatmaps of epoch {epoch} are on different grids; compute one of them "
                "again (compute_heatmap_30.py --force), or pass one kind of --weights."
            )
        published[epoch] = comparable_ratios(heatmap, settings.dataset or loaded.config["dataset"])
        paths[epoch, weights] = paths_of(settings, heatmap)
        statistics += statistics_of((epoch, weights), heatmap, paths[epoch, weights])
    processes.close()
    if not processes.is_main:
        return
    folder = Path(settings.output_dir or loaded.results)
    claimed = claimed_epochs(folder, heatmaps, names, settings.force)
    for epoch, of_epoch in heatmaps.items():
        measured = {}
        for weights, heatmap in of_epoch.items():
            loaded = load_model(checkpoints[epoch, weights], weights == "ema", processes.device)
            measured[weights] = coupling_of(settings, loaded, int(heatmap["t_grid"][0]), processes.device)
        with replacing(folder / SETTINGS_FILE) as temporary:
            temporary.write_text(json.dumps(claimed, indent=1) + "\n")
        write_jacobians(epoch, names[epoch], of_epoch, published[epoch], folder)
        write_coupling(epoch, names[epoch], measured, folder)
    write_csv(folder / "path_statistics.csv", statistics)
    draw_paths(paths, loaded.scheduler.log_snr.cpu().numpy(), folder)
    print_statistics(statistics)
    print(f"tables and figures in {folder}")


if __name__ == "__main__":
    cli.run_stage(main)
