"""Pictures that LIFT writes carry a mark, by which a folder of images is told from what a run has left in it."""

import contextlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from PIL.PngImagePlugin import PngInfo

from images.reading import UnreadableImageError, read_bytes

T = TypeVar("T")
# Text chunks of a PNG, as matplotlib and Pillow write them: before the pixels, and the same in every run.
IMAGE_TEXT = {"Software": "LIFT"}
FIGURE_TEXT = IMAGE_TEXT | {"Comment": "figure"}
GIF_COMMENT = b"LIFT figure"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# No mark begins further behind: that of a GIF follows its 256 colours.
MARKED_BYTES = 1024
# Why one is left out.
WRITTEN_BY_LIFT = "written by LIFT"


class Origin(IntEnum):
    """Where a picture comes from, in the order in which pictures of a folder are taken for its images."""

    OTHERS = 0
    SAMPLE = 1  # An image that LIFT made.
    FIGURE = 2  # A grid, a plot or an animation that LIFT drew.


def png_info(text: dict[str, str]) -> PngInfo:
    """Text for Pillow to write into a PNG."""
    info = PngInfo()
    for keyword, value in text.items():
        info.add_text(keyword, value)
    return info


def _chunk(text: dict[str, str], keyword: str) -> bytes:
    data = f"{keyword}\0{text[keyword]}".encode("latin-1")
    return len(data).to_bytes(4, "big") + b"tEXt" + data


def origin(start: bytes) -> Origin:
    """Where a picture comes from that starts with these bytes, of which MARKED_BYTES are enough."""
    if start.startswith(b"GIF8"):
        return Origin.FIGURE if bytes((0x21, 0xFE, len(GIF_COMMENT))) + GIF_COMMENT in start else Origin.OTHERS
    if not start.startswith(PNG_SIGNATURE) or _chunk(IMAGE_TEXT, "Software") not in start:
        return Origin.OTHERS
    return Origin.FIGURE if _chunk(FIGURE_TEXT, "Comment") in start else Origin.SAMPLE


def start_of(file: Path) -> bytes:
    """The bytes of a file by which `origin` knows it; raises what `read_bytes` raises."""
    return read_bytes(file, MARKED_BYTES)


def by_origin(files: Sequence[T], start: Callable[[T], bytes]) -> dict[Origin, list[T]]:
    """Pictures by where they come from, in their order; what cannot be read is of others.

    start: the first bytes of one, called where its name ends as those of LIFT's own do.
    """
    groups: dict[Origin, list[T]] = {each: [] for each in Origin}
    for file in files:
        found = Origin.OTHERS
        if str(file).lower().endswith((".png", ".gif")):
            with contextlib.suppress(UnreadableImageError):
                found = origin(start(file))
        groups[found].append(file)
    return groups
