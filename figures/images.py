"""Figures of images: grids, rows of samples, states along a path, and super-resolution.

Each `plot_*` function takes images (numpy arrays, CPU tensors) and the name of a PNG file, which appears complete or
not at all. Pixels are enlarged by whole factors without smoothing.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike
from PIL import Image

from figures.style import COLORS, DPI, STYLE, save_figure
from images.own import FIGURE_TEXT, png_info
from runtime.safe_write import replacing

MAX_TRAJECTORY_COLUMNS = 10


def image_grid(
    images: ArrayLike,  # uint8 [N, C, H, W], C = 1 or 3
    columns: int,
    scale: int = 1,  # every pixel becomes scale x scale pixels
    padding: int = 2,  # white output pixels around and between images
) -> np.ndarray:
    """Lay images out row by row; returns uint8 [H', W', 3] with grey repeated to RGB.

    With c = min(columns, N) and r = ceil(N / c): H' = r·(H·scale + padding) + padding and
    W' = c·(W·scale + padding) + padding. Places left over are white. Raises ValueError for images of
    another type or shape, no image at all, columns or scale below 1, and a negative padding.
    """
    images = _as_images(images)  # [N, C, H, W]
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"an image grid of {columns} columns, scale {scale} and padding {padding} is impossible; give at "
            "least 1, 1 and 0"
        )
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)  # [H', W', 3]
    for k, image in enumerate(images):
        top = padding + k // columns * (height + padding)
        left = padding + k % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def save_image_grid(
    images: ArrayLike,  # uint8 [N, C, H, W], C = 1 or 3
    file: str | os.PathLike,
    columns: int,
    scale: int = 1,
    padding: int = 2,
) -> None:
    """Write `image_grid` as a PNG, pixel by pixel."""
    grid = Image.fromarray(image_grid(images, columns, scale, padding))
    with replacing(file) as temporary:
        grid.save(temporary, format="PNG", dpi=(DPI, DPI), pnginfo=png_info(FIGURE_TEXT))


def plot_samples(
    rows: Mapping[str, ArrayLike],  # label -> uint8 [N, C, H, W], image k from the same seed in every row
    file: str | os.PathLike,
    title: str,
) -> None:
    """Draw labelled rows of samples under each other, so that columns compare methods at equal seeds.

    Images are enlarged by a whole factor of at least 1, towards 128 pixels, less where a row would get wider
    than 2400 pixels; rows may differ in C, H and W and are shown at the size of the first. Raises ValueError for no
    row and for rows of unequal N.
    """
    save_figure(_samples_figure(rows, title), file)


def plot_trajectory(
    fine: Sequence[ArrayLike],  # uint8 [C, H, W] per point
    coarse: Sequence[ArrayLike] | None,  # uint8 [C, H/2, W/2] per point, None for one scale
    points: Sequence[Sequence[int]],  # timesteps per point, fine first
    file: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw the states of a sampler along its path: fine scale above, coarse below at the same displayed size.

    At most ten points are shown, evenly chosen, the first and the last among them, each with its timestep.
    Raises ValueError if images and points do not pair up.
    """
    save_figure(_trajectory_figure(fine, coarse, points, title), file)


def plot_super_resolution(
    columns: Mapping[str, ArrayLike],  # name -> uint8 [N, C, H, W], the originals last, H and W any of each column
    file: str | os.PathLike,
    title: str = "",
    captions: Mapping[str, Sequence[str]] | None = None,  # name -> one line per image, such as its PSNR
) -> None:
    """Draw each image as every method has it side by side, and under that the part of it with the most detail.

    Pixels are enlarged without smoothing, so that an original of up to 64 pixels takes 192 a side. The part is 3/8 of
    a side, where the squared differences of neighbouring pixels of the original add up to most; a frame shows where.
    Raises ValueError for no column and for columns of unequal N.
    """
    save_figure(_super_resolution_figure(columns, title, captions or {}), file)


def _as_images(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images are {images.dtype} of shape {list(images.shape)}; pass at least one as uint8 "
            "[N, C, H, W] with 1 or 3 channels"
        )
    return np.broadcast_to(images, (images.shape[0], 3, *images.shape[2:]))


