"""The settings that stages share, the values of flags, and how a stage ends on bad input: a sentence and a status."""

from runtime.startup import interruptible

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint import MODEL_CLASSES, checkpoint_of_run
from data import BACKGROUND, RESIZE_FILTER, RESIZE_FILTERS, ImageSet, load_images, split_holdout
from images.reading import parse_colour
from images.sources import is_here, is_hub_id
from runtime.device import PRECISIONS
from runtime.errors import in_words
from runtime.runs import hint_at_runs, run_name
from runtime.settings import Settings, option
from runtime.terminal import discard, printing

# Whole numbers are below it: PyTorch holds 63 bits, and a table of results 18 digits.
LARGEST = 10**18
ANY_CLASSES = "any"  # The one way in which a data set divides its images.


def file_of(*suffixes: str) -> Callable[[str], str]:
    """An argparse type of file names that end in one of these, so that no file of another kind is written over."""

    def check(text: str) -> str:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"'{text}' does not end in {' or '.join(suffixes)}")
        return text

    return check


def hidden_dims(text: str) -> tuple[int, ...]:
    """Parse `64,128,256,512`."""
    try:
        widths = tuple(int(part) for part in text.replace(" ", ",").split(",") if part)
    except ValueError:
        widths = ()
    if not widths:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of widths such as 64,128,256,512")
    return widths


