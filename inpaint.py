"""Paint what a mask leaves open, with a model that was trained for nothing of the sort (RePaint, arXiv 2201.09865).

    python inpaint.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --mask center
    python inpaint.py --checkpoint FILE --ema --input my_images --mask mask.png --repeats 4 --output painted
    python inpaint.py --checkpoint FILE --ema --mask center --class cat --guidance_scale 2
    python inpaint.py --checkpoint FILE --ema --mask left --mask_scale coarse --path_type dp_total --heatmap FILE

White of a mask is known and black is painted, with the line at mid-grey; what is transparent is the opposite of what is
drawn. A mask of the fine size says which fine pixels are known; a coarse one is known then where all four of its fine
ones are. A mask of the coarse size says which coarse pixels are known, and the fine image may be anything with these
2x2 means: a local super-resolution. --resize takes images and masks of any size.

A model of residuals knows a pixel with the whole of its 2x2 block; known ones of other blocks are put in at the end.

At every point of the path what is known replaces what was sampled, noised to the timestep of its scale; known coarse
pixels also say what the 2x2 means of the noisy fine image are (not with --free_fine). A jump goes back --jump_length
points by adding noise, so that what is painted can take in what is known (--jump_repeats passes over each stretch; 1 is
none). Known fine pixels come out as they went in, bit for bit; known 2x2 means do up to the rounding to bytes, where no
value is clipped.

Writes one PNG per image and seed, named after both, into --output (what is there already is skipped), settings.json,
and `inpainting.png` with some of them. Without --input, images that were kept out of training serve, if there are any.
"""

import runtime.startup  # noqa: F401

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, CompileSettings, DataSettings, HardwareSettings
from data import coarse, fingerprint_array, fit, padded, read_png, save_png, to_float, to_uint8
from diffusion.sampler import (
    Denoiser,
    Images,
    Samples,
    SeededNoise,
    check_finite,
    coarse_feed,
    compile_denoiser,
    sample,
    scale_shapes,
)
from diffusion.step import Solver
from diffusion.super_resolution import noise_seeds
from evaluation.given_images import evaluation_images
from figures.images import plot_samples
from figures.style import WEIGHTS_TITLES
from image_folder import as_in_training, claim_images, evenly, read_folder
from images.reading import TooLargeError, UnreadableImageError, WrongSizeError, read_bytes, read_mask
from images.representation import RESIDUAL, upsample_nearest
from paths.path import Path as SamplingPath
from planning.choice import OnePathSettings, SolverSettings, path_of_settings
from planning.conditions import OneClassSettings
from runtime.device import autocast, resolve_compile, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import short_name
from runtime.settings import REQUIRED, option, parse_settings
from scheduler import DDIMScheduler

