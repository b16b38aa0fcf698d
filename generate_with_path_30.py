"""Generate images along a path.

    python generate_with_path_30.py --checkpoint checkpoints/baseline_400ep.pth --num_images 64 --device 0
    python generate_with_path_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema \\
        --path_type dp_total --heatmap results/heatmap_30_400ep_ema.pth --num_images 64
    python generate_with_path_30.py --checkpoint FILE --schedule results/samples/dp_total/schedule.json
    python generate_with_path_30.py --checkpoint FILE --path_type cascade:2,6    # or shift:1, lead:2, heuristic:0.8
    python generate_with_path_30.py --checkpoint checkpoints/single_t_400ep.pth --coarse_from noisy

Writes one PNG per image, named by its seed, into --output (images already there are skipped), `grid.png`,
`schedule.json`, which replays the path without the heatmap, and with --trajectory `trajectory.png`. Models that predict
the fine image alone (single_t, no_t) read a coarse one that --coarse_from makes of it.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from checkpoint import LoadedModel, load_model
from data import read_png, save_png, to_uint8
from diffusion.sampler import ENDS, coarse_feed, compile_denoiser, image_seeds, sample_seeds, scale_shapes
from figures.images import plot_trajectory, save_image_grid
from image_folder import claim, write_settings
from paths.path import Path as SamplingPath
from paths.schedule_file import save_schedule
from planning.choice import add_one_path_arguments, path_of_flags
from runtime.device import autocast, resolve_compile, resolve_precision, select_device

GRID_IMAGES = 64


def parse_args() -> argparse.Namespace:
    """The flags of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True)
    add("--ema", action="store_true", help="use the EMA weights")
    add("--num_images", type=cli.positive_int, default=64, help="(64)")
    add("--batch_size", type=cli.positive_int, default=64, help="images per network call (64)")
    add("--seed", type=cli.seed, default=42, help="image k has seed 1000000 * SEED + k (42)")
    add("--eta", type=cli.unit_interval, default=0.0, help="0 DDIM to 1 ancestral (0)")
    add("--end", choices=ENDS, default="clean", help="land on the clean image, or on t=0 as published (clean)")
    add("--output", help="folder (results/samples/{checkpoint}_{weights}_{path}_{calls}[_{coarse_from}])")
    add("--force", action="store_true", help="replace the images of other settings that --output holds")
    add("--trajectory", action="store_true", help="also draw both scales along the path")
    cli.add_device_arguments(parser)
    cli.add_compile_argument(parser)
    add_one_path_arguments(parser)
    return parser.parse_args()


def prepare_output(
    folder: Path, path: SamplingPath, loaded: LoadedModel, args: argparse.Namespace, device: torch.device
) -> None:
    """Write what made the images, or refuse a folder whose images were made otherwise."""
    settings = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        "eta": args.eta,
        "end": args.end,
        "precision": resolve_precision(device, args.precision),
    }
    feed = coarse_feed(loaded.model, args.coarse_from)
    if feed is not None:
        settings["coarse_from"] = feed
    claim(folder, settings, args.force, ("[0-9]*.png", "trajectory.png"))
    write_settings(folder, settings)
    save_schedule(
        path,
        folder / "schedule.json",
        loaded.scheduler.log_snr.numpy(),
        solver={"name": "ddim", "eta": args.eta, "end": args.end},
        criterion=path.provenance.get("criterion"),
        cost=path.provenance.get("cost"),
        model_fingerprint=loaded.fingerprint,
        data_fingerprint=loaded.config["data_fingerprint"],
        beta_schedule=loaded.config["beta_schedule"],
    )


def png_file(folder: Path, seed: int) -> Path:
    """The file of one image."""
    return folder / f"{seed:012d}.png"


def main() -> None:
    """Generate what is missing, then draw the grid."""
    args = parse_args()
    device = select_device(args.device)
    loaded = load_model(args.checkpoint, args.ema, device)
    config = loaded.config
    weights = loaded.weights
    path, kind = path_of_flags(args, loaded)
    feed = coarse_feed(loaded.model, args.coarse_from)
    name = "_".join([Path(args.checkpoint).stem, weights, kind, str(path.nfe), *([feed] if feed else [])])
    folder = Path(args.output or f"results/samples/{name}")
    seeds = image_seeds(args.seed, args.num_images)
    prepare_output(folder, path, loaded, args, device)

    missing = [seed for seed in seeds if not png_file(folder, seed).exists()]
    shapes = scale_shapes(loaded.model.num_scales, config["channels"], config["resolution"])
    states: list[list[torch.Tensor]] = []

    def record(k: int, images: tuple[torch.Tensor, ...]) -> None:
        if len(states) <= path.nfe:
            shown = loaded.scheduler.representation.finished(images)
            states.append([to_uint8(x[0]).cpu() for x in shown])

    batch_size = min(args.batch_size, max(1, len(missing)))
    denoise = loaded.model.denoise
    if missing and resolve_compile(device, args.compile, len(missing) * path.nfe):
        denoise, note = compile_denoiser(denoise, shapes, batch_size, device, args.precision)
        if note:
            print(note)

    def run(chosen, callback=None):
        return sample_seeds(
            denoise, loaded.scheduler, path, chosen, shapes, batch_size, device, args.eta, callback, args.end, feed
        )

    nfe = 0
    with autocast(device, args.precision), tqdm(total=len(missing), unit="img", desc=name) as bar:
        for chosen, samples in run(missing):
            nfe = samples.nfe
            for seed, pixels in zip(chosen, to_uint8(samples.images[0]).cpu(), strict=True):
                save_png(pixels, png_file(folder, seed))
            bar.update(len(chosen))
        if args.trajectory:
            for _ in run(seeds[:1], record):
                pass
            fine = [state[0].numpy() for state in states]
            coarse = [state[1].numpy() for state in states] if path.num_scales == 2 else None
            plot_trajectory(fine, coarse, path.points, folder / "trajectory.png")
    shown = [read_png(png_file(folder, seed)) for seed in seeds[:GRID_IMAGES]]
    save_image_grid(torch.stack(shown).numpy(), folder / "grid.png", columns=8)
    made = f"{len(missing)} new with {nfe} network calls each" if missing else "all there already"
    print(f"{args.num_images} images in {folder}: {made}; path {path.kind} {path.fingerprint()}")


if __name__ == "__main__":
    cli.run_stage(main)
