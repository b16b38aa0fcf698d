"""Tables of the results: hand-computed entries, published numbers only beside their like."""

import csv
import math
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aggregate_results
from evaluation.result_layout import PUBLISHED_FILE, VALUE_LAYOUTS, improvement, layout_tables, read_published
from evaluation.results_table import ERROR_BAR_FIELDS, METRIC_VALUES, RESULT_FIELDS, VALUE_FIELDS, append_row, read_rows
from evaluation.series import COLUMN_TITLES, series_of
from evaluation.table_text import render_markdown


def make_row(**changes):
    row = {
        "checkpoint_fingerprint": f"{changes.get('model_type', 'dual')}{changes.get('epoch', 200)}",
        "weights": "raw",
        "path_fingerprint": changes.get("path_type", "diagonal"),
        "nfe": 18,
        "seed": 42,
        "num_images": 15803,
        "metric": "fid",
        "metric_features": "inception-123",
        "resize": "pytorch-fid",
        "reference_fingerprint": "def",
        "precision": "fp32",
        "dataset": "huggan/AFHQv2",
        "reference": "train",
        "reference_images": 15803,
        "model_type": "dual",
        "epoch": 200,
        "path_type": "diagonal",
        "fid": 30.0,
        "date": "2025-01-31T23:59:59Z",
    } | changes
    if row["metric"] != "fid":
        row["fid"] = changes.get("fid")
    return {field: "" if row.get(field) is None else str(row[field]) for field in RESULT_FIELDS}


OURS = {"dataset": "cats", "num_images": 20_000}


def table_of(tables, what):
    (table,) = [table for table in tables if what in table.title]
    assert all(len(row) == len(table.columns) for row in table.rows)
    return table


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def best(table):
    return [[cell.text for cell in row if cell.best] for row in table.rows]


def test_the_published_layout_with_hand_computed_entries():
    rows = []
    for seed, shift in ((42, -0.5), (43, 0.5)):
        for weights, factor in (("raw", 1), ("ema", 0.5)):
            for epoch in (1000, 200):
                for model, path, fid in (
                    ("dual", "dp_total", 80.0),
                    ("shared_t", "diagonal", 61.0),
                    ("baseline", "diagonal", 33.0),
                    ("dual", "diagonal", 87.0),
                ):
                    if (epoch, model) != (1000, "shared_t"):
                        names = {"model_type": model, "path_type": path, "epoch": epoch, "weights": weights}
                        rows.append(make_row(**OURS, **names, seed=seed, fid=factor * fid + shift))
    tables = layout_tables(rows)
    raw = table_of(tables, "raw weights")
    assert raw.title == "FID, raw weights: cats, 20,000 images, NFE 18"
    assert raw.columns == ("epoch", "Baseline", "LIFT diagonal", "LIFT DP-Total", "shared_t diagonal")
    # Two values a unit apart have the standard deviation 1/√2.
    assert texts(raw) == [
        ["200", "33.00 ± 0.71 (2)", "87.00 ± 0.71 (2)", "80.00 ± 0.71 (2)", "61.00 ± 0.71 (2)"],
        ["1000", "33.00 ± 0.71 (2)", "87.00 ± 0.71 (2)", "80.00 ± 0.71 (2)", ""],
    ]
    assert best(raw) == [["33.00 ± 0.71 (2)"]] * 2
    assert texts(table_of(tables, "EMA weights"))[0][1:3] == ["16.50 ± 0.71 (2)", "43.50 ± 0.71 (2)"]
    assert texts(table_of(tables, "improvement")) == [
        ["200", "ema", "3.50 ± 0.00 (8.0 %, 2)"],
        ["200", "raw", "7.00 ± 0.00 (8.0 %, 2)"],
        ["1000", "ema", "3.50 ± 0.00 (8.0 %, 2)"],
        ["1000", "raw", "7.00 ± 0.00 (8.0 %, 2)"],
    ]
    assert len(tables) == 4
    for part in ("Lower is better", "inception-123", "pytorch-fid", "train (15,803 images, def)", "fp32"):
        assert part in raw.note


