"""Walk from the image of one seed to that of another along a path, or from one given image to another.

    python interpolate.py --checkpoint checkpoints/lift_dual_timestep_400ep.pth --ema --seeds 42000000 42000001
    python interpolate.py --checkpoint FILE --ema --seeds 42000000 42000007 --frames 24 --gif
    python interpolate.py --checkpoint FILE --ema --seeds 42000000 42000007 --at 6 --schedule schedule.json
    python interpolate.py --checkpoint FILE --ema --input A.png B.png
    python interpolate.py --checkpoint FILE --ema --seeds 42000000 42000001 --class cat --guidance_scale 2

Seeds are those in the names of the images of generate_with_path_30.py, which the first and the last frame are. Between
them lie the great circles of their noise, each scale by itself, sampled on without fresh noise of their own; with
--at K not of the noise, but of what the two seeds have become at point K of the path.

With --input two images are taken to the noise they come from, as by encode.py, along the same path unless another is
given. The first and the last frame are what comes back: by --solver ode, at timestep 0 and without a clamp. --tolerance
is that of the way up, and of ode.

Writes `frame_000.png` and so on into --output (what is there already is skipped), settings.json, all of them in a
strip, `grid.png`, and with --gif `frames.gif`, which goes there and back without end.
"""

import runtime.startup  # noqa: F401

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import cli
from checkpoint import LoadedModel, load_model
from cli import CheckpointSettings, HardwareSettings
from data import coarse, fingerprint_array, read_png, save_png
from diffusion.adaptive import MOST_CALLS, TOLERANCE, check_tolerance
from diffusion.sampler import (
    ENDS,
    IMAGES_PER_SEED,
    Denoiser,
    Images,
    Samples,
    SeededNoise,
    check_finite,
    coarse_feed,
    sample,
    scale_shapes,
)
from diffusion.solvers import SOLVERS, Ddim
from diffusion.step import Solver
from evaluation.given_latents import check_latents_exist, encode_pixels
from figures.images import image_grid, save_image_grid
from figures.style import even_columns
from image_folder import as_in_training, check_apart, claim_images, read_file
from images.own import GIF_COMMENT
from paths.path import Path as SamplingPath
from planning.choice import OnePathSettings, WalkSettings
from planning.conditions import Conditions, OneClassSettings
from planning.path_types import path_type
from planning.usual_path import OTHER_TYPES, TWO_CLOCK_STEPS, OpenPathSettings, usual_path
from runtime.device import PRECISIONS, autocast, exact_autocast, resolve_precision, select_device
from runtime.progress import Progress
from runtime.safe_write import replacing, short_name
from runtime.settings import option, parse_settings
from scheduler import DDIMScheduler

GRID_COLUMNS, GRID_SIDE = 12, 128
GRID_FILE, GIF_FILE = "grid.png", "frames.gif"
GIF_SIDE, GIF_MILLISECONDS = 256, 100


def image_seed(text: str) -> int:
    """Parse a seed in the name of an image, which goes beyond the one that it was made from."""
    return cli.seed(text, below=IMAGES_PER_SEED * cli.LARGEST)


