"""The results table: one CSV row per evaluation, appended under a lock and never rewritten.

Many jobs on many hosts share one file. A row is one line and ends in its date, so a line that a crash cut
short is recognised, skipped with a warning and never joined with the next one. A whole line with nonsense in it was
edited by hand and is refused, since skipping it would change means unnoticed.
"""

import csv
import io
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from runtime.safe_write import replacing

# What makes two evaluations the same.
RESULT_KEY = (
    "checkpoint_fingerprint",
    "weights",  # raw or ema
    "path_fingerprint",
    "nfe",
    "seed",
    "num_images",
    "metric",  # one of METRICS
    "metric_features",  # inception-<fingerprint>, swd-7x7-64-32-16 or pixels
    "resize",  # the filter by which images reach the network of the metric, or none
    "reference_fingerprint",
    "precision",  # of the network, fp32 or bf16
)
DESCRIPTION_FIELDS = (
    "dataset",
    "reference",
    "reference_images",
    "model_type",
    "epoch",
    "path_type",
    "coarse_from",  # x0 or noisy, for models that read a coarse image they do not predict; else empty
    "regime",  # timestep pairs of training (--t_pairs); empty for a model of one scale
    "representation",  # of the scales (--representation); empty for a model of one
)

# What each metric measures; the first value is the one it is known by.
METRIC_VALUES = {
    "fid": ("fid",),
    "fid_infinity": ("fid_infinity",),
    "kid": ("kid", "kid_sd"),
    "is": ("inception_score", "inception_score_sd"),
    "pr": ("manifold_precision", "manifold_recall"),
    "swd": ("swd", "swd_64", "swd_32", "swd_16"),  # swd is the mean over its levels
    "nn": ("nn_distance", "nn_distance_real", "authenticity"),
}
METRICS = tuple(METRIC_VALUES)
VALUE_FIELDS = tuple(field for fields in METRIC_VALUES.values() for field in fields)

# The date comes last because its fixed form shows whether the line is whole.
RESULT_FIELDS = (*RESULT_KEY, *DESCRIPTION_FIELDS, *VALUE_FIELDS, "seconds", "checkpoint", "date")

# Rows that agree in these differ in the seed alone, so their spread is that of the seed.
GROUP_FIELDS = (*DESCRIPTION_FIELDS, *(field for field in RESULT_KEY if field != "seed"))