def test_the_columns_are_the_published_four_then_the_others():
    series = [("zeta", "diagonal"), *reversed(COLUMN_TITLES), ("dual", "cascade")]
    rows = [make_row(**OURS, model_type=model, path_type=path) for model, path in series]
    (titles,) = {table.columns for table in layout_tables(rows) if "raw weights" in table.title}
    assert titles[:5] == ("epoch", "Baseline", "LIFT diagonal", "LIFT DP-64", "LIFT DP-Total")
    assert titles[-2:] == ("dual cascade", "zeta diagonal")


SETTINGS = {
    "dataset": "dogs",
    "num_images": "12345",
    "metric_features": "inception-456",
    "resize": "clean",
    "reference": "holdout",
    "reference_images": "",
    "reference_fingerprint": "abc",
    "precision": "bf16",
    "nfe": "8",
}


@pytest.mark.parametrize("field", SETTINGS)
def test_what_does_not_compare_shares_no_table(field):
    rows = [make_row(), make_row(path_type="dp_64", fid=29), make_row(path_type="dp_total", **{field: SETTINGS[field]})]
    epoch_tables = [table for table in layout_tables(rows) if "raw weights" in table.title]
    assert sorted(len(table.columns) for table in epoch_tables) == [2, 3]


def test_one_value_has_no_deviation_and_two_paths_of_one_name_have_a_column_each():
    rows = [make_row(**OURS, fid=1.0), make_row(**OURS, fid=2.0, path_fingerprint="xyz")]
    table = table_of(layout_tables(rows), "raw weights")
    assert table.columns == ("epoch", "LIFT diagonal, path diagonal", "LIFT diagonal, path xyz")
    assert texts(table) == [["200", "1.00 (1)", "2.00 (1)"]] and best(table) == [["1.00 (1)"]]
    assert "bracket" not in table.note


def test_a_forced_repetition_counts_once():
    rows = [make_row(**OURS, fid=10), make_row(**OURS, path_type="dp_64", fid=9), make_row(**OURS, fid=12)]
    tables = layout_tables(rows)
    assert texts(table_of(tables, "raw weights")) == [["200", "12.00 (1)", "9.00 (1)"]]
    assert texts(table_of(tables, "improvement")) == [["200", "raw", "3.00 (25.0 %, 1)"]]


# Best epochs


VALUES = [field for field in VALUE_FIELDS if field not in ERROR_BAR_FIELDS]
HIGHER = {"inception_score", "manifold_precision", "manifold_recall", "class_score", "class_accuracy"}


def test_every_value_but_error_bars_has_a_layout():
    assert list(VALUE_LAYOUTS) == VALUES
    assert {field for field in VALUES if VALUE_LAYOUTS[field].better == "higher"} == HIGHER


@pytest.mark.parametrize("field", VALUES)
def test_the_best_epoch_follows_the_direction_of_the_value(field):
    metric = next(metric for metric, fields in METRIC_VALUES.items() if field in fields)
    rows = [
        make_row(**OURS, metric=metric, epoch=epoch, path_type=path, **{field: value})
        for epoch, values in ((200, (0.2, 0.4)), (400, (0.1, 0.3)), (600, (0.4, 0.2)), (800, (0.1, 0.4)))
        for path, value in zip(("diagonal", "dp_64"), values, strict=True)
    ]
    tables = layout_tables(rows)
    digits = VALUE_LAYOUTS[field].digits
    if field.endswith("_real") or field in ("nn_distance", "authenticity"):
        assert [table.title.split(", ")[1].split(":")[0] for table in tables] == ["raw weights"]
        assert best(tables[0]) == [[]] * 4
        return
    found = texts(table_of(tables, "best epochs"))
    epochs, values = (["600", "200"], (0.4, 0.4)) if field in HIGHER else (["400", "600"], (0.1, 0.2))
    assert [row[:3] for row in found] == [["LIFT diagonal", "raw", epochs[0]], ["LIFT DP-64", "raw", epochs[1]]]
    assert [row[3] for row in found] == [f"{value:.{digits}f} (1)" for value in values]
    in_rows = [1, 1, 0, 1] if field in HIGHER else [0, 0, 1, 0]
    table = table_of(tables, "raw weights")
    assert [[cell.best for cell in row[1:]].index(True) for row in table.rows] == in_rows
    gain = table_of(tables, "improvement")
    sign = 1 if field in HIGHER else -1
    assert [float(row[2].split()[0]) for row in texts(gain)] == [0.2 * sign, 0.2 * sign, -0.2 * sign, 0.3 * sign]


