"""Images in: from the hub, a folder or the built-in synthetic set, decoded once and served at two scales.

`load_images` decodes and resizes every image once and keeps the result as a memory-mapped uint8 array in
the cache folder. `TwoScaleBatches` serves shuffled batches from memory, on the GPU where there is one.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from images.classes import as_read, as_written, chosen
from images.own import IMAGE_TEXT, png_info
from images.reading import (
    TooLargeError,
    UnreadableImageError,
    WrongSizeError,
    parse_colour,
    read_image,
    reads_as_ever,
)
from images.sources import Classes, Source, open_source
from images.synthetic import synthetic_classes, synthetic_images
from runtime.progress import Progress
from runtime.reports import printable
from runtime.safe_write import replacing, short_name

RESIZE_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
RESIZE_FILTER = "bilinear"
DECODE_CHUNK = 512
SYNTHETIC_DEFAULT_IMAGES = 4096
# Figures that generate_with_path_30.py of earlier versions drew into the folder of its images.
SAMPLE_FIGURES = frozenset({"grid.png", "trajectory.png"})
# Raised when images are read otherwise than before, so that the cache is looked at again.
READING = 2
# As pages show it; what is drawn in black on nothing would vanish on black.
BACKGROUND = "white"


@dataclass(frozen=True)
class ImageSet:
    """Decoded images: `pixels` uint8 `[N, C, R, R]`, `name` as given, `fingerprint` of the pixels themselves.

    `classes` are the ways in which the data set divides them, with a label for each of these images; names are those of
    the whole data set, whether all classes are left in this part of it or not.
    """

    pixels: np.ndarray
    name: str
    fingerprint: str
    classes: tuple[Classes, ...] = ()

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.pixels.shape[1]

    def divided(self, by: str | None = None) -> Classes:
        """The way of dividing into classes that is asked for, with a label of at least 0 for every image.

        by: as in `Classes.by`, or the name of a column alone; None if there is exactly one way.

        Raises ValueError if there is none, if there are several and none is named, for a name that none has, for
        images without a label, and for fewer than two classes.
        """
        return chosen(self.classes, by, self.name)

    def __len__(self) -> int:
        return len(self.pixels)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] (clamped) to uint8 0..255 by rounding, as a saved PNG holds them."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def coarse(x_64: torch.Tensor) -> torch.Tensor:
    """The coarse image `x_32 = A x_64`, the 2x2 mean: `[B, C, H, W]` -> `[B, C, H/2, W/2]`."""
    return F.avg_pool2d(x_64, 2)


def fingerprint_array(pixels: np.ndarray) -> str:
    """16 hex digits of the sha256 over shape, type and content of an array."""
    digest = hashlib.sha256(f"{pixels.shape}{pixels.dtype}".encode())
    for start in range(0, len(pixels), DECODE_CHUNK):
        digest.update(np.ascontiguousarray(pixels[start : start + DECODE_CHUNK]))
    return digest.hexdigest()[:16]


def fingerprint_labels(classes: Classes) -> str:
    """16 hex digits of the sha256 over the names of classes and the label of every image."""
    digest = hashlib.sha256(json.dumps(classes.names).encode())
    digest.update(np.ascontiguousarray(classes.labels, "<i8"))
    return digest.hexdigest()[:16]


def fit(image: Image.Image, resolution: int, resample: Image.Resampling) -> Image.Image:
    """Resize the shorter side and crop the centre, rounding as torchvision does."""
    size = tuple(resolution * side // min(image.size) for side in image.size)
    if image.size != size:
        image = image.resize(size, resample)
    left, top = (round((side - resolution) / 2) for side in size)
    return image.crop((left, top, left + resolution, top + resolution))


def padded(image: Image.Image, resolution: int, colour: tuple[int, int, int]) -> Image.Image:
    """An image of mode L or RGB in the middle of a square of one colour; an odd rest goes to the right and the bottom.

    Grey remains grey if the colour is grey as well, or none of it shows. Raises TooLargeError for a side beyond the
    resolution.
    """
    if max(image.size) > resolution:
        raise TooLargeError(f"is {image.width}x{image.height} and does not fit into {resolution}x{resolution}")
    if image.size == (resolution, resolution):
        return image
    is_grey = image.mode == "L" and len(set(colour)) == 1
    square = Image.new("L" if is_grey else "RGB", (resolution, resolution), colour[0] if is_grey else colour)
    square.paste(image, tuple((resolution - side) // 2 for side in image.size))
    return square


def _decode(
    content: bytes | np.ndarray,
    resolution: int,
    resize_filter: str | None,
    background: tuple[int, int, int],
    pad: tuple[int, int, int] | None,
) -> tuple[np.ndarray, bool]:
    """An image of the training set, uint8 `[3, R, R]`, and if it is grey."""
    must_fit = resize_filter is None and pad is None
    image = read_image(content, (resolution, resolution) if must_fit else None, background)
    if pad is not None:
        image = padded(image, resolution, pad)
    grey = image.mode == "L"
    image = image.convert("RGB")
    if resize_filter is not None and pad is None:
        image = fit(image, resolution, RESIZE_FILTERS[resize_filter])
    return np.asarray(image).transpose(2, 0, 1), grey


def _decode_all(
    source: Source,
    count: int,
    resolution: int,
    resize_filter: str | None,
    background: tuple[int, int, int],
    pad: tuple[int, int, int] | None,
    skip_bad_images: bool,
    num_workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Every readable image of the source, uint8 `[N, C, R, R]`, grey if all of them are; and which these are, `[N]`."""

    def attempt(i: int) -> tuple[np.ndarray, bool] | Exception:
        try:
            return _decode(source.read(i), resolution, resize_filter, background, pad)
        except (UnreadableImageError, WrongSizeError) as error:
            # A new one, because the frames of what was raised hold the image.
            return type(error)(str(error))

    # What keeps its size is a reference, of which no image is to be missing because it is too large.
    may_skip = (UnreadableImageError,) if resize_filter is None else (UnreadableImageError, TooLargeError)
    pixels = np.empty((count, 3, resolution, resolution), np.uint8)
    kept, all_grey = [], True
    with ThreadPoolExecutor(max(1, num_workers)) as pool, Progress(total=count, desc="decoding", unit="img") as bar:
        for start in range(0, count, DECODE_CHUNK):
            chunk = range(start, min(start + DECODE_CHUNK, count))
            for i, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if not isinstance(result, Exception):
                    pixels[len(kept)], grey = result
                    all_grey &= grey
                    kept.append(i)
                elif skip_bad_images and isinstance(result, may_skip):
                    tqdm.write(printable(f"skipped {source.describe(i)}: {result}"))
                else:
                    raise ValueError(f"{source.describe(i)} {_refusal(result, resize_filter is not None)}")
            bar.update(len(chunk))
    return pixels[: len(kept), :1] if all_grey else pixels[: len(kept)], np.array(kept, np.int64)


