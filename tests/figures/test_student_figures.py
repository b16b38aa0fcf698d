import numpy as np
import pytest

import figures.students
import make_figures
from evaluation.results_table import RESULT_FIELDS
from figure_checks import check_file, check_layout, check_old_file_stays
from figures.students import StudentScore, plot_students
from result_rows import make_row, table_text


def scores(offset, calls=(1, 2, 4, 8), cost=True, sd=1.0):
    return {n: StudentScore(20 + 60 / n + offset, sd, round(3e5 * (4 - np.log2(n))) if cost else None) for n in calls}


CURVES = {
    "Progressive": scores(0),
    "Consistency": scores(9, (1, 2, 4), sd=None),
    "The teacher by its best solver, DPM-Solver++ of second order with a planned path of as many calls": scores(
        30, (4, 8, 16), cost=False
    ),
}


def draw(file):
    plot_students(CURVES, file, "Students", "SWD")


def figure_of(curves=CURVES):
    return figures.students._students_figure(curves, "title", "SWD")


def test_file_is_a_picture_of_the_announced_size(tmp_path):
    check_file(draw, (1440, 795), tmp_path)


def test_failing_plot_leaves_the_old_file(tmp_path, monkeypatch):
    check_old_file_stays(draw, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "curves", [CURVES, {"a": scores(0, (1,))}, {"a": scores(0, cost=False)}, {n: scores(3) for n in "abcdefg"}]
)
def test_nothing_overlaps_or_leaves_the_page(curves):
    check_layout(figure_of(curves))


def test_points_are_where_their_numbers_say():
    left, right = figure_of().axes
    for axes, place in ((left, 0), (right, 1)):
        for name, line in zip(CURVES, [bars.lines[0] for bars in axes.containers], strict=False):
            points = CURVES[name].items()
            expected = [((calls, score.cost)[place], score.mean) for calls, score in sorted(points)]
            np.testing.assert_allclose(line.get_xydata(), expected)
    assert len(left.containers) == 3 and len(right.containers) == 2
    assert sorted(text.get_text() for text in right.texts) == sorted("1 2 4 8 1 2 4".split())
    assert len(figure_of({"a": scores(0, cost=False)}).axes) == 1


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        ({}, "no curve"), ({"a": {}}, "without a point"),
        ({"a": {0: StudentScore(1.0, None, None)}}, "calls of a is 0"),
        ({"a": {1: StudentScore(1.0, None, 0)}}, "cost of a is 0"),
        ({"a": {1: StudentScore(np.nan, None, None)}}, "not finite"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(curves, words):
    with pytest.raises(ValueError, match=words):
        figure_of(curves)


def rows_of(calls, images, teacher_calls, **more):
    said = {"nfe": calls, "student": f"{calls}calls", "student_images": images, "teacher_calls": teacher_calls}
    said |= {"checkpoint_fingerprint": f"c{calls}", "teacher": f"t{calls}", "metric": "swd", "fid": None}
    return [make_row(**said | more, seed=seed, swd=swd) for seed, swd in ((42, 60.0 / calls), (43, 62.0 / calls))]


@pytest.fixture
def table(tmp_path):
    def write(rows, name="students.csv"):
        file = tmp_path / name
        file.write_text(table_text(RESULT_FIELDS, rows))
        return file

    return write


def test_tables_are_curves(stage, table, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(make_figures, "plot_students", lambda curves, *rest: drawn.update(curves=curves, rest=rest))
    students = table(rows_of(1, "48", "96") + rows_of(2, "24", "48"))
    teacher = table([row | {"student": "none"} for row in rows_of(4, "none", "none")], "teacher.csv")
    stage(make_figures, "students", f"A={students}", f"B={teacher}", "--metric", "swd", "--output", tmp_path / "f.png")
    assert list(drawn["curves"]) == ["A", "B"]
    assert [(n, score.mean, score.cost) for n, score in sorted(drawn["curves"]["A"].items())] == [
        (1, 61.0, 144), (2, 30.5, 72),
    ]  # fmt: skip
    assert drawn["curves"]["A"][1].sd == pytest.approx(np.std([60, 62], ddof=1))
    assert drawn["curves"]["B"][4].cost is None and drawn["rest"][-1].endswith("1,000 images")


def test_tables_that_make_no_figure_are_refused(refused, table, tmp_path):
    rows = rows_of(1, "48", "96")
    out = ["--metric", "swd", "--output", tmp_path / "figure.png"]
    two = table(rows + [row | {"weights": "ema", "checkpoint_fingerprint": "e"} for row in rows])
    refused(make_figures, "students", two, *out, says=("holds two results at 1 calls", "--weights"))
    refused(make_figures, "students", two, "--metric", "kid", "--output", out[-1], says=("holds no kid",))
    other = table([row | {"num_images": 7} for row in rows_of(2, "24", "48")], "other.csv")
    refused(make_figures, "students", f"A={two}", f"B={other}", *out, "--weights", "raw", says=("do not compare",))