def test_the_best_of_raw_and_ema_are_rows_of_their_own():
    fids = {("raw", 200): 40, ("raw", 400): 35, ("ema", 200): 28, ("ema", 400): 29}
    rows = [make_row(**OURS, weights=weights, epoch=epoch, fid=fid) for (weights, epoch), fid in fids.items()]
    table = table_of(layout_tables(rows), "best epochs")
    assert texts(table) == [["LIFT diagonal", "raw", "400", "35.00 (1)"], ["LIFT diagonal", "ema", "200", "28.00 (1)"]]
    assert best(table) == [[], ["28.00 (1)"]]


def test_ablations_have_a_table_when_there_are_any():
    rows = [make_row(**OURS)]
    assert not [table for table in layout_tables(rows) if "ablations" in table.title]
    for model, epoch, fid in (("single_t", 200, 50), ("single_t", 400, 45), ("no_t", 200, 90), ("no_t", 400, 95)):
        rows.append(make_row(**OURS, model_type=model, epoch=epoch, fid=fid))
    assert texts(table_of(layout_tables(rows), "ablations")) == [
        ["no_t diagonal", "raw", "200", "90.00 (1)"],
        ["single_t diagonal", "raw", "400", "45.00 (1)"],
    ]


# Improvement


def test_an_improvement_is_paired_by_seed():
    diagonal, path = {"1": 50.0, "2": 60.0, "3": 70.0, "9": 1000.0}, {"1": 49.0, "2": 57.0, "3": 65.0, "8": -7.0}
    gain = improvement(diagonal, path)
    # Differences 1, 3 and 5 have mean 3 and standard deviation 2; the diagonal's mean over these seeds is 60.
    assert gain == (3.0, 2.0, pytest.approx(5.0), 3)
    assert improvement(path, diagonal, "higher")[:2] == (3.0, 2.0)
    assert improvement(diagonal, {"2": 57.0}) == (3.0, None, pytest.approx(5.0), 1)


def test_an_improvement_without_a_shared_seed_is_of_the_means():
    assert improvement({"1": 40.0, "2": 60.0}, {"3": 45.0}) == (5.0, None, pytest.approx(10.0), 0)
    rows = [make_row(**OURS, seed=1, fid=50), make_row(**OURS, seed=2, fid=45, path_type="dp_64")]
    assert texts(table_of(layout_tables(rows), "improvement")) == [["200", "raw", "5.00 (10.0 %, unpaired)"]]


def test_no_per_cent_of_what_is_not_positive():
    assert improvement({"1": -0.001}, {"1": -0.002}).percent is None
    rows = [make_row(**OURS, metric="kid", kid=value, path_type=path) for path, value in (("diagonal", 0), ("kl", -1))]
    assert texts(table_of(layout_tables(rows), "improvement")) == [["200", "raw", "1.00000 (1)"]]


@pytest.mark.parametrize("values", [({}, {"1": 1.0}), ({"1": 1.0}, {})])
def test_an_improvement_needs_values(values):
    with pytest.raises(ValueError, match="at least one value"):
        improvement(*values)


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=2, max_size=8))
def test_paired_deviation_agrees_with_variances_and_covariance(pairs):
    diagonal, path = ({str(k): pair[side] for k, pair in enumerate(pairs)} for side in (0, 1))
    gain = improvement(diagonal, path)
    first, second = zip(*pairs, strict=True)
    variance = statistics.variance(first) + statistics.variance(second) - 2 * statistics.covariance(first, second)
    assert gain.mean == pytest.approx(statistics.mean(first) - statistics.mean(second), abs=1e-9)
    assert gain.sd**2 == pytest.approx(variance, abs=1e-8)


