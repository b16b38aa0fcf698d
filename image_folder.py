"""Folders of images: what a stage is given in one, and what it writes into another with the settings it was made by."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import BACKGROUND, RESIZE_FILTERS, fit, padded
from images.own import WRITTEN_BY_LIFT, Origin, by_origin, start_of
from images.reading import (
    TooLargeError,
    UnreadableImageError,
    WrongSizeError,
    find_images,
    parse_colour,
    read_bytes,
    read_image,
    report_left_out,
)
from runtime.safe_write import replacing

SETTINGS_FILE = "settings.json"


def as_in_training(config: dict[str, Any], resize: bool) -> dict[str, str | None]:
    """How images are to be read for a model of this config: arguments of `read_file`, `read_folder` and `read_given`.

    resize: whether they are brought to its size as in training.
    """
    pad = config.get("pad") if resize else None
    resize_filter = config["resize_filter"] if resize and pad is None else None
    return {"background": config.get("background", BACKGROUND), "resize_filter": resize_filter, "pad": pad}


def read_file(
    file: Path,
    size: int,
    channels: int,
    background: str = BACKGROUND,
    resize_filter: str | None = None,  # one of RESIZE_FILTERS: fit an image of another size, as those of the training
    pad: str | None = None,  # a colour: pad a smaller image instead
) -> torch.Tensor:
    """An image, uint8 `[C, size, size]`.

    Colour becomes grey and grey becomes colour where the model wants it, and what is transparent shows the background.
    Raises ValueError for an image that is unreadable, of more than 16 bits or of another size that is not to be
    changed, or too large to be padded.
    """
    try:
        image = read_image(read_bytes(file), None if resize_filter or pad else (size, size), parse_colour(background))
        if pad is not None:
            image = padded(image, size, parse_colour(pad))
    except (UnreadableImageError, WrongSizeError) as error:
        is_size = isinstance(error, WrongSizeError)
        others = "smaller ones are padded" if isinstance(error, TooLargeError) else "--resize brings others"
        raise ValueError(
            f"{file} cannot be used ({f'it {error}' if is_size else error}); this model takes 8-bit images of "
            f"{size}x{size} pixels{f', to which {others}' if is_size else ''}."
        ) from error
    image = image.convert("RGB" if channels == 3 else "L")
    pixels = np.array(fit(image, size, RESIZE_FILTERS[resize_filter]) if resize_filter else image)
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1)


def read_folder(
    folder: Path,
    size: int,
    channels: int,
    background: str = BACKGROUND,
    resize_filter: str | None = None,
    pad: str | None = None,
    flag: str = "--input",  # that names it, for messages
) -> dict[str, torch.Tensor]:
    """The images of a folder by name without suffix, in order, uint8 `[C, size, size]`; of its subfolders, none.

    Each is read as by `read_file`. Hidden files and files that are no images are left out, and so are figures that
    LIFT drew, beside anything else. Raises FileNotFoundError for a missing folder, ValueError for one without images
    and for two whose names differ in the suffix alone, and what `read_file` raises.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {folder} is not a folder; name one of {size}x{size} images.")
    found = find_images(folder, below=False)
    groups = by_origin(found.files, start_of)
    # Images that LIFT made lie in a folder of no training because someone wants them there.
    files = sorted(groups[Origin.OTHERS] + groups[Origin.SAMPLE]) or groups[Origin.FIGURE]
    left_out = found.left_out + Counter(file.suffix.lower() for file in (*found.archives, *found.tables))
    left_out[WRITTEN_BY_LIFT] += len(found.files) - len(files)
    images = read_files(files, size, channels, background=background, resize_filter=resize_filter, pad=pad)
    report_left_out(folder, +left_out)
    if not images:
        raise ValueError(f"{flag} {folder} holds no image; name a folder of {size}x{size} images.")
    return images


def read_files(files: Sequence[Path], size: int, channels: int, **reading: str | None) -> dict[str, torch.Tensor]:
    """Images by name without folder and suffix, in order, uint8 `[C, size, size]`; reading: options of `read_file`.

    Raises ValueError for two of one name, and what `read_file` raises.
    """
    images: dict[str, torch.Tensor] = {}
    for file in files:
        if file.stem in images:
            raise ValueError(f"{file} has the name of another image but for its folder or suffix; rename it.")
        images[file.stem] = read_file(file, size, channels, **reading)
    return images


