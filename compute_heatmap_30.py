"""Measure what a step costs at every (t_64, t_32): the error map of a LIFT checkpoint on a 30x30 grid.

    python compute_heatmap_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --device 0
    python compute_heatmap_30.py --checkpoint FILE --output results/heatmap_30_400ep.pth --K 4 --num_images 16
    python compute_heatmap_30.py --plot_only --output results/heatmap_30_400ep_ema.pth

Writes results/heatmap_30_{epoch}ep[_ema].pth and two figures beside it: the errors with their optimal
paths (.png), and the four Jacobian blocks (_blocks.png). Images are those the checkpoint was trained on.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

import cli
from checkpoint import load_model
from data import to_float
from device import autocast, resolve_precision, select_device
from error_map import error_map, load_heatmap, published_errors, save_heatmap
from path import check_steps, find_optimal_paths_all_steps, leads, path_from_cells, timestep_grid
from path_choice import add_path_arguments, heatmap_file, path_errors
from plots import plot_blocks, plot_heatmap_pair


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a LIFT checkpoint (required unless --plot_only)")
    add("--ema", action="store_true", help="use the EMA weights")
    add("--output", help="the heatmap file (results/heatmap_30_{epoch}ep[_ema].pth)")
    add("--grid", type=cli.positive_int, default=30, help="grid lines per axis (30)")
    add("--K", type=cli.positive_int, default=4, help="Hutchinson probes (4)")
    add("--num_images", type=cli.positive_int, default=16, help="images averaged over (16)")
    add("--batch_size", type=cli.positive_int, default=None, help="samples per network call (the images)")
    add("--seed", type=cli.seed, default=42, help="choice of images, noise and probes (42)")
    add("--plot_only", action="store_true", help="draw the figures of an existing --output")
    add("--force", action="store_true", help="replace an existing heatmap made with other settings")
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    add_path_arguments(parser)
    args = parser.parse_args()
    if not (args.output if args.plot_only else args.checkpoint):
        parser.error("--plot_only needs --output" if args.plot_only else "--checkpoint is required")
    return args


def path_fields(content: dict, args: argparse.Namespace) -> dict:
    """What follows from a map for a factor and a rule for steps: errors, and the optimal paths for every N."""
    error_64, error_32 = published_errors(content, args.factor)
    fields = {"factor": args.factor, "num_steps": args.num_steps, "max_jump": args.max_jump}
    fields |= {"error_64": error_64, "error_32": error_32, "error_total": error_64 + error_32}
    t_grid = content["t_grid"].tolist()
    costs, all_steps = {}, {}
    for name in ("64", "total"):
        errors = path_errors(content, f"dp_{name}", args.factor)
        optima = find_optimal_paths_all_steps(*errors, 2 * (len(t_grid) - 1), args.max_jump)
        all_steps[name] = {n: {"cells": [list(c) for c in cells], "cost": cost} for n, (cells, cost) in optima.items()}
        cells, costs[name] = optima[args.num_steps]
        fields[f"samples_{name}"] = [list(cell) for cell in cells]
        fields[f"timesteps_{name}"] = [[t_grid[i], t_grid[j]] for i, j in cells]
    return fields | {"costs": costs, "all_steps": all_steps}


def draw(content: dict, file: Path) -> None:
    """The figures of one heatmap, beside it, and how its paths lead."""
    t_grid = content["t_grid"].numpy()
    grids = t_grid, content["log_snr_grid"].numpy()
    label = f"epoch {content['epoch']}, {content['weights']} weights"
    plot_heatmap_pair(
        content["error_64"].numpy(),
        content["error_total"].numpy(),
        *grids,
        content["samples_64"],
        content["samples_total"],
        file.with_suffix(".png"),
        f"{label}, factor {content['factor']}, {content['num_steps']} steps",
    )
    blocks = {name: block.numpy() for name, block in content["jacobian"].items()}
    plot_blocks(blocks, *grids, file.with_name(f"{file.stem}_blocks.png"), label)
    for name in ("64", "total"):
        lead = leads(path_from_cells(content[f"samples_{name}"], t_grid, f"dp_{name}", {}), t_grid)
        print(
            f"DP-{name.title()}: t_32 ahead at {lead['ahead']} of {lead['points']} points, behind at {lead['behind']}, "
            f"largest lead {lead['largest_lead']} cells"
        )
    print(f"figures {file.with_suffix('.png')} and {file.stem}_blocks.png")


def compute(args: argparse.Namespace) -> tuple[dict, Path]:
    """The map with its settings, and the file it belongs in; an existing file with equal settings is reused."""
    device = select_device(args.device)
    check_steps(args.grid, args.num_steps, args.max_jump)
    loaded = load_model(args.checkpoint, args.ema, device)
    if loaded.config["model_type"] != "dual":
        raise ValueError(
            f"{args.checkpoint} is a '{loaded.config['model_type']}' model; an error map needs two clocks."
        )
    if loaded.scheduler.snr[-1] == 0:
        raise ValueError(
            f"{args.checkpoint} was trained with schedule '{loaded.config['beta_schedule']}', whose noise prediction "
            "is undefined at its noisy end, so that it has no error map; use --path_type diagonal."
        )
    file = Path(args.output or heatmap_file("results", loaded.config["epoch"], loaded.weights, args.grid))
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
        "precision": resolve_precision(device, args.precision),
    }
    if file.exists() and not args.force:
        content = load_heatmap(file)
        different = [name for name, value in settings.items() if content.get(name) != value]
        if different:
            raise ValueError(f"{file} exists with another {', '.join(different)}; pass --force or another --output.")
        print(f"the map of {file} has these settings and is kept")
        return content, file
    chosen = np.random.default_rng(args.seed).choice(len(images), args.num_images, replace=False)
    x_64 = to_float(torch.from_numpy(images.pixels[np.sort(chosen)])).to(device)
    content = error_map(
        loaded.model.denoise,
        loaded.scheduler,
        x_64,
        timestep_grid(args.grid).tolist(),
        num_probes=args.K,
        seed=args.seed,
        batch_size=args.batch_size or args.num_images,
        autocast=functools.partial(autocast, device, args.precision),
    )
    # The file calls these K and batch, as published.
    del content["num_probes"], content["num_images"]
    return content | settings, file


def main() -> None:
    """Compute or reuse the map, find the paths, then draw."""
    args = parse_args()
    content, file = (load_heatmap(args.output), Path(args.output)) if args.plot_only else compute(args)
    check_steps(len(content["t_grid"]), args.num_steps, args.max_jump)
    wanted = {"factor": args.factor, "num_steps": args.num_steps, "max_jump": args.max_jump}
    known = {name: content.get(name) for name in wanted}
    content |= path_fields(content, args)
    if not args.plot_only and known != wanted:
        save_heatmap(file, content)
    draw(content, file)
    print(f"heatmap {file}")


if __name__ == "__main__":
    cli.run_stage(main)