def test_improvements_compare_within_one_checkpoint_and_one_nfe():
    rows = []
    for checkpoint, nfe, diagonal, path in (("a", 18, 50, 40), ("b", 18, 90, 88), ("a", 8, 70, 69)):
        names = {"checkpoint_fingerprint": checkpoint, "nfe": nfe}
        rows.append(make_row(**OURS, **names, fid=diagonal))
        rows.append(make_row(**OURS, **names, fid=path, path_type="dp_total"))
    rows.append(make_row(**OURS, checkpoint_fingerprint="c", fid=1, path_type="dp_total"))
    tables = layout_tables(rows)
    eighteen = table_of(tables, "improvement over the diagonal: cats, 20,000 images, NFE 18")
    assert eighteen.columns[2:] == ("LIFT DP-Total, checkpoint a", "LIFT DP-Total, checkpoint b")
    assert texts(eighteen) == [["200", "raw", "10.00 (20.0 %, 1)", "2.00 (2.2 %, 1)"]]
    eight = table_of(tables, "improvement over the diagonal: cats, 20,000 images, NFE 8")
    assert texts(eight) == [["200", "raw", "1.00 (1.4 %, 1)"]]


# NFE


def test_a_value_against_nfe_where_several_were_measured():
    rows = [
        make_row(**OURS, epoch=epoch, nfe=nfe, path_type=path, fid=nfe + offset)
        for epoch, nfes in ((200, (18,)), (400, (8, 18, 100)))
        for nfe in nfes
        for path, offset in (("diagonal", 0), ("dp_64", 12 - nfe))
    ]
    table = table_of(layout_tables(rows), "against NFE")
    assert table.title == "FID, against NFE: cats, 20,000 images"
    assert table.columns == ("epoch", "weights", "NFE", "LIFT diagonal", "LIFT DP-64")
    assert texts(table) == [
        ["400", "raw", "8", "8.00 (1)", "12.00 (1)"],
        ["400", "raw", "18", "18.00 (1)", "12.00 (1)"],
        ["400", "raw", "100", "100.00 (1)", "12.00 (1)"],
    ]
    assert best(table) == [["8.00 (1)"], ["12.00 (1)"], ["12.00 (1)"]]


# Published numbers


def test_the_published_file_holds_the_published_tables():
    numbers = read_published()
    assert len(numbers) == 10 * 8 + 5
    assert len({number[:5] for number in numbers}) == len(numbers)
    by_key = {number[:5]: number for number in numbers}
    assert by_key["dual", "dp_total", "", "raw", "2000"][5:] == ("36.65", "0.23", "5")
    assert by_key["baseline", "diagonal", "", "ema", "400"][5:] == ("27.90", "", "")
    assert by_key["single_t", "dp", "x0", "", "600"].fid_mean == "34.42"
    # Column sums of the published tables.
    for series, total in (
        (("baseline", "diagonal", "raw"), 441.80),
        (("dual", "diagonal", "raw"), 703.42),
        (("dual", "dp_64", "raw"), 632.40),
        (("dual", "dp_total", "raw"), 481.93),
        (("baseline", "diagonal", "ema"), 331.33),
        (("dual", "diagonal", "ema"), 437.11),
        (("dual", "dp_64", "ema"), 354.60),
        (("dual", "dp_total", "ema"), 351.03),
    ):
        chosen = [n for n in numbers if (n.model_type, n.path_type, n.weights) == series]
        assert [number.epoch for number in chosen] == [str(epoch) for epoch in range(200, 2001, 200)]
        assert math.fsum(float(number.fid_mean) for number in chosen) == pytest.approx(total, abs=1e-9)
    for number in numbers:
        assert 20 < float(number.fid_mean) < 210
        assert (number.fid_sd == "") == (number.seeds != "5")


