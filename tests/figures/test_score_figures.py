import numpy as np
import pytest
from matplotlib import rc_context

import figures.scores
from evaluation.results_table import DESCRIPTION_FIELDS, RESULT_KEY, VALUE_FIELDS, aggregate
from figure_checks import check_file, check_layout, check_old_file_stays
from figures.scores import plot_factorial, plot_scores, plot_scores_against_epoch, plot_scores_against_nfe
from figures.style import NFE_LABEL

SPACINGS = ("uniform_t", "uniform_log_snr", "published")
FACTORIAL = [
    {"schedule": schedule, "spacing": spacing, "offset": offset, "nfe": str(nfe), "model": model}
    | {"value": 20 + k + 300 / nfe, "sd": 1.5 if nfe == 18 else None}
    for schedule in ("cosine_clipped", "cosine")
    for spacing in SPACINGS
    for k, (model, offset) in enumerate((("lift", "diagonal"), ("lift", "dp_64"), ("baseline", None)))
    for nfe in (4, 6, 8, 10, 18, 50)
]
# Raw weights lack one curve, one curve has a single point, and deviations are known for some points alone.
BANDS = {
    "raw": {
        "Baseline": {6: (150.0, 4.0), 10: (60.0, 2.0), 18: (30.0, 1.0), 36: (22.0, 0.5)},
        "LIFT of a long name that takes two lines": {18: (44.0, 3.0)},
    },
    "ema": {
        "Baseline": {6: (120.0, 4.0), 10: (45.0, None), 18: (20.0, 1.0), 36: (12.0, None)},
        "LIFT DP-64": {6: (140.0, None), 10: (50.0, None), 18: (31.0, None), 36: (25.0, None)},
        "LIFT of a long name that takes two lines": {6: (100.0, 3.0), 18: (60.0, 3.0), 36: (45.0, 2.0)},
    },
}


NAMES = ("Baseline", "LIFT DP-64", "LIFT DP-Total, lr 0.001")


def rows_of(epochs, names=NAMES, **extra):
    return [
        {"name": name, "weights": weights, "epoch": str(epoch)}
        | {"fid_mean": 30.0 + k + epoch / 100 + 5 * (weights == "raw"), "fid_sd": 0.3 if weights == "raw" else None}
        | extra
        for epoch in epochs
        for k, name in enumerate(names)
        for weights in ("raw", "ema")
    ]


