"""Generate images along a path.

    python generate_with_path_30.py --checkpoint checkpoints/baseline_400ep.pth --num_images 64 --device 0
    python generate_with_path_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema \\
        --path_type dp_total --heatmap results/heatmap_30_400ep_ema.pth --num_images 64
    python generate_with_path_30.py --checkpoint FILE --schedule results/samples/dp_total/schedule.json
    python generate_with_path_30.py --checkpoint FILE --path_type cascade:2,6    # or shift:1, lead:2, heuristic:0.8
    python generate_with_path_30.py --checkpoint checkpoints/single_t_400ep.pth --coarse_from noisy
    python generate_with_path_30.py --checkpoint FILE --class cat dog --guidance_scale 2
    python generate_with_path_30.py --checkpoint FILE --classifier FILE --classifier_scale 3 --class cat

Writes one PNG per image, named by its seed, into --output (images already there are skipped), and nothing else that
`python -m pytorch_fid results/fid_real FOLDER` would take for one: `schedule.json`, which replays the path without the
heatmap, and below it `figures/grid.png` and with --trajectory `figures/trajectory.png`. Models that predict the fine
image alone (single_t, no_t) read a coarse one that --coarse_from makes of it. A model that was trained with --classes
makes all of them in turn, or those of --class, and `figures/classes.png` has a row for each.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from pathlib import Path

import torch

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, CompileSettings, HardwareSettings
from data import read_png, save_png
from diffusion.sampler import check_finite, coarse_feed, compile_denoiser, image_seeds, sample_seeds, scale_shapes
from figures.images import plot_samples, plot_trajectory, save_image_grid
from image_folder import claim, write_settings
from paths.path import Path as SamplingPath
from paths.schedule_file import save_schedule
from planning.choice import OnePathSettings, WalkSettings, path_of_settings
from planning.conditions import ClassSettings, Conditions
from planning.replay import made_for
from runtime.device import autocast, resolve_compile, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import short_name
from runtime.settings import option, parse_settings

GRID_IMAGES = 64
CLASS_ROWS, CLASS_IMAGES = 20, 10  # At most, of the figure of classes.
FIGURES = "figures"  # The folder of what is no sample, within that of the samples.


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(
    ClassSettings, CheckpointSettings, OnePathSettings, WalkSettings, CompileSettings, HardwareSettings
):
    """What is sampled, along which path, and where it goes."""

    num_images: int = option(64, parse=cli.positive_int)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "image k has seed 1000000 * SEED + k", parse=cli.seed)
    output: str | None = option(
        None,
        "folder (samples/{checkpoint}_{weights}_{path}_{calls}[_{coarse_from}] in the run's results)",
        aliases=("--output_dir",),
    )
    force: bool = option(False, "replace the images of other settings that --output holds")
    trajectory: bool = option(False, "also draw both scales along the path")


def parse_args() -> SamplingSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(SamplingSettings, __doc__)


def prepare_output(
    folder: Path,
    path: SamplingPath,
    loaded: LoadedModel,
    conditions: Conditions,
    settings: SamplingSettings,
    device: torch.device,
) -> None:
    """Write what made the images, or refuse a folder whose images were made otherwise."""
    said = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        **settings.solver_said,
        "end": settings.end,
        "precision": resolve_precision(device, settings.precision),
        **conditions.said,
    }
    feed = coarse_feed(loaded.model, settings.coarse_from)
    if feed is not None:
        said["coarse_from"] = feed
    claim(folder, said, settings.force, ("[0-9]*.png", f"{FIGURES}/*.png"))
    write_settings(folder, said)
    save_schedule(
        path,
        folder / "schedule.json",
        loaded.scheduler.log_snr.numpy(),
        solver=settings.solver_entry,
        criterion=path.provenance.get("criterion"),
        cost=path.provenance.get("cost"),
        beta_schedule=loaded.config["beta_schedule"],
        **made_for(path, loaded),
    )


def png_file(folder: Path, seed: int) -> Path:
    """The file of one image."""
    return folder / f"{seed:012d}.png"


def draw_classes(conditions: Conditions, seeds: range, folder: Path) -> None:
    """A row of images for each class, if there is one of each."""
    count = min(CLASS_IMAGES, len(seeds) // len(conditions.names))
    rows = {
        name: torch.stack([read_png(png_file(folder, seed)) for seed in seeds[k :: len(conditions.names)][:count]])
        for k, name in enumerate(conditions.names[:CLASS_ROWS] if count else ())
    }
    if rows:
        plot_samples(rows, folder / FIGURES / "classes.png", conditions.label.capitalize())


def main() -> None:
    """Generate what is missing, then draw the grid."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    config, space = loaded.config, loaded.space
    weights = loaded.weights
    conditions = settings.conditions(loaded)
    path, kind = path_of_settings(settings, loaded)
    feed = coarse_feed(loaded.model, settings.coarse_from)
    name = "_".join([Path(settings.checkpoint).stem, weights, kind, str(path.nfe), *([feed] if feed else [])])
    name += settings.solver_suffix + conditions.suffix
    folder = Path(settings.output or loaded.results / "samples" / short_name(name))
    seeds = image_seeds(settings.seed, settings.num_images)
    prepare_output(folder, path, loaded, conditions, settings, device)

    missing = [seed for seed in seeds if not png_file(folder, seed).exists()]
    shapes = scale_shapes(loaded.model.num_scales, config["channels"], loaded.side)
    states: list[list[torch.Tensor]] = []

    def record(k: int, images: tuple[torch.Tensor, ...]) -> None:
        if len(states) <= path.nfe:
            shown = loaded.scheduler.representation.finished(images)
            states.append([space.pixels(x[:1])[0].cpu() for x in shown])

    batch_size = min(settings.batch_size, max(1, len(missing)))
    denoise = conditions.told_classes(loaded.denoise_with_variance)
    if missing and resolve_compile(device, settings.compile, len(missing) * settings.calls(path.nfe)):
        denoise, note = compile_denoiser(
            denoise, shapes, batch_size, device, settings.precision, with_labels=bool(conditions.names)
        )
        if note:
            print(note)
    denoise = conditions.guided(denoise, loaded)

    def run(chosen, callback=None):
        return sample_seeds(
            denoise,
            loaded.scheduler,
            path,
            chosen,
            shapes,
            batch_size,
            device,
            callback=callback,
            end=settings.end,
            coarse_from=feed,
            solver=settings.make_solver(),
            labels=conditions.labels(chosen),
        )

    calls = 0
    with autocast(device, settings.precision), Progress(total=len(missing), unit="img", desc=name) as bar:
        for chosen, samples in run(missing):
            calls += samples.nfe * len(chosen)
            check_finite(samples.images[0], [f"of seed {seed}" for seed in chosen])
            for seed, pixels in zip(chosen, space.pixels(samples.images[0]).cpu(), strict=True):
                save_png(pixels, png_file(folder, seed))
            bar.update(len(chosen))
        if settings.trajectory:
            for _ in run(seeds[:1], record):
                pass
            fine = [state[0].numpy() for state in states]
            coarse = [state[1].numpy() for state in states] if path.num_scales == 2 else None
            plot_trajectory(fine, coarse, path.points, folder / FIGURES / "trajectory.png")
    shown = [read_png(png_file(folder, seed)) for seed in seeds[:GRID_IMAGES]]
    save_image_grid(torch.stack(shown).numpy(), folder / FIGURES / "grid.png", columns=8)
    if conditions.names:
        draw_classes(conditions, seeds, folder)
    made = "all there already"
    if missing:
        made = f"{len(missing)} new with {round(calls / len(missing))} network calls each"
    print(f"{settings.num_images} images in {folder}: {made}; path {path.kind} {path.fingerprint()}")


if __name__ == "__main__":
    cli.run_stage(main)
