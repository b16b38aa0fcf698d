"""Results beside the targets of the DDPM report: which meet them, in which direction, and what is said of them."""

import csv
import re

import pytest

import aggregate_results
import report
from conftest import run_stage
from evaluation.result_layout import VALUE_LAYOUTS
from evaluation.results_table import append_row
from evaluation.targets import TARGETS, target_tables, unmeasured, verdicts
from result_rows import as_read, make_row


def fid(value, **changes):
    given = {"model_type": "baseline", "representation": "", "regime": "", "num_images": 50_000, "weights": "ema"}
    return make_row(**given | {"fid": value} | changes)


def score(value, sd, **changes):
    return fid(None, metric="is", inception_score=value, inception_score_sd=sd, **changes)


def other(name, **changes):
    return {"checkpoint_fingerprint": name, "run": name, **changes}


def rows_of(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_the_targets_are_those_of_the_report():
    said = {name: [(t.field, t.text) for t in report.targets] for name, report in TARGETS.items()}
    assert said == {"cifar10": [("fid", "< 50"), ("inception_score", "> 6.2")], "mnist": [("fid", "< 10")]}


@pytest.mark.parametrize(
    ("name", "row", "met"),
    [
        ("cifar10", fid(49.99), True), ("cifar10", fid(50.0), False), ("cifar10", fid(50.01), False),
        ("mnist", fid(9.99), True), ("mnist", fid(10.0), False), ("mnist", fid(49.0), False),
        ("cifar10", score(6.21, 0.1), True), ("cifar10", score(6.2, 0.1), False), ("cifar10", score(6.19, 0.1), False),
    ],
)  # fmt: skip
def test_lower_or_higher_than_the_bound_meets_it_as_the_value_has_it(name, row, met):
    [[verdict]] = verdicts([as_read(row)], name)
    better = VALUE_LAYOUTS[verdict.target.field].better
    assert verdict.met is met and better == {"is": "higher", "fid": "lower"}[row["metric"]]


def test_runs_stand_side_by_side_and_the_number_of_images_is_said():
    whole = {"perceptual_weight": "0.1", "network": "ddpm_unet", "preset": "ddpm_report"}
    ablated = whole | other("plain", network="ddpm_unet_plain", preset="ddpm_report (changed)")
    rows = [fid(40.0, nfe=1000, **whole), fid(60.0, nfe=1000, **ablated), fid(45.5, nfe=50, num_images=1000, **whole)]
    [table] = target_tables(map(as_read, rows), "cifar10")
    assert table.columns == ("model and path", "weights", "epoch", "NFE", "images", "FID", "target", "met")
    cells = rows_of(table)
    assert [row[3:] for row in cells] == [
        ["50", "1,000", "45.50", "< 50", "yes"],
        ["1000", "50,000", "40.00", "< 50", "yes"],
        ["1000", "50,000", "60.00", "< 50", "no"],
    ]
    assert "ddpm_unet_plain" in cells[2][0] and "ddpm_unet_plain" not in cells[1][0]
    assert table.title.endswith("FID < 50: 2 of 3 results meet it") and "fewer than 10,000 images" in table.note
    assert "fewer than" not in target_tables([as_read(rows[0])], "cifar10")[0].note


def test_the_inception_score_has_the_deviation_over_its_splits_and_over_seeds():
    one = [as_read(score(6.5, 0.08))]
    assert rows_of(target_tables(one, "cifar10")[0])[0][5] == "6.50 ± 0.08 over 10 splits"
    two = [*one, as_read(score(6.7, 0.1, seed=43))]
    assert rows_of(target_tables(two, "cifar10")[0])[0][5] == "6.60 ± 0.14 over 2 seeds, ± 0.09 over 10 splits"


def test_no_two_features_share_a_table_and_what_was_not_measured_is_said():
    rows = [as_read(fid(5.0)), as_read(fid(6.0, metric_features="inception-other"))]
    assert len(target_tables(rows, "mnist")) == 2
    assert unmeasured(rows, "mnist") == []
    assert unmeasured(rows, "cifar10") == ["Target of the DDPM report, CIFAR-10: Inception score > 6.2: not measured."]
    swd = make_row(metric="swd", fid=None, swd=3.0, metric_features="swd-7x7-32-16")
    assert target_tables([as_read(swd)], "mnist") == [] and len(unmeasured([as_read(swd)], "mnist")) == 1


def test_they_are_printed_and_written_and_on_the_page(stage, tmp_path):
    table = tmp_path / "fid_results.csv"
    for row in (fid(40.0), fid(60.0, **other("b", network="ddpm_unet")), score(6.5, 0.08)):
        append_row(table, row)
    flags = ["--targets", "cifar10", "--brief"]
    ended = stage(aggregate_results, "--input", table, "--output", tmp_path / "out", *flags)
    assert "FID < 50: 1 of 2 results meets it" in ended.output and "not measured" not in ended.output
    assert "| 6.50 ± 0.08 over 10 splits | > 6.2 | yes |" in (tmp_path / "out.md").read_text()
    with open(tmp_path / "out_tables.csv", newline="") as stream:
        assert ["60.00", "< 50", "no"] in [row[-3:] for row in csv.reader(stream)]
    page = tmp_path / "report.html"
    places = ["--results", table, "--folder", tmp_path, "--output", page]
    stage(report, *places, "--targets", "cifar10")
    section = re.search(r'<section id="targets".*?</section>', page.read_text(), re.DOTALL)[0]
    assert "1 of 2 results meets it" in section and "<td>&lt; 50</td>" in section and 'href="#row-3"' in section
    stage(report, *places)
    assert 'id="targets"' not in page.read_text()
    assert run_stage(report, *places, "--targets", "imagenet").status == 2