def _refusal(error: UnreadableImageError | WrongSizeError, of_training: bool) -> str:
    if isinstance(error, UnreadableImageError):
        return f"cannot be read ({error}); repair or remove it, or pass --skip_bad_images."
    if isinstance(error, TooLargeError) and of_training:
        return f"{error}, to which --pad pads; leave --pad out or raise --resolution, or pass --skip_bad_images."
    way_out = "remove the image" if isinstance(error, TooLargeError) else "pass it as --dataset, which resizes"
    return f"{error}; name a folder of images of that size, which generate_with_path_30.py writes, or {way_out}."


def _all_read_as_ever(source: Source, count: int, num_workers: int) -> bool:
    """Whether an array that an earlier version decoded is what this one would decode."""

    def look(i: int) -> bool:
        try:
            return reads_as_ever(source.read(i))
        except UnreadableImageError:
            return True

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        return all(pool.map(look, range(count)))


def _cached_info(pixels_file: Path, info_file: Path, resolution: int) -> dict | None:
    """What is known of an array in the cache; None if there is none, or it is not what was written."""
    try:
        info = json.loads(info_file.read_text())
        pixels = np.load(pixels_file, mmap_mode="r")
        is_whole = pixels.dtype == np.uint8 and pixels.shape[2:] == (resolution,) * 2 and len(info["fingerprint"]) == 16
        if "classes" in info:
            as_read(info["classes"], len(pixels))
    except (FileNotFoundError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError):
        return None  # Damage is of as many kinds as a file has bytes, and costs no more than to decode again.
    return info if is_whole else None


