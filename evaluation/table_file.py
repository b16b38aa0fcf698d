"""Files of tables that many processes append to, as text: earlier headers, torn lines, and what spreadsheets do.

A table is CSV whose last column is a date, by which a whole line is recognised. Lines are only ever appended: a file
whose header is of an earlier version, and lacks columns, gets the whole header once more before the first row that has
them. Columns of a row are those of the header with as many.

A spreadsheet may have saved the file: with a byte order mark, other line ends, quotes, semicolons or tabs between the
cells, decimal commas, lines padded to one length, and dates of its own form. What cannot be mistaken is read; of the
rest the cause is named.
"""

import csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import naming
from runtime.safe_write import replacing

BYTE_ORDER_MARK = "\ufeff"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
# The order of its parts leaves no doubt what is the month.
_SPREADSHEET_DATE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}) ([0-9]{2}:[0-9]{2})(:[0-9]{2})?")
_ANY_DATE = re.compile(r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}([ T,].*)?")
_DECIMAL_COMMA = re.compile(r"([-+]?[0-9]*),([0-9]+([eE][-+]?[0-9]+)?)")
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}")


class TableFormat(NamedTuple):
    """What tables of a kind hold."""

    columns: tuple[str, ...]  # the first names the kind, the last is the date
    required: frozenset[str]  # those that headers of every version have
    numbers: frozenset[str]  # those of numbers that need not be whole


class Line(NamedTuple):
    """A row of a table: its cells by column, and its number in the file, whose header is line 1."""

    number: int
    cells: dict[str, str]


def csv_line(values: Iterable[Any]) -> str:
    """One line of a CSV file, line break included."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file of rows with the same columns, whole or not at all."""
    lines = (csv_line(line) for line in (rows[0], *(row.values() for row in rows)))
    with replacing(file) as temporary:
        temporary.write_bytes("".join(lines).encode(errors="replace"))


def is_date(text: str) -> bool:
    """Whether a text is a date such as 2025-01-31T23:59:59Z."""
    try:
        datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return False
    return _DATE.fullmatch(text) is not None


def is_rewritten_date(text: str) -> bool:
    """Whether a text is a date in the form of some spreadsheet, and not the beginning of one of ours."""
    return _ANY_DATE.fullmatch(text) is not None and not _begins_date(text) and not _DATE.fullmatch(text)


def _begins_date(text: str) -> bool:
    return "0000-00-00T00:00:00Z".startswith(re.sub("[0-9]", "0", text))


def append_line(file: Path, form: TableFormat, values: Sequence[Any]) -> None:
    """Append a row of all columns to `file`, which is created with its header if missing or empty.

    The row is one write and is on the disk when this returns. It has the line ends of the file. The caller keeps other
    writers away. Raises what `check_appendable` raises.
    """
    row = csv_line(values)
    if not file.exists() or file.stat().st_size == 0:
        with replacing(file) as temporary:
            temporary.write_bytes((csv_line(form.columns) + row).encode(errors="replace"))
        return
    content = check_appendable(file, form)
    if _last_header(content, form) != form.columns:
        row = csv_line(form.columns) + row
    line_end = "\r\n" if content.partition(b"\n")[0].endswith(b"\r") else "\n"
    # A line cut short by a crash is closed, so that the new row does not become its end.
    before = "" if content.endswith(b"\n") else line_end
    with naming(file), open(file, "ab") as stream:
        stream.write((before + row.replace("\n", line_end)).encode(errors="replace"))
        stream.flush()
        os.fsync(stream.fileno())


def check_appendable(file: Path, form: TableFormat) -> bytes:
    """The content of a file that rows can be appended to.

    Raises ValueError for another header, and for a file that a spreadsheet saved in a form of its own.
    """
    content = file.read_bytes()
    header, delimiter = _first_header(file, form, _decode(file, content.partition(b"\n")[0]).partition("\n")[0])
    if delimiter != "," or not header[-1]:
        how = f"{DELIMITERS[delimiter]} between" if delimiter != "," else "empty cells behind"
        raise ValueError(
            f"{file} was saved by a spreadsheet with {how} its columns, which rows of another form must not be mixed "
            "with; save it as CSV with commas and decimal points, or choose another --output."
        )
    return content


def _last_header(content: bytes, form: TableFormat) -> tuple[str, ...]:
    # Torn ones are none that rows could follow.
    name = form.columns[0].encode()
    start = max(content.rfind(b"\n" + name), content.rfind(b'\n"' + name)) + 1
    return tuple(_cells(content[start:].partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip("\r"), ","))