FIGURES = {
    "curves": (lambda file: plot_scores(rows_of([200, 400]), "fid", file), (1140, 780)),
    "dots": (lambda file: plot_scores(rows_of([400]), "fid", file), (1110, 513)),
    "bands": (lambda file: plot_scores_against_nfe(BANDS, file), (1620, 660)),
    "bands of epochs": (lambda file: plot_scores_against_epoch({"ema": BANDS["ema"]}, file), (990, 660)),
    "factorial": (lambda file: plot_factorial(FACTORIAL, file), (1590, 1080)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


def test_failing_plot_leaves_the_old_file(tmp_path, monkeypatch):
    check_old_file_stays(FIGURES["dots"][0], tmp_path, monkeypatch)


def test_page_does_not_depend_on_users_matplotlibrc(tmp_path):
    FIGURES["dots"][0](tmp_path / "plain.png")
    with rc_context({"savefig.bbox": "tight", "savefig.facecolor": "red", "font.size": 20}):
        FIGURES["dots"][0](tmp_path / "odd.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "odd.png").read_bytes()


LAID_OUT = {
    "curves": lambda: figures.scores._scores_figure(rows_of([200, 400]), "fid", "title"),
    "dots": lambda: figures.scores._scores_figure(rows_of([400]), "fid", "title"),
    "bands": lambda: figures.scores._score_bands_figure(BANDS, "title", "FID, 15,803 images", NFE_LABEL),
    "bands of epochs": lambda: figures.scores._score_bands_figure({"ema": BANDS["ema"]}, "", "FID", "epoch"),
    "factorial": lambda: figures.scores._factorial_figure(FACTORIAL, "title", "FID"),
    "one panel": lambda: figures.scores._factorial_figure(FACTORIAL[:18], "title", "FID"),
}


# As trainings and paths are called that differ in much.
LONG = [
    f"{model}, band:diagonal,1, residual, improved (changed), vp cosine, v prediction, lr {rate}, training seed 43"
    for model in ("LIFT KL diagonal", "LIFT KL", "dual cascade:2,6")
    for rate in ("0.0001", "0.001", "0.0003")
]
LAID_OUT |= {
    "curves of long names": lambda: figures.scores._scores_figure(rows_of([200, 400], LONG), "fid", "title"),
    "dots of long names": lambda: figures.scores._scores_figure(rows_of([400], LONG), "fid", "title"),
    "bands of long names": lambda: figures.scores._score_bands_figure(
        {kind: {name: {6: (20.0 + k, 1.0), 18: (10.0 + k, 1.0)} for k, name in enumerate(LONG)} for kind in "ab"},
        "title",
        "FID",
        NFE_LABEL,
    ),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_nothing_overlaps_or_leaves_the_page(name):
    check_layout(LAID_OUT[name]())


# Scores against the epoch


def test_scores_are_drawn_against_the_epoch():
    rows = rows_of([1000, 200, 400])
    axes = figures.scores._scores_figure(rows, "fid", "title").axes[0]
    assert len(axes.containers) == 6
    for k, container in enumerate(axes.containers):
        line, _, (bars,) = container.lines
        series = [rows[k + 6 * m] for m in (1, 2, 0)]
        np.testing.assert_allclose(line.get_xydata(), [[int(row["epoch"]), row["fid_mean"]] for row in series])
        assert line.get_linestyle() == ("-" if series[0]["weights"] == "raw" else "--")
        lengths = [segment[1, 1] - segment[0, 1] for segment in map(np.asarray, bars.get_segments()) if len(segment)]
        np.testing.assert_allclose(
            [length for length in lengths if np.isfinite(length)],
            [0.6] * (3 if series[0]["weights"] == "raw" else 0),
        )
    names = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert names == ["Baseline", "LIFT DP-64", "LIFT DP-Total, lr 0.001"]


def test_scores_of_one_epoch_are_labelled_dots():
    rows = rows_of([400], num_images="15803", nfe="18")
    axes = figures.scores._scores_figure(rows, "fid", "title").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Baseline",
        "LIFT DP-64",
        "LIFT DP-Total, lr 0.001",
    ]
    values = [text.get_text() for text in axes.texts]
    assert values == ["39.00 ± 0.30", "34.00", "40.00 ± 0.30", "35.00", "41.00 ± 0.30", "36.00"]
    np.testing.assert_allclose([c.lines[0].get_xdata()[0] for c in axes.containers], [39, 34, 40, 35, 41, 36])
    assert axes.get_xlabel() == "FID, 15,803 images, NFE 18"
    assert axes.get_title(loc="left") == "epoch 400"


def test_aggregated_results_can_be_drawn(tmp_path):
    blank = dict.fromkeys((*RESULT_KEY, *DESCRIPTION_FIELDS), "x") | dict.fromkeys(VALUE_FIELDS, "")
    rows = [
        blank | {"epoch": epoch, "seed": seed, "num_images": "500", "nfe": "18", "weights": "ema", "fid": fid}
        for epoch, seed, fid in (("200", "1", "30"), ("200", "2", "32"), ("1000", "1", "28"), ("1000", "2", "27"))
    ]
    results = [result | {"name": "x"} for result in aggregate(rows)]
    axes = figures.scores._scores_figure(results, "fid", "").axes[0]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[200, 31], [1000, 27.5]])
    plot_scores(results, "fid", tmp_path / "figure.png")
    with pytest.raises(ValueError, match="no row has a swd_mean"):
        plot_scores(results, "swd", tmp_path / "figure.png")


def test_scores_that_do_not_compare_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="num_images 15803 and 500 do not compare"):
        plot_scores(rows_of([200], num_images="500") + rows_of([400], num_images="15803"), "fid", file)
    with pytest.raises(ValueError, match="resize clean and pytorch-fid do not compare"):
        plot_scores(rows_of([200], resize="clean") + rows_of([400], resize="pytorch-fid"), "fid", file)
    with pytest.raises(ValueError, match="Baseline has two values of fid with raw weights at epoch 200"):
        plot_scores(rows_of([200, 400]) + rows_of([200]), "fid", file)
    assert not file.exists()


# Bands