@rc_context(STYLE)
def _samples_figure(rows: Mapping[str, ArrayLike], title: str) -> Figure:
    if not rows:
        raise ValueError("there is no row of samples to draw; pass at least one")
    strips = {label: _as_images(images) for label, images in rows.items()}
    counts = {label: len(images) for label, images in strips.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"rows of samples must be equally long but hold {counts}; pass the same seeds in each")
    count, _, height, width = next(iter(strips.values())).shape
    scale = max(1, min(math.ceil(128 / height), 2400 // (count * width)))
    size = (height * scale, width * scale)
    cells = [[_tile(image, size) for image in images] for images in strips.values()]
    labels = ["\n".join(textwrap.wrap(label, 16)) for label in strips]
    return _picture_table(cells, labels, title)


@rc_context(STYLE)
def _trajectory_figure(
    fine: Sequence[ArrayLike],
    coarse: Sequence[ArrayLike] | None,
    points: Sequence[Sequence[int]],
    title: str,
) -> Figure:
    lengths = [len(points), len(fine)] + ([] if coarse is None else [len(coarse)])
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"a trajectory of {lengths[0]} points came with {lengths[1:]} images per scale; pass one per point"
        )
    columns = min(len(points), MAX_TRAJECTORY_COLUMNS)
    shown = np.rint(np.linspace(0, len(points) - 1, columns)).astype(int)
    scales = [[np.asarray(states[k]) for k in shown] for states in (fine, coarse) if states is not None]
    scales = [_as_images(np.stack(states)) for states in scales]
    height, width = scales[0].shape[2:]
    factor = math.ceil(128 / height)
    size = (height * factor, width * factor)
    cells = [[_tile(image, size) for image in images] for images in scales]
    names = ("fine", "coarse")
    labels = [f"{name}\n{images.shape[2]} × {images.shape[3]}" for name, images in zip(names, scales, strict=False)]
    captions = [[f"$t = {points[k][s]}$" for k in shown] for s in range(len(scales))]
    return _picture_table(cells, labels, title, headings=[f"point {k}" for k in shown], captions=captions)


@rc_context(STYLE)
def _super_resolution_figure(
    columns: Mapping[str, ArrayLike], title: str, captions: Mapping[str, Sequence[str]]
) -> Figure:
    if not columns:
        raise ValueError("there is no column of images to draw; pass at least one")
    pictures = {name: _as_images(images) for name, images in columns.items()}
    counts = {name: len(images) for name, images in pictures.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns of images must be equally long but hold {counts}; pass the same images in each")
    originals = list(pictures.values())[-1]
    height, width = originals.shape[2:]
    # Three eighths of a side are a whole number of pixels then, too.
    scale = 3 * math.ceil(64 / height)
    size = (height * scale, width * scale)
    cells, lines = [], []
    for k, original in enumerate(originals):
        part = _most_detailed(original)
        whole = [_tile(images[k], size) for images in pictures.values()]
        cells += [[_framed(tile, part) for tile in whole], [_tile_of_part(tile, part) for tile in whole]]
        lines += [[captions[name][k] if name in captions else "" for name in pictures], [""] * len(pictures)]
    return _picture_table(cells, ["image", "detail"] * len(originals), title, headings=list(columns), captions=lines)


def _most_detailed(image: np.ndarray) -> tuple[float, float, float, float]:
    # Top, left, height and width as shares of a side; even pixels, so that it is whole pixels at half the size too.
    values = image.astype(np.float64)
    detail = np.zeros(image.shape[1:])
    detail[1:] += (np.diff(values, axis=1) ** 2).sum(0)
    detail[:, 1:] += (np.diff(values, axis=2) ** 2).sum(0)
    sides = tuple(max(2, 2 * round(3 * side / 16)) for side in detail.shape)
    sums = sliding_window_view(detail, sides)[::2, ::2].sum((2, 3))
    corner = 2 * np.array(np.unravel_index(sums.argmax(), sums.shape))
    return tuple(float(x) for x in np.concatenate([corner, sides]) / np.tile(detail.shape, 2))


def _part_of(tile: np.ndarray, part: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    return tuple(round(share * tile.shape[k % 2]) for k, share in enumerate(part))


def _framed(tile: np.ndarray, part: tuple[float, float, float, float], line: int = 2) -> np.ndarray:
    top, left, height, width = _part_of(tile, part)
    rows, columns = np.ogrid[: tile.shape[0], : tile.shape[1]]
    outside = np.maximum(abs(2 * (rows - top) + 1 - height) - height, abs(2 * (columns - left) + 1 - width) - width)
    framed = tile.copy()
    framed[(outside > 0) & (outside < 2 * line)] = np.rint(np.array(to_rgb(COLORS[4])) * 255)
    return framed


def _tile_of_part(tile: np.ndarray, part: tuple[float, float, float, float]) -> np.ndarray:
    top, left, height, width = _part_of(tile, part)
    return _tile(tile[top : top + height, left : left + width].transpose(2, 0, 1), tile.shape[:2])


def _tile(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # [3, H, W] to [*size, 3] by nearest neighbour.
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))


def _text_width(text: str, size_points: float) -> int:
    # A blank text has no outline to measure.
    return math.ceil(TextPath((0, 0), text + ".", size=size_points).get_extents().width * DPI / 72)


def _picture_table(
    cells: Sequence[Sequence[np.ndarray]],  # rows of equally large [H, W, 3]
    labels: Sequence[str],  # one per row, at its left
    title: str,
    headings: Sequence[str] | None = None,  # one per column
    captions: Sequence[Sequence[str]] | None = None,  # one per picture, under it
) -> Figure:
    # Laid out in output pixels, so that every image pixel covers a whole number of them.
    height, width, _ = cells[0][0].shape
    gap, line = 6, 30
    margin_left = 24 + max(_text_width(part, 10) for label in labels for part in label.split("\n"))
    margin_top = gap + (line + 10 if title else 0) + (line if headings else 0)
    pitch_x, pitch_y = width + gap, height + gap + (line if captions else 0)
    total_width = max(margin_left + len(cells[0]) * pitch_x, _text_width(title, 12) + 2 * gap)
    total_height = margin_top + len(cells) * pitch_y
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)

    def write(x: float, y: float, text: str, **style) -> None:
        figure.text(x / total_width, 1 - y / total_height, text, va="center", **style)

    if title:
        write(total_width / 2, gap + line / 2, title, ha="center", fontsize=12)
    for row, (label, pictures) in enumerate(zip(labels, cells, strict=True)):
        y = margin_top + row * pitch_y
        write(margin_left - 12, y + height / 2, label, ha="right")
        for column, picture in enumerate(pictures):
            x = margin_left + column * pitch_x
            # figimage counts pixels from the lower edge.
            figure.figimage(picture, x, total_height - y - height, origin="upper")
            if headings and row == 0:
                write(x + width / 2, y - line / 2, headings[column], ha="center", fontsize=9)
            if captions:
                write(x + width / 2, y + height + line / 2, captions[row][column], ha="center", fontsize=9)
    return figure
