import numpy as np
import pytest

import figures.guidance
import make_figures
from evaluation.results_table import RESULT_FIELDS
from evaluation.series import guided_results
from figure_checks import check_file, check_layout, check_old_file_stays, overlap, render
from figures.guidance import plot_guidance
from figures.style import curve_style
from result_rows import as_read, make_row, table_text

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def quality_of(k, scales=SCALES, sd=0.01):
    return {s: ((0.65 - 0.06 * s - 0.02 * k, sd), (0.95 - 0.4 / (1 + s) - 0.01 * k, sd)) for s in scales}


def distance_of(k, scales=SCALES, sd=1.0):
    return {s: (12.0 + k + (s - 1.5) ** 2, sd) for s in scales}


NAMES = ("Baseline", "LIFT KL", "LIFT DP-64, lr 0.001, class cat+dog, guidance 1, classifier c0ffee, 18 evaluations")
QUALITY = {name: quality_of(k, SCALES[k:], None if k else 0.01) for k, name in enumerate(NAMES)}
# One curve has no quality.
DISTANCES = {name: distance_of(k, SCALES[k:], None if k else 1.0) for k, name in enumerate((*NAMES, "LIFT"))}


def draw(file):
    plot_guidance(QUALITY, DISTANCES, file, "Guidance")


def figure_of(quality=QUALITY, distances=DISTANCES, labels=("recall", "precision", "FID")):
    return figures.guidance._guidance_figure(quality, distances, "title", labels)


def test_file_is_a_picture_of_the_announced_size(tmp_path):
    check_file(draw, (1440, 795), tmp_path)


def test_failing_plot_leaves_the_old_file(tmp_path, monkeypatch):
    check_old_file_stays(draw, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        (QUALITY, DISTANCES),
        ({"a": quality_of(0)}, {"a": distance_of(0)}),
        ({"a": quality_of(0, [2.0])}, {"b": distance_of(0, [2.0])}),
        ({name: quality_of(k) for k, name in enumerate("abcdefghi")}, {name: distance_of(1) for name in "abcdefghi"}),
        ({"a": quality_of(0)}, {"a": {s: (10.0**s, None) for s in SCALES}}),
    ],
)
def test_nothing_overlaps_or_leaves_the_page(data):
    figure = figure_of(*data)
    check_layout(figure)
    left = figure.axes[0]
    render(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in left.texts]
    assert not any(overlap(one, other) for k, one in enumerate(boxes) for other in boxes[:k])
    points = np.concatenate([left.transData.transform(each.lines[0].get_xydata()) for each in left.containers])
    for box in boxes:
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for x, y in points)
        assert left.bbox.x0 <= box.x0 and box.x1 <= left.bbox.x1 and left.bbox.y0 <= box.y0 and box.y1 <= left.bbox.y1


def test_points_are_joined_by_their_scale_and_named_by_it():
    backwards = {name: dict(reversed(list(points.items()))) for name, points in QUALITY.items()}
    left, right = figure_of(backwards).axes
    for k, container in enumerate(left.containers):
        line, _, bars = container.lines
        expected = [(recall[0], precision[0]) for recall, precision in QUALITY[NAMES[k]].values()]
        np.testing.assert_allclose(line.get_xydata(), expected)
        assert (line.get_color(), line.get_marker()) == tuple(curve_style(k).values())
    for k, container in enumerate(right.containers):
        line, _, (bars,) = container.lines
        points = DISTANCES[(*NAMES, "LIFT")[k]]
        np.testing.assert_allclose(line.get_xydata(), [(scale, mean) for scale, (mean, _) in points.items()])
        assert (line.get_color(), line.get_marker()) == tuple(curve_style(k).values())
        segments = [segment for segment in map(np.asarray, bars.get_segments()) if np.isfinite(segment).all()]
        assert [len(segment) for segment in segments if len(segment)] == [2] * (8 if k == 0 else 0)
    assert (left.get_xlabel(), left.get_ylabel()) == ("recall", "precision")
    assert (right.get_xlabel(), right.get_ylabel()) == ("guidance scale", "FID")
    assert [text.get_text().replace("\n", " ") for text in left.figure.legends[0].get_texts()] == [*NAMES, "LIFT"]