def test_score_bands_are_mean_and_deviation():
    figure = figures.scores._score_bands_figure(BANDS, "title", "FID", NFE_LABEL)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["raw weights", "EMA"]
    assert len({axes.get_ylim() for axes in figure.axes}) == len({axes.get_xlim() for axes in figure.axes}) == 1
    looks = {}
    for axes, curves in zip(figure.axes, BANDS.values(), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        bands = [part for part in axes.collections if not hasattr(part, "get_segments")]
        for container, band, (name, points) in zip(axes.containers, bands, curves.items(), strict=True):
            line = container.lines[0]
            np.testing.assert_allclose(line.get_xydata(), [[nfe, mean] for nfe, (mean, _) in points.items()])
            looks.setdefault(name, set()).add((line.get_color(), line.get_marker()))
            corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices.tolist()}
            known = {nfe: score for nfe, score in points.items() if score[1] is not None}
            runs = len(points) > 1 and name != "LIFT DP-64" and points is not BANDS["ema"]["Baseline"]
            for nfe, (mean, sd) in known.items() if runs else ():
                assert {(nfe, mean - sd), (nfe, mean + sd)} <= corners
    assert all(len(look) == 1 for look in looks.values()) and len(set.union(*looks.values())) == 3
    # From top to bottom as the curves end at the right.
    names = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert names == ["LIFT of a long name that takes two lines", "LIFT DP-64", "Baseline"]


def test_score_axis_is_linear_where_a_band_reaches_zero_or_means_are_close():
    for points in (
        {6: (1.0, 1.0), 18: (9.0, 1.0)},
        {6: (2.0, None), 18: (9.9, 1.0)},
        {6: (-0.1, None), 18: (3.0, None)},
    ):
        figure = figures.scores._score_bands_figure({"raw": {"a": points}}, "", "KID", "epoch")
        assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "linear"


def test_score_bands_that_cannot_be_drawn_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    for panels in ({}, {"raw": {}}):
        with pytest.raises(ValueError, match="no score to draw"):
            plot_scores_against_nfe(panels, file)
    with pytest.raises(ValueError, match=r"curve a \(raw\) has no point"):
        plot_scores_against_nfe({"raw": {"a": {}}}, file)
    with pytest.raises(ValueError, match=r"a \(raw\) has the score nan ± 1 at 18"):
        plot_scores_against_nfe({"raw": {"a": {18: (float("nan"), 1.0)}}}, file)
    with pytest.raises(ValueError, match="an NFE is 0"):
        plot_scores_against_nfe({"raw": {"a": {0: (1.0, None)}}}, file)
    assert not file.exists()


# The factorial comparison


def test_factorial_panels_hold_their_schedule_and_spacing():
    figure = figures.scores._factorial_figure(FACTORIAL, "title", "FID")
    titles = [f"{schedule}, {spacing}" for schedule in ("cosine_clipped", "cosine") for spacing in SPACINGS]
    assert [axes.get_title() for axes in figure.axes] == titles
    for axes in figure.axes:
        rows = [row for row in FACTORIAL if f"{row['schedule']}, {row['spacing']}" == axes.get_title()]
        assert axes.get_xscale() == axes.get_yscale() == "log" and len(axes.containers) == 3
        for k, container in enumerate(axes.containers):
            line, _, (bars,) = container.lines
            curve = rows[6 * k : 6 * k + 6]
            np.testing.assert_allclose(line.get_xydata(), [[int(row["nfe"]), row["value"]] for row in curve])
            assert line.get_linestyle() == ("--" if curve[0]["model"] == "baseline" else "-")
            # Only NFE 18 has a deviation.
            known = [segment for segment in map(np.asarray, bars.get_segments()) if np.isfinite(segment).all()]
            (bar,) = [segment for segment in known if len(segment)]
            np.testing.assert_allclose(bar, [[18, curve[4]["value"] - 1.5], [18, curve[4]["value"] + 1.5]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["diagonal", "dp_64", "baseline"]


def test_several_models_have_their_own_curves():
    rows = [row | {"model": model} for row in FACTORIAL[:6] for model in ("raw", "EMA")]
    figure = figures.scores._factorial_figure(rows, "title", "FID")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["raw, diagonal", "EMA, diagonal"]


def test_factorials_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no row"):
        plot_factorial([], file)
    with pytest.raises(ValueError, match="diagonal with schedule cosine_clipped, spacing uniform_t at NFE 4 has two"):
        plot_factorial(FACTORIAL + FACTORIAL[:1], file)
    with pytest.raises(ValueError, match="the value of diagonal .* is -1"):
        plot_factorial([FACTORIAL[0] | {"value": -1}], file)
    assert not file.exists()