@dataclass(frozen=True, kw_only=True)
class InterpolationSettings(OneClassSettings, CheckpointSettings, OpenPathSettings, WalkSettings, HardwareSettings):
    """Between which images, along which path, in how many frames."""

    seeds: tuple[int, int] | None = option(
        None, "of the first and the last frame", parse=image_seed, nargs=2, metavar=("A", "B")
    )
    input: tuple[str, str] | None = option(
        None, "images to walk between, in place of --seeds", nargs=2, metavar=("A", "B")
    )
    resize: bool = option(
        False,
        "bring images of --input to the size of the model: shorter side, then the centre; of one trained with --pad "
        "pad them",
    )
    solver: str | None = option(None, "how a step is taken (ddim; with --input ode)", choices=tuple(SOLVERS))
    end: str | None = option(
        None, "land on the clean image, or on t=0 (clean; with --input t0, where encoding begins)", choices=ENDS
    )
    tolerance: float | None = option(
        None,
        f"of ode, and with --input of the way up by any solver: relative and absolute error of a step ({TOLERANCE:g})",
        parse=cli.positive_float,
    )
    num_steps: int | None = option(
        None,
        f"steps of the path ({OnePathSettings.num_steps}; with --input by ode 1, of the residual pair with two clocks "
        f"{TWO_CLOCK_STEPS})",
        parse=cli.positive_int,
    )
    path_type: str | None = option(
        None,
        f"diagonal, with --input of the residual pair with two clocks image_diagonal; or another: {OTHER_TYPES}",
        parse=path_type,
        metavar="TYPE",
    )
    precision: str = option("auto", "auto: bf16 where it is fast, with --input fp32", choices=PRECISIONS, shown="")
    frames: int = option(12, "the two ends counted", parse=cli.positive_int)
    at: int = option(0, "point of the path whose states are interpolated", parse=int, metavar="K", shown="0: the noise")
    batch_size: int = option(64, "images per network call, at least 3", parse=cli.positive_int)
    gif: bool = option(False, "also write an animation")
    output: str | None = option(None, "folder (one named after all of these in interpolation of the run's results)")
    force: bool = option(False, "replace the frames of other settings that --output holds")

    def check(self) -> None:
        given = self.input is not None
        self._derive(solver=self.solver or ("ode" if given else "ddim"), end=self.end or ("t0" if given else "clean"))
        tolerance = self.tolerance
        if given and tolerance is not None:
            check_tolerance(tolerance)
            if self.solver != "ode":
                self._derive(tolerance=None)  # It is that of the way up, of which other solvers know nothing.
        super().check()
        self._derive(tolerance=tolerance)
        if not given:
            steps, kind = OnePathSettings.num_steps, OnePathSettings.path_type
            self._derive(num_steps=self.num_steps or steps, path_type=self.path_type or kind)
        if given == (self.seeds is not None):
            raise ValueError("either --seeds A B or --input A B, two images, is needed; pass one of them")
        if self.resize and not given:
            raise ValueError("--resize is for images of --input; leave it out")
        if given and self.make_solver().draws:
            raise ValueError(
                f"--solver {self.solver_words} draws noise on the way, so that images of --input do not come back; "
                "choose another, such as ode"
            )
        if given and self.precision == "auto":
            self._derive(precision="fp32")  # Steps would follow the rounding of bf16.
        if self.frames < 2 or self.batch_size < 3:
            raise ValueError(
                "--frames must be at least 2, the two ends, and --batch_size 3, both ends and a frame between"
            )


def parse_args() -> InterpolationSettings:
    """The settings of this stage, from its flags."""
    return parse_settings(InterpolationSettings, __doc__)


