"""Results table: appends survive concurrency and crashes, aggregates agree with the statistics module."""

import csv
import math
import multiprocessing
import random
import statistics
import threading
import warnings

import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evaluation.results_table import (
    ERROR_BAR_FIELDS,
    GROUP_FIELDS,
    METRIC_VALUES,
    METRICS,
    RESULT_FIELDS,
    RESULT_KEY,
    VALUE_FIELDS,
    aggregate,
    append_row,
    has_row,
    read_rows,
    write_csv,
)
from evaluation.table_file import csv_line
from evaluation.training_columns import TRAINING_COLUMNS, TRAINING_FIELDS
from result_rows import TRAINING, as_read, make_row


def append_many(file, process):
    for seed in range(200):
        # Rows longer than any buffer would show interleaving.
        length = 20_000 if seed % 20 == 0 else 20
        append_row(file, make_row(seed=seed, path_fingerprint=str(process), checkpoint=str(process) * length))


def test_rows_come_back_as_written(tmp_path):
    file = tmp_path / "new" / "results.csv"
    append_row(file, make_row())
    append_row(file, make_row(seed=43, dataset='a "quoted", name é', seconds=None, reference_images=None))
    rows = read_rows(file)
    assert [row["seed"] for row in rows] == ["42", "43"]
    assert rows[0] == as_read(make_row())
    assert rows[1]["dataset"] == 'a "quoted", name é' and rows[1]["seconds"] == ""
    with open(file, newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == rows


def test_eight_processes_lose_and_mix_nothing(tmp_path):
    file = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(file, k)) for k in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_rows(file)
    assert len(rows) == 1600 and len(file.read_text().splitlines()) == 1601
    assert {(row["path_fingerprint"], int(row["seed"])) for row in rows} == {
        (str(k), seed) for k in range(8) for seed in range(200)
    }
    for row in rows:
        length = 20_000 if int(row["seed"]) % 20 == 0 else 20
        assert row["checkpoint"] == row["path_fingerprint"] * length
    assert {path.name for path in tmp_path.iterdir()} <= {"results.csv", "results.csv.lock"}


def test_append_waits_for_the_lock(tmp_path):
    file = tmp_path / "results.csv"
    appender = threading.Thread(target=append_row, args=(file, make_row()))
    with FileLock(f"{file}.lock"):
        appender.start()
        appender.join(0.3)
        assert appender.is_alive() and not file.exists()
    appender.join()
    assert len(read_rows(file)) == 1


def test_has_row_looks_at_every_field_of_the_key_and_at_those_it_is_given(tmp_path):
    file = tmp_path / "results.csv"
    assert not has_row(file, make_row())
    append_row(file, make_row())
    assert has_row(file, make_row())
    key = {field: make_row()[field] for field in RESULT_KEY}
    assert has_row(file, key | {"nfe": "18"})
    assert has_row(file, key | {"path_type": make_row()["path_type"]})
    assert not has_row(file, key | {"path_type": "dp_64"})
    for field in RESULT_KEY:
        other = {"weights": "ema", "metric": "swd"}.get(field, "7")
        assert not has_row(file, make_row(**{field: other})), field
    with pytest.raises(KeyError):
        has_row(file, {"seed": 42})


def test_any_cut_of_the_last_line_costs_at_most_that_row(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row(seed=1))
    intact = file.read_bytes()
    append_row(file, make_row(seed=2, dataset='é "q", r'))
    whole = file.read_bytes()
    for length in range(len(intact) + 1, len(whole)):
        file.write_bytes(whole[:length])
        complete = length == len(whole) - 1  # Only the line break is missing.
        kept = ["1", "2"] if complete else ["1"]
        if complete:
            assert [row["seed"] for row in read_rows(file)] == kept
        else:
            with pytest.warns(UserWarning, match="line 3"):
                assert [row["seed"] for row in read_rows(file)] == kept
        append_row(file, make_row(seed=3))
        assert file.read_bytes().startswith(whole[:length])
        if complete:
            assert [row["seed"] for row in read_rows(file)] == [*kept, "3"]
        else:
            with pytest.warns(UserWarning, match="line 3"):
                assert [row["seed"] for row in read_rows(file)] == [*kept, "3"]


def write_table(file, *rows):
    """A table as a text editor leaves it: nothing checks the rows."""
    lines = [csv_line(RESULT_FIELDS), *(csv_line(map(str, row)) for row in rows)]
    file.write_text("".join(lines), encoding="utf-8")
    return file.read_bytes()


def as_values(**changes):
    return list(as_read(make_row(**changes)).values())


