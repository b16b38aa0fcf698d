"""Measure what a step costs at every fine and coarse timestep: the error map of a two-scale checkpoint, 30x30 cells.

    python compute_heatmap_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --device 0
    python compute_heatmap_30.py --checkpoint FILE --output results/heatmap_30_400ep.pth --K 4 --num_images 16
    python compute_heatmap_30.py --checkpoint FILE --coarse 10 --K 1           # a thinned grid, interpolated
    python compute_heatmap_30.py --checkpoint FILE --maps mse                  # all that KL paths need
    python compute_heatmap_30.py --checkpoint FILE --maps mse --seen_only      # of a model trained around a path
    torchrun --standalone --nproc_per_node=4 compute_heatmap_30.py --checkpoint FILE
    python compute_heatmap_30.py --plot_only --output results/heatmap_30_400ep_ema.pth

Writes results/heatmap_30_{epoch}ep[_ema].pth and two figures beside it: the published errors with their optimal
paths (.png), and the maps themselves, Jacobian blocks and denoising errors (_maps.png). Images are those the
checkpoint was trained on. A run that is stopped and started again goes on from its .part files.

Models that predict the fine scale alone (single_t, no_t) have maps of that scale, and DP-64 is the only path found on
them; theirs are results/heatmap_30_{model}_{epoch}ep[_ema].pth. A baseline has one clock and only its denoising errors,
which are measured along it (--maps mse and no --coarse, whatever is passed): all that its best schedule, kl_diagonal,
needs. The map of a model that was trained around a path (--t_pairs) says where that was, and KL paths keep to it.
"""

import argparse
import functools
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

import cli
from checkpoint import LoadedModel, load_model
from data import ImageSet, to_float
from figures.maps import plot_heatmap, plot_heatmap_pair, plot_maps
from paths.optimal import check_steps, find_optimal_paths_all_steps
from paths.path import GRID_SPACINGS, leads, path_from_cells, timestep_grid
from planning.choice import PATH_SETTINGS, add_path_arguments, heatmap_file, path_errors, seen_cells
from planning.error_map import (
    DIFFERENTIATED,
    MAPS,
    PartFiles,
    error_map,
    largest_deviation,
    load_heatmap,
    published_errors,
    save_heatmap,
)
from planning.regimes import seen_range
from runtime.device import autocast, resolve_precision
from runtime.distributed import PATIENCE, Processes

# A shared_t model has two scales and one timestep, which is neither a plane nor one scale.
MAPPED_MODELS = ("baseline", "dual", "single_t", "no_t")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of this stage, from the command line unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a checkpoint of training (required unless --plot_only)")
    add("--ema", action="store_true", help="use the EMA weights")
    add("--output", help="the heatmap file (results/heatmap_30_[{model}_]{epoch}ep[_ema].pth)")
    add("--grid", type=cli.positive_int, default=30, help="grid lines per axis (30)")
    add("--K", type=cli.positive_int, default=4, help="Hutchinson probes (4)")
    add("--num_images", type=cli.positive_int, default=16, help="images averaged over (16)")
    add("--maps", choices=MAPS, default="all", help="blocks need 2K backward passes, mse none (all)")
    add("--of", choices=DIFFERENTIATED, default="eps", help="differentiate the noise predicted, or the image (eps)")
    add("--coarse", type=cli.positive_int, default=None, metavar="M", help="measure M lines per axis, interpolate")
    text = "measure only pairs that the model was trained on; others take the error of the nearest coarse timestep"
    add("--seen_only", action="store_true", help=text)
    add("--grid_spacing", choices=GRID_SPACINGS, default="uniform_t", help="of the grid lines (uniform_t)")
    add("--start", type=cli.positive_int, default=None, help="noisiest timestep of the grid (the first with a signal)")
    add("--batch_size", type=cli.positive_int, default=None, help="samples per network call (the images)")
    add("--seed", type=cli.seed, default=42, help="choice of images, noise and probes (42)")
    add("--plot_only", action="store_true", help="draw the figures of an existing --output")
    add("--force", action="store_true", help="replace an existing heatmap made with other settings")
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    add_path_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.output if args.plot_only else args.checkpoint):
        parser.error("--plot_only needs --output" if args.plot_only else "--checkpoint is required")
    if args.seen_only and args.coarse is not None:
        parser.error("--coarse interpolates over all pairs of timesteps; leave it out beside --seen_only")
    return args