def read_lines(file: Path, form: TableFormat) -> list[Line]:
    """The rows of `file` in the order written; none when it is missing or empty.

    A column that the header of a row lacks is missing. Numbers have decimal points, dates the form of `is_date` where
    nothing else could be meant. A line that a crash cut short is skipped with a warning that names it.

    Raises ValueError for another header, a line of another number of columns, and a form that a spreadsheet gave the
    file and that cannot be read for sure.
    """
    if not file.exists() or file.stat().st_size == 0:
        return []
    texts = _decode(file, file.read_bytes()).split("\n")
    first, delimiter = _first_header(file, form, texts[0])
    # Lines are parsed one by one, since the open quote of a damaged one would swallow those that follow.
    cells = {number: _cells(text, delimiter) for number, text in enumerate(texts, start=1)}
    cells = {number: values for number, values in cells.items() if any(values)}
    if not first[-1]:
        cells = {number: _without_padding(values) for number, values in cells.items()}
    # A spreadsheet may have sorted the lines, so that a header comes after its rows.
    columns = {len(values): tuple(values) for values in cells.values() if _is_header(values, form)}
    lines = []
    for number, values in cells.items():
        if _is_header(values, form):
            _check_header(f"{file} line {number}", values, form)
            columns[len(values)] = tuple(values)
        elif values[0] == form.columns[0] or _is_torn(values, columns):
            warnings.warn(f"{file} line {number} is not a whole result and is skipped.", stacklevel=4)
        elif len(values) not in columns:
            known = " or ".join(map(str, sorted(columns)))
            raise ValueError(
                f"{file} line {number} has {len(values)} columns instead of {known}; correct it or delete the line."
            )
        else:
            lines.append(Line(number, dict(zip(columns[len(values)], values, strict=True))))
    _normalise(file, lines, form, delimiter)
    return lines


def _decode(file: Path, content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} was saved by a spreadsheet as UTF-16; save it as CSV in UTF-8.")
    text = content.decode(errors="replace").removeprefix(BYTE_ORDER_MARK)
    return re.sub(r"\r\n?", "\n", text)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [""])
    except csv.Error:
        return [line]


def _without_padding(values: list[str]) -> list[str]:
    # The date at the end of a row is never empty.
    last = max((k for k, value in enumerate(values) if value), default=0)
    return values[: last + 1]


def _is_header(values: Sequence[str], form: TableFormat) -> bool:
    return values[0] == form.columns[0] and values[-1] == form.columns[-1]


def _check_header(place: str, names: Sequence[str], form: TableFormat) -> None:
    """Raise ValueError for names that are not some of the columns, with all that every version has, ends in place."""
    absent = [name for name in form.columns if name in form.required and name not in names]
    unknown = [name for name in names if name not in form.columns]
    twice = [name for name in names if names.count(name) > 1]
    if 2 * len(absent) > len(form.required):
        reason = f"its header begins with {','.join(names)[:40]!r}"
    elif unknown:
        reason = f"it has a column {unknown[0]!r}, which is unknown here"
    elif absent or twice:
        reason = f"it has no column {absent[0]}" if absent else f"it has the column {twice[0]} twice"
    elif not _is_header(names, form):
        reason = f"its columns go from {names[0]} to {names[-1]}, not from {form.columns[0]} to {form.columns[-1]}"
    else:
        return
    raise ValueError(
        f"{place} is not a results table of this version, {reason}: move it away or choose another --output."
    )


def _first_header(file: Path, form: TableFormat, line: str) -> tuple[list[str], str]:
    """The cells of the first line, padding included, and what is between them."""
    delimiter = max(DELIMITERS, key=lambda one: len(set(form.columns) & set(_cells(line, one))))
    header = _cells(line, delimiter)
    _check_header(str(file), _without_padding(header), form)
    return header, delimiter


def _is_torn(values: Sequence[str], columns: dict[int, tuple[str, ...]]) -> bool:
    # The beginning of a whole line has no more columns than it, and in its last column the beginning of a date.
    last, most = values[-1], max(columns)
    if _DATE.fullmatch(last) or _SPREADSHEET_DATE.fullmatch(last):
        return False
    if len(values) < most:
        return not (len(values) in columns and is_rewritten_date(last))
    return len(values) == most and _begins_date(last)


def _normalise(file: Path, lines: Sequence[Line], form: TableFormat, delimiter: str) -> None:
    """Give numbers decimal points and dates our form, in place, where that is no guess."""
    date = form.columns[-1]
    for line in lines:
        found = _SPREADSHEET_DATE.fullmatch(line.cells[date])
        if found:
            line.cells[date] = f"{found[1]}T{found[2]}{found[3] or ':00'}Z"
    if delimiter == ",":
        return
    numbers = [(line, name) for line in lines for name in form.numbers & line.cells.keys()]
    commas = [(line, name) for line, name in numbers if _DECIMAL_COMMA.fullmatch(line.cells[name])]
    if not commas:
        return
    points = [line.number for line, name in numbers if "." in line.cells[name]]
    reason = f"points in others, as in line {points[0]}" if points else ""
    if not points and all(_THOUSANDS.fullmatch(line.cells[name]) for line, name in commas):
        reason = "no other, so that they may stand between thousands"
    if reason:
        raise ValueError(
            f"{file} was saved by a spreadsheet with {DELIMITERS[delimiter]}, commas in some numbers and {reason}; "
            "save it as CSV with commas between the columns and decimal points."
        )
    for line, name in commas:
        line.cells[name] = _DECIMAL_COMMA.sub(r"\1.\2", line.cells[name])
