"""Ways in which a data set divides its images into classes: their names, and the class of every image."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Columns of numbers or text that say what an image shows, in any case of letters.
LABEL_COLUMNS = frozenset({"label", "labels", "class"})
# Folders of a thousand images each, as the tools of StyleGAN, FFHQ and EDM write them.
SHARD = re.compile(r"\d{5}")
SHOWN_IMAGES = 3


@dataclass(frozen=True, eq=False)
class Classes:
    """One way of dividing images: by what, such as "folder" or "column 'label'", and the class of each image.

    names: of all classes of the data set, in an order that does not depend on which images are taken.
    labels: int64 `[N]`, the place of each image's class in `names`; -1 for an image without a label.
    """

    by: str
    names: tuple[str, ...]
    labels: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Classes):
            return NotImplemented
        return (self.by, self.names) == (other.by, other.names) and np.array_equal(self.labels, other.labels)

    @property
    def flag(self) -> str:
        """What to call this way in a flag: the name of a column alone, or `by` itself."""
        column = re.fullmatch(r"column '(.*)'", self.by, re.DOTALL)
        return column[1] if column else self.by

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the classes that have an image, in order."""
        return tuple(self.names[k] for k in np.unique(self.labels[self.labels >= 0]))

    def take(self, chosen: np.ndarray | slice) -> "Classes":
        """The same way of dividing, for some of the images: indices, a mask `[N]` or a slice."""
        return Classes(self.by, self.names, self.labels[chosen])


def told_apart(by: str, names: Iterable[str], labels: np.ndarray) -> tuple[Classes, ...]:
    """The one way of dividing that these labels are, or none if they do not tell any two images apart."""
    classes = Classes(by, tuple(names), np.asarray(labels, np.int64))
    return (classes,) if len(classes.present) > 1 else ()


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names: by their value if all of them are whole numbers, as digits are, or else as text."""
    distinct = set(names)
    if all(name.isascii() and name.isdecimal() for name in distinct):
        return sorted(distinct, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(distinct)


def by_folder(places: Sequence[tuple[str, ...]]) -> tuple[Classes, ...]:
    """Classes by the folder at the top, if every image lies in one of several; places are folders and a file name."""
    tops = [place[0] for place in places]
    if not all(len(place) > 1 for place in places) or all(map(SHARD.fullmatch, tops)):
        return ()
    names = in_order(tops)
    number = {name: k for k, name in enumerate(names)}
    return told_apart("folder", names, np.array([number[top] for top in tops], np.int64))


def by_columns(rows: Any) -> tuple[Classes, ...]:
    """Classes by every column of `datasets` rows that says to be of classes, or is called so and holds numbers or text.

    A column of classes has all of its own names, in its own order; others have their values, sorted.
    """
    kinds = {name: kind for name, kind in rows.features.items() if _is_label(name, kind)}
    if not kinds:
        return ()
    table = rows.select_columns(list(kinds)).with_format("arrow")[:]
    found: tuple[Classes, ...] = ()
    for name, kind in kinds.items():
        found += told_apart(f"column '{name}'", *_of_column(table.column(name), getattr(kind, "names", None)))
    return found


def _of_column(column: Any, names: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Names, and labels `[N]`, of a column of Arrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Unlabelled rows of a column of classes have -1 or nothing.
    if names is not None:
        labels = pc.fill_null(column, -1).to_numpy()
        return names, np.where((labels >= 0) & (labels < len(names)), labels, -1)
    values = [value for value in column.unique().to_pylist() if value is not None]
    values = in_order(values) if all(isinstance(value, str) for value in values) else sorted(values)
    labels = pc.fill_null(pc.index_in(column, value_set=pa.array(values, column.type)), -1).to_numpy()
    return [str(value) for value in values], labels


def _is_label(name: str, kind: Any) -> bool:
    if hasattr(kind, "names"):
        return True
    return name.lower() in LABEL_COLUMNS and bool(
        re.match(r"u?int|(large_)?string|bool", str(getattr(kind, "dtype", "")))
    )


def chosen(ways: Sequence[Classes], by: str | None, dataset: str) -> Classes:
    """The way of dividing that is asked for: by `Classes.by`, by the name of a column, or None for the only one.

    Raises ValueError, in one sentence, if there is none, if there are several and none is named, for a name that none
    has, for images without a label, and for fewer than two classes.
    """
    if not ways:
        raise ValueError(
            f"'{dataset}' has no labels: put the images of each class into a folder of its own, or name a data set "
            "with a label column."
        )
    known = " and ".join(way.by for way in ways)
    if by is None and len(ways) > 1:
        raise ValueError(
            f"'{dataset}' is divided into classes by {known}; name one of them, as in --classes {ways[0].flag}."
        )
    named = [way for way in ways if by in (None, way.by, way.flag)]
    if not named:
        raise ValueError(
            f"'{dataset}' is not divided into classes by '{by}' but by {known}; pass --classes {ways[0].flag}."
        )
    way = named[0]
    instead = "name another way with --classes BY" if len(ways) > 1 else "leave --classes out"
    unlabelled = np.flatnonzero(way.labels < 0)
    if len(unlabelled):
        have = "has" if len(unlabelled) == 1 else "have"
        shown = ", ".join(map(str, unlabelled[:SHOWN_IMAGES])) + ", ..." * (len(unlabelled) > SHOWN_IMAGES)
        raise ValueError(
            f"{len(unlabelled):,} of the {len(way.labels):,} images of '{dataset}' {have} "
            f"no label by {way.by} (counted from 0: {shown}); label them, take them out of the data set, or {instead}."
        )
    if len(way.present) < 2:
        raise ValueError(
            f"All {len(way.labels):,} images of '{dataset}' are of one class by {way.by} ({', '.join(way.present)}), "
            f"and it takes two; take more of them (--limit), or {instead}."
        )
    return way


def as_written(ways: Sequence[Classes]) -> list[dict]:
    """Ways of dividing as JSON holds them."""
    return [{"by": way.by, "names": list(way.names), "labels": way.labels.tolist()} for way in ways]


def as_read(written: list[dict], count: int) -> tuple[Classes, ...]:
    """Ways of dividing so many images, from JSON; raises ValueError, TypeError or LookupError for what is damaged."""
    ways = []
    for way in written:
        names, labels = tuple(way["names"]), np.array(way["labels"])
        are_labels = labels.shape == (count,) and labels.dtype == np.int64
        if not are_labels or labels.min() < -1 or labels.max() >= len(names) or {*map(type, names)} != {str}:
            raise ValueError("labels are damaged")
        ways.append(Classes(str(way["by"]), names, labels))
    return tuple(ways)