def _whole_number(text: str, least: int, below: int, what: str) -> int:
    # Python reads no more than 4300 digits.
    value = int(text) if text.isdecimal() and len(text) < 1000 else below if text.isdecimal() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
    if value >= below:
        shown = text if len(text) < 60 else f"{text[:20]}..."
        raise argparse.ArgumentTypeError(f"'{shown}' is too large; choose less than {below}")
    return value


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, with up to 18 digits."""
    return _whole_number(text, 1, LARGEST, "a positive integer")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def number_from_zero(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 0")
    return value


def seed(text: str, below: int = LARGEST) -> int:
    """Parse an integer of at least 0 that is below a bound."""
    return _whole_number(text, 0, below, "0 or a positive integer")


def colour(text: str) -> str:
    """Keep the text of a colour, such as white or #808080."""
    try:
        parse_colour(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no colour such as white or #808080") from error
    return text


def unit_interval(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def proper_share(text: str) -> float:
    """Parse a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")
    return value


def loss_weights(text: str) -> tuple[float, ...] | str:
    """Parse `auto` or `1,0.25`: a number of at least 0 for each of one or two scales, not all 0."""
    if text == "auto":
        return text
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if not 1 <= len(weights) <= 2 or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise argparse.ArgumentTypeError(f"'{text}' is not a pair of weights such as 1,0.25")
    return weights


def checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """An argparse type that keeps the text which `parse` accepts; its ValueError becomes a usage error."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def named(texts: Iterable[str]) -> dict[str, Path]:
    """Split each NAME=FILE; without a name, the file's folder names it, and a folder names itself."""
    places = {}
    for text in texts:
        name, _, place = text.rpartition("=")
        name = name or (Path(place) if Path(place).is_dir() else Path(place).parent).name
        if name in places:
            raise ValueError(f"Two inputs are called '{name}'; give each a name of its own as NAME={place}.")
        places[name] = Path(place)
    return places


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which images; what is left open is that of the checkpoint they belong to."""

    group = "data"
    dataset: str | None = option(None, "hub id, folder, or synthetic (that of the checkpoint)")
    limit: int | None = option(None, "first N images only", parse=positive_int, metavar="N", recorded=True)
    holdout: int | None = option(
        None, "images kept out of training (as in training)", parse=positive_int, metavar="N", recorded=True
    )
    cache_dir: str = option("cache", "decoded images are kept here")
    num_workers: int = option(4, "threads that decode images", parse=positive_int)
    skip_bad_images: bool = option(False, "leave unreadable images out", recorded=True)


@dataclass(frozen=True, kw_only=True)
class TrainingDataSettings(DataSettings):
    """Which images to train on, and how they come to their size."""

    group = "data"
    dataset: str = option("huggan/AFHQv2", "hub id, folder, or synthetic", recorded=True)
    resolution: int = option(64, "side of the fine image", parse=positive_int, recorded=True)
    resize_filter: str = option(RESIZE_FILTER, choices=tuple(RESIZE_FILTERS), recorded=True)
    background: str = option(
        BACKGROUND,
        "colour under transparent parts, by name or as #rrggbb",
        parse=colour,
        metavar="COLOUR",
        recorded=True,
        absent=BACKGROUND,
    )
    pad: str | None = option(
        None,
        "in place of a resize pad images evenly to --resolution, with a colour (black); an odd rest goes to the right "
        "and the bottom (off)",
        parse=colour,
        metavar="COLOUR",
        nargs="?",
        const="black",
        recorded=True,
        absent=None,
    )
    classes: str | None = option(
        None,
        "tell the model the classes of the images: those of its folders or of its label column, or by name of one of "
        "several columns or `folder` (off)",
        metavar="BY",
        nargs="?",
        const=ANY_CLASSES,
    )
    latents: str | None = option(
        None,
        "train on what an autoencoder makes of the images, AutoencoderKL of diffusers: a hub id such as "
        "stabilityai/sd-vae-ft-ema, a folder, or either with :SUBFOLDER (off)",
        metavar="ID",
        recorded=True,
        absent=None,
    )
    holdout: int | None = option(
        None, "images kept out of training, evenly over the set (none)", parse=positive_int, metavar="N", recorded=True
    )

    def check(self) -> None:
        super().check()
        if self.pad is not None and self.resize_filter != RESIZE_FILTER:
            raise ValueError("--pad resizes nothing; leave it or --resize_filter out.")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Which trained model: a file, or the checkpoint of a run.

    `checkpoint` has its value once the object is made. Raises ValueError for neither, for both, and for a run without
    such a checkpoint.
    """

    checkpoint: str | None = option(None, "a checkpoint of training")
    run: str | None = option(None, "run whose checkpoint it is", parse=run_name, metavar="NAME")
    epoch: int | None = option(None, "of --run (the last)", parse=positive_int)
    model_type: str | None = option(None, "of --run, if it has several", choices=tuple(MODEL_CLASSES))
    ema: bool = option(False, "use the EMA weights")

    @property
    def needs_checkpoint(self) -> bool:
        """Whether nothing can be done without a model."""
        return True

    def check(self) -> None:
        super().check()
        if self.run is None:
            if self.epoch is not None or self.model_type is not None:
                raise ValueError("--epoch and --model_type choose a checkpoint of --run; name that too")
            if self.checkpoint is None and self.needs_checkpoint:
                raise ValueError(f"--checkpoint FILE or --run NAME is required{hint_at_runs()}")
            return
        if self.checkpoint is not None:
            raise ValueError("--checkpoint and --run exclude each other; leave one of them out")
        self._derive(checkpoint=str(checkpoint_of_run(self.run, self.model_type, self.epoch)))


@dataclass(frozen=True, kw_only=True)
class HardwareSettings(Settings):
    """Where networks run, and in which precision."""

    group = "hardware"
    device: str | None = option(None, "0, cuda:1 or cpu (the first GPU if there is one)")
    precision: str = option("auto", "auto: bf16 where it is fast", choices=PRECISIONS, shown="")


@dataclass(frozen=True, kw_only=True)
class CompileSettings(Settings):
    """Whether the network is compiled; None leaves it to the device and the length of the run."""

    group = "hardware"
    compile: bool | None = option(
        None, "compile the network, which takes minutes (on a GPU, for long runs)", parse=bool
    )


def load_training_images(settings: DataSettings, config: dict | None = None) -> ImageSet:
    """The images that settings name, without those held out; what is left open comes from the config of a checkpoint.

    Without a config they must be `TrainingDataSettings`, which leave nothing open. Raises what `load_images` and
    `split_holdout` raise.
    """
    return load_image_parts(settings, config)[0]


def load_image_parts(settings: DataSettings, config: dict | None = None) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on and those held out, if any are, as `load_training_images` finds them.

    A limit and a count of images held out belong to the data set they were given with: with a `dataset` those of the
    config hold where it names the images of the training, at another place or not, and no others.

    Raises ValueError too if the place that the config names holds other images by now than were trained on.
    """
    if config is None:
        return _load_image_parts(settings, asdict(settings), inherited={})
    if settings.dataset is None:
        _check_place(config)
        parts = _load_image_parts(settings, config, inherited=config)
        changed = parts[0].fingerprint != config.get("data_fingerprint", parts[0].fingerprint)
        if changed and settings.limit is None and settings.holdout is None:
            raise ValueError(
                f"The images of '{config['dataset']}' are no longer those of the training, so that none are known to "
                "be held out; bring them back, or pass what is there now as --dataset."
            )
        return parts
    with contextlib.suppress(ValueError):  # Other images may be too few for these counts.
        parts = _load_image_parts(settings, config, inherited=config)
        if parts[0].fingerprint == config.get("data_fingerprint"):
            return parts
    return _load_image_parts(settings, config, inherited={})


def load_start_parts(
    settings: DataSettings,
    channels: int,  # of the model
    config: dict | None = None,
) -> tuple[ImageSet, ImageSet | None]:
    """The images that lines start from, in place of noise, and those of them held out, of a training or of a config.

    They are read as the images that lines end at are; `limit` and `holdout` of the training hold for each of both sets.
    Raises ValueError for other images than the config was trained on, and what `load_image_parts` and `in_channels`
    raise.
    """
    said = asdict(settings) if config is None else config
    if config is not None:
        _check_place(config, "start_dataset")
    reading = {name: getattr(settings, name) for name in ("cache_dir", "num_workers", "skip_bad_images")}
    own = DataSettings(dataset=said["start_dataset"], **reading)
    parts = _load_image_parts(own, said, inherited=said)
    if config is not None and parts[0].fingerprint != config["start_fingerprint"]:
        raise ValueError(
            f"The images of '{own.dataset}', which the model starts from, are no longer those of the training; bring "
            "them back."
        )
    return tuple(None if part is None else in_channels(part, channels) for part in parts)


def in_channels(images: ImageSet, channels: int) -> ImageSet:
    """Images to start from with the channels of a model, grey ones three times for RGB; refuses colour for grey."""
    if images.channels == channels:
        return images
    if channels == 1:
        raise ValueError(
            f"The images of '{images.name}' have colours, and the model makes grey ones; pass grey ones to start from."
        )
    return dataclasses.replace(images, pixels=np.repeat(images.pixels, channels, axis=1))


def _check_place(config: dict, which: str = "dataset") -> None:
    # A folder that has gone must not be looked for on the hub, where another data set may have its name.
    place = config[which]
    was_here = config.get(f"{which}_is_here", not is_hub_id(place))
    if place != "synthetic" and was_here and not is_here(place):
        way_out = "pass their place as --dataset" if which == "dataset" else "put them or a link to them in that place"
        raise FileNotFoundError(
            f"The images of the training lay in '{place}', which is not there (seen from {os.getcwd()}); {way_out}."
        )


def _load_image_parts(settings: DataSettings, defaults: dict, inherited: dict) -> tuple[ImageSet, ImageSet | None]:
    images = load_images(
        settings.dataset or defaults["dataset"],
        resolution=defaults["resolution"],
        cache_dir=settings.cache_dir,
        limit=settings.limit or inherited.get("limit"),
        resize_filter=defaults["resize_filter"],
        skip_bad_images=settings.skip_bad_images or defaults["skip_bad_images"],
        num_workers=settings.num_workers,
        background=defaults.get("background", BACKGROUND),
        pad=defaults.get("pad"),
    )
    holdout = settings.holdout or inherited.get("holdout")
    return (images, None) if holdout is None else split_holdout(images, holdout)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; bad input ends it with one sentence on stderr and status 1, an interrupt with 130.

    What cannot be printed is lost (`printing`), and a reader that closes its pipe ends the stage quietly.
    With LIFT_DEBUG set in the environment the traceback is shown instead.
    """
    try:
        with interruptible(), printing():
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        discard(sys.stdout)  # Python would complain when it flushes on the way out.
        sys.exit(128 + signal.SIGPIPE)
    except torch.OutOfMemoryError as error:
        if os.environ.get("LIFT_DEBUG"):
            raise
        sys.exit(f"error: out of GPU memory ({str(error).splitlines()[0]}); lower --batch_size or --hidden_dims.")
    except MemoryError as error:
        if os.environ.get("LIFT_DEBUG"):
            raise
        reason = f" ({' '.join(str(error).split())})" if str(error) else ""
        sys.exit(f"error: out of memory{reason}; lower --batch_size, --hidden_dims or the number of images.")
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("LIFT_DEBUG"):
            raise
        said = in_words(error) if isinstance(error, OSError) else str(error)
        sys.exit(f"error: {' '.join(said.split())}")