def read_given(
    places: Sequence[str],
    size: int,
    channels: int,
    flag: str = "--input",
    **reading: str | None,
) -> dict[str, torch.Tensor]:
    """The images of --input, or of another flag, which names files or one folder.

    They are read as by `read_files` and `read_folder`.
    Raises FileNotFoundError for what is not there, ValueError for a folder beside others, and what these raise.
    """
    paths = [Path(place) for place in places]
    if len(paths) == 1 and paths[0].is_dir():
        return read_folder(paths[0], size, channels, flag=flag, **reading)
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{flag} {path} does not exist; name images, or one folder of them.")
        if path.is_dir():
            raise ValueError(f"{flag} {path} is a folder beside others; name images, or one folder of them.")
    return read_files(paths, size, channels, **reading)


def read_to_change(
    source: Path,
    folder: Path,  # what is made of the images goes here
    size: int,
    config: dict[str, Any],
    resize: bool,
    num_images: int | None,  # evenly over those there are; None: all
) -> tuple[dict[str, torch.Tensor], dict[str, str | None]]:
    """The images of --input for a model of a config, as by `read_folder`, and what settings.json says of reading them.

    Raises ValueError for an output folder that is the source, for more images than there are, and what `read_folder`
    raises.
    """
    reading = as_in_training(config, resize)
    images = read_folder(source, size, config["channels"], **reading)
    if folder.resolve() == source.resolve():
        raise ValueError(f"--output {folder} is the folder of the input, which would be overwritten; pass another.")
    if num_images:
        names = list(images)
        images = {names[k]: images[names[k]] for k in evenly(num_images, len(names), str(source))}
    return images, {name: reading[name] for name in ("resize_filter", "pad")}


def check_apart(folder: Path, places: Sequence[str], flag: str = "input") -> None:
    """Raise ValueError for an output folder that is one of the inputs or holds one, which might be written over."""
    for place in map(Path, places):
        if folder.resolve() in (place.resolve(), place.resolve().parent):
            raise ValueError(f"--output {folder} is the folder of the {flag} {place}; pass another.")


def evenly(count: int, available: int, where: str) -> np.ndarray:
    """Indices of `count` of `available` images, spread over them as held-out ones are. Raises ValueError for more."""
    if count > available:
        raise ValueError(f"--num_images {count} asks for more than the {available} images of {where}; lower it.")
    return (2 * np.arange(count) + 1) * available // (2 * count)


def claim(folder: Path, settings: dict[str, Any], force: bool, made: Sequence[str] = ()) -> dict[str, Any]:
    """What settings.json of a folder says, or nothing; refuses a folder of other settings, or if forced empties it.

    `images`, what the folder has images of, may differ; made: glob patterns of what else there is to be removed.
    """
    file = folder / SETTINGS_FILE
    if not file.exists():
        return {}
    try:
        saved = json.loads(file.read_text())
        different = [key for key in saved | settings if key != "images" and saved.get(key) != settings.get(key)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); pass another --output.") from error
    if different and not force:
        raise ValueError(
            f"{folder} holds results with another {', '.join(different)}; pass --force to replace them, or another "
            "--output."
        )
    if different:
        # Names of images are not patterns, whatever characters they hold.
        images = [folder / f"{name}.png" for name in saved.get("images", ())]
        for old in (*images, *(file for pattern in made for file in folder.glob(pattern))):
            old.unlink(missing_ok=True)
    return {} if different else saved


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json."""
    with replacing(folder / SETTINGS_FILE) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def claim_images(
    folder: Path, settings: dict[str, Any], prints: dict[str, str], force: bool, made: Sequence[str] = ()
) -> list[str]:
    """Make a folder that of images of these settings; returns the names of those that are not there yet.

    prints: name -> fingerprint of what the image is made from. Raises ValueError for a folder of other settings or an
    image that came from elsewhere, unless forced.
    """
    known = claim(folder, settings, force, made).get("images", {})
    files = {name: folder / f"{name}.png" for name in prints}
    foreign = [file for name, file in files.items() if file.exists() and name not in known]
    if foreign and not force:
        raise ValueError(f"{foreign[0]} was not made by this stage; pass --force to replace it, or another --output.")
    missing = [name for name in prints if not files[name].exists() or known.get(name) != prints[name]]
    for name in missing:
        files[name].unlink(missing_ok=True)
    write_settings(folder, settings | {"images": known | prints})
    return missing