def _up_to_date(info: dict, kept: int, source: Source, count: int, num_workers: int) -> dict | None:
    """What is known of an array of so many images that an earlier version may have decoded; None to decode it again."""
    if "classes" not in info:
        classes = source.classes(count)
        # Earlier versions did not say which images they left out.
        if classes and kept != count:
            return None
        info = info | {"classes": as_written(classes)}
    if info.get("reading") != READING and not _all_read_as_ever(source, count, num_workers):
        return None
    return info | {"reading": READING}


def write_array(
    file: Path, array: np.ndarray, what: str = "decoded images", info_file: Path | None = None, info: dict | None = None
) -> None:
    """Write an array into the cache, whole or not at all, and what is known of it beside it; raises OSError."""
    try:
        with replacing(file) as temporary, open(temporary, "wb") as stream:
            # To a file of its own NumPy would say how much it wrote, but not why no more.
            np.save(SimpleNamespace(write=stream.write), array)
        if info_file is not None:
            with replacing(info_file) as temporary:
                temporary.write_text(json.dumps(info))
    except OSError as error:
        raise OSError(
            f"The {what} could not be written to {file}, which takes {array.nbytes:,} bytes "
            f"({error.strerror or error}); make room there or pass another --cache_dir."
        ) from error


def _synthetic_pixels(count: int, resolution: int) -> np.ndarray:
    parts = []
    with Progress(total=count, desc="painting", unit="img") as bar:
        for start in range(0, count, DECODE_CHUNK):
            parts.append(synthetic_images(min(DECODE_CHUNK, count - start), resolution, start))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def load_images(
    dataset: str,
    resolution: int = 64,
    cache_dir: str | os.PathLike = "cache",
    limit: int | None = None,
    resize_filter: str | None = RESIZE_FILTER,
    skip_bad_images: bool = False,
    num_workers: int = 4,
    background: str = BACKGROUND,
    pad: str | None = None,
) -> ImageSet:
    """Load a data set at one resolution, decoding it once and keeping pixels and labels in `cache_dir`.

    dataset: a hub id or a folder that `datasets` opens, either with `:CONFIG` if it has several; a folder or a zip
        archive of images (only its part `train` if it has parts); a folder as torchvision leaves MNIST, CIFAR-10 and
        the like; or `synthetic` (endless; 4096 images unless `limit` says otherwise).
    resolution: side of the fine image, a multiple of 16.
    limit: the first so many images only, of which unreadable ones that are skipped are not made up for.
    resize_filter: one of RESIZE_FILTERS, or None for images that are to be of that size already, beside which
        SAMPLE_FIGURES may lie.
    background: the colour under what is transparent, by name or as #rrggbb.
    pad: the colour to pad images with evenly to that size, in place of a resize.
    A set of grey images stays grey; everything else becomes RGB. Shorter side to `resolution`, then a centre crop.

    Raises ValueError for a bad resolution, an unreadable image or one too large to be padded (unless skipped), one of
    another size where none is to be resized, or fewer images than `limit`, FileNotFoundError for a missing folder,
    RuntimeError for a data set that cannot be loaded, OSError if the cache cannot be written or the system has no more
    files to give.
    """
    if resolution < 16 or resolution % 16:
        raise ValueError(f"--resolution {resolution} must be a positive multiple of 16, such as 32 or 64.")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1.")
    colour = parse_colour(background)
    synthetic = dataset == "synthetic"
    pad_colour = None if pad is None or synthetic else parse_colour(pad)
    if synthetic:
        count = limit or SYNTHETIC_DEFAULT_IMAGES
        # Two images of each class, so that a change of the drawing code is not answered from the cache.
        key = f"synthetic-{hashlib.sha256(synthetic_images(6)).hexdigest()}"
    else:
        source = open_source(dataset, SAMPLE_FIGURES if resize_filter is None else frozenset())
        if limit is not None and limit > source.count:
            raise ValueError(f"--limit {limit} asks for more images than the {source.count} of '{dataset}'.")
        count, key = limit or source.count, source.key
    label = f"{key}|{resolution}|{resize_filter}|{count}|{skip_bad_images}"
    if colour != parse_colour(BACKGROUND) and not synthetic:
        label += f"|{colour}"
    if pad_colour is not None:
        label += f"|pad {pad_colour}"
    # The colon before a config would part a file from its streams in some file systems.
    name = Path(dataset).name if Path(dataset).exists() else Path(dataset).name.replace(":", "-")
    # Names end at 255 bytes, of which suffixes and the name beside that is written first take up to 41.
    name = short_name(name, 214)
    stem = Path(cache_dir) / f"{name}_{resolution}_{hashlib.sha256(label.encode()).hexdigest()[:12]}"
    # The name of a data set may hold a dot, so that with_suffix would cut off the rest and its hash.
    pixels_file, info_file = Path(f"{stem}.npy"), Path(f"{stem}.json")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{stem}.lock"):
        info = _cached_info(pixels_file, info_file, resolution)
        if info is not None and not synthetic:
            found, info = info, _up_to_date(info, len(np.load(pixels_file, mmap_mode="r")), source, count, num_workers)
            if info not in (None, found):
                with replacing(info_file) as temporary:
                    temporary.write_text(json.dumps(info))
        if info is None:
            if synthetic:
                pixels = _synthetic_pixels(count, resolution)
            else:
                pixels, kept = _decode_all(
                    source, count, resolution, resize_filter, colour, pad_colour, skip_bad_images, num_workers
                )
            if len(pixels) == 0:
                raise ValueError(f"Dataset '{dataset}' holds no readable image.")
            info = {"dataset": dataset, "fingerprint": fingerprint_array(pixels), "resolution": resolution}
            info |= {"resize_filter": resize_filter} if pad_colour is None else {"pad": pad}
            if not synthetic:
                classes = [way.take(kept) for way in source.classes(count)]
                info |= {"reading": READING, "classes": as_written(classes)}
            write_array(pixels_file, pixels, info_file=info_file, info=info)
    pixels = np.load(pixels_file, mmap_mode="r")
    classes = synthetic_classes(len(pixels)) if synthetic else as_read(info["classes"], len(pixels))
    return ImageSet(pixels, dataset, info["fingerprint"], classes)


