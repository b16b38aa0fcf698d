"""Where images come from: a folder, zip archives, or whatever the library `datasets` opens."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from images.classes import Classes, by_columns, by_folder
from images.own import MARKED_BYTES, WRITTEN_BY_LIFT, Origin, by_origin, start_of
from images.reading import (
    SPLITS,
    TABLES,
    Archives,
    Member,
    UnreadableImageError,
    find_images,
    find_members,
    is_split,
    read_bytes,
    read_image,
    report_left_out,
)
from images.torchvision_sets import find_sets, read_set
from runtime.reports import say_once

# Files by which `datasets` knows what it saved to a folder, all of one line.
SAVED = (("state.json", "dataset_info.json"), ("dataset_dict.json",))

# The name of a data set on the hub, with or without its owner and a config.
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/]*)?"


@dataclass(frozen=True)
class Source:
    """Undecoded images: how many, what identifies them, how to read one and what to call it in a message.

    `read` gives the content of a file, or uint8 `[H, W]` or `[H, W, 3]` where images lie decoded. `classes` gives the
    ways in which the images are divided into classes, of which there are two or more, with labels of the first so many.
    """

    count: int
    key: str
    read: Callable[[int], bytes | np.ndarray]
    describe: Callable[[int], str]
    classes: Callable[[int], tuple[Classes, ...]]


def _image_files(folder: Path, leave_out: frozenset[str], has_arrays: bool) -> list[Path] | list[Member]:
    """The images of a folder, or if it has none those of its zip archives; only the part `train` if there are parts.

    What LIFT wrote is among them only where there is nothing else, not even tables or arrays of images.
    """
    found = find_images(folder)
    left_out = found.left_out
    loose = by_origin([file for file in found.files if file.name not in leave_out], start_of)
    packed, beside = _packed([] if loose[Origin.OTHERS] else found.archives)
    files = _meant(left_out, loose, packed)
    if not files or ((found.tables or has_arrays) and not (loose[Origin.OTHERS] or packed[Origin.OTHERS])):
        return []
    if _lacks_training_part(folder, files):
        # What there is to train on lies in there in another form, perhaps in archives.
        inside = [archive for archive in found.archives if archive.is_relative_to(folder / "train")]
        packed, beside = _packed(inside)
        left_out["outside of its part 'train'"] += len(files) + len(found.archives) - len(inside)
        left_out[WRITTEN_BY_LIFT] += len(packed[Origin.SAMPLE]) + len(packed[Origin.FIGURE])
        files = packed[Origin.OTHERS]
    for table in found.tables:
        left_out[table.suffix.lower()] += 1
    if not files:
        return []
    if isinstance(files[0], Member):
        left_out.update(beside)
        files = _part_of_members(folder, files, left_out)
    else:
        left_out[".zip"] += len(found.archives)
        files = _part_of_files(folder, files, left_out)
    report_left_out(folder, +left_out)
    return files


def _packed(places: Sequence[Path]) -> tuple[dict[Origin, list[Member]], Counter[str]]:
    """The images of zip archives, and what else is in them."""
    members, left_out, archives = [], Counter(), Archives()
    for archive in places:
        inside, others = find_members(archive)
        members += inside
        left_out.update(others)
    return by_origin(members, lambda member: archives.read(member.archive, member.name, MARKED_BYTES)), left_out


def _meant(left_out: Counter[str], *groups: dict[Origin, list]) -> list:
    """Of pictures by where they come from those of the first kind that there is; LIFT's own are counted otherwise."""
    meant = next((group[origin] for origin in Origin for group in groups if group[origin]), [])
    own = [group[origin] for group in groups for origin in Origin if origin is not Origin.OTHERS]
    left_out[WRITTEN_BY_LIFT] += sum(len(files) for files in own if files is not meant)
    return meant


def _lacks_training_part(folder: Path, files: list[Path] | list[Member]) -> bool:
    """Whether all images lie in other parts of a data set that has a part `train`."""
    tops = _tops([_place(folder, file) for file in files])
    return (folder / "train").is_dir() and "train" not in tops and is_split(tops | {"train"})


def _tops(places: Sequence[tuple[str, ...]]) -> set[str]:
    """The folders that are seen at the top."""
    return {place[0] for place in places if len(place) > 1}


def _part_of_files(folder: Path, files: list[Path], left_out: Counter[str]) -> list[Path]:
    places = [_place(folder, file) for file in files]
    tops = _tops(places)
    chosen = _training_part(places, left_out)
    if "train" in tops and not is_split(tops):
        others = ", ".join(sorted(tops - {"train"})[:3])
        say_once(
            f"note: '{folder / 'train'}' is read as one folder among others ({others}); name it if it alone is meant"
        )
    return [file for file, keep in zip(files, chosen, strict=True) if keep]