# Error bars of one evaluation, so that over seeds only their mean says something.
ERROR_BAR_FIELDS = ("kid_sd", "inception_score_sd")

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def append_row(file: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Append one evaluation to `file`, which is created with its header when missing or empty.

    The row is one write and is on the disk when this returns.

    Args:
        file: CSV file; `file` + ".lock" beside it keeps concurrent jobs apart.
        row: values of RESULT_FIELDS, as `read_rows` demands them; fields that may be empty may be missing or None.
            The date is UTC as 2025-01-31T23:59:59Z.

    Raises:
        ValueError: `row` has an unknown field or a value that its column cannot hold, such as a missing key field,
            a NaN or a line break; or `file` has another header. The file stays as it is.
    """
    file = Path(file)
    line = _format_row(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists() or file.stat().st_size == 0:
            with replacing(file) as temporary:
                temporary.write_bytes((csv_line(RESULT_FIELDS) + line).encode())
            return
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
    fault = _find_fault(texts)
    if fault is not None:
        raise ValueError(f"A result cannot be written to the table: its {fault[0]} {fault[1]}.")
    return csv_line(texts.values())


def csv_line(values: Iterable[Any]) -> str:
    """One line of a CSV file, line break included."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _whole_number(least: int) -> Callable[[str], bool]:
    return lambda text: _INTEGER.fullmatch(text) is not None and int(text) >= least


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _is_date(text: str) -> bool:
    try:
        datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return False
    return _DATE.fullmatch(text) is not None


_POSITIVE = (_whole_number(1), "a positive integer")
_COUNT = (_whole_number(0), "0 or a positive integer")
_TEXT = (lambda text: text.strip() != "", "a name")
_EMPTY_OR_NUMBER = (lambda text: text == "" or _is_number(text), "empty or a finite number")

# What a column may hold; dataset, reference, model_type, path_type, coarse_from, regime,
# representation and checkpoint are free text.
_COLUMN_CHECKS: dict[str, tuple[Callable[[str], bool], str]] = {
    **dict.fromkeys(RESULT_KEY, _TEXT),
    "weights": (("raw", "ema").__contains__, "raw or ema"),
    "nfe": _POSITIVE,
    "seed": _COUNT,
    "num_images": _POSITIVE,
    "metric": (METRICS.__contains__, f"one of {', '.join(METRICS)}"),
    "reference_images": (lambda text: text == "" or _POSITIVE[0](text), "empty or a positive integer"),
    "epoch": _COUNT,
    **dict.fromkeys(VALUE_FIELDS, _EMPTY_OR_NUMBER),
    "seconds": (lambda text: text == "" or (_is_number(text) and float(text) >= 0), "empty or a number of at least 0"),
    "date": (_is_date, "a date such as 2025-01-31T23:59:59Z"),
}


def _find_fault(row: Mapping[str, str]) -> tuple[str, str] | None:
    # The column at fault and what is wrong with it.
    for column, (allowed, form) in _COLUMN_CHECKS.items():
        if not allowed(row[column]):
            return column, f"{row[column]!r} is not {form}"
    own = METRIC_VALUES[row["metric"]]
    for column in VALUE_FIELDS:
        if row[column] and column not in own:
            return column, f"{row[column]!r} is not empty, but the metric of the row is {row['metric']}"
    if not any(row[column] for column in own):
        return own[0], f"'' is not a value, and the row has no other of its metric {row['metric']}"
    return None


def _check_header(file: Path, line: str) -> None:
    if line.rstrip("\r\n") != csv_line(RESULT_FIELDS).rstrip("\n"):
        present = line.strip().split(",")
        absent = [field for field in RESULT_FIELDS if field not in present]
        reason = f"its header begins with {line.strip()[:40]!r}"
        if 0 < len(absent) < len(RESULT_FIELDS) / 2:  # A table of an earlier version, not some other file.
            reason = f"it has no column {absent[0]}"
        raise ValueError(
            f"{file} is not a results table of this version, {reason}: move it away or choose another --output."
        )


def read_rows(file: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of `read_numbered_rows` without their numbers."""
    return list(read_numbered_rows(file).values())


def read_numbered_rows(file: str | os.PathLike) -> dict[int, dict[str, str]]:
    """Rows of `file` in the order written, every value as text; none when the file is missing or empty.

    Keys are the numbers of their lines, of which the header is line 1.

    Integers are nfe and num_images (from 1), seed and epoch (from 0) and reference_images (from 1, or empty). Of
    VALUE_FIELDS at least one of METRIC_VALUES[metric] is a finite number, those of other metrics are empty. A line that
    a crash cut short, which therefore lacks a whole date at its end, is skipped with a warning that names it.

    Raises ValueError for another header, and for a whole line that is not a result, naming the line and the column.
    """
    file = Path(file)
    if not file.exists():
        return {}
    lines = file.read_bytes().decode(errors="replace").split("\n")
    if lines == [""]:
        return {}
    _check_header(file, lines[0])
    rows = {}
    # Lines are parsed one by one, since the open quote of a damaged one would swallow those that follow.
    for number, line in enumerate(lines[1:], start=2):
        if not line.removesuffix("\r"):
            continue
        try:
            values = next(csv.reader([line.removesuffix("\r")]))
        except csv.Error:
            values = [""]
        if _is_torn(values):
            warnings.warn(f"{file} line {number} is not a whole result and is skipped.", stacklevel=2)
            continue
        if len(values) != len(RESULT_FIELDS):
            raise ValueError(
                f"{file} line {number} has {len(values)} columns instead of {len(RESULT_FIELDS)}; "
                f"correct it or delete the line."
            )
        row = dict(zip(RESULT_FIELDS, values, strict=True))
        fault = _find_fault(row)
        if fault is not None:
            raise ValueError(f"{file} line {number}, column {fault[0]}: {fault[1]}; correct it or delete the line.")
        rows[number] = row
    return rows


def _is_torn(values: Sequence[str]) -> bool:
    # The beginning of a whole line has no more columns than it, and in its last column the beginning of a date.
    if len(values) < len(RESULT_FIELDS):
        return not _DATE.fullmatch(values[-1])
    begins_date = "0000-00-00T00:00:00Z".startswith(re.sub("[0-9]", "0", values[-1]))
    return len(values) == len(RESULT_FIELDS) and begins_date and not _DATE.fullmatch(values[-1])


def has_row(file: str | os.PathLike, key: Mapping[str, Any]) -> bool:
    """Whether `file` holds a row that agrees with `key` in every field of RESULT_KEY and in what else it names.

    Raises KeyError when `key` lacks a field of RESULT_KEY or names an unknown one, and ValueError when the
    file has another header.
    """
    fields = {*RESULT_KEY, *key}
    wanted = {field: str(key[field]) for field in fields}
    return any({field: row[field] for field in fields} == wanted for row in read_rows(file))


def without_repetitions(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of rows that agree in their key and description, which are forced repetitions, the last one."""
    return list({tuple(str(row[field]) for field in (*GROUP_FIELDS, "seed")): row for row in rows}.values())


def aggregate(
    rows: Iterable[Mapping[str, Any]],  # from read_rows
    group_by: Sequence[str] = GROUP_FIELDS,
) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every value, one result per group, in natural order.

    A result holds the fields of `group_by` and, for each of VALUE_FIELDS, `{value}_mean`, `{value}_sd` (of
    the sample, divided by n - 1) and `{value}_seeds`; without a value the mean is None, below two the sd.
    ERROR_BAR_FIELDS have no `{value}_sd`. Of forced repetitions the last one counts.

    Raises ValueError when a group holds a seed twice, so that it mixes what is not a repetition.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in without_repetitions(rows):
        groups.setdefault(tuple(str(row[field]) for field in group_by), []).append(row)
    results = []
    for group in sorted(groups, key=lambda group: [natural_order(text) for text in group]):
        result: dict[str, Any] = dict(zip(group_by, group, strict=True))
        for field in VALUE_FIELDS:
            measured = [row for row in groups[group] if row[field] != ""]
            if len({row["seed"] for row in measured}) < len(measured):
                raise ValueError(
                    f"The results {', '.join(f'{name} {value}' for name, value in result.items())} hold a seed "
                    f"twice for {field}: group by every field that tells them apart."
                )
            values = [float(row[field]) for row in measured]
            mean = statistics.fmean(values) if values else None
            sd = statistics.stdev(values) if len(values) > 1 else None
            spread = {} if field in ERROR_BAR_FIELDS else {f"{field}_sd": sd}
            result |= {f"{field}_mean": mean, **spread, f"{field}_seeds": len(values)}
        results.append(result)
    return results


def natural_order(text: str) -> tuple[int, float, str]:
    """Sort key by which epoch 1000 comes after epoch 200, and words after numbers."""
    return (0, float(text), "") if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else (1, 0.0, text)


def write_csv(file: str | os.PathLike, aggregated: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal columns, such as those of `aggregate`, as CSV, a None as an empty field, `file` as a whole.

    Raises ValueError when there is no result.
    """
    if not aggregated:
        raise ValueError(f"There is no result to write to {file}: evaluate a checkpoint first.")
    lines = [csv_line(aggregated[0]), *(csv_line(result.values()) for result in aggregated)]
    with replacing(file) as temporary:
        temporary.write_bytes("".join(lines).encode())
