"""Results table: appends survive concurrency and crashes, aggregates agree with the statistics module."""

import csv
import multiprocessing
import random
import statistics
import threading

import pytest
from filelock import FileLock

from results_table import (
    GROUP_FIELDS,
    RESULT_FIELDS,
    RESULT_KEY,
    VALUE_FIELDS,
    aggregate,
    append_row,
    has_row,
    read_rows,
    write_csv,
    write_markdown,
)


def make_row(**changes):
    return {
        "checkpoint_fingerprint": "c0ffee",
        "weights": "raw",
        "path_fingerprint": "abc",
        "nfe": 18,
        "seed": 42,
        "num_images": 1000,
        "metric_features": "inception-123",
        "reference_fingerprint": "def",
        "precision": "fp32",
        "dataset": "cats, small",
        "model_type": "dual",
        "epoch": 200,
        "path_type": "diagonal",
        "metric": "fid",
        "fid": 33.25,
        "seconds": 1.5,
        "checkpoint": "lift_dual_timestep_200ep.pth",
        "date": "2025-01-31T23:59:59Z",
    } | changes


def append_many(file, process):
    # Rows longer than any buffer would show interleaving.
    for seed in range(15):
        append_row(file, make_row(seed=seed, path_fingerprint=str(process), checkpoint=str(process) * 20_000))


def test_rows_come_back_as_written(tmp_path):
    file = tmp_path / "new" / "results.csv"
    append_row(file, make_row())
    append_row(file, make_row(seed=43, dataset='a "quoted", name é', fid=None))
    rows = read_rows(file)
    assert [row["seed"] for row in rows] == ["42", "43"]
    assert rows[0] == {field: str(make_row().get(field, "")) for field in RESULT_FIELDS}
    assert rows[1]["dataset"] == 'a "quoted", name é' and rows[1]["fid"] == ""
    with open(file, newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == rows


def test_four_processes_lose_and_mix_nothing(tmp_path):
    file = tmp_path / "results.csv"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(file, k)) for k in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    rows = read_rows(file)
    assert len(file.read_text().splitlines()) == 61
    assert {(row["path_fingerprint"], int(row["seed"])) for row in rows} == {
        (str(k), seed) for k in range(4) for seed in range(15)
    }
    assert all(row["checkpoint"] == row["path_fingerprint"] * 20_000 for row in rows)


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
        assert not has_row(file, make_row(**{field: "7"})), field
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


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "checkpoint_finger", ",".join((*RESULT_FIELDS, "extra")) + "\n"])
def test_foreign_header_is_refused_and_left_alone(tmp_path, content):
    file = tmp_path / "other.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match="other.csv"):
        append_row(file, make_row())
    with pytest.raises(ValueError, match="other.csv"):
        read_rows(file)
    assert file.read_text() == content


def test_empty_file_gets_a_header(tmp_path):
    file = tmp_path / "results.csv"
    file.touch()
    assert read_rows(file) == []
    append_row(file, make_row())
    assert len(read_rows(file)) == 1


def test_line_endings_of_a_spreadsheet_are_read(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row())
    rows = read_rows(file)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(file) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fdi": 3.0}, "fdi"),
        ({"seed": None}, "seed"),
        ({"path_fingerprint": ""}, "path_fingerprint"),
        ({"dataset": "two\nlines"}, "dataset"),
        ({"date": "2025-01-31"}, "date"),
        ({"date": None}, "date"),
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
        assert set(result) == {*GROUP_FIELDS, *(f"{v}_{s}" for v in VALUE_FIELDS for s in ("mean", "sd", "seeds"))}


def test_aggregate_keeps_apart_what_differs_in_more_than_the_seed():
    row = make_row() | dict.fromkeys(VALUE_FIELDS, "")
    rows = [row, *(row | {field: "other", "seed": 43} for field in GROUP_FIELDS)]
    assert len(aggregate(rows)) == len(rows)


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


def test_markdown_is_the_published_table(tmp_path):
    file = tmp_path / "results.csv"
    for seed, shift in ((42, -0.5), (43, 0.5)):
        for weights, factor in (("raw", 1), ("ema", 0.5)):
            for epoch in (1000, 200):
                for model, path, fid in (
                    ("dual", "dp_total", 80.0),
                    ("no_t", "dp_64", 61.0),
                    ("baseline", "diagonal", 33.0),
                    ("dual", "diagonal", 87.0),
                ):
                    if (epoch, model) != (1000, "no_t"):
                        append_row(
                            file,
                            make_row(
                                seed=seed,
                                weights=weights,
                                epoch=epoch,
                                model_type=model,
                                path_type=path,
                                path_fingerprint=path,
                                checkpoint_fingerprint=f"{model}{epoch}",
                                fid=factor * fid + shift,
                            ),
                        )
    append_row(file, make_row(metric="swd", fid=None, swd=7.0, swd_32=6.0, swd_16=8.0, metric_features="swd-7x7-32-16"))
    append_row(file, make_row(num_images=50_000, fid=12.345))
    write_markdown(tmp_path / "table.md", aggregate(read_rows(file)))
    text = (tmp_path / "table.md").read_text()
    assert (
        "## fid: cats, small, 1000 images, NFE 18\n\n"
        "Features inception-123, reference def.\n\n"
        "| epoch | weights | Baseline | LIFT diagonal | LIFT DP-Total | no_t dp_64 |\n"
        "| ---: | --- | ---: | ---: | ---: | ---: |\n"
        "| 200 | ema | 16.50 ± 0.71 (2) | 43.50 ± 0.71 (2) | 40.00 ± 0.71 (2) | 30.50 ± 0.71 (2) |\n"
        "| 200 | raw | 33.00 ± 0.71 (2) | 87.00 ± 0.71 (2) | 80.00 ± 0.71 (2) | 61.00 ± 0.71 (2) |\n"
        "| 1000 | ema | 16.50 ± 0.71 (2) | 43.50 ± 0.71 (2) | 40.00 ± 0.71 (2) |  |\n"
        "| 1000 | raw | 33.00 ± 0.71 (2) | 87.00 ± 0.71 (2) | 80.00 ± 0.71 (2) |  |\n"
    ) in text
    assert "## fid: cats, small, 50000 images, NFE 18" in text and "| 200 | raw | 12.35 (1) |" in text
    headings = [line.split(":")[0] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## fid", "## fid", "## swd", "## swd_32", "## swd_16"]


def test_markdown_shows_both_paths_of_one_name(tmp_path):
    file = tmp_path / "results.csv"
    append_row(file, make_row(fid=1.0))
    append_row(file, make_row(fid=2.0, path_fingerprint="xyz"))
    write_markdown(tmp_path / "table.md", aggregate(read_rows(file)))
    assert "| 200 | raw | 1.00 (1); 2.00 (1) |" in (tmp_path / "table.md").read_text()


def test_nothing_to_write_is_an_error_and_keeps_the_old_file(tmp_path):
    for write in (write_csv, write_markdown):
        file = tmp_path / "old"
        file.write_text("old")
        with pytest.raises(ValueError, match="old"):
            write(file, [])
        assert file.read_text() == "old"
