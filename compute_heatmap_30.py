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
from device import autocast, select_device
from error_map import error_map, load_heatmap, published_errors, save_heatmap
from path import check_steps, timestep_grid
from path_choice import add_path_arguments, heatmap_file, heatmap_path
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
    add("--seed", type=int, default=42, help="choice of images, noise and probes (42)")
    add("--plot_only", action="store_true", help="draw the figures of an existing --output")
    add("--force", action="store_true", help="replace an existing heatmap made with other settings")
    cli.add_data_arguments(parser, dataset_default=None)
    cli.add_device_arguments(parser)
    add_path_arguments(parser)
    args = parser.parse_args()
    if not (args.output if args.plot_only else args.checkpoint):
        parser.error("--plot_only needs --output" if args.plot_only else "--checkpoint is required")
    return args


def draw(content: dict, file: Path, args: argparse.Namespace) -> None:
    """The figures of one heatmap, beside it."""
    paths = {
        path_type: heatmap_path(content, path_type, args.num_steps, args.max_jump, args.factor)[0]
        for path_type in ("dp_64", "dp_total")
    }
    grids = content["t_grid"].numpy(), content["log_snr_grid"].numpy()
    label = f"epoch {content['epoch']}, {content['weights']} weights"
    plot_heatmap_pair(
        content["error_64"].numpy(),
        content["error_total"].numpy(),
        *grids,
        paths["dp_64"].provenance["cells"],
        paths["dp_total"].provenance["cells"],
        file.with_suffix(".png"),
        label,
    )
    blocks = {name: block.numpy() for name, block in content["jacobian"].items()}
    plot_blocks(blocks, *grids, file.with_name(f"{file.stem}_blocks.png"), label)
    print(f"figures {file.with_suffix('.png')} and {file.stem}_blocks.png")


def compute(args: argparse.Namespace) -> tuple[dict, Path]:
    """The content of the heatmap file and its name; an existing file with equal settings is reused."""
    device = select_device(args.device)
    check_steps(args.grid, args.num_steps, args.max_jump)
    loaded = load_model(args.checkpoint, args.ema, device)
    if loaded.config["model_type"] != "dual":
        raise ValueError(
            f"{args.checkpoint} is a '{loaded.config['model_type']}' model; an error map needs two clocks."
        )
    file = Path(args.output or heatmap_file("results", loaded.config["epoch"], loaded.weights, args.grid))
    images = cli.load_training_images(args, loaded.config)
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
        "factor": args.factor,
        "precision": args.precision,
    }
    if file.exists() and not args.force:
        content = load_heatmap(file)
        different = [name for name, value in settings.items() if content.get(name) != value]
        if different:
            raise ValueError(f"{file} exists with another {', '.join(different)}; pass --force or another --output.")
        print(f"{file} exists with these settings and is kept")
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
    content |= settings
    content["error_64"], content["error_32"] = published_errors(content, args.factor)
    content["error_total"] = content["error_64"] + content["error_32"]
    content["costs"] = {}
    for name in ("64", "total"):
        path, cost = heatmap_path(content, f"dp_{name}", args.num_steps, args.max_jump, args.factor)
        content[f"samples_{name}"] = path.provenance["cells"]
        content[f"timesteps_{name}"] = [list(point) for point in path.points]
        content["costs"][name] = cost
    save_heatmap(file, content)
    return content, file


def main() -> None:
    """Compute or reuse the map, then draw it."""
    args = parse_args()
    content, file = (load_heatmap(args.output), Path(args.output)) if args.plot_only else compute(args)
    draw(content, file, args)
    print(f"heatmap {file}")


if __name__ == "__main__":
    cli.run_stage(main)