# What is known of n x n pixels, by the name of the mask.
MASKS: dict[str, Callable[[int], np.ndarray]] = {
    "center": lambda n: np.pad(np.zeros((n - n // 4 * 2,) * 2, bool), n // 4, constant_values=True),
    "left": lambda n: np.broadcast_to(np.arange(n) >= n // 2, (n, n)),
    "random": lambda n: np.random.default_rng(0).random((n, n)) < 0.5,
    "none": lambda n: np.ones((n, n), bool),
}
FIGURE_FILE = "inpainting.png"
FIGURE_IMAGES, FIGURE_SEEDS = 8, 4
UNKNOWN_GREY = 128


@dataclass(frozen=True, kw_only=True)
class InpaintingSettings(
    OneClassSettings,
    CheckpointSettings,
    OnePathSettings,
    SolverSettings,
    DataSettings,
    CompileSettings,
    HardwareSettings,
):
    """What is painted into which images, and how."""

    usual_eta = 1.0  # As published.
    mask: str = option(
        REQUIRED,
        "PNG of the fine or the coarse size, white where known; or what is painted: the central quarter (center), half "
        f"(left, random) or nothing (none); one of {', '.join(MASKS)}",
    )
    mask_scale: str | None = option(
        None, "of a mask by name, or of a file with --resize (fine)", choices=("fine", "coarse")
    )
    input: str | None = option(None, "folder of images of the fine size")
    resize: bool = option(
        False,
        "bring images of --input and a mask in a file to the size of the model: shorter side, then the centre; of one "
        "trained with --pad pad them, with what is known",
    )
    on: str | None = option(None, "images of the data set (holdout if there are any)", choices=("holdout", "train"))
    num_images: int | None = option(
        None, "evenly over those there are (all of --input, 8 of a data set)", parse=cli.positive_int, metavar="N"
    )
    repeats: int = option(1, "results per image, by as many seeds from --seed on", parse=cli.positive_int)
    batch_size: int = option(64, "images per network call", parse=cli.positive_int)
    seed: int = option(42, "the noise of an image depends on this and its pixels", parse=cli.seed)
    free_fine: bool = option(
        False, "with a coarse mask: put nothing into the fine image on the way, as in super-resolution"
    )
    jump_length: int = option(3, "points that a jump goes back", parse=cli.positive_int)
    jump_repeats: int = option(5, "passes over each stretch; 1 is no jump", parse=cli.positive_int)
    output: str | None = option(None, "folder (one named after all of these in inpainting of the run's results)")
    force: bool = option(False, "replace the images of other settings that --output holds")

    def check(self) -> None:
        super().check()
        if self.input is not None and self.on is not None:
            raise ValueError("--input and --on exclude each other; leave one of them out")
        if self.mask_scale and self.mask not in MASKS and not self.resize:
            raise ValueError("--mask_scale is for a mask by name or --resize; the size of a PNG says its scale")
        if self.resize and self.input is None and self.mask in MASKS:
            raise ValueError("--resize is for --input or a mask in a file; images of a data set have their size")


def parse_args() -> InpaintingSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(InpaintingSettings, __doc__)


def load_mask(mask: str, scale: str | None, resolution: int, resize: bool = False, pad: bool = False) -> torch.Tensor:
    """What is known, bool `[n, n]`: a mask by name, for the fine or the coarse scale, or that of an image file.

    resize: bring a file to a scale as `fit` does images, by nearest neighbours. Without a scale that is the fine one,
    unless the file has the size of the coarse one. pad: do so as `padded` does images, whose margins are known.

    Raises FileNotFoundError for neither, ValueError for a file that is no image, or of neither size if not resized, or
    too large to be padded.
    """
    sizes = {"fine": resolution, "coarse": resolution // 2}
    if mask in MASKS:
        return torch.from_numpy(np.array(MASKS[mask](sizes[scale or "fine"])))
    if not Path(mask).is_file():
        raise FileNotFoundError(f"--mask {mask} is neither a file nor one of {', '.join(MASKS)}; name one of these.")
    squares = tuple((size, size) for size in sizes.values())
    try:
        levels = read_mask(read_bytes(Path(mask)), None if resize else squares)
        if resize and (scale is not None or levels.shape not in squares):
            drawn, size = Image.fromarray(levels), sizes[scale or "fine"]
            brought = padded(drawn, size, (255,) * 3) if pad else fit(drawn, size, Image.Resampling.NEAREST)
            levels = np.asarray(brought)
    except (UnreadableImageError, WrongSizeError) as error:
        is_size = isinstance(error, WrongSizeError)
        fine, half = (f"{size}x{size}" for size in sizes.values())
        others = "smaller ones are padded" if isinstance(error, TooLargeError) else "--resize brings others to it"
        raise ValueError(
            f"--mask {mask} cannot be used ({f'it {error}' if is_size else error}); this model takes an 8-bit image of "
            f"{fine} pixels, or of {half} for the coarse scale{f'; {others}' if is_size else ''}."
        ) from error
    return torch.from_numpy(levels > 127)


def scale_masks(
    mask: torch.Tensor, resolution: int, num_scales: int, coarse_from: str | None = None
) -> tuple[torch.Tensor, ...]:
    """What a mask of either scale says is known of every scale, bool `[H, W]` each, fine first.

    Raises ValueError for a mask of the coarse scale where a model has none, or reads it off the noisy fine image.
    """
    if len(mask) == resolution:
        half = resolution // 2
        return (mask, mask.view(half, 2, half, 2).all(3).all(1))[:num_scales]
    if num_scales == 1 or coarse_from == "noisy":
        raise ValueError(
            "A mask of the coarse scale needs a model that is given a coarse image of its own, unlike a baseline model "
            f"or --coarse_from noisy; pass a mask of {resolution}x{resolution} pixels."
        )
    return torch.zeros(resolution, resolution, dtype=torch.bool), mask


def jump_counts(num_steps: int, jump_length: int, jump_repeats: int) -> dict[int, int]:
    """How often to jump at which points of a path: jump_repeats - 1 times at every jump_length-th one but the last.

    Raises ValueError for jumps as long as the path or longer.
    """
    if jump_repeats == 1:
        return {}
    if jump_length >= num_steps:
        steps, way = ("1 step", "pass") if num_steps == 1 else (f"{num_steps} steps", "choose less, or")
        raise ValueError(
            f"--jump_length {jump_length} is too long for a path of {steps}; {way} --jump_repeats 1 for no jumps."
        )
    return dict.fromkeys(range(jump_length, num_steps, jump_length), jump_repeats - 1)


def fit_means(x: torch.Tensor, means: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The image nearest to x `[B, C, 2H, 2W]` whose 2x2 means are `means` `[B, C, H, W]` where mask `[H, W]` is set."""
    return x + upsample_nearest((means - coarse(x)) * mask)


def repaint(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: SamplingPath,
    images: torch.Tensor,  # clean, [B, C, R, R] in [-1, 1]; what is not known of them is not looked at
    masks: Sequence[torch.Tensor],  # of `scale_masks`
    draw: Callable[[Sequence[int]], torch.Tensor],  # (C, H, W) -> standard normal [B, C, H, W]
    eta: float = 1.0,
    jump_length: int = 1,
    jump_repeats: int = 1,
    coarse_from: str | None = None,
    free_fine: bool = False,
    solver: Solver | None = None,  # None: DDIM with eta
) -> Samples:
    """Sample along a path with what is known put in at every point (RePaint, arXiv 2201.09865, algorithm 1).

    Known pixels are the clean ones noised to the timestep of their scale with fresh noise (eq. 8a), at timestep 0 the
    clean ones themselves, as in super-resolution; the others are sampled (eq. 8b). `jump_counts` says where to jump. A
    jump takes every scale back by its own timesteps, and leaves one alone that had not moved since.

    Where no fine pixel is known, the 2x2 means of the fine image are, at the known coarse pixels, and they are put in
    likewise (`fit_means`), which holds to the rounding of floats in the end. free_fine: only then, at the last point.

    A residual, which is of four pixels together, is known where all of them are, and known pixels of other blocks are
    put in at the end. It has no means, so that known coarse pixels alone hold by themselves.

    Noise is drawn for the start scale by scale, then at each point for the scales of which something is known, for the
    means, for a jump, and as `sample` does: with nothing known and no jumps this is `sample`. Raises what `sample` and
    `jump_counts` raise.
    """
    representation = scheduler.representation
    known = representation.split(images)[: path.num_scales]
    masks = [mask.to(images.device) for mask in masks]
    pixels, is_residual = masks[0], representation is RESIDUAL
    by_means = not pixels.any() and not is_residual and len(masks) == 2
    if is_residual and pixels.any():
        if not masks[1].any():
            raise ValueError(
                "A residual is known where a whole 2x2 block of pixels is, and this mask leaves none whole; pass "
                "another mask, or the checkpoint of an over-complete model."
            )
        masks[0] = upsample_nearest(masks[1][None, None].float())[0, 0].bool()
    is_known = [mask.any().item() for mask in masks]
    left = jump_counts(path.nfe, jump_length, jump_repeats)

    def noised(image: torch.Tensor, t: int, strength: float = 1.0) -> torch.Tensor:
        return scheduler.add_noise(image, strength * draw(image.shape[1:]), t) if t > 0 else image

    def place(k: int, xs: Images) -> tuple[int, Images]:
        placed = [
            torch.where(mask, noised(image, t), x) if some else x
            for x, image, mask, some, t in zip(xs, known, masks, is_known, path.points[k], strict=True)
        ]
        if by_means and is_known[1] and (k == path.nfe or not free_fine):
            # The mean of four pixels has half the noise of one.
            placed[0] = fit_means(placed[0], noised(known[1], path.points[k][0], 0.5), masks[1])
        if left.get(k, 0) > 0:
            left[k] -= 1
            back = zip(placed, path.points[k], path.points[k - jump_length], strict=True)
            placed = [scheduler.renoise(x, draw(x.shape[1:]), t, u) if u > t else x for x, t, u in back]
            k -= jump_length
        if coarse_from == "noisy":
            placed[1] = coarse(placed[0])
        return k, representation.project(tuple(placed))

    noise = [draw(image.shape[1:]) for image in known]
    (painted, *rest), nfe = sample(
        denoise, scheduler, path, noise, eta, place, draw=draw, coarse_from=coarse_from, solver=solver
    )
    # A sum of residual and mean is rounded.
    painted = torch.where(pixels, images, painted) if is_residual else painted
    return Samples((painted, *rest), nfe)


def inpaint(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: SamplingPath,
    images: torch.Tensor,  # [N, C, R, R] in [-1, 1]
    masks: Sequence[torch.Tensor],
    seeds: Sequence[int],  # of the noise of each image
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    **options: Any,  # of `repaint`
) -> Iterator[Samples]:
    """`repaint` batch by batch: image k depends on what is known of it and on `seeds[k]` alone.

    Raises ValueError if an image comes out NaN or infinite, and what `repaint` raises.
    """
    for start in range(0, len(images), batch_size):
        draw = functools.partial(SeededNoise(seeds[start : start + batch_size]).draw, device=device)
        given = images[start : start + batch_size].to(device)
        samples = repaint(denoise, scheduler, path, given, masks, draw, **options)
        check_finite(samples.images[0], range(start, start + len(given)))
        yield samples


def read_images(settings: InpaintingSettings, loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The images to paint in, uint8 `[C, R, R]` by name: those of --input, or some of the data set, numbered."""
    config = loaded.config
    if settings.input is None:
        inherited = config if settings.dataset is None else {}
        on = settings.on or ("holdout" if settings.holdout or inherited.get("holdout") else "train")
        pixels = evaluation_images(settings, loaded, settings.checkpoint, on, settings.num_images)
        few = evenly(settings.num_images or min(FIGURE_IMAGES, len(pixels)), len(pixels), "the data set")
        return {f"{k:04d}": image for k, image in enumerate(pixels[few])}
    reading = as_in_training(config, settings.resize)
    images = read_folder(Path(settings.input), config["resolution"], config["channels"], **reading)
    names = list(images)
    return {names[k]: images[names[k]] for k in evenly(settings.num_images or len(names), len(names), settings.input)}


def draw_figure(
    images: dict[str, torch.Tensor], mask: torch.Tensor, seeds: Sequence[int], folder: Path, title: str
) -> None:
    """Some images, what was known of them, and what was made of them, one row per seed."""
    names = [list(images)[k] for k in evenly(min(FIGURE_IMAGES, len(images)), len(images), "the figure")]
    originals = torch.stack([images[name] for name in names])
    given = originals.clone() if len(mask) == originals.shape[-1] else to_uint8(coarse(to_float(originals)))
    given[:, :, ~mask] = UNKNOWN_GREY
    rows = {"original": originals, f"known of {len(mask)} × {len(mask)}": given}
    for seed in seeds[:FIGURE_SEEDS]:
        rows[f"seed {seed}"] = torch.stack([read_png(folder / f"{name}_{seed}.png") for name in names])
    plot_samples({label: pixels.numpy() for label, pixels in rows.items()}, folder / FIGURE_FILE, title)


def main() -> None:
    """Paint what is missing, then draw the figure."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    loaded.require_pixels("inpaint.py")
    config, weights = loaded.config, loaded.weights
    conditions = settings.conditions(loaded)
    path, kind = path_of_settings(settings, loaded)
    feed = coarse_feed(loaded.model, settings.coarse_from)
    pad = config.get("pad") is not None
    mask = load_mask(settings.mask, settings.mask_scale, config["resolution"], settings.resize, pad)
    masks = scale_masks(mask, config["resolution"], loaded.model.num_scales, feed)
    if settings.free_fine and len(mask) == config["resolution"]:
        raise ValueError("--free_fine is for a mask of the coarse scale, and this one is of the fine; leave it out.")
    jumps = jump_counts(path.nfe, settings.jump_length, settings.jump_repeats)
    images = read_images(settings, loaded)
    name = f"{Path(settings.checkpoint).stem}_{weights}_{kind}_{path.nfe}_{Path(settings.mask).stem}"
    name += settings.solver_suffix
    words = (settings.mask_scale, feed, Path(settings.input).resolve().name if settings.input else None)
    name += "".join(f"_{word}" for word in words if word) + conditions.suffix
    folder = Path(settings.output or loaded.results / "inpainting" / short_name(name))
    if settings.input and folder.resolve() == Path(settings.input).resolve():
        raise ValueError(f"--output {folder} is the folder of the input; pass another.")

    said = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        "mask_fingerprint": fingerprint_array(mask.numpy()),
        **{name: as_in_training(config, settings.resize)[name] for name in ("resize_filter", "pad")},
        **settings.solver_said,
        "jump_length": settings.jump_length if jumps else None,
        "jump_repeats": settings.jump_repeats,
        "free_fine": settings.free_fine,
        "coarse_from": feed,
        "precision": resolve_precision(device, settings.precision),
        **conditions.said,
    }
    seeds = range(settings.seed, settings.seed + settings.repeats)
    results = {f"{name}_{seed}": (pixels, seed) for name, pixels in images.items() for seed in seeds}
    prints = {name: fingerprint_array(pixels.numpy()) for name, (pixels, _) in results.items()}
    missing = claim_images(folder, said, prints, settings.force, (FIGURE_FILE,))

    batch_size = min(settings.batch_size, max(1, len(missing)))
    solver = settings.make_solver()
    steps = path.nfe, path.nfe + settings.jump_length * sum(jumps.values())
    along, calls = (solver.calls(count) * conditions.calls for count in steps)
    denoise = conditions.told_classes(loaded.denoise_with_variance)
    if missing and resolve_compile(device, settings.compile, len(missing) * calls):
        shapes = scale_shapes(loaded.model.num_scales, config["channels"], config["resolution"])
        denoise, note = compile_denoiser(
            denoise, shapes, batch_size, device, settings.precision, with_labels=bool(conditions.names)
        )
        if note:
            print(note)
    denoise = conditions.of_the_class(denoise, loaded)
    nfe = start = 0
    with autocast(device, settings.precision), Progress(total=len(missing), unit="img", desc="inpainting") as bar:
        if missing:
            pixels = torch.stack([results[name][0] for name in missing])
            own_seeds = [noise_seeds(results[name][0][None], results[name][1])[0] for name in missing]
            batches = inpaint(
                denoise, loaded.scheduler, path, to_float(pixels), masks, own_seeds, batch_size, device,
                solver=solver, jump_length=settings.jump_length, jump_repeats=settings.jump_repeats,
                coarse_from=feed, free_fine=settings.free_fine,
            )  # fmt: skip
            for samples in batches:
                nfe = samples.nfe
                for image in to_uint8(samples.images[0]).cpu():
                    save_png(image, folder / f"{missing[start]}.png")
                    start += 1
                bar.update(len(samples.images[0]))

    counted = f"{'at least ' * solver.adaptive}{calls} network calls"
    title = f"Inpainting along {path.kind}, {counted}, epoch {config['epoch']}, {WEIGHTS_TITLES[weights]}"
    title += conditions.title
    draw_figure(images, mask, seeds, folder, title)
    made = "all there already"
    if missing:
        made = f"{len(missing)} new with {nfe} network calls each"
        made += "" if solver.adaptive else f", {along} of the path and {nfe - along} by jumps"
    print(f"{len(results)} images in {folder}: {made}; path {path.kind} {path.fingerprint()}")


if __name__ == "__main__":
    cli.run_stage(main)
