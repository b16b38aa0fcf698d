"""The results table: one CSV row per evaluation, appended under a lock and never rewritten.

Many jobs on many hosts share one file. A row is one line and ends in its date, so a line that a crash cut
short is recognised, skipped with a warning and never joined with the next one. A whole line with nonsense in it was
edited by hand and is refused, since skipping it would change means unnoticed. Columns that a table of an earlier
version lacks have defaults.
"""

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from checkpoint import MODEL_CLASSES
from diffusion.solvers import SOLVERS
from evaluation.table_file import (
    Line,
    TableFormat,
    append_line,
    check_appendable,
    csv_line,
    is_date,
    is_rewritten_date,
    read_lines,
)
from evaluation.training_columns import TRAINING_COLUMNS, TRAINING_FIELDS, number_text
from planning.regimes import default_regime
from runtime.safe_write import beside, replacing

# What makes two evaluations the same.
RESULT_KEY = (
    "checkpoint_fingerprint",
    "weights",  # raw or ema
    "path_fingerprint",
    "nfe",
    "seed",
    "num_images",
    "metric",  # one of METRICS
    "metric_features",  # inception-<fingerprint>, <run>-<fingerprint> of a judge, swd-7x7-64-32-16 or pixels
    "resize",  # the filter by which images reach the network of the metric, or none
    "reference_fingerprint",
    "precision",  # of the network, fp32 or bf16
)
DESCRIPTION_FIELDS = (
    "dataset",
    "reference",
    "reference_images",
    "floor_images",  # real images of which a value of them beside that of generated ones is (`fd_real`); empty if none
    "model_type",
    "epoch",
    "path_type",
    "coarse_from",  # x0 or noisy, for models that read a coarse image they do not predict; else empty
    "regime",  # timestep pairs of training (--t_pairs); empty for a model of one scale
    "representation",  # of the scales (--representation); empty for a model of one
    "solver",  # how a step of the path is taken, and where the last one lands
    "guidance",  # which classes are sampled and what guides towards them; empty for a model without classes
    *TRAINING_FIELDS,  # all empty in rows of versions that did not say
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
    # Of a classifier trained here, with what real images have beside.
    "fd": ("fd", "fd_real"),
    "cs": ("class_score", "class_score_sd", "class_score_real"),
    "ca": ("class_accuracy", "class_accuracy_real"),
}
METRICS = tuple(METRIC_VALUES)
VALUE_FIELDS = tuple(field for fields in METRIC_VALUES.values() for field in fields)

# The date comes last because its fixed form shows whether the line is whole.
RESULT_FIELDS = (*RESULT_KEY, *DESCRIPTION_FIELDS, *VALUE_FIELDS, "seconds", "checkpoint", "date")

# Rows that agree in these differ in the seed alone, so their spread is that of the seed.
GROUP_FIELDS = (*DESCRIPTION_FIELDS, *(field for field in RESULT_KEY if field != "seed"))

# Error bars of one evaluation, so that over seeds only their mean says something.
ERROR_BAR_FIELDS = ("kid_sd", "inception_score_sd", "class_score_sd")