def slerp(first: torch.Tensor, last: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Points of the great circle from one image `[C, H, W]` to another, `[B, C, H, W]` for weights `[B]` in [0, 1].

    (sin((1 - w) a) first + sin(w a) last) / sin(a) with the angle a between them (Shoemake 1985): images of equal norm
    keep it, and independent normal ones stay normal, whose straight mean has half the variance. The ends, and all
    there is between equal images, are exact. Opposite images have no such circle, and go through 0 instead.
    """
    a, b = first.double(), last.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    w = weights.double().to(a.device).view(-1, 1, 1, 1)
    if angle.sin() < 1e-6:
        points = torch.where(w == 1, b, a + w * (b - a))
    else:
        points = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()
    return points.to(first.dtype)


def check_point(at: int, path: SamplingPath) -> None:
    """Raises ValueError for what is no point of a path, or the last, where nothing is left to sample."""
    if not 0 <= at < path.nfe:
        raise ValueError(f"--at {at} is not a point before the last of a path of {path.nfe} steps; choose 0 or more.")


def interpolate(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    path: SamplingPath,
    seeds: Sequence[int] | None,  # two, or None for latents
    weights: torch.Tensor,  # [B], of the second seed; the first two of them 0 and 1
    shapes: Sequence[tuple[int, int, int]],  # (C, H, W) per scale, fine first
    at: int = 0,
    device: torch.device | str = "cpu",
    end: str = "clean",
    coarse_from: str | None = None,
    solver: Solver | None = None,  # None: DDIM
    latents: Images | None = None,  # [2, C, H, W] per scale, to start from in place of what the seeds draw
) -> Samples:
    """Sample what lies between the states of two seeds at point `at` of a path, scale by scale.

    Rows 0 and 1 are the images that `sample_seeds` makes of the two seeds, or `sample` of the two latents, but for what
    a solver that remembers earlier points forgets at point `at`. What a coarse feed or a solver draws lies between what
    it draws for the two seeds; latents go with none that draw. Raises ValueError for an `at` that is no point of the
    path before the last, or other first weights, and what `sample` raises.
    """
    check_point(at, path)
    if weights[:2].tolist() != [0, 1]:
        raise ValueError(f"The first two weights must be 0 and 1, the ends, not {weights[:2].tolist()}.")
    solver, draw = solver or Ddim(), None
    if latents is None:
        source = SeededNoise(seeds)

        def draw(shape: Sequence[int]) -> torch.Tensor:
            return slerp(*source.draw(shape, device), weights)

    def meet(k: int, xs: Images) -> tuple[int, Images] | None:
        if k != at:
            return None
        solver.start()  # What was seen before was seen of other images.
        fine = slerp(xs[0][0], xs[0][1], weights)
        if coarse_from == "noisy":
            return k, (fine, coarse(fine))
        return k, (fine, *(slerp(x[0], x[1], weights) for x in xs[1:]))

    noise = [draw(shape) for shape in shapes] if latents is None else [slerp(x[0], x[1], weights) for x in latents]
    return sample(
        denoise, scheduler, path, noise, callback=meet, end=end, draw=draw, coarse_from=coarse_from, solver=solver
    )


def save_gif(frames: torch.Tensor, file: Path) -> None:
    """Write uint8 `[N, C, H, W]` as an animation that goes there and back, of 256 pixels a side or a little more."""
    scale = -(-GIF_SIDE // frames.shape[-1])
    pictures = [Image.fromarray(image_grid(frame[None].numpy(), 1, scale, padding=0)) for frame in frames]
    turn = pictures[1:] + pictures[-2:0:-1]
    with replacing(file) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=turn, duration=GIF_MILLISECONDS, loop=0,
            comment=GIF_COMMENT,
        )  # fmt: skip


class Ends:
    """The first and the last frame, by their seeds or as given images."""

    def __init__(self, settings: InterpolationSettings, loaded: LoadedModel, conditions: Conditions):
        self.settings, self.loaded, self.conditions = settings, loaded, conditions
        self.scheduler, self.said = loaded.scheduler, {"seeds": list(settings.seeds or ())}
        self.names = [str(seed) for seed in settings.seeds or ()]
        if settings.input is None:
            return
        loaded.require_pixels("interpolate.py --input")
        loaded.require_means("interpolate.py --input")
        check_latents_exist(loaded, settings.checkpoint)
        config = loaded.config
        reading = as_in_training(config, settings.resize)
        images = [read_file(Path(file), config["resolution"], config["channels"], **reading) for file in settings.input]
        self.pixels = torch.stack(images)
        self.names = [Path(file).resolve().stem for file in settings.input]
        self.said = {
            "input_fingerprints": [fingerprint_array(image.numpy()) for image in images],
            "tolerance": settings.tolerance or TOLERANCE,
        }
        self.scheduler = loaded.scheduler.unclamped()

    def latents(self, path: SamplingPath, device: torch.device) -> Images | None:
        """What given images are made of, `[2, C, H, W]` per scale; None for seeds."""
        if self.settings.input is None:
            return None
        settings = self.settings
        # Of a solver of fixed steps --num_calls counts those of the way down.
        limit = settings.most_calls if settings.make_solver().adaptive else None
        told = self.conditions.told_classes(self.loaded.denoise)
        return encode_pixels(
            self.loaded, path, self.pixels.to(device), settings.tolerance or TOLERANCE, limit or MOST_CALLS,
            self.conditions.of_the_class(told, self.loaded),
        ).latents  # fmt: skip


def main() -> None:
    """Make the frames that are missing, then draw the strip."""
    settings = parse_args()
    device = select_device(settings.device)
    loaded = load_model(settings.checkpoint, settings.ema, device)
    config, weights, space = loaded.config, loaded.weights, loaded.space
    conditions = settings.conditions(loaded)
    path, kind = usual_path(settings, loaded)
    feed = coarse_feed(loaded.model, settings.coarse_from)
    check_point(settings.at, path)
    ends = Ends(settings, loaded, conditions)
    name = "_".join([Path(settings.checkpoint).stem, weights, kind, str(path.nfe), *ends.names, *([feed] * bool(feed))])
    name += f"_at{settings.at}" if settings.at else ""
    name += settings.solver_suffix + conditions.suffix
    folder = Path(settings.output or loaded.results / "interpolation" / short_name(name))
    check_apart(folder, settings.input or ())

    said = {
        "weights_fingerprint": loaded.fingerprint,
        "path_fingerprint": path.fingerprint(),
        **ends.said,
        "frames": settings.frames,
        "at": settings.at,
        # Folders of earlier versions do not say; they were all made by DDIM without noise.
        **({} if settings.solver_words == "ddim eta 0" else settings.solver_said),
        "end": settings.end,
        "coarse_from": feed,
        "precision": resolve_precision(device, settings.precision),
        **conditions.said,
    }
    denoise = conditions.of_the_class(conditions.told_classes(loaded.denoise_with_variance), loaded)
    # The ends lead every batch, because what is between them is made from their rows.
    shares = torch.linspace(0, 1, settings.frames, dtype=torch.float64)
    names = [f"frame_{k:03d}" for k in range(settings.frames)]
    missing = claim_images(folder, said, dict.fromkeys(names, ""), settings.force, (GRID_FILE, GIF_FILE))
    inner = [k for k in range(1, settings.frames - 1) if names[k] in missing]
    chunks = [inner[s : s + settings.batch_size - 2] for s in range(0, len(inner), settings.batch_size - 2)] or [[]]
    shapes = scale_shapes(loaded.model.num_scales, config["channels"], loaded.side)
    running = autocast if settings.input is None else exact_autocast
    with running(device, settings.precision), Progress(total=len(missing), unit="img", desc="interpolation") as bar:
        nfe, latents = 0, ends.latents(path, device) if missing else None
        for chunk in chunks if missing else []:
            rows = [0, settings.frames - 1, *chunk]
            samples = interpolate(
                denoise, ends.scheduler, path, settings.seeds, shares[rows], shapes, settings.at,
                device, settings.end, feed, settings.make_solver(), latents,
            )  # fmt: skip
            nfe = samples.nfe
            check_finite(samples.images[0], [names[k] for k in rows])
            for k, pixels in zip(rows, space.pixels(samples.images[0]).cpu(), strict=True):
                file = folder / f"{names[k]}.png"
                if not file.exists():
                    save_png(pixels, file)
                    bar.update()
    frames = torch.stack([read_png(folder / f"{name}.png") for name in names])
    save_image_grid(
        frames.numpy(), folder / GRID_FILE, even_columns(len(frames), GRID_COLUMNS), -(-GRID_SIDE // frames.shape[-1])
    )
    if settings.gif:
        save_gif(frames, folder / GIF_FILE)
    elif missing:  # An animation of other frames would be left.
        (folder / GIF_FILE).unlink(missing_ok=True)
    made = f"{len(missing)} new with {nfe} network calls each" if missing else "all there already"
    print(f"{settings.frames} frames in {folder}: {made}; path {path.kind} {path.fingerprint()}")


if __name__ == "__main__":
    cli.run_stage(main)