def first_of_equals(pixels: np.ndarray) -> np.ndarray:
    """For each image of `[N, C, R, R]` the index of the first one with the same pixels, int64 `[N]`."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(hashlib.sha256(image.tobytes()).digest(), k) for k, image in enumerate(pixels)])


def distinct_images(pixels: np.ndarray) -> np.ndarray:
    """The images of `[N, C, R, R]` without repetitions, in order."""
    return pixels[first_of_equals(pixels) == np.arange(len(pixels))]


def split_holdout(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and `count` held out, which lie evenly over the set; each part is in order.

    An image that equals one held out is in neither part, as sets of faces from the web repeat themselves. Which ones
    are held out depends on the images alone, so training and evaluation agree without a list, and a set that is sorted
    by class has every class in both parts. Raises ValueError unless 0 < count < number of images, or if the held-out
    images and their repetitions are all there is.
    """
    if not 0 < count < len(images):
        raise ValueError(
            f"--holdout {count} must leave images to train on: '{images.name}' has {len(images)}, so choose 1 to "
            f"{len(images) - 1}."
        )
    # The middle of each of `count` stretches of equal length.
    chosen = (2 * np.arange(count) + 1) * len(images) // (2 * count)
    held_out = np.zeros(len(images), bool)
    held_out[chosen] = True
    first = first_of_equals(images.pixels)
    to_train_on = ~np.isin(first, first[chosen])
    if not to_train_on.any():
        raise ValueError(
            f"--holdout {count} leaves none of the images of '{images.name}', which repeats them; hold out fewer."
        )

    def part(mask: np.ndarray) -> ImageSet:
        pixels = images.pixels[mask]
        classes = tuple(way.take(mask) for way in images.classes)
        return ImageSet(pixels, images.name, fingerprint_array(pixels), classes)

    return part(to_train_on), part(held_out)