def test_published_numbers_stand_beside_their_like():
    rows = [
        make_row(fid=80),
        make_row(fid=70, epoch=400, path_type="dp_total", weights="ema"),
        make_row(fid=60, epoch=300),
        make_row(fid=50, path_type="kl"),
    ]
    tables = layout_tables(rows)
    raw = table_of(tables, "raw weights")
    assert texts(raw) == [["200", "80.00 (1) [87.22 ± 0.35]", "50.00 (1)"], ["300", "60.00 (1)", ""]]
    assert "Square brackets: published." in raw.note
    assert texts(table_of(tables, "EMA weights")) == [["400", "70.00 (1) [28.91]"]]
    found = {(row[0], row[1]): row[3] for row in texts(table_of(tables, "best epochs"))}
    assert found["LIFT DP-Total", "ema"] == "70.00 (1) [28.91]"
    assert found["LIFT diagonal", "raw"] == "60.00 (1)"


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cats"},
        {"num_images": 15802},
        {"nfe": 17},
        {"resize": "clean"},
        {"reference": "holdout"},
        {"reference_images": 1580},
        {"reference_images": None},
        {"metric": "fid_infinity", "fid_infinity": 30},
    ],
)
def test_published_numbers_stand_beside_nothing_else(change):
    rows = [make_row(**change), make_row(model_type="single_t", **change)]
    text = render_markdown(layout_tables(rows))
    assert "[" not in text and "ublished" not in text


def test_published_ablations_stand_beside_ours_of_the_same_feed():
    rows = [
        make_row(model_type=model, path_type=path, epoch=epoch, coarse_from=feed, fid=fid + (feed == "x0") / 2)
        for model, path, epoch, fid in (
            ("single_t", "diagonal", 400, 40),
            ("single_t", "dp_64", 400, 35),
            ("no_t", "dp_64", 600, 60),
            ("no_t", "cascade:2,6", 600, 61),
        )
        for feed in ("x0", "noisy")
    ]
    tables = layout_tables(rows)
    table = table_of(tables, "ablations")
    assert {row[0]: row[3] for row in texts(table)} == {
        "single_t diagonal, noisy": "40.00 (1) [209.82]",
        "single_t diagonal, x0": "40.50 (1)",
        "single_t DP-64, noisy": "35.00 (1)",
        "single_t DP-64, x0": "35.50 (1) [34.42, epoch 600]",
        "no_t DP-64, noisy": "60.00 (1)",
        "no_t DP-64, x0": "60.50 (1) [61.68, epoch 600]",
        "no_t cascade:2,6, noisy": "61.00 (1)",
        "no_t cascade:2,6, x0": "61.50 (1)",
    }
    assert "not stated" in table.note
    # Each path is compared with the diagonal of its own feed, and no_t has none.
    table = table_of(tables, "improvement")
    assert table.columns[2:] == ("single_t DP-64, noisy", "single_t DP-64, x0")
    assert texts(table) == [["400", "raw", "5.00 (12.5 %, 1)", "5.00 (12.3 %, 1)"]]
    assert "; " not in "".join(cell for one in tables for row in texts(one) for cell in row)


def test_published_numbers_are_of_the_published_regime():
    rows = [
        make_row(model_type=model, path_type=path, coarse_from=feed, regime=regime, checkpoint_fingerprint=regime)
        for model, path, feed in (("dual", "diagonal", ""), ("single_t", "diagonal", "noisy"))
        for regime in ("independent", "shift:2")
    ]
    tables = layout_tables(rows)
    raw = table_of(tables, "raw weights")
    assert raw.columns[1:] == (
        "LIFT diagonal", "LIFT diagonal, shift:2", "single_t diagonal, noisy", "single_t diagonal, noisy, shift:2"
    )  # fmt: skip
    assert texts(raw) == [["200", "30.00 (1) [87.22 ± 0.35]", "30.00 (1)", "30.00 (1)", "30.00 (1)"]]
    found = {row[0]: row[3] for row in texts(table_of(tables, "ablations"))}
    assert found == {
        "single_t diagonal, noisy": "30.00 (1) [209.82]",
        "single_t diagonal, noisy, shift:2": "30.00 (1)",
    }
    assert len(texts(table_of(tables, "best epochs"))) == 4


def test_the_usual_regime_of_a_model_goes_without_saying():
    for model, usual, other in (("dual", "independent", "same"), ("shared_t", "same", ""), ("no_t", "independent", "")):
        assert series_of(make_row(model_type=model, regime=usual)).regime == ""
        assert series_of(make_row(model_type=model, regime=other)).regime == other
    assert series_of(make_row(model_type="baseline")) == ("baseline", "diagonal", "", "", "", (), ())


