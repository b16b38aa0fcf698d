"""Image files as they are meant: upright, without transparency, in 8 bits, or refused with a reason.

`find_images` says which files below a folder are images, and what it left out; `read_image` reads one of them.
"""

import errno
import functools
import io
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from runtime.reports import say_once

ORIENTATION = 0x0112  # The number of this tag in EXIF.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # Tags of TIFF.
# Formats that Pillow knows by name but reads with the help of another program or not at all.
NEED_HELP = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# What operating systems, cameras and archives leave beside images.
LITTER = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"})
# Files of many images each, which the library `datasets` reads.
TABLES = (".parquet", ".arrow", ".tar")
# What stops every file from being read is no fault of one.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
SPLITS = frozenset({"train", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"})


class UnreadableImageError(ValueError):
    """An image is damaged, is none, or holds what no 8-bit image can be made of by a rule; says which."""


class WrongSizeError(ValueError):
    """An image is not of the size it is to have."""


class TooLargeError(WrongSizeError):
    """An image does not fit into the square that it is to be padded to."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow reads by itself, in lower case with their dot."""
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    # Files of several pictures, of which Pillow reads the first as JPEG.
    return frozenset({suffix for suffix in known if Image.EXTENSION[suffix] not in NEED_HELP} | {".mpo"})


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's image: hidden, or left there by a system."""
    return name.startswith(".") or name.lower() in LITTER


@dataclass
class Found:
    """Files below a folder that are images, archives or tables by their names, in order; others by reason, counted."""

    files: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path, below: bool = True) -> Found:
    """Images, archives and tables in a folder and below it, in the order of their names; hidden ones are left out.

    Links are followed. A folder is read once however many links lead to it, by its own name if it lies below.
    Links that lead nowhere are among the files if their names are those of images.
    """
    found = Found()
    root, seen, links = Path(os.path.realpath(folder)), set(), []

    def walk(place: Path) -> None:
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(place) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            found.left_out["folders that may not be read"] += 1
            return
        for entry in inside:
            file = place / entry.name
            if is_hidden(entry.name):
                found.left_out["hidden"] += 1
            elif not below and entry.is_dir():
                found.left_out["folders"] += 1
            elif entry.is_dir(follow_symlinks=False):
                walk(file)
            elif entry.is_symlink() and os.path.isdir(file):
                links.append(file)
            elif file.suffix.lower() in image_suffixes():
                # A pipe or a socket would never end.
                if entry.is_file(follow_symlinks=False) or os.path.isfile(file) or not os.path.exists(file):
                    found.files.append(file)
                else:
                    found.left_out["no files"] += 1
            elif file.suffix.lower() == ".zip" and os.path.isfile(file):
                found.archives.append(file)
            elif file.suffix.lower() in TABLES and os.path.isfile(file):
                found.tables.append(file)
            elif not os.path.exists(file):
                found.left_out["broken links"] += 1
            else:
                found.left_out[file.suffix.lower() or "no suffix"] += 1

    walk(folder)
    while links:
        link = links.pop(0)
        # A link upwards would take in what lies around the folder.
        if not root.is_relative_to(os.path.realpath(link)):
            walk(link)
    for files in (found.files, found.archives, found.tables):
        files.sort()
    return found


def is_split(names: set[str]) -> bool:
    """Whether `train` among the names of folders is a part of a data set: if all the others are names of parts too."""
    return "train" in names and {name.lower() for name in names} <= SPLITS


@dataclass(frozen=True)
class Member:
    """One image in a zip archive."""

    archive: Path
    name: str
    size: int
    checksum: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


def find_members(archive: Path) -> tuple[list[Member], Counter[str]]:
    """The images of a zip archive in the order of their names, and how many other files it has by reason.

    Raises UnreadableImageError for a file that is no zip archive.
    """
    members, left_out = [], Counter()
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = sorted(opened.infolist(), key=lambda entry: PurePosixPath(entry.filename))
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise UnreadableImageError(f"{archive} is a damaged archive ({error}).") from error
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if entry.is_dir():
            continue
        if any(map(is_hidden, path.parts)):
            left_out["hidden"] += 1
        elif path.suffix.lower() in image_suffixes():
            members.append(Member(archive, entry.filename, entry.file_size, entry.CRC))
        else:
            left_out[path.suffix.lower() or "no suffix"] += 1
    return members, left_out


class Archives:
    """Images in zip archives, of which one is open at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._opened: zipfile.ZipFile | None = None

    def read(self, file: Path, name: str, most: int = -1) -> bytes:
        """The content of one image of an archive, or so many bytes of it; raises what `read_bytes` raises."""
        with self._lock:
            try:
                if file != self._file:
                    if self._opened is not None:
                        self._opened.close()
                    self._file, self._opened = None, zipfile.ZipFile(file)
                    self._file = file
                with self._opened.open(name) as stream:
                    return stream.read(most)
            except Exception as error:  # Checksums, passwords and unknown ways to compress have a type each.
                if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED):
                    raise
                raise UnreadableImageError(str(error) or type(error).__name__) from error


def report_left_out(place: str | os.PathLike, left_out: Counter[str]) -> None:
    """One line with how many files of `place` are left out and why."""
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        say_once(f"note: {left_out.total()} of the files of '{place}' are left out: {reasons}")


def parse_colour(text: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour by name or as #rrggbb; raises ValueError for what is none."""
    return ImageColor.getrgb(text)[:3]


def read_bytes(file: Path, most: int | None = None) -> bytes:
    """The content of a file, or so many bytes of it; the file is closed again whatever follows.

    Raises UnreadableImageError with the reason, and OSError where the system has no more files or memory to give.
    """
    try:
        if most is None:
            return file.read_bytes()
        with open(file, "rb", buffering=0) as stream:
            return stream.read(most)
    except OSError as error:
        if error.errno in EXHAUSTED:
            way_out = "close programs" if error.errno == errno.ENOMEM else "raise the limit (ulimit -n)"
            raise OSError(
                f"{file} could not be opened ({error.strerror}); {way_out} or lower --num_workers."
            ) from error
        if file.is_symlink() and not os.path.exists(file):
            raise UnreadableImageError(f"it is a link to {os.readlink(file)}, which is not there") from error
        raise UnreadableImageError(error.strerror or str(error)) from error


def read_image(
    content: bytes | np.ndarray, size: tuple[int, int] | None = None, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """An image of mode L or RGB: upright, its transparency laid on the background, 16-bit grey in 8 bits.

    content: of a file, or uint8 `[H, W]` or `[H, W, 3]`, which is an image already.
    size: width and height that it must have. Grey remains grey if the background is grey as well.

    Raises UnreadableImageError with the reason, WrongSizeError for another size, and OSError where the system has no
    more memory to give.
    """

    def look(image: Image.Image) -> Image.Image:
        upright = _upright(image)
        if size is not None and upright.size != size:
            raise WrongSizeError(f"is {upright.width}x{upright.height} and not {size[0]}x{size[1]}")
        if upright.has_transparency_data:
            return _composite(upright, background)
        return upright.convert("L" if upright.mode in ("1", "L") else "RGB")

    return look(Image.fromarray(content)) if isinstance(content, np.ndarray) else _opened(content, look)


def reads_as_ever(content: bytes | np.ndarray) -> bool:
    """Whether an image has nothing that versions before this module read otherwise; also true of an unreadable one."""

    def look(image: Image.Image) -> bool:
        if image.mode.startswith(("I", "F")) or image.has_transparency_data:
            return False
        if image.format == "PNG":
            # The orientation may follow the pixels, which are not to be decoded for this.
            return not any(mark in content for mark in (b"eXIf", b"Raw profile type exif", b"Orientation"))
        return _turn(image) is None

    if isinstance(content, np.ndarray):
        return True
    try:
        return _opened(content, look)
    except UnreadableImageError:
        return True


def read_mask(content: bytes, sizes: tuple[tuple[int, int], ...] | None) -> np.ndarray:
    """A mask drawn by hand as grey levels, uint8 `[H, W]`; where it is transparent, the opposite of what is drawn.

    That is black if anything drawn is bright, and white if all of it is dark. sizes: those that it may have, or None.

    Raises UnreadableImageError with the reason, and WrongSizeError for a size that is not among `sizes`.
    """

    def look(image: Image.Image) -> np.ndarray:
        if sizes is not None and image.size not in sizes:
            raise WrongSizeError(f"is {image.width}x{image.height}")
        upright = _upright(image)
        if not upright.has_transparency_data:
            return np.asarray(upright.convert("L"))
        drawn = upright.convert("RGBA")
        levels, is_drawn = np.asarray(drawn.convert("L")), np.asarray(drawn.getchannel("A")) > 127
        if not is_drawn.any():
            raise UnreadableImageError("it is transparent all over, so that nothing is drawn on it")
        behind = 0 if (levels > 127)[is_drawn].any() else 255
        return np.asarray(_composite(drawn, (behind,) * 3).convert("L"))

    return _opened(content, look)


def _opened(content: bytes, use: Callable) -> object:
    try:
        # From memory: Pillow keeps the file of a damaged image open.
        with Image.open(io.BytesIO(content)) as image:
            return use(image)
    except (WrongSizeError, UnreadableImageError):
        raise
    except UnidentifiedImageError as error:
        what = "Pillow cannot identify it as an image" if content else "it is empty"
        raise UnreadableImageError(what) from error
    except Exception as error:  # A damaged file raises whatever the damage happens to hit.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED):
            raise
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # EXIF is what cameras and editors damage most, and the picture is none the worse.
        return None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says, in 8 bits, with the transparency that it has."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode.startswith(("I", "F")) and not is_16_bit:
        raise UnreadableImageError(
            "it has more than 16 bits per value, of which nothing says what is black and what is white; save it with "
            "8 or 16 bits"
        )
    tags, key = getattr(image, "tag_v2", {}), image.info.get("transparency")
    tile = getattr(image, "tile", None)  # Nothing tells how an array was stored.
    rawmode = str(tile[0][-1]) if tile else ""
    image.load()
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    if is_16_bit:
        values = np.asarray(upright).astype(np.int64)
        largest = 4095 if tuple(tags.get(BITS_PER_SAMPLE, ())) == (12,) else 65535
        levels = (values * 510 + largest) // (2 * largest)  # Rounded; for 16 bits the quotient by 257.
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            levels = 255 - levels
        grey = Image.fromarray(levels.astype(np.uint8))
        if not isinstance(key, int):
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    # The transparent value of a PNG counts in its own bits: Pillow takes the upper 8 of 16, and scales 2 and 4 up.
    if ";16" in rawmode and isinstance(key, tuple):
        upright.info["transparency"] = tuple(level >> 8 for level in key)
    elif isinstance(key, int) and image.format == "PNG":
        upright.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(rawmode, 1)
    return upright


def _composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    is_grey = image.mode in ("1", "L", "LA", "La") and len(set(background)) == 1
    if image.mode in ("La", "RGBa"):
        image = image.convert(f"{image.mode[:-1]}A")
    pixels = np.asarray(image.convert("LA" if is_grey else "RGBA")).astype(np.uint32)
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    behind = np.array(background[: colour.shape[-1]], np.uint32)
    mixed = (colour * alpha + behind * (255 - alpha) + 127) // 255  # Opaque pixels stay as they are.
    return Image.fromarray(mixed.astype(np.uint8).squeeze(-1) if is_grey else mixed.astype(np.uint8))