class AFHQ64Dataset(torch.utils.data.Dataset):
    """AFHQv2 at 64x64 for a DataLoader, as the published code names it: float32 `[3, 64, 64]` in [-1, 1] per image.

    Raises what `load_images` raises, and ValueError for a split that the data set does not have.
    """

    def __init__(self, split: str = "train", cache_dir: str | os.PathLike | None = None):
        if split != "train":
            raise ValueError(f"huggan/AFHQv2 has no split '{split}', only 'train'.")
        self.pixels = load_images("huggan/AFHQv2", 64, cache_dir or "cache").pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_float(torch.from_numpy(self.pixels[index].copy()))


class TwoScaleBatches:
    """Shuffled batches `(x_64 [B, C, R, R], x_32 [B, C, R/2, R/2], labels [B])`, from memory.

    Images are float32 in [-1, 1], and labels int64, or None where none are given. The whole set lies as uint8 on
    `device` and becomes float there. The order depends on (seed, epoch) only; the remainder that does not fill a batch
    is left out, a different one each epoch. `flip` mirrors each image with probability one half. `labels` are those of
    all images, `[N]`. Raises ValueError if a batch is larger than the set, or there is not one label for each image.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
        labels: np.ndarray | None = None,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"--batch_size {batch_size} does not fit the {len(images)} images of '{images.name}'; "
                "choose one between 1 and that."
            )
        if labels is not None and np.shape(labels) != (len(images),):
            raise ValueError(f"{len(images)} images of '{images.name}' need a label each, not {np.shape(labels)}.")
        self.device = device
        self.count = len(images)
        self.labels = None if labels is None else torch.from_numpy(np.array(labels, np.int64)).to(device)  # [N]
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self._hold(images)

    def _hold(self, images: ImageSet) -> None:
        self.pixels = torch.from_numpy(np.array(images.pixels)).to(self.device)  # [N, C, R, R]

    @property
    def nbytes(self) -> int:
        """Bytes of the set as it lies in memory."""
        return self.pixels.nbytes

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.count // self.batch_size

    def clean(self, chosen: torch.Tensor, step: int, mirrored: torch.Tensor | None = None) -> torch.Tensor:
        """The images of some indices `[B]` as step `step` shows them, `[B, C, R, R]`, those mirrored `[B]` that say so.

        Pixels are the same at every step.
        """
        x_64 = to_float(self.pixels[chosen])  # [B, C, R, R]
        return x_64 if mirrored is None else torch.where(mirrored[:, None, None, None], x_64.flip(-1), x_64)

    def epoch(
        self, epoch: int, first_batch: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """The batches of one epoch, from `first_batch` on."""
        rng = np.random.default_rng((self.seed, epoch))
        order = torch.from_numpy(rng.permutation(self.count)).to(self.device)
        mirrored = torch.from_numpy(rng.random(self.count) < 0.5).to(self.device)
        for batch in range(first_batch, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]  # [B]
            step = epoch * len(self) + batch
            x_64 = self.clean(chosen, step, mirrored[chosen] if self.flip else None)  # [B, C, R, R]
            yield x_64, coarse(x_64), None if self.labels is None else self.labels[chosen]


def save_png(pixels: torch.Tensor, file: Path, by_lift: bool = True) -> None:
    """Write uint8 `[C, H, W]`, with the mark of an image that LIFT made if it did."""
    with replacing(file) as temporary:
        marks = png_info(IMAGE_TEXT) if by_lift else None
        Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(temporary, pnginfo=marks)


def read_png(file: Path) -> torch.Tensor:
    """Read uint8 `[C, H, W]`; raises ValueError for a damaged file."""
    try:
        with Image.open(file) as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return pixels.view(image.height, image.width, -1).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"{file} is damaged; remove it and run again.") from error