def add_missing_map_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of stages that need heatmaps: where they are, and how `compute_missing` makes one."""
    group = parser.add_argument_group("heatmaps, computed when they are missing")
    group.add_argument("--heatmap_dir", default="results", help="folder of heatmap_30_{epoch}ep[_ema].pth (results)")
    group.add_argument("--grid", type=cli.positive_int, default=30, help="grid lines of those heatmaps (30)")
    group.add_argument("--grid_spacing", choices=GRID_SPACINGS, default="uniform_t", help="(uniform_t)")
    group.add_argument("--K", type=cli.positive_int, default=4, help="Hutchinson probes (4)")
    group.add_argument("--heatmap_images", type=cli.positive_int, default=16, help="images averaged over (16)")


def compute_missing(args: argparse.Namespace, checkpoint: Path, weights: str, file: Path, processes: Processes) -> None:
    """Compute the heatmap of a checkpoint that another stage needs, with that stage's flags, and save it as `file`.

    args: has the flags of `add_missing_map_arguments`, data and hardware. Raises what `compute` raises.
    """
    flags = {
        "--checkpoint": checkpoint,
        "--output": file,
        "--grid": args.grid,
        "--grid_spacing": args.grid_spacing,
        "--K": args.K,
        "--num_images": args.heatmap_images,
        "--precision": args.precision,
        "--dataset": args.dataset,
        "--limit": args.limit,
        "--holdout": args.holdout,
        "--cache_dir": args.cache_dir,
        "--num_workers": args.num_workers,
    }
    words = [str(word) for pair in flags.items() if pair[1] is not None for word in pair]
    words += ["--ema"] * (weights == "ema") + ["--skip_bad_images"] * args.skip_bad_images
    compute(parse_args(words), processes)


def dp_names(content: dict) -> tuple[str, ...]:
    """What the published paths on a map minimise: the fine error, and where the coarse one is known the total."""
    return ("64", "total") if "LL" in content["jacobian"] else ("64",)


def path_fields(content: dict, args: argparse.Namespace) -> dict:
    """What follows from a map for a factor, a normalisation and a rule for steps: errors, optimal paths for every N."""
    error_64, error_32 = published_errors(content, args.factor, args.normalisation)
    fields = {name: getattr(args, name) for name in PATH_SETTINGS} | {"error_64": error_64}
    if "total" in dp_names(content):
        fields |= {"error_32": error_32, "error_total": error_64 + error_32}
    t_grid = content["t_grid"].tolist()
    costs, all_steps = {}, {}
    for name in dp_names(content):
        errors = path_errors(content, f"dp_{name}", args.factor, args.normalisation)
        optima = find_optimal_paths_all_steps(*errors, 2 * (len(t_grid) - 1), args.max_jump)
        all_steps[name] = {n: {"cells": [list(c) for c in cells], "cost": cost} for n, (cells, cost) in optima.items()}
        cells, costs[name] = optima[args.num_steps]
        fields[f"samples_{name}"] = [list(cell) for cell in cells]
        fields[f"timesteps_{name}"] = [[t_grid[i], t_grid[j]] for i, j in cells]
    return fields | {"costs": costs, "all_steps": all_steps}


def draw(content: dict, file: Path) -> None:
    """The figures of one heatmap, beside it, and how its published paths lead."""
    t_grid, log_snr_grid = content["t_grid"].numpy(), content["log_snr_grid"].numpy()
    label = f"epoch {content['epoch']}, {content['weights']} weights"
    # Maps from before other models had any do not say whose they are.
    model_type = content.get("model_type", "dual")
    label = label if model_type == "dual" else f"{model_type}, {label}"
    maps = content.get("jacobian", {}) | {name: content[name] for name in ("mse_64", "mse_32") if name in content}
    maps_file = file.with_name(f"{file.stem}_maps.png")
    plot_maps(maps, log_snr_grid, t_grid, maps_file, label, content["of"])
    print(f"figure {maps_file}")
    if "jacobian" not in content:
        return
    title = f"{label}, factor {content['factor']}, {content['num_steps']} steps"
    names = dp_names(content)
    if "total" in names:
        plot_heatmap_pair(
            content["error_64"].numpy(),
            content["error_total"].numpy(),
            t_grid,
            log_snr_grid,
            content["samples_64"],
            content["samples_total"],
            file.with_suffix(".png"),
            title,
        )
    else:
        plot_heatmap(
            content["error_64"].numpy(),
            t_grid,
            log_snr_grid,
            file.with_suffix(".png"),
            title,
            "fine error per unit of log SNR",
            {"DP-64": content["samples_64"]},
        )
    for name in names:
        lead = leads(path_from_cells(content[f"samples_{name}"], t_grid, f"dp_{name}", {}), t_grid)
        print(
            f"DP-{name.title()}: coarse ahead at {lead['ahead']} of {lead['points']} points, "
            f"behind at {lead['behind']}, largest lead {lead['largest_lead']} cells"
        )
    print(f"figure {file.with_suffix('.png')}")


def compute(args: argparse.Namespace, processes: Processes, with_paths: bool = False) -> tuple[dict, Path]:
    """The map with its settings, and the file it belongs in; an existing file with equal settings is reused.

    with_paths: published paths are to be found on it, for which its grid must do. Of several runs that want one file at
    a time, the first makes it and the others wait and reuse it.
    """
    device = processes.device
    loaded = load_model(args.checkpoint, args.ema, device)
    model_type = loaded.config["model_type"]
    if model_type not in MAPPED_MODELS:
        raise ValueError(
            f"{args.checkpoint} is a '{model_type}' model, but an error map needs one scale, or two that may be at any "
            f"two timesteps; pass a checkpoint of one of {', '.join(MAPPED_MODELS)}."
        )
    if loaded.model.num_scales == 1:
        args.maps, args.coarse = "mse", None
    if with_paths and args.maps != "mse":  # Of which no published path is made.
        check_steps(args.grid, args.num_steps, args.max_jump)
    seen = seen_range(loaded.config, loaded.scheduler)
    if args.seen_only and seen is None:
        raise ValueError(f"{args.checkpoint} was trained on all pairs of timesteps; leave --seen_only out.")
    if args.coarse is not None and seen is not None and processes.is_main:
        print(
            "note: --coarse interpolates between pairs of timesteps that this model was not trained on; --seen_only "
            "does not",
            file=sys.stderr,
        )
    log_snr = loaded.scheduler.log_snr.numpy()
    if args.start is None:
        args.start = int((loaded.scheduler.snr > 0).nonzero().max())
    if args.start < len(log_snr) and loaded.scheduler.snr[args.start] == 0:
        raise ValueError(
            f"{args.checkpoint} was trained with schedule '{loaded.config['beta_schedule']}', whose SNR is 0 at "
            f"timestep {args.start}, where a map has no log SNR; pass a --start below it, such as {args.start - 1}."
        )
    file = Path(args.output or heatmap_file("results", loaded.config["epoch"], loaded.weights, args.grid, model_type))
    images = cli.load_training_images(args, loaded.config)
    if images.channels != loaded.config["channels"]:
        raise ValueError(
            f"The images of '{images.name}' have {images.channels} channel(s) but {args.checkpoint} was trained on "
            f"{loaded.config['channels']}; pass another --dataset."
        )
    if args.num_images > len(images):
        raise ValueError(f"--num_images {args.num_images} exceeds the {len(images)} images of '{images.name}'.")
    settings = {
        "fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "epoch": loaded.config["epoch"],
        "data_fingerprint": images.fingerprint,
        "beta_schedule": loaded.config["beta_schedule"],
        "K": args.K,
        "batch": args.num_images,
        "seed": args.seed,
        "grid": args.grid,
        "grid_spacing": args.grid_spacing,
        "start": args.start,
        "maps": args.maps,
        "of": args.of,
        "coarse": args.coarse,
        "precision": args.precision,
    }
    settings |= {"seen_only": True} if args.seen_only else {}  # As files have it that do not know the choice.
    file.parent.mkdir(parents=True, exist_ok=True)
    # The first process holds the file for all.
    with FileLock(f"{file}.lock") if processes.is_main else nullcontext():
        # Hosts that share files may see them at different moments, and the first process is the one that writes.
        [kept] = processes.any(processes.is_main and file.exists() and not args.force)
        if kept:
            content = load_heatmap(file)
            different = [name for name, value in settings.items() if content.get(name) != value]
            different += [name for name in ("seen_only",) if name in content.keys() - settings.keys()]
            if different:
                raise ValueError(
                    f"{file} exists with another {', '.join(different)}; pass --force or another --output."
                )
            if processes.is_main:
                print(f"the map of {file} has these settings and is kept")
        else:
            content = measure(args, loaded, images, settings, seen, file, processes)
            processes.any(False)  # The file is there when any of them goes on.
    return content | settings, file


def measure(
    args: argparse.Namespace,
    loaded: LoadedModel,
    images: ImageSet,
    settings: dict,
    seen: torch.Tensor | None,  # of `seen_range`
    file: Path,
    processes: Processes,
) -> dict:
    """The map itself, saved by the first process."""
    device = processes.device
    chosen = np.random.default_rng(args.seed).choice(len(images), args.num_images, replace=False)
    x_64 = to_float(torch.from_numpy(images.pixels[np.sort(chosen)])).to(device)

    def run(timesteps: np.ndarray, precision: str, **options) -> dict:
        return error_map(
            loaded.model.denoise,
            loaded.scheduler,
            x_64,
            timesteps.tolist(),
            num_probes=args.K,
            seed=args.seed,
            batch_size=args.batch_size or args.num_images,
            autocast=functools.partial(autocast, device, precision),
            maps=args.maps,
            of=args.of,
            num_predictions=loaded.model.num_predictions,
            num_scales=loaded.model.num_scales,
            **options,
        )

    num_timesteps = loaded.config["num_train_timesteps"]
    grid = timestep_grid(args.grid, num_timesteps, args.grid_spacing, args.start, loaded.scheduler.log_snr.numpy())
    precision = fast = resolve_precision(device, args.precision)
    if args.precision == "auto" and precision != "fp32":
        few = grid[sorted({0, len(grid) // 2, len(grid) - 1})]
        deviation = largest_deviation(*(run(few, kind, progress=False) for kind in (precision, "fp32")))
        # The cells are shared, and must be alike.
        if processes.any(not deviation <= 1)[0]:
            precision = "fp32"
        if processes.is_main:
            print(f"{fast} differs from fp32 by at most {deviation:.2g} standard errors: {precision}")
    parts = PartFiles(file, settings | {"used": precision})
    where = {} if seen is None else {"seen_32": seen}
    options = {"coarse": args.coarse, "processes": processes, "parts": parts}
    if args.seen_only:
        band = where | {"t_grid": grid}
        options["cells"] = torch.from_numpy(seen_cells(band, grid, loaded.scheduler.log_snr.numpy()))
    content = run(grid, precision, **options) | where
    content |= {"used_precision": precision, "num_train_timesteps": num_timesteps}
    # It follows from the fingerprint, so that maps from before it was told are kept.
    content["model_type"] = loaded.config["model_type"]
    # The file calls these K and batch, as published.
    del content["num_probes"], content["num_images"]
    if processes.is_main:
        save_heatmap(file, content | settings)
        parts.remove()
    return content


def main() -> None:
    """Compute or reuse the map, find the published paths, then draw."""
    args = parse_args()
    processes = Processes("cpu" if args.plot_only else args.device, PATIENCE)
    if args.plot_only:
        content, file = load_heatmap(args.output), Path(args.output)
    else:
        content, file = compute(args, processes, with_paths=True)
    processes.close()
    if not processes.is_main:
        return
    if "jacobian" in content:
        check_steps(len(content["t_grid"]), args.num_steps, args.max_jump)
        known = {name: content.get(name) for name in PATH_SETTINGS}
        content |= path_fields(content, args)
        if not args.plot_only and any(known[name] != getattr(args, name) for name in PATH_SETTINGS):
            save_heatmap(file, content)
    draw(content, file)
    print(f"heatmap {file}")


if __name__ == "__main__":
    cli.run_stage(main)