def test_residuals_are_named():
    row = make_row(model_type="dual", regime="independent", representation="residual")
    assert series_of(row).title == "LIFT diagonal, residual"


def test_regimes_are_compared_with_their_own_diagonal():
    rows = [
        make_row(**OURS, regime=regime, checkpoint_fingerprint=regime, path_type=path, fid=fid)
        for regime, fids in (("independent", (50, 40)), ("band:2", (30, 27)))
        for path, fid in zip(("diagonal", "kl"), fids, strict=True)
    ]
    table = table_of(layout_tables(rows), "improvement")
    assert table.columns[2:] == ("LIFT KL", "LIFT KL, band:2")
    assert texts(table) == [["200", "raw", "10.00 (20.0 %, 1)", "3.00 (10.0 %, 1)"]]


def test_a_missing_published_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv"):
        read_published(tmp_path / "none.csv")
    assert PUBLISHED_FILE.parent.joinpath("README.md").is_file()


# Notes on n


@pytest.mark.parametrize(
    ("metric", "num_images", "parts"),
    [
        ("fid", 10_000, ()),
        ("fid", 9_999, ("n = 9,999",)),
        ("fid", 2_048, ("n = 2,048",)),
        ("fid", 2_047, ("n = 2,047", "fewer images than features")),
        ("fid_infinity", 9_999, ()),
        ("fid_infinity", 2_047, ("fewer images than features",)),
        ("kid", 100, ()),
        ("swd", 100, ()),
    ],
)
def test_few_images_are_noted(metric, num_images, parts):
    tables = layout_tables([make_row(dataset="cats", num_images=num_images, metric=metric, **{metric: 1.0})])
    assert len(tables) == 2
    for table in tables:
        assert f"{num_images:,} images" in table.title
        for part in ("n = 9,999", "n = 2,048", "n = 2,047", "fewer images than features"):
            assert (part in table.note) == (part in parts)


def test_nothing_to_lay_out_is_an_error():
    with pytest.raises(ValueError, match="no result"):
        layout_tables([])


# The stage


@pytest.fixture
def stage(monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["aggregate_results.py", *map(str, flags)])
        aggregate_results.main()
        return capsys.readouterr().out

    return run


def test_the_stage_joins_tables_of_several_hosts(stage, tmp_path):
    for host, seed in (("a", 1), ("b", 2)):
        append_row(tmp_path / f"{host}.csv", {**make_row(**OURS, seed=seed, fid=10 * seed)})
        append_row(tmp_path / f"{host}.csv", {**make_row(**OURS, seed=seed, metric="kid", kid=0.1)})
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    out = stage("--input", *files, "--output", tmp_path / "new/all", "--metric", "fid")
    assert "| 200 | 15.00 ± 7.07 (2) |" in out and "KID" not in out
    assert out.strip() == (tmp_path / "new/all.md").read_text().strip()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "all.csv",
        "all.md",
        "all.tex",
        "all_tables.csv",
    ]
    with open(tmp_path / "new/all.csv", newline="") as stream:
        (result,) = csv.DictReader(stream)
    assert (float(result["fid_mean"]), float(result["fid_sd"]), result["fid_seeds"]) == (
        15,
        pytest.approx(50**0.5),
        "2",
    )
    assert "KID" in stage("--input", *files, "--output", tmp_path / "new/all")


def test_the_stage_refuses_what_it_cannot_lay_out(stage, tmp_path):
    file = tmp_path / "scores.csv"
    append_row(file, make_row())
    rows = read_rows(file)
    with pytest.raises(ValueError, match="none.csv holds no result"):
        stage("--input", file, tmp_path / "none.csv", "--output", tmp_path / "table")
    with pytest.raises(ValueError, match="no result of --metric kid pr"):
        stage("--input", file, "--output", tmp_path / "table", "--metric", "kid", "pr")
    with pytest.raises(ValueError, match="would overwrite the results"):
        stage("--input", file, "--output", tmp_path / "scores")
    assert read_rows(file) == rows
    assert {path.name for path in tmp_path.iterdir()} <= {"scores.csv", "scores.csv.lock"}
