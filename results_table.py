"""The results table: one CSV row per evaluation, appended under a lock and never rewritten.

Many jobs on many hosts share one file. A row is one line and ends in its date, so a line that a crash cut
short is recognised, skipped with a warning and never joined with the next one.
"""

import csv
import io
import os
import re
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from safe_write import replacing

# What makes two evaluations the same.
RESULT_KEY = (
    "checkpoint_fingerprint",
    "weights",  # raw or ema
    "path_fingerprint",
    "nfe",
    "seed",
    "num_images",
    "metric_features",  # such as inception-<fingerprint> or swd-7x7-64-32-16
    "reference_fingerprint",
    "precision",  # of the network, fp32 or bf16
)
VALUE_FIELDS = ("fid", "swd", "swd_64", "swd_32", "swd_16")  # swd is the mean over its levels
DESCRIPTION_FIELDS = ("dataset", "model_type", "epoch", "path_type", "metric")
# The date comes last because its fixed form shows whether the line is whole.
RESULT_FIELDS = (*RESULT_KEY, *DESCRIPTION_FIELDS, *VALUE_FIELDS, "seconds", "checkpoint", "date")

# Rows that agree in these differ in the seed alone, so their spread is that of the seed.
GROUP_FIELDS = (*DESCRIPTION_FIELDS, *(field for field in RESULT_KEY if field != "seed"))

# What the published table calls a model type and a path type.
COLUMN_TITLES = {
    ("baseline", "diagonal"): "Baseline",
    ("dual", "diagonal"): "LIFT diagonal",
    ("dual", "dp_64"): "LIFT DP-64",
    ("dual", "dp_total"): "LIFT DP-Total",
    ("dual", "kl_diagonal"): "LIFT KL diagonal",
    ("dual", "kl"): "LIFT KL",
}

_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_TABLE_FIELDS = ("dataset", "num_images", "nfe", "metric_features", "reference_fingerprint")


def append_row(file: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Append one evaluation to `file`, which is created with its header when missing or empty.

    Args:
        file: CSV file; `file` + ".lock" beside it keeps concurrent jobs apart.
        row: values of RESULT_FIELDS; fields other than the key and the date may be missing or None. The date
            is UTC as 2025-01-31T23:59:59Z.

    Raises:
        ValueError: `row` has an unknown field, lacks a key field or a valid date, or holds a line break; or
            `file` has another header, in which case it stays as it is.
    """
    file = Path(file)
    line = _format_row(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        before = _format_line(RESULT_FIELDS)
        if file.exists() and file.stat().st_size > 0:
            with open(file, "rb") as stream:
                _check_header(file, stream.readline().decode(errors="replace"))
                stream.seek(-1, os.SEEK_END)
                # A line cut short by a crash is closed, so that the new row does not become its end.
                before = "" if stream.read(1) == b"\n" else "\n"
        with open(file, "ab") as stream:
            stream.write((before + line).encode())
            stream.flush()
            os.fsync(stream.fileno())


def _format_row(row: Mapping[str, Any]) -> str:
    unknown = [field for field in row if field not in RESULT_FIELDS]
    if unknown:
        raise ValueError(f"A result has no field {unknown[0]!r}: the fields are {', '.join(RESULT_FIELDS)}.")
    texts = {field: "" if row.get(field) is None else str(row[field]) for field in RESULT_FIELDS}
    for field, text in texts.items():
        if "\n" in text or "\r" in text:
            raise ValueError(f"The field {field} of a result must be one line, but it is {text!r}.")
        if field in RESULT_KEY and not text:
            raise ValueError(f"A result needs the field {field}, which is part of its key.")
    if not _DATE.fullmatch(texts["date"]):
        raise ValueError(f"The date of a result must look like 2025-01-31T23:59:59Z, not {texts['date']!r}.")
    return _format_line(texts.values())


def _format_line(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _check_header(file: Path, line: str) -> None:
    if line.rstrip("\r\n") != _format_line(RESULT_FIELDS).rstrip("\n"):
        raise ValueError(
            f"{file} is not a results table of this version, its header begins with {line.strip()[:40]!r}: "
            f"move it away or choose another --output."
        )


def read_rows(file: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of `file` in the order written, every value as text; none when the file is missing or empty.

    A line that is no whole row is skipped with a warning that names it. Raises ValueError for another header.
    """
    file = Path(file)
    if not file.exists():
        return []
    lines = file.read_bytes().decode(errors="replace").split("\n")
    if lines == [""]:
        return []
    _check_header(file, lines[0])
    rows = []
    # Lines are parsed one by one, since the open quote of a damaged one would swallow those that follow.
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            values = next(csv.reader([line.removesuffix("\r")]))
        except csv.Error:
            values = []
        if len(values) == len(RESULT_FIELDS) and _DATE.fullmatch(values[-1]):
            rows.append(dict(zip(RESULT_FIELDS, values, strict=True)))
        else:
            warnings.warn(f"{file} line {number} is not a whole result and is skipped.", stacklevel=2)
    return rows


def has_row(file: str | os.PathLike, key: Mapping[str, Any]) -> bool:
    """Whether `file` holds a row that agrees with `key` in every field of RESULT_KEY and in what else it names.

    Raises KeyError when `key` lacks a field of RESULT_KEY or names an unknown one, and ValueError when the
    file has another header.
    """
    fields = {*RESULT_KEY, *key}
    wanted = {field: str(key[field]) for field in fields}
    return any({field: row[field] for field in fields} == wanted for row in read_rows(file))


def _key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[field]) for field in RESULT_KEY)


