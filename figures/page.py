"""The page of a report: what it may hold, and its HTML. It holds its pictures and needs no other file."""

import base64
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATE = "report_template.html"
LARGE_PAGE_MB = 20


class Picture(NamedTuple):
    """A PNG as a data URI, its size in pixels, and what it shows, for those who see it and for those who do not."""

    src: str
    width: int
    height: int
    alt: str
    caption: str
    show_width: int | None = None  # Widest on the page, for grids of small images whose every pixel counts.


class Number(NamedTuple):
    """Mean ± deviation over seeds as text, and the lines of the results table that were averaged."""

    text: str
    lines: list[int]
    is_best: bool = False


class ScoreTable(NamedTuple):
    """Scores that compare: blocks of rows (title, rows of (labels, one number or None per column))."""

    caption: str
    labels: list[str]
    columns: list[str]
    blocks: list[tuple[str, list[tuple[list[str], list[Number | None]]]]]


class FactTable(NamedTuple):
    """Settings that occur: headers, and rows of texts with the lines of the results table that have them."""

    caption: str
    headers: list[str]
    rows: list[tuple[list[str], list[int]]]


class Group(NamedTuple):
    """What is comparable: title, details, warnings, headline table, and curves with their numbers."""

    title: str
    details: str
    warnings: list[str]
    headline: ScoreTable
    curves: list[tuple[Picture, ScoreTable]]


class Content(NamedTuple):
    """What the page says, section by section, and every row of the results table, each with its `line`."""

    title: str
    results: str  # Name of the results table.
    groups: list[Group]
    targets: list[FactTable]  # Results beside the targets of a report; none where none are asked for.
    target_notes: list[str]
    heatmaps: list[Picture]
    heatmap_notes: list[str]
    paths: list[Picture]
    sample_rows: list[Picture]
    grids: list[Picture]
    facts: list[FactTable]
    rows: list[dict[str, Any]]
    row_fields: list[str]
    shared: dict[str, str]  # Fields of which all rows have this value.
    empty_fields: list[str]


def embed(file: Path, alt: str, caption: str, enlarged: int | None = None) -> Picture:
    """A PNG file, byte for byte, as a data URI. Raises ValueError, naming the file, if it is no whole PNG."""
    content = file.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
    except Exception as error:  # A damaged stream raises whatever the damage happens to hit.
        raise ValueError(f"Picture {file} is damaged ({type(error).__name__}); draw it again.") from error
    src = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(src, width, height, alt, caption, enlarged and width * enlarged)


def runs_of(lines: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs = itertools.groupby(enumerate(sorted(lines)), key=lambda pair: pair[1] - pair[0])
    members = [[line for _, line in run] for _, run in runs]
    return [(run[0], run[-1]) for run in members]


def render(content: Content) -> str:
    """The page as HTML, a section without input being one sentence. The same content gives the same text."""
    curves = [picture for group in content.groups for picture, _ in group.curves]
    pictures = [*curves, *content.heatmaps, *content.paths, *content.sample_rows, *content.grids]
    megabytes = sum(len(picture.src) for picture in pictures) / 1e6
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        content._asdict(),
        runs_of=runs_of,
        megabytes=megabytes if megabytes > LARGE_PAGE_MB else None,
        next_figure=itertools.count(1).__next__,
        next_table=itertools.count(1).__next__,
    )