_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def append_row(file: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Append one evaluation to `file`, which is created with its header when missing or empty.

    The row is one write and is on the disk when this returns. Bytes of names that are no letters become question marks.

    Args:
        file: CSV file; `file` + ".lock" beside it keeps concurrent jobs apart.
        row: values of RESULT_FIELDS, as `read_rows` demands them; fields that may be empty may be missing or None.
            The date is UTC as 2025-01-31T23:59:59Z.

    Raises:
        ValueError: `row` has an unknown field or a value that its column cannot hold, such as a missing key field,
            a NaN or a line break; or `file` is no table that rows can be appended to. The file stays as it is.
    """
    file = Path(file)
    values = _format_row(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(beside(file, ".lock")):
        append_line(file, FORMAT, values)


def _format_row(row: Mapping[str, Any]) -> list[str]:
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
    return list(texts.values())


def _whole_number(least: int) -> Callable[[str], bool]:
    return lambda text: _INTEGER.fullmatch(text) is not None and int(text) >= least


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


_POSITIVE = (_whole_number(1), "a positive integer")
_COUNT = (_whole_number(0), "0 or a positive integer")
_TEXT = (lambda text: text.strip() != "", "a name")
_EMPTY_OR_NUMBER = (lambda text: text == "" or _is_number(text), "empty or a finite number")

_EMPTY_OR_COUNT = (lambda text: text == "" or _COUNT[0](text), "empty, 0 or a positive integer")
_NUMBERS_OF_TRAINING = tuple(name for name, kind in TRAINING_COLUMNS.items() if kind.form == "number")
_TRAINING_CHECKS = {"number": _EMPTY_OR_NUMBER, "count": _EMPTY_OR_COUNT}

# What a column may hold; the others are free text.
_COLUMN_CHECKS: dict[str, tuple[Callable[[str], bool], str]] = {
    **dict.fromkeys(RESULT_KEY, _TEXT),
    "weights": (("raw", "ema").__contains__, "raw or ema"),
    "nfe": _POSITIVE,
    "seed": _COUNT,
    "num_images": _POSITIVE,
    "metric": (METRICS.__contains__, f"one of {', '.join(METRICS)}"),
    **dict.fromkeys(
        ("reference_images", "floor_images"),
        (lambda text: text == "" or _POSITIVE[0](text), "empty or a positive integer"),
    ),
    "epoch": _COUNT,
    **{name: _TRAINING_CHECKS[kind.form] for name, kind in TRAINING_COLUMNS.items() if kind.form in _TRAINING_CHECKS},
    **dict.fromkeys(VALUE_FIELDS, _EMPTY_OR_NUMBER),
    "seconds": (lambda text: text == "" or (_is_number(text) and float(text) >= 0), "empty or a number of at least 0"),
    "date": (is_date, "a date such as 2025-01-31T23:59:59Z"),
}


# A fingerprint of digits alone, or with one e among them, after a spreadsheet has taken it for a number.
_NUMBER_OF_A_FINGERPRINT = re.compile(r"[0-9]([.,][0-9]+)?E\+[0-9]+")


def _find_fault(row: Mapping[str, str]) -> tuple[str, str] | None:
    # The column at fault and what is wrong with it.
    for column, (allowed, form) in _COLUMN_CHECKS.items():
        text = row[column]
        if column.endswith("_fingerprint") and _NUMBER_OF_A_FINGERPRINT.fullmatch(text):
            return column, f"{text!r} is not a fingerprint, but the number that a spreadsheet has made of one"
        if not allowed(text):
            return column, f"{text!r} is not {form}{_blame(column, text)}"
    own = METRIC_VALUES[row["metric"]]
    for column in VALUE_FIELDS:
        if row[column] and column not in own:
            return column, f"{row[column]!r} is not empty, but the metric of the row is {row['metric']}"
    if not any(row[column] for column in own):
        return own[0], f"'' is not a value, and the row has no other of its metric {row['metric']}"
    return None


def _blame(column: str, text: str) -> str:
    if column == "date" and is_rewritten_date(text):
        return ", but one in the form of a spreadsheet"
    if column in FORMAT.numbers and re.fullmatch(r"[-+]?[0-9.]*,[0-9]+", text):
        return ", but one with a comma, as spreadsheets write them"
    return ""


def _default_representation(row: Mapping[str, str]) -> str:
    model = MODEL_CLASSES.get(row["model_type"])
    return "overcomplete" if model is not None and model.num_scales > 1 else ""


def _solver_of_path(row: Mapping[str, str]) -> str:
    # Which was a part of the path's fingerprint alone.
    found = re.search(r"-eta([0-9.e-]+)-(clean|t0)", row["path_fingerprint"])
    return f"ddim eta {float(found[1]):g} {found[2]}" if found else "ddim eta 0 clean"


UNKNOWN = "unknown"
# What rows of earlier versions, which lack these columns, were made with.
DEFAULTS: dict[str, Callable[[Mapping[str, str]], str]] = {
    "resize": lambda row: "pytorch-fid" if row["metric"] == "fid" else "none",
    "precision": lambda row: UNKNOWN,
    "reference": lambda row: "train",
    "regime": lambda row: default_regime(row["model_type"]) or "",
    "representation": _default_representation,
    "solver": _solver_of_path,
    **dict.fromkeys(
        ("reference_images", "floor_images", "coarse_from", "guidance", *TRAINING_FIELDS, *VALUE_FIELDS),
        lambda row: "",
    ),
}
FORMAT = TableFormat(
    columns=RESULT_FIELDS,
    required=frozenset(RESULT_FIELDS) - DEFAULTS.keys(),
    numbers=frozenset(("seconds", *VALUE_FIELDS, *_NUMBERS_OF_TRAINING)),
)


def read_rows(file: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of `read_numbered_rows` without their numbers."""
    return list(read_numbered_rows(file).values())


def read_numbered_rows(file: str | os.PathLike) -> dict[int, dict[str, str]]:
    """Rows of `file` in the order written, every value as text; none when the file is missing or empty.

    Keys are the numbers of their lines, of which the header is line 1.

    Integers are nfe and num_images (from 1), seed and epoch (from 0), reference_images and floor_images (from 1, or
    empty). Of
    VALUE_FIELDS at least one of METRIC_VALUES[metric] is a finite number, those of other metrics are empty. A line that
    a crash cut short, which therefore lacks a whole date at its end, is skipped with a warning that names it.

    Columns that the header of a row lacks have their DEFAULTS. Raises ValueError for another header, for a file that a
    spreadsheet made unreadable, and for a whole line that is not a result, naming the line and the column.
    """
    file = Path(file)
    return {line.number: _checked_row(file, line) for line in read_lines(file, FORMAT)}


def _checked_row(file: Path, line: Line) -> dict[str, str]:
    row = {field: line.cells[field] if field in line.cells else DEFAULTS[field](line.cells) for field in RESULT_FIELDS}
    fault = _find_fault(row)
    if fault is not None:
        raise ValueError(f"{file} line {line.number}, column {fault[0]}: {fault[1]}; correct it or delete the line.")
    # A spreadsheet writes 1e-05 otherwise, which is no other training.
    rates = {name: number_text(float(row[name])) for name in _NUMBERS_OF_TRAINING if row[name]}
    return row | rates


def check_table(file: str | os.PathLike) -> None:
    """Raise ValueError for a file that cannot be read as a results table, or that rows cannot be appended to."""
    if read_rows(file):
        check_appendable(Path(file), FORMAT)


def has_row(file: str | os.PathLike, key: Mapping[str, Any]) -> bool:
    """Whether `file` holds a row that agrees with `key` in every field of RESULT_KEY and in what else it names.

    What a row of an earlier version does not say disagrees with nothing, and neither does None. Raises KeyError when
    `key` lacks a field of RESULT_KEY or names an unknown one, and ValueError when the file has another header.
    """
    wanted = {field: str(key[field]) for field in {*RESULT_KEY, *key} if key[field] is not None}
    return any(all(row[field] in (text, "", UNKNOWN) for field, text in wanted.items()) for row in read_rows(file))


def evaluations(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per evaluation: of rows that agree in key and description, which are forced repetitions, the last one.

    What a row does not say of its training, as those of earlier versions, it says as another row of the same weights
    does, if all of these say the same. Of adaptive solvers, whose calls differ from seed to seed, rows that differ in
    nothing else have the mean as theirs.
    """
    rows = list(rows)
    said: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for field in TRAINING_FIELDS:
            if row[field]:
                said.setdefault((row["checkpoint_fingerprint"], field), set()).add(row[field])
    known = {key: min(values) for key, values in said.items() if len(values) == 1}
    filled = [
        row | {field: row[field] or known.get((row["checkpoint_fingerprint"], field), "") for field in TRAINING_FIELDS}
        for row in rows
    ]
    but_calls = [field for field in GROUP_FIELDS if field != "nfe"]
    calls: dict[tuple[str, ...], list[int]] = {}
    for row in filter(is_adaptive, filled):
        calls.setdefault(group_of(row, but_calls), []).append(int(row["nfe"]))
    for row in filter(is_adaptive, filled):
        row["nfe"] = str(round(statistics.mean(calls[group_of(row, but_calls)])))
    return list({(group_of(row), str(row["seed"])): row for row in filled}.values())


def is_adaptive(row: Mapping[str, Any]) -> bool:
    """Whether the number of calls of a row depends on its images."""
    name = str(row["solver"]).partition(" ")[0]
    return name in SOLVERS and SOLVERS[name].adaptive


def group_of(row: Mapping[str, Any], group_by: Sequence[str] = GROUP_FIELDS) -> tuple[str, ...]:
    """What a row, or a result of `aggregate`, shares with those that are averaged with it."""
    return tuple(str(row[field]) for field in group_by)


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
    for row in evaluations(rows):
        groups.setdefault(group_of(row, group_by), []).append(row)
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
        temporary.write_bytes("".join(lines).encode(errors="replace"))