def aggregate(
    rows: Iterable[Mapping[str, Any]],  # from read_rows
    group_by: Sequence[str] = GROUP_FIELDS,
) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every value, one result per group, in natural order.

    A result holds the fields of `group_by` and, for each of VALUE_FIELDS, `{value}_mean`, `{value}_sd` (of
    the sample, divided by n - 1) and `{value}_seeds`; without a value the mean is None, below two the sd.
    Of rows of a group with the same key the last one counts, since it is a forced repetition.

    Raises ValueError when a group holds a seed twice, so that it mixes what is not a repetition.
    """
    groups: dict[tuple[str, ...], dict[tuple[str, ...], Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[field]) for field in group_by), {})[_key_of(row)] = row
    results = []
    for group in sorted(groups, key=lambda group: [_natural(text) for text in group]):
        result: dict[str, Any] = dict(zip(group_by, group, strict=True))
        for field in VALUE_FIELDS:
            measured = [row for row in groups[group].values() if row[field] != ""]
            if len({row["seed"] for row in measured}) < len(measured):
                raise ValueError(
                    f"The results {', '.join(f'{name} {value}' for name, value in result.items())} hold a seed "
                    f"twice for {field}: group by every field that tells them apart."
                )
            values = [float(row[field]) for row in measured]
            result[f"{field}_mean"] = statistics.fmean(values) if values else None
            result[f"{field}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            result[f"{field}_seeds"] = len(values)
        results.append(result)
    return results


def _natural(text: str) -> tuple[int, float, str]:
    # Epoch 1000 comes after epoch 200, and words come after numbers.
    return (0, float(text), "") if re.fullmatch(r"\d+(\.\d+)?", text) else (1, 0.0, text)


def write_csv(file: str | os.PathLike, aggregated: Sequence[Mapping[str, Any]]) -> None:
    """Write the result of `aggregate` as CSV, a None as an empty field, replacing `file` as a whole.

    Raises ValueError when there is no result.
    """
    if not aggregated:
        raise ValueError(f"There is no result to write to {file}: evaluate a checkpoint first.")
    lines = [_format_line(aggregated[0]), *(_format_line(result.values()) for result in aggregated)]
    with replacing(file) as temporary:
        temporary.write_bytes("".join(lines).encode())


def write_markdown(file: str | os.PathLike, aggregated: Sequence[Mapping[str, Any]]) -> None:
    """Write the result of `aggregate` as Markdown, replacing `file` as a whole.

    Only what is comparable shares a table: one per value, data set, number of images, NFE, features and
    reference. It has a row per epoch and kind of weights and a column per model and path, the published four
    first; a cell is mean ± sd (number of seeds), without sd for a single seed, and names every result where
    several checkpoints or paths of the same name were measured.

    Raises ValueError when there is no result, and KeyError when a field of GROUP_FIELDS was not grouped by.
    """
    if not aggregated:
        raise ValueError(f"There is no result to write to {file}: evaluate a checkpoint first.")
    sections = ["# Results\n\nMean ± standard deviation over seeds (number of seeds).\n"]
    for field in VALUE_FIELDS:
        tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for result in aggregated:
            if result[f"{field}_mean"] is not None:
                tables.setdefault(tuple(result[name] for name in _TABLE_FIELDS), []).append(result)
        for setting, results in tables.items():
            sections.append(_markdown_table(field, setting, results))
    with replacing(file) as temporary:
        temporary.write_text("\n".join(sections), encoding="utf-8")


def _markdown_table(field: str, setting: tuple[str, ...], results: Sequence[Mapping[str, Any]]) -> str:
    dataset, num_images, nfe, features, reference = setting
    heading = f"## {field}: {dataset}, {num_images} images, NFE {nfe}\n\nFeatures {features}, reference {reference}.\n"
    cells: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for result in results:
        row, column = (result["epoch"], result["weights"]), (result["model_type"], result["path_type"])
        cells.setdefault(row, {}).setdefault(column, []).append(_markdown_value(field, result))
    measured = sorted({column for row in cells.values() for column in row})
    columns = [column for column in COLUMN_TITLES if column in measured]
    columns += [column for column in measured if column not in COLUMN_TITLES]
    titles = [COLUMN_TITLES.get(column, " ".join(filter(None, column))) for column in columns]
    lines = [["epoch", "weights", *titles], ["---:", "---", *["---:"] * len(columns)]]
    for row in sorted(cells, key=lambda row: [_natural(text) for text in row]):
        lines.append([*row, *("; ".join(cells[row].get(column, [])) for column in columns)])
    return heading + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_value(field: str, result: Mapping[str, Any]) -> str:
    spread = "" if result[f"{field}_sd"] is None else f" ± {result[f'{field}_sd']:.2f}"
    return f"{result[f'{field}_mean']:.2f}{spread} ({result[f'{field}_seeds']})"