INTEGERS = ("nfe", "seed", "num_images", "epoch")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        *((column, text) for column in ("nfe", "num_images") for text in ("0", "x")),
        *((column, text) for column in INTEGERS for text in ("", "1.0", "-1", "1e3", " 1", "²")),
        *((column, text) for column in ("reference_images", "floor_images") for text in ("0", "many", "1.5")),
        *(("fid", text) for text in ("abc", "nan", "inf", "1e999", "1_0", "1,5", " 1", "")),
        ("kid", "abc"),
        ("kid", "0.5"),
        *(("weights", text) for text in ("", "EMA", "raw ")),
        *(("metric", text) for text in ("", "FID", "fide")),
        *(("seconds", text) for text in ("soon", "nan", "-1")),
        *(("date", text) for text in ("yesterday", "31.01.2025", "2025-13-01T00:00:00Z", "2025-13-31 23:59:59")),
        *((column, text) for column in ("lr", "ema_decay") for text in ("fast", "nan", "0,001")),
        *((column, text) for column in ("batch_size", "images_seen", "parameters") for text in ("64.0", "-1", "many")),
        *((field, "") for field in RESULT_KEY if field.endswith(("fingerprint", "features")) or field == "precision"),
        ("resize", " "),
    ],
)
def test_a_row_edited_into_nonsense_is_refused_and_left_alone(tmp_path, column, text):
    file = tmp_path / "results.csv"
    before = write_table(file, as_values(seed=1), as_values(**{"seed": 2, column: text}), as_values(seed=3))
    with pytest.raises(ValueError) as error:
        read_rows(file)
    text = text.replace("2025-13-31 23:59:59", "2025-13-31T23:59:59Z")  # The order of which leaves no doubt.
    assert str(error.value).startswith(f"{file} line 3, column {column}: {text!r} is not ")
    assert str(error.value).endswith("; correct it or delete the line.")
    with pytest.raises(ValueError, match="line 3"):
        has_row(file, make_row())
    assert file.read_bytes() == before


@pytest.mark.parametrize(("column", "text"), [("nfe", "1"), ("num_images", "1"), ("seed", "0"), ("epoch", "0")])
def test_the_least_count_is_one(tmp_path, column, text):
    write_table(tmp_path / "results.csv", as_values(**{column: text}))
    assert [row[column] for row in read_rows(tmp_path / "results.csv")] == [text]


@pytest.mark.parametrize(
    ("edit", "count"),
    [
        (lambda values: values[:3] + values[4:], len(RESULT_FIELDS) - 1),
        (lambda values: values[:3] + ["more"] + values[3:], len(RESULT_FIELDS) + 1),
        (lambda values: [*values, ""], len(RESULT_FIELDS) + 1),
        (lambda values: values[-19:], 19),
    ],
)
def test_a_row_with_another_number_of_columns_is_refused_and_left_alone(tmp_path, edit, count):
    file = tmp_path / "results.csv"
    before = write_table(file, as_values(), edit(as_values(seed=43)))
    expected = f"{file} line 3 has {count} columns instead of {len(RESULT_FIELDS)}; correct it or delete the line."
    with pytest.raises(ValueError) as error:
        read_rows(file)
    assert str(error.value) == expected
    assert file.read_bytes() == before


def metric_row(metric):
    values = {field: 0.5 for field in METRIC_VALUES[metric]}
    return make_row(fid=None, metric=metric) | values


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_needs_one_of_its_values_and_takes_no_other(tmp_path, metric):
    file = tmp_path / "results.csv"
    append_row(file, metric_row(metric))
    for field in METRIC_VALUES[metric]:
        append_row(file, metric_row(metric) | dict.fromkeys(METRIC_VALUES[metric]) | {field: -1e-3})
    rows = read_rows(file)
    assert len(rows) == 1 + len(METRIC_VALUES[metric])
    with pytest.raises(ValueError, match=f"no other of its metric {metric}"):
        append_row(file, metric_row(metric) | dict.fromkeys(METRIC_VALUES[metric]))
    for field in set(VALUE_FIELDS) - set(METRIC_VALUES[metric]):
        with pytest.raises(ValueError, match=f"its {field} '1' is not empty, but the metric of the row is {metric}"):
            append_row(file, metric_row(metric) | {field: 1})
    assert read_rows(file) == rows


FREE_TEXT = {"dataset", "reference", "model_type", "path_type", "coarse_from", "regime", "representation"}
FREE_TEXT |= {"solver", "guidance"}
FREE_TEXT |= {"checkpoint", *(name for name, column in TRAINING_COLUMNS.items() if column.form == "text")}
one_line = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
cell_text = one_line | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["raw", "ema", *METRICS])