def test_a_lone_curve_has_every_number_beside_its_point():
    figure = figure_of({"a": quality_of(0)}, {"a": distance_of(0)})
    left, right = figure.axes
    assert {text.get_text() for text in left.texts} == {f"{scale:g}" for scale in SCALES}
    for text in left.texts:
        (recall, _), (precision, _) = quality_of(0)[float(text.get_text())]
        assert tuple(text.xy) == (recall, precision) and np.hypot(*text.get_position()) <= 24
    ticks = [label.get_text() for label in right.get_xticklabels()]
    assert ticks[0] == "0" and ticks[-1] == "8"
    assert sorted([*right.get_xticks(), *right.get_xticks(minor=True)]) == list(SCALES)


def test_the_distance_is_logarithmic_where_it_spans_much():
    for distances, scale in (
        ({0.0: (1.0, None), 3.0: (6.0, None)}, "log"),
        ({0.0: (1.0, 2.0), 3.0: (6.0, 1)}, "linear"),
    ):
        assert figure_of(distances={"a": distances}).axes[1].get_yscale() == scale


def test_what_cannot_be_drawn_is_refused(tmp_path):
    for quality, distances, says in (
        ({}, DISTANCES, "no curve to draw"),
        (QUALITY, {}, "no curve to draw"),
        ({"a": {}}, DISTANCES, "the curve a has no point"),
        (QUALITY, {"a": {-1.0: (1.0, None)}}, "a has the guidance scale -1"),
        (QUALITY, {"a": {2.0: (float("nan"), 1.0)}}, r"a has the score nan ± 1 at guidance scale 2"),
    ):
        with pytest.raises(ValueError, match=says):
            plot_guidance(quality, distances, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


# From tables


def rows_of(scale, kind="", seeds=(42, 43), classifier="", steps=18, **changes):
    calls = 1 if scale in (0, 1) and not classifier else 2
    guidance = f"{kind}{f'classifier {classifier}' if classifier else 'guidance'} {scale:g}"
    common = {"guidance": guidance, "nfe": steps * calls, "path_fingerprint": f"p-{guidance}", "fid": None} | changes
    made = []
    for k, seed in enumerate(seeds):
        values = {"manifold_precision": 0.5 + scale / 20 + 0.01 * k, "manifold_recall": 0.6 - scale / 20}
        made.append(make_row(**common | {"metric": "pr", "seed": seed} | values))
        made.append(make_row(**common | {"metric": "fid", "seed": seed, "fid": 20 + scale + 2 * k}))
    return made


@pytest.fixture
def table(tmp_path):
    """`table(rows)`: a file of them."""

    def write(rows, name="scores.csv"):
        (tmp_path / name).write_text(table_text(RESULT_FIELDS, rows))
        return tmp_path / name

    return write


@pytest.fixture
def drawn(stage, table, tmp_path, monkeypatch):
    """`drawn(rows, *flags)`: what `make_figures.py guidance` draws of them."""

    def draw(rows, *flags):
        found = []
        monkeypatch.setattr(make_figures, "plot_guidance", lambda *args: found.append(args))
        stage(make_figures, "guidance", table(rows), "--output", tmp_path / "figure.png", *flags)
        quality, distances, _, _, labels = found[0]
        return quality, distances, labels

    return draw


def test_rows_make_a_curve_of_means_over_seeds_at_one_number_of_steps(drawn):
    quality, distances, labels = drawn([row for scale in (3, 0, 1) for row in rows_of(scale)])
    assert labels == ["manifold recall, 1,000 images", "manifold precision", "FID, 1,000 images"]
    [(name, points)], [(same, scores)] = quality.items(), distances.items()
    assert name == same == "LIFT diagonal" and list(points) == list(scores) == [0.0, 1.0, 3.0]
    for scale in (0, 1, 3):
        assert scores[scale] == pytest.approx((21 + scale, 2**0.5))
        recall, precision = points[scale]
        assert recall == pytest.approx((0.6 - scale / 20, 0)) and precision[0] == pytest.approx(0.505 + scale / 20)


def test_curves_are_those_of_series_steps_and_kinds(drawn):
    rows = [row for scale in (0, 2) for row in rows_of(scale)]
    rows += [row for scale in (1, 2) for row in rows_of(scale, "class cat, ")]
    rows += [row for scale in (1, 4) for row in rows_of(scale, classifier="c0ffee")]
    rows += [row for scale in (1, 2) for row in rows_of(scale, steps=36, model_type="baseline", regime="")]
    rows.append(make_row(guidance="", fid=99))  # Of a model without classes.
    quality, distances, _ = drawn(rows)
    assert {name: list(points) for name, points in distances.items()} == {
        "Baseline, guidance, 36 evaluations": [1.0, 2.0],
        "LIFT diagonal, class cat, guidance, 18 evaluations": [1.0, 2.0],
        "LIFT diagonal, classifier c0ffee, 18 evaluations": [1.0, 4.0],
        "LIFT diagonal, guidance, 18 evaluations": [0.0, 2.0],
    }
    assert quality.keys() == distances.keys()


def test_adaptive_solvers_have_one_curve_whatever_their_calls(drawn):
    rows = [
        row for scale, nfe in ((1, 40), (2, 95)) for row in rows_of(scale, solver="ode tolerance 0.0001 clean", nfe=nfe)
    ]
    rows += [row for scale in (1, 2) for row in rows_of(scale, solver="ddim eta 0 clean", steps=8)]
    _, distances, _ = drawn(rows)
    assert sorted(map(list, distances.values())) == [[1.0, 2.0]] * 2


def test_weights_and_epochs_are_said_where_they_differ(drawn):
    rows = [
        row for epoch in (9, 100) for scale in (1, 2) for row in rows_of(scale, epoch=epoch, images_seen=10 * epoch)
    ]
    rows = [row | {"checkpoint_fingerprint": f"c{row['epoch']}"} for row in rows]
    rows += [row | {"weights": "ema", "checkpoint_fingerprint": "e"} for row in rows if row["epoch"] == 9]
    _, distances, _ = drawn(rows)
    assert list(distances) == [
        "LIFT diagonal, EMA, epoch 9", "LIFT diagonal, raw weights, epoch 9", "LIFT diagonal, raw weights, epoch 100",
    ]  # fmt: skip


def test_the_distance_is_the_one_that_there_is_or_that_is_asked_for(drawn):
    rows = [row for scale in (1, 2) for row in rows_of(scale)]
    by_judge = [
        row | {"metric": "fd", "fd": row["fid"], "fid": None, "metric_features": "judge-1"} if row["fid"] else row
        for row in rows
    ]
    assert drawn(by_judge)[2][2] == "Fréchet distance by a judge, 1,000 images"
    both = rows + [row for row in by_judge if row["metric"] == "fd"]
    assert drawn(both)[2][2] == "FID, 1,000 images"
    assert drawn(both, "--metric", "fd")[2][2] == "Fréchet distance by a judge, 1,000 images"


def test_several_tables_are_drawn_together(stage, table, tmp_path):
    files = [table(rows_of(scale), f"{scale}.csv") for scale in (1, 2)]
    out = tmp_path / "figure.png"
    assert stage(make_figures, "guidance", *files, "--output", out).output.strip() == str(out) and out.exists()


def test_tables_that_make_no_figure_are_refused(refused, table, tmp_path):
    rows = [row for scale in (1, 2) for row in rows_of(scale)]

    def says(*words, rows=rows, flags=()):
        file = table(rows)
        refused(make_figures, "guidance", file, "--output", tmp_path / "figure.png", *flags, says=(file, *words))

    says("no row names a guidance scale", "--guidance_scale", rows=[make_row(), make_row(seed=43)])
    says("no row names a guidance scale", rows=[make_row(guidance="much")])
    says("has manifold_recall and manifold_precision", "--metrics pr", rows=[r for r in rows if r["metric"] == "fid"])
    says("has fid", "--metrics fid", rows=[r for r in rows if r["metric"] == "pr"])
    says("has kid", "--metrics kid", flags=("--metric", "kid"))
    says("two results of LIFT diagonal at guidance scale 2", rows=rows + rows_of(2, path_fingerprint="other"))


def test_rows_that_do_not_compare_are_refused(refused, table, tmp_path):
    rows = [row for scale in (1, 2) for row in rows_of(scale)]
    for field, value in (("num_images", 500), ("metric_features", "other"), ("reference_fingerprint", "x")):
        file = table(rows + rows_of(3, **{field: value}))
        refused(make_figures, "guidance", file, "--output", tmp_path / "f.png", says=(field, "do not compare"))


def test_results_of_a_curve_are_in_the_order_of_their_scales():
    rows = [as_read(row) for scale in (10, 2, 0.5) for row in rows_of(scale)]
    results = [result for result in guided_results(rows) if result["metric"] == "fid"]
    assert [result["scale"] for result in results] == [0.5, 2.0, 10.0]
