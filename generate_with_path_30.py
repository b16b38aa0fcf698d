"""Generate images along a path.

    python generate_with_path_30.py --checkpoint checkpoints/baseline_400ep.pth --num_images 64 --device 0
    python generate_with_path_30.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema \\
        --path_type dp_total --heatmap results/heatmap_30_400ep_ema.pth --num_images 64
    python generate_with_path_30.py --checkpoint FILE --schedule results/samples/dp_total/schedule.json
    python generate_with_path_30.py --checkpoint FILE --path_type cascade:2,6    # or shift:1, lead:2, heuristic:0.8
    python generate_with_path_30.py --checkpoint checkpoints/single_t_400ep.pth --coarse_from noisy
    python generate_with_path_30.py --checkpoint FILE --class cat dog --guidance_scale 2
    python generate_with_path_30.py --checkpoint FILE --start path/to/cats    # of a training with --target_dataset
    python generate_with_path_30.py --checkpoint FILE --solver cold --start_components 8    # of --preset cold
    python generate_with_path_30.py --checkpoint FILE --classifier FILE --classifier_scale 3 --class cat

Writes one PNG per image, named by its seed, into --output (images already there are skipped), and nothing else that
`python -m pytorch_fid results/fid_real FOLDER` would take for one: `schedule.json`, which replays the path without the
heatmap, and below it `figures/grid.png` and with --trajectory `figures/trajectory.png`. Models that predict the fine
image alone (single_t, no_t) read a coarse one that --coarse_from makes of it. A model that was trained with --classes
makes all of them in turn, or those of --class, and `figures/classes.png` has a row for each. A model that was trained
with --target_dataset makes an image of each that --start names, and calls it as that one is called;
`figures/starts.png` has those. A model of cold diffusion starts from draws of a mixture of Gaussians, fitted to what
its training images are once they are fully degraded; it has no noise level that a schedule could say.
"""

import runtime.startup  # noqa: F401

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli
from checkpoint import DEGRADED_IMAGES, START_IMAGES, LoadedModel, load_model
from cli import CheckpointSettings, CompileSettings, DataSettings, HardwareSettings
from data import BACKGROUND, fingerprint_array, load_images, read_png, save_png
from diffusion.sampler import check_finite, coarse_feed, compile_denoiser, image_seeds, sample_seeds, scale_shapes
from diffusion.starts import Starts, check_walk
from figures.images import plot_samples, plot_trajectory, save_image_grid
from image_folder import as_in_training, check_apart, claim, claim_images, evenly, read_given, write_settings
from paths.path import Path as SamplingPath
from paths.schedule_file import save_schedule
from planning.choice import OnePathSettings, path_of_settings
from planning.cold_walks import MixtureSettings
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
    ClassSettings, CheckpointSettings, OnePathSettings, MixtureSettings, CompileSettings, HardwareSettings
):
    """What is sampled, along which path, and where it goes."""

    num_images: int = option(64, "images; of a data set that --start names, at most so many", parse=cli.positive_int)
    start: tuple[str, ...] | None = option(
        None,
        "images to start from in place of noise, of a model trained with --target_dataset: files, a folder, or a data "
        "set, brought to its size as in training",
        nargs="+",
        metavar="PLACE",
    )
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "image k has seed 1000000 * SEED + k", parse=cli.seed)
    output: str | None = option(
        None,
        "folder (samples/{checkpoint}_{weights}_{path}_{calls}[_{coarse_from}] in the run's results)",
        aliases=("--output_dir",),
    )
    dataset: str | None = option(
        None, "of a model of cold diffusion: the place of its training images (that of the checkpoint)"
    )
    cache_dir: str = option("cache", "decoded images of a data set to start from, and mixtures, are kept here")
    force: bool = option(False, "replace the images of other settings that --output holds")
    trajectory: bool = option(False, "also draw both scales along the path")


def parse_args() -> SamplingSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(SamplingSettings, __doc__)


def given_images(settings: SamplingSettings, loaded: LoadedModel) -> dict[str, torch.Tensor] | None:
    """What to start from by name, uint8 `[C, R, R]`; None for a model that starts from noise, and refuses the other."""
    config, places = loaded.config, settings.start or ()
    if not loaded.starts_from_images:
        if places:
            what = "what degraded images look like" if loaded.is_cold else "noise"
            raise ValueError(f"{loaded.file} starts from {what}, and --start names images; leave it out.")
        return None
    if not places:
        raise ValueError(
            f"{loaded.file} walks from images of '{config['start_dataset']}' to images of '{config['dataset']}', not "
            "from noise; name images to start from by --start."
        )
    if len(places) > 1 or (Path(places[0]).exists() and Path(places[0]).suffix.lower() != ".zip"):
        reading = as_in_training(config, resize=True)
        return read_given(places, config["resolution"], config["channels"], "--start", **reading)
    reading = {name: config.get(name) for name in ("resize_filter", "pad")}
    background = config.get("background", BACKGROUND)
    found = load_images(places[0], config["resolution"], settings.cache_dir, background=background, **reading)
    images = cli.in_channels(found, config["channels"])
    chosen = evenly(min(settings.num_images, len(images)), len(images), f"'{images.name}'").tolist()
    return {f"{row:06d}": torch.from_numpy(np.array(images.pixels[row])) for row in chosen}