@settings(max_examples=300, deadline=None)
@given(column=st.sampled_from(RESULT_FIELDS), text=cell_text)
@example(column="date", text="")
@example(column="date", text="2025-01-31T23:")
@example(column="metric", text="swd")
@example(column="lr", text="00")
def test_a_corrupted_cell_is_harmless_or_refused_by_name(tmp_path_factory, column, text):
    file = tmp_path_factory.mktemp("table") / "results.csv"
    before = write_table(file, as_values(seed=1), as_values(**{"seed": 2, column: text}))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = read_rows(file)
    except ValueError as error:
        assert column not in FREE_TEXT
        # The value does not belong to another metric, so that it is the value that is named.
        named = "fid" if column == "metric" and text in METRICS else column
        assert f"line 3, column {named}: " in str(error)
    else:
        if len(rows) == 1:
            # The date looks as if a crash had cut it short.
            assert column == "date" and "line 3" in str(caught[0].message)
        else:
            rate = column in TRAINING_COLUMNS and TRAINING_COLUMNS[column].form == "number" and text
            assert float(rows[1][column]) == float(text) if rate else rows[1][column] == text
            if column not in FREE_TEXT and column not in VALUE_FIELDS:
                assert text or column in ("seconds", "reference_images", "floor_images", *TRAINING_FIELDS)
            if column in VALUE_FIELDS and text:
                assert math.isfinite(float(text)) and column in METRIC_VALUES["fid"]
    assert file.read_bytes() == before


@settings(max_examples=100, deadline=None)
@given(dataset=one_line, checkpoint=one_line, data=st.data())
def test_a_row_cut_anywhere_is_skipped_and_never_refused(tmp_path_factory, dataset, checkpoint, data):
    file = tmp_path_factory.mktemp("table") / "results.csv"
    append_row(file, make_row(seed=1))
    intact = len(file.read_bytes())
    append_row(file, make_row(seed=2, dataset=dataset, checkpoint=checkpoint))
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(intact + 1, len(whole) - 2))])
    for _ in range(2):
        append_row(file, make_row(seed=3))
    with pytest.warns(UserWarning, match="line 3"):
        assert [row["seed"] for row in read_rows(file)] == ["1", "3", "3"]


FOREIGN = {
    "a,b\n1,2\n": "header begins with 'a,b'",
    "checkpoint_finger": "header begins with 'checkpoint_finger'",
    csv_line((*RESULT_FIELDS, "extra")): "has a column 'extra', which is unknown here",
    csv_line(field for field in RESULT_FIELDS if field != "nfe"): "has no column nfe",
    csv_line((*RESULT_FIELDS[:-1], "seconds", "date")): "has the column seconds twice",
    csv_line(
        ("date", *RESULT_FIELDS[:-1])
    ): "columns go from date to checkpoint, not from checkpoint_fingerprint to date",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_header_is_refused_and_left_alone(tmp_path, content):
    file = tmp_path / "other.csv"
    file.write_text(content)
    for use in (lambda: append_row(file, make_row()), lambda: read_rows(file)):
        with pytest.raises(ValueError, match="other.csv is not a results table of this version.*move it away") as error:
            use()
    assert file.read_text() == content and FOREIGN[content] in str(error.value)


def test_empty_file_gets_a_header(tmp_path):
    file = tmp_path / "results.csv"
    file.touch()
    assert read_rows(file) == []
    append_row(file, make_row())
    assert len(read_rows(file)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fdi": 3.0}, "fdi"),
        ({"seed": None}, "seed"),
        ({"path_fingerprint": ""}, "path_fingerprint"),
        ({"dataset": "two\nlines"}, "dataset"),
        ({"date": "2025-01-31"}, "date"),
        ({"date": None}, "date"),
        ({"date": "2025-02-30T00:00:00Z"}, "date"),
        ({"fid": math.nan}, "fid 'nan' is not"),
        ({"fid": None}, "no other of its metric fid"),
        ({"kid": 0.5}, "kid '0.5' is not empty, but the metric of the row is fid"),
        ({"weights": "best"}, "raw or ema"),
        ({"metric": "fide"}, "one of fid"),
    ],
)
def test_wrong_row_is_refused_before_the_file_is_touched(tmp_path, change, message):
    file = tmp_path / "results.csv"
    with pytest.raises(ValueError, match=message):
        append_row(file, make_row(**change))
    assert not file.exists()


