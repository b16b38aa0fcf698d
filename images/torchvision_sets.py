"""Data sets as torchvision leaves them in a folder: MNIST, FashionMNIST and KMNIST, CIFAR-10 and CIFAR-100.

Only the part to train on is read, by torchvision's own readers, and nothing is downloaded.
"""

import gzip
import os
import pickle
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images.classes import Classes, told_apart

# Sets of one format: images and labels in a file each, which may be packed, in MNIST/raw and the like.
IDX_SETS = ("MNIST", "FashionMNIST", "KMNIST")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
# Folders of CIFAR and the two files in each that nothing else has together.
CIFAR_SETS = {"cifar-10-batches-py": ("data_batch_1", "batches.meta"), "cifar-100-python": ("train", "meta")}
# What readers of idx files and of gzip raise by where the damage is.
DAMAGE = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set in memory: `images` uint8 `[N, H, W]` or `[N, H, W, 3]`, its files and classes, and which set it is.

    `kind` is a name of torchvision's, or empty for digits of another folder.
    """

    kind: str
    images: np.ndarray
    files: tuple[Path, ...]
    classes: tuple[Classes, ...]


def find_sets(folder: Path) -> list[Path]:
    """Where in a folder the files of data sets of torchvision's lie: there, or where torchvision puts them below it."""
    for place in (folder, folder / "raw"):
        if _is_set(place):
            return [place]
    below = [*(folder / name / "raw" for name in IDX_SETS), *(folder / name for name in CIFAR_SETS)]
    return [place for place in below if _is_set(place)]


def read_set(folder: Path, places: list[Path]) -> TorchvisionSet:
    """The data set whose files lie in the only place that `find_sets` gave for a folder.

    Raises ValueError if there are several, or if a file is missing or is not what was published, and so damaged.
    """
    if len(places) > 1:
        names = ", ".join(str(place.parent if place.name == "raw" else place) for place in places)
        raise ValueError(f"'{folder}' holds several data sets; name the folder of one of them: {names}.")
    [place] = places
    if _idx_file(place, IDX_FILES[0]) is not None:
        return _read_idx(place)
    return _read_cifar(place, _cifar_kind(place))


def _is_set(place: Path) -> bool:
    return _idx_file(place, IDX_FILES[0]) is not None or _cifar_kind(place) is not None


def _cifar_kind(place: Path) -> str | None:
    """Which of CIFAR_SETS lies in a folder; if it has that name a file may be missing, which is said later."""

    def is_kind(kind: str, marks: tuple[str, ...]) -> bool:
        there = [os.path.isfile(place / mark) for mark in marks]
        return any(there) if place.name == kind else all(there)

    return next((kind for kind, marks in CIFAR_SETS.items() if is_kind(kind, marks)), None)


def _idx_file(place: Path, name: str) -> Path | None:
    return next((file for file in (place / name, place / f"{name}.gz") if os.path.isfile(file)), None)


def _read_idx(place: Path) -> TorchvisionSet:
    # Imported here and below because only these data sets need it, and it takes a while.
    from torchvision import datasets

    files = [_idx_file(place, name) for name in IDX_FILES]
    if None in files:
        raise ValueError(f"'{place}' lacks {IDX_FILES[files.index(None)]}, with or without .gz; copy it there.")
    readers = (datasets.mnist.read_image_file, datasets.mnist.read_label_file)
    images, labels = (_unpacked(file, read) for file, read in zip(files, readers, strict=True))
    if len(images) != len(labels):
        raise ValueError(f"{files[0]} holds {len(images):,} images and {files[1]} {len(labels):,} labels; copy both.")
    # In a folder of another name nothing says what the numbers stand for.
    name = Path(os.path.abspath(place)).parent.name
    kind, most = name if name in IDX_SETS else "", int(labels.max(initial=-1))
    names = getattr(datasets, kind).classes if kind else [str(k) for k in range(most + 1)]
    if most >= len(names):
        raise ValueError(f"{files[1]} holds labels beyond the {len(names)} classes of {kind}; copy it again.")
    return TorchvisionSet(kind, images, tuple(files), told_apart("label", names, labels))


def _unpacked(file: Path, read: Callable[[str], torch.Tensor]) -> np.ndarray:
    try:
        if file.suffix != ".gz":
            return read(str(file)).numpy()
        with tempfile.NamedTemporaryFile() as whole, gzip.open(file) as packed:
            shutil.copyfileobj(packed, whole)
            whole.flush()
            return read(whole.name).numpy()
    except DAMAGE as error:
        raise ValueError(f"{file} is damaged, perhaps cut short; copy or download it again.") from error


def _read_cifar(place: Path, kind: str) -> TorchvisionSet:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    published = CIFAR10 if kind == "cifar-10-batches-py" else CIFAR100

    class Training(published):
        # The folder may have another name, and the part to test on may be missing.
        base_folder, test_list = "", []

    # Before anything of a pickle is run, as torchvision does too, but without saying which file it is.
    for name, checksum in [*Training.train_list, (Training.meta["filename"], Training.meta["md5"])]:
        if not check_integrity(str(place / name), checksum):
            state = "is not the file that was published, perhaps cut short" if (place / name).exists() else "is missing"
            raise ValueError(f"{place / name} {state}; unpack or download the data set again.")
    images = Training(str(place))
    files = tuple(place / name for name, _ in Training.train_list)
    if published is CIFAR10:
        classes = told_apart("label", images.classes, np.array(images.targets))
    else:
        coarse, meta = (pickle.loads((place / name).read_bytes(), encoding="latin1") for name in CIFAR_SETS[kind])
        classes = told_apart("fine_labels", images.classes, np.array(images.targets))
        classes += told_apart("coarse_labels", meta["coarse_label_names"], np.array(coarse["coarse_labels"]))
    return TorchvisionSet(published.__name__, images.data, files, classes)