def prepare_output(
    folder: Path,
    path: SamplingPath,
    loaded: LoadedModel,
    conditions: Conditions,
    settings: SamplingSettings,
    device: torch.device,
    given: dict[str, torch.Tensor] | None,
) -> list[str]:
    """Write what made the images, or refuse a folder whose images were made otherwise.

    Returns the names of those given of which there is no image yet.
    """
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
    missing = []
    if given is None:
        claim(folder, said, settings.force, ("[0-9]*.png", f"{FIGURES}/*.png"))
        write_settings(folder, said)
    else:
        check_apart(folder, settings.start, "--start")
        prints = {name: fingerprint_array(image.numpy()) for name, image in given.items()}
        missing = claim_images(folder, said, prints, settings.force, (f"{FIGURES}/*.png",))
    if not loaded.scheduler.noise_levels:
        return missing
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
    return missing


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
    loaded = load_model(settings.checkpoint, settings.ema, device, given=(START_IMAGES, DEGRADED_IMAGES))
    config, space = loaded.config, loaded.space
    weights = loaded.weights
    conditions = settings.conditions(loaded)
    path, kind = path_of_settings(settings, loaded)
    if settings.dataset is not None and not loaded.is_cold:
        raise ValueError(f"--dataset is for models of cold diffusion, and {loaded.file} is none; leave it out.")
    given = given_images(settings, loaded)
    mixture = settings.mixture_starts(loaded, DataSettings(dataset=settings.dataset, cache_dir=settings.cache_dir))
    feed = coarse_feed(loaded.model, settings.coarse_from)
    name = "_".join([Path(settings.checkpoint).stem, weights, kind, str(path.nfe), *([feed] if feed else [])])
    name += settings.solver_suffix + conditions.suffix
    if given is not None or mixture is not None:
        check_walk(path, settings.make_solver(), loaded.scheduler)
    if given is not None:
        name += f"_from_{Path(settings.start[0]).stem}"
    folder = Path(settings.output or loaded.results / "samples" / short_name(name))
    # The seed of an image to start from is its place among those given.
    seeds = image_seeds(settings.seed, settings.num_images) if given is None else range(len(given))
    without = prepare_output(folder, path, loaded, conditions, settings, device, given)
    if given is None:
        starts = mixture and partial(mixture.of_seeds, num_scales=loaded.model.num_scales, device=device)
        files = {seed: png_file(folder, seed) for seed in seeds}
        missing = [seed for seed in seeds if not files[seed].exists()]
    else:
        names = list(given)
        files = {seed: folder / f"{names[seed]}.png" for seed in seeds}
        missing = [seed for seed in seeds if names[seed] in without]
        images = Starts(torch.stack(list(given.values())).numpy())
        starts = partial(images.scales, num_scales=loaded.model.num_scales, device=device)
        save_image_grid(images.pixels[:GRID_IMAGES], folder / FIGURES / "starts.png", columns=8)
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
            starts=starts,
        )

    calls = 0
    with autocast(device, settings.precision), Progress(total=len(missing), unit="img", desc=name) as bar:
        for chosen, samples in run(missing):
            calls += samples.nfe * len(chosen)
            check_finite(samples.images[0], [f"of seed {seed}" if given is None else names[seed] for seed in chosen])
            for seed, pixels in zip(chosen, space.pixels(samples.images[0]).cpu(), strict=True):
                save_png(pixels, files[seed])
            bar.update(len(chosen))
        if settings.trajectory:
            for _ in run(seeds[:1], record):
                pass
            fine = [state[0].numpy() for state in states]
            coarse = [state[1].numpy() for state in states] if path.num_scales == 2 else None
            plot_trajectory(fine, coarse, path.points, folder / FIGURES / "trajectory.png")
    shown = [read_png(files[seed]) for seed in seeds[:GRID_IMAGES]]
    save_image_grid(torch.stack(shown).numpy(), folder / FIGURES / "grid.png", columns=8)
    if conditions.names:
        draw_classes(conditions, seeds, folder)
    made = "all there already"
    if missing:
        made = f"{len(missing)} new with {round(calls / len(missing))} network calls each"
    print(f"{len(seeds)} images in {folder}: {made}; path {path.kind} {path.fingerprint()}")


if __name__ == "__main__":
    cli.run_stage(main)
