"""The flags that stages share, and how a stage ends on bad input: one sentence and an exit status."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable

import torch

from data import RESIZE_FILTERS, ImageSet, load_images, split_holdout
from runtime.device import PRECISIONS


def hidden_dims(text: str) -> tuple[int, ...]:
    """Parse `64,128,256,512`."""
    try:
        widths = tuple(int(part) for part in text.replace(" ", ",").split(",") if part)
    except ValueError:
        widths = ()
    if not widths:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of widths such as 64,128,256,512")
    return widths


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def seed(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not 0 or a positive integer")
    return int(text)


def unit_interval(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def two_weights(text: str) -> tuple[float, float]:
    """Parse `1,0.25`: two numbers of at least 0, one of them above."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 2 or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise argparse.ArgumentTypeError(f"'{text}' is not a pair of weights such as 1,0.25")
    return weights


def loss_weights(text: str) -> tuple[float, float] | str:
    """Parse `auto`, or as `two_weights`."""
    return text if text == "auto" else two_weights(text)


def checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """An argparse type that keeps the text which `parse` accepts; its ValueError becomes a usage error."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def add_data_arguments(parser: argparse.ArgumentParser, dataset_default: str | None = "huggan/AFHQv2") -> None:
    """`--dataset` and everything that decides which pixels it gives; None leaves dataset to the checkpoint."""
    group = parser.add_argument_group("data")
    said = dataset_default or "that of the checkpoint"
    group.add_argument("--dataset", default=dataset_default, help=f"hub id, folder, or synthetic ({said})")
    if dataset_default is not None:
        group.add_argument("--resolution", type=positive_int, default=64, help="side of the fine image (64)")
        group.add_argument("--resize_filter", choices=tuple(RESIZE_FILTERS), default="bilinear", help="(bilinear)")
    group.add_argument("--limit", type=positive_int, default=None, metavar="N", help="first N images only")
    text = "images kept out of training, evenly over the set (none)" if dataset_default else "(as in training)"
    group.add_argument("--holdout", type=positive_int, default=None, metavar="N", help=text)
    group.add_argument("--cache_dir", default="cache", help="decoded images are kept here (cache)")
    group.add_argument("--num_workers", type=positive_int, default=4, help="threads that decode images (4)")
    group.add_argument("--skip_bad_images", action="store_true", help="leave unreadable images out")


def load_training_images(args: argparse.Namespace, config: dict | None = None) -> ImageSet:
    """The images the flags name, without those held out; what they leave open comes from the config of a checkpoint."""
    return load_image_parts(args, config)[0]


def load_image_parts(args: argparse.Namespace, config: dict | None = None) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on and those held out, if any are, as `load_training_images` finds them.

    A limit and a count of images held out belong to the data set they were given with: with `--dataset` those of the
    config hold where it names the images of the training, at another place or not, and no others.
    """
    if config is None or args.dataset is None:
        return _load_image_parts(args, config or vars(args), inherited=config or {})
    with contextlib.suppress(ValueError):  # Other images may be too few for these counts.
        parts = _load_image_parts(args, config, inherited=config)
        if parts[0].fingerprint == config.get("data_fingerprint"):
            return parts
    return _load_image_parts(args, config, inherited={})


def _load_image_parts(args: argparse.Namespace, defaults: dict, inherited: dict) -> tuple[ImageSet, ImageSet | None]:
    images = load_images(
        args.dataset or defaults["dataset"],
        resolution=defaults["resolution"],
        cache_dir=args.cache_dir,
        limit=args.limit or inherited.get("limit"),
        resize_filter=defaults["resize_filter"],
        skip_bad_images=args.skip_bad_images or defaults["skip_bad_images"],
        num_workers=args.num_workers,
    )
    holdout = args.holdout or inherited.get("holdout")
    return (images, None) if holdout is None else split_holdout(images, holdout)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--precision`."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default=None, help="0, cuda:1 or cpu (the first GPU if there is one)")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 where it is fast")


def add_compile_argument(parser: argparse._ActionsContainer) -> None:
    """`--compile`, for a parser or a group of it; None where it is not given."""
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network, which takes minutes (on a GPU, for long runs)",
    )


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; bad input ends it with one sentence on stderr and status 1, an interrupt with 130.

    With LIFT_DEBUG set in the environment the traceback is shown instead.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        if os.environ.get("LIFT_DEBUG"):
            raise
        sys.exit(f"error: out of GPU memory ({str(error).splitlines()[0]}); lower --batch_size or --hidden_dims.")
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("LIFT_DEBUG"):
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