def test_aggregate_agrees_with_the_statistics_module(tmp_path):
    file = tmp_path / "results.csv"
    generator = random.Random(0)
    expected = {}
    for epoch in (1000, 200):
        for path in ("diagonal", "dp_64"):
            for seed in range(42, 47 if path == "diagonal" else 43):
                fid = generator.uniform(20, 90)
                expected.setdefault((str(epoch), path), []).append(fid)
                names = {"epoch": epoch, "checkpoint_fingerprint": epoch, "path_type": path, "path_fingerprint": path}
                append_row(file, make_row(**names, seed=seed, fid=fid))
    results = aggregate(read_rows(file))
    assert [(r["epoch"], r["path_type"]) for r in results] == [
        ("200", "diagonal"),
        ("200", "dp_64"),
        ("1000", "diagonal"),
        ("1000", "dp_64"),
    ]
    for result in results:
        values = expected[result["epoch"], result["path_type"]]
        assert result["fid_mean"] == pytest.approx(statistics.mean(values), rel=1e-14)
        assert result["fid_seeds"] == len(values)
        if len(values) == 1:
            assert result["fid_sd"] is None
        else:
            assert result["fid_sd"] == pytest.approx(statistics.stdev(values), rel=1e-12)
        assert result["swd_mean"] is None and result["swd_seeds"] == 0
        statistic = {f"{v}_{s}" for v in VALUE_FIELDS for s in ("mean", "sd", "seeds")}
        assert set(result) == {*GROUP_FIELDS, *statistic} - {f"{bar}_sd" for bar in ERROR_BAR_FIELDS}


def test_hand_computed_mean_and_deviation():
    row = {key: str(value) for key, value in make_row().items()} | dict.fromkeys(VALUE_FIELDS, "")
    values = ((1, "2", "0.5"), (2, "4", "0.7"), (3, "9", "0.9"))
    rows = [row | {"metric": "kid", "seed": seed, "kid": kid, "kid_sd": sd} for seed, kid, sd in values]
    (result,) = aggregate(rows)
    # The squares of -3, -1 and 4 add up to 26.
    assert (result["kid_mean"], result["kid_sd"], result["kid_seeds"]) == (5, pytest.approx(13**0.5), 3)
    assert (result["kid_sd_mean"], result["kid_sd_seeds"]) == (pytest.approx(0.7), 3)


def test_aggregate_keeps_apart_what_differs_in_more_than_the_seed():
    row = make_row() | dict.fromkeys(VALUE_FIELDS, "")
    rows = [row, *(row | {field: "other", "seed": 43} for field in GROUP_FIELDS)]
    assert len(aggregate(rows)) == len(rows)


def test_a_row_that_does_not_say_how_it_was_trained_is_of_the_training_of_its_weights(tmp_path):
    file = tmp_path / "results.csv"
    silent = dict.fromkeys(TRAINING)
    append_row(file, make_row(seed=1, fid=10.0, **silent))
    append_row(file, make_row(seed=2, fid=20.0))
    append_row(file, make_row(seed=1, fid=50.0, checkpoint_fingerprint="beef", **silent))
    first, second = aggregate(read_rows(file))
    assert (first["fid_mean"], first["fid_seeds"], first["lr"]) == (50.0, 1, "")
    assert (second["fid_mean"], second["fid_seeds"], second["lr"]) == (15.0, 2, TRAINING["lr"])
    # Of two trainings that ended in these weights nobody knows which one it was.
    append_row(file, make_row(seed=2, fid=20.0, run="second"))
    silent = [result for result in aggregate(read_rows(file)) if not result["run"]]
    assert sorted(result["fid_mean"] for result in silent) == [10.0, 50.0]


def test_a_row_that_says_nothing_counts_as_done(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row(run=""))
    assert has_row(file, make_row()) and not has_row(file, make_row(lr="0.5"))
    append_row(file, make_row(run="other", seed=43))
    assert not has_row(file, make_row(seed=43))


def test_a_forced_repetition_replaces_the_earlier_value(tmp_path):
    file = tmp_path / "results.csv"
    for seed, fid in ((1, 10.0), (2, 20.0), (1, 14.0)):
        append_row(file, make_row(seed=seed, fid=fid))
    (result,) = aggregate(read_rows(file))
    assert (result["fid_mean"], result["fid_seeds"]) == (17.0, 2)


def test_a_group_that_mixes_checkpoints_is_refused(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row())
    append_row(file, make_row(checkpoint_fingerprint="beef"))
    with pytest.raises(ValueError, match="diagonal.*seed twice"):
        aggregate(read_rows(file), group_by=("path_type", "nfe"))


def test_csv_holds_the_aggregate(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row())
    results = aggregate(read_rows(file))
    write_csv(tmp_path / "mean.csv", results)
    with open(tmp_path / "mean.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row == {name: "" if value is None else str(value) for name, value in results[0].items()}
    assert [path.name for path in tmp_path.glob("*mean*")] == ["mean.csv"]


def test_nothing_to_write_is_an_error_and_keeps_the_old_file(tmp_path):
    file = tmp_path / "old"
    file.write_text("old")
    with pytest.raises(ValueError, match="old"):
        write_csv(file, [])
    assert file.read_text() == "old"