def _part_of_members(folder: Path, members: list[Member], left_out: Counter[str]) -> list[Member]:
    # What was packed is most often one folder, or one archive.
    chosen = _training_part(_unshared([_place(folder, member) for member in members]), left_out)
    return [member for member, keep in zip(members, chosen, strict=True) if keep]


def _place(folder: Path, file: Path | Member) -> tuple[str, ...]:
    """Folders on the way to an image, an archive being one, and its name."""
    if isinstance(file, Member):
        return (*file.archive.relative_to(folder).with_suffix("").parts, *PurePosixPath(file.name).parts)
    return file.relative_to(folder).parts


def _unshared(places: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Places without the folders that all of them begin with."""
    shared = next((k for k, names in enumerate(zip(*places, strict=False)) if len(set(names)) > 1), 0)
    return [place[shared:] for place in places]


def _training_part(places: Sequence[tuple[str, ...]], left_out: Counter[str]) -> list[bool]:
    if not is_split(_tops(places)):
        return [True] * len(places)
    chosen = [len(place) > 1 and place[0] == "train" for place in places]
    if not all(chosen):
        left_out["outside of its part 'train'"] += len(chosen) - sum(chosen)
    return chosen


def _listed(folder: Path, file: Path | Member) -> tuple:
    if isinstance(file, Member):
        return (os.path.relpath(file.archive, folder), file.name, file.size, file.checksum)
    try:
        status = file.stat()
    except OSError:
        status = file.lstat()
    return (str(file.relative_to(folder)), status.st_size, status.st_mtime_ns)


def _of_first(whole: Callable[[], tuple[Classes, ...]]) -> Callable[[int], tuple[Classes, ...]]:
    """The classes of the first so many images; names are those of the whole set, so that a limit renumbers nothing."""
    return lambda count: tuple(way.take(slice(count)) for way in whole())


def _folder_source(folder: Path, files: Sequence[Path] | Sequence[Member]) -> Source:
    archives = Archives()

    def read(i: int) -> bytes:
        file = files[i]
        return archives.read(file.archive, file.name) if isinstance(file, Member) else read_bytes(file)

    return Source(
        count=len(files),
        key=json.dumps([_listed(folder, file) for file in files]),
        read=read,
        describe=lambda i: str(files[i]),
        classes=_of_first(lambda: by_folder(_unshared([_place(folder, file) for file in files]))),
    )


def _tables_among_others(folder: Path) -> list[Path]:
    """The tables of a folder to train on, where `datasets` left alone might read other files or none.

    It reads what most files are, and a run that writes below the folder of its data soon has more of its own; and it
    takes the folder's name for a pattern. Nothing if a card says what is read, or if there are parts without `train`.
    """
    found = find_images(folder)
    tables = next(filter(None, ([file for file in found.tables if file.suffix == kind] for kind in TABLES)), [])
    card = folder / "README.md"
    says = card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")
    others = found.files or found.archives or found.left_out.keys() - {"hidden", "no suffix", ".md"}
    if says or not (others or glob.has_magic(os.path.abspath(folder))):
        return []
    # Parts go by a word in the name of a file or of a folder.
    words = [set(re.split(r"[-._ 0-9/]+", str(table.relative_to(folder)))) for table in tables]
    of_training = [table for table, names in zip(tables, words, strict=True) if names & {"train", "training"}]
    return of_training or ([] if any(names & SPLITS for names in words) else tables)


def _load_rows(dataset: str, name: str, config: str | None) -> Any:
    # Imported here because a machine that trains on the built-in images or a folder does not need it.
    import datasets

    try:
        if not is_saved(Path(name)):
            tables = _tables_among_others(Path(name)) if config is None and Path(name).is_dir() else []
            # As a pattern a name may hold a star.
            files = {"data_files": {"train": [glob.escape(os.path.abspath(table)) for table in tables]}}
            # The library calls a folder by its last part, which . and .. have none of.
            place = name if Path(name).name.strip(".") else os.path.abspath(name)
            return datasets.load_dataset(place, config, split="train", **files if tables else {})
        rows = datasets.load_from_disk(name)
    except Exception as error:  # The library raises a dozen types of its own and its dependencies' for one cause.
        # Both messages, of a name that lacks and of one that is none, end with a list.
        configs = re.search(r"(?:configs|Available): \[([^\]]*)\]", str(error))
        if configs:
            names = configs[1].replace("'", "")
            raise ValueError(
                f"Dataset '{name}' has the configs {names}; name one of them, as in --dataset "
                f"{name}:{names.split(', ')[0]}."
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"Dataset '{dataset}' could not be loaded ({type(error).__name__}: {reason}); check the name and the "
            "network, or pass --dataset FOLDER with your own images or --dataset synthetic."
        ) from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise ValueError(f"Dataset '{dataset}' has no part 'train' but {', '.join(rows)}; name the folder of one.")
        rows = rows["train"]
    return rows


def _is_bytes(kind: Any) -> bool:
    """Whether a column holds bytes, alone or as `{bytes, path}`."""
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _image_column(rows: Any, dataset: str, declared: list[str]) -> str:
    """The column `image`, or else the first that holds images: those that say so before those of bytes."""
    columns = declared or [name for name, kind in rows.features.items() if _is_bytes(kind)]
    if len(columns) > 1 and not declared and "image" not in columns and len(rows):
        columns = [name for name in columns if _is_image(rows[0][name])] or columns
    if columns:
        return "image" if "image" in columns else columns[0]
    lists = [name for name, kind in rows.features.items() if hasattr(kind, "feature") or isinstance(kind, list)]
    if lists:
        raise ValueError(
            f"Dataset '{dataset}' has no image column, but lists in {' and '.join(lists)}; write one image per row."
        )
    raise ValueError(f"Dataset '{dataset}' has no image column; its columns are {', '.join(rows.column_names)}.")


def _is_image(entry: Any) -> bool:
    try:
        read_image((entry["bytes"] if isinstance(entry, dict) else entry) or b"")
    except UnreadableImageError:
        return False
    return True


def _dataset_source(dataset: str, name: str, config: str | None) -> Source:
    import datasets

    rows = _load_rows(dataset, name, config)
    if config is None and Path(name).is_dir() and rows.info.builder_name == "imagefolder":
        # Pictures that are no images by the rules of this project.
        raise ValueError(
            f"Dataset '{dataset}' holds no image to train on: its pictures are hidden, written by LIFT, or not in its "
            "part 'train'. Name the folder that is meant."
        )
    declared = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    column, labelled = _image_column(rows, dataset, declared), rows
    rows = rows.select_columns([column])
    if declared:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    archives = Archives()

    def read(i: int) -> bytes:
        entry = rows[i][column]
        entry = entry if isinstance(entry, dict) else {"bytes": entry}
        if entry.get("bytes") is not None:
            return entry["bytes"]
        place = entry.get("path")
        if place is None:
            raise UnreadableImageError("the row is empty")
        # The library names a file in an archive so: zip://a/1.png::/home/me/pictures.zip.
        inside = re.fullmatch(r"zip://(.*)::([^:].*)", place)
        if inside:
            return archives.read(Path(inside[2]), inside[1])
        return read_bytes(Path(place) if Path(place).exists() else Path(name) / place)

    return Source(
        count=len(rows),
        key=f"{rows._fingerprint}/{column}",
        read=read,
        describe=lambda i: f"image {i} of dataset '{dataset}'",
        classes=_of_first(lambda: by_columns(labelled)),
    )


def _torchvision_source(folder: Path, places: list[Path]) -> Source:
    found = read_set(folder, places)
    return Source(
        count=len(found.images),
        key=json.dumps(["torchvision", found.kind, *(_listed(file.parent, file) for file in found.files)]),
        read=lambda i: found.images[i],
        describe=lambda i: f"image {i} of '{folder}'",
        classes=_of_first(lambda: found.classes),
    )


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote a folder with save_to_disk."""
    return any(all((folder / name).is_file() for name in names) for names in SAVED)


def is_hub_id(dataset: str) -> bool:
    """Whether a name could be one of the hub; anything else, such as a path through folders, is a place here."""
    return re.fullmatch(HUB_ID, dataset, re.ASCII) is not None and not dataset.lower().endswith(".zip")


def is_here(dataset: str) -> bool:
    """Whether a data set is a file or a folder of this machine, with or without `:CONFIG`."""
    return any(Path(place).exists() for place in (dataset, dataset.rpartition(":")[0]) if place)


def open_source(dataset: str, leave_out: frozenset[str] = frozenset()) -> Source:
    """The images of a folder, a zip archive, or a data set with or without `:CONFIG`, less files of certain names.

    Raises ValueError for a data set without images or for a config that it lacks, FileNotFoundError for a missing
    folder, and RuntimeError for a data set that cannot be loaded.
    """
    name, config = dataset, None
    if ":" in dataset and not Path(dataset).exists():
        name, _, config = dataset.rpartition(":")
    folder = Path(name)
    if folder.is_dir():
        plain = not config and not is_saved(folder)
        arrays = find_sets(folder) if plain else []
        files = _image_files(folder, leave_out, bool(arrays)) if plain else []
        if files:
            return _folder_source(folder, files)
        if arrays:
            return _torchvision_source(folder, arrays)
    elif config is None and folder.suffix.lower() == ".zip" and folder.is_file():
        packed, left_out = _packed([folder])
        members = _part_of_members(folder.parent, _meant(left_out, packed), left_out)
        report_left_out(folder, +left_out)
        if not members:
            raise ValueError(f"The archive {folder} holds no image.")
        return _folder_source(folder.parent, members)
    elif folder.exists() or not is_hub_id(name):
        raise FileNotFoundError(f"--dataset {dataset} is not a folder; give a folder, a hub id or 'synthetic'.")
    return _dataset_source(dataset, name, config)
