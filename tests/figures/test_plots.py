import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from evaluation.results_table import DESCRIPTION_FIELDS, RESULT_KEY, VALUE_FIELDS, aggregate
from figure_checks import check_file, check_layout, render
from figures import plots
from figures.plots import (
    image_grid,
    plot_cost_against_nfe,
    plot_criteria,
    plot_factorial,
    plot_losses,
    plot_samples,
    plot_scores,
    plot_scores_against_epoch,
    plot_scores_against_nfe,
    plot_trajectory,
    save_image_grid,
    spread_out,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
COARSE = RNG.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
POINTS = [(999, 999), (900, 700), (500, 300), (200, 100), (50, 0), (0, 0)]
RUNS = {
    "baseline": [{"step": 50 * k, "epoch": k, "loss_64": 1 / (k + 1)} for k in range(40)],
    "dual": [{"step": 50 * k, "epoch": k, "loss_64": 2 / (k + 1), "loss_32": 3 / (k + 1)} for k in range(40)],
}
COSTS = {
    "optimum": {n: 4 + 20 / n for n in range(6, 59)},
    "diagonal": {n: 5 + 30 / n for n in (6, 10, 18, 50)},
    "published": {18: 7.5},
}
DISTANCES = np.exp(RNG.normal(size=60))
FAMILIES = ["diagonal", "optimum", "random"] * 20
# Costs of a narrow range, of a common one, and of many decades.
CRITERIA = {
    f"criterion {k} of a name that is too long for one line": (
        DISTANCES**power * np.exp(RNG.normal(size=60)),
        DISTANCES,
    )
    for k, power in enumerate((0.02, 1, 8, 1, 1))
}
CRITERIA["narrow"] = (1.04 * DISTANCES**0.005, DISTANCES)
RHO = {name: 1 - 0.3 * k for k, name in enumerate(CRITERIA)}
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


def scores(epochs, **extra):
    return [
        {"model_type": model, "path_type": kind, "weights": weights, "epoch": str(epoch)}
        | {"fid_mean": 30.0 + k + epoch / 100 + 5 * (weights == "raw"), "fid_sd": 0.3 if weights == "raw" else None}
        | extra
        for epoch in epochs
        for k, (model, kind) in enumerate((("baseline", "diagonal"), ("dual", "dp_64"), ("dual", "dp_total")))
        for weights in ("raw", "ema")
    ]


FIGURES = {
    "losses": (lambda file: plot_losses(RUNS, file), (1710, 690)),
    "curves": (lambda file: plot_scores(scores([200, 400]), "fid", file), (1140, 780)),
    "dots": (lambda file: plot_scores(scores([400]), "fid", file), (1110, 513)),
    "bands": (lambda file: plot_scores_against_nfe(BANDS, file), (1620, 660)),
    "bands of epochs": (lambda file: plot_scores_against_epoch({"ema": BANDS["ema"]}, file), (990, 660)),
    "costs": (lambda file: plot_cost_against_nfe(COSTS, file, optimum="optimum"), (1140, 780)),
    "criteria": (lambda file: plot_criteria(CRITERIA, FAMILIES, file, rho=RHO), (1290, 900)),
    "factorial": (lambda file: plot_factorial(FACTORIAL, file), (1590, 1080)),
    "samples": (lambda file: plot_samples({"a": IMAGES, "b": COARSE}, file, "title"), None),
    "trajectory": (lambda file: plot_trajectory(IMAGES, COARSE, POINTS, file), None),
    "grid": (lambda file: save_image_grid(IMAGES, file, columns=4, scale=3), (4 * 50 + 2, 2 * 50 + 2)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


@pytest.mark.parametrize("name", ["dots", "trajectory", "grid"])
def test_failing_plot_leaves_the_old_file(name, tmp_path, monkeypatch):
    def fail(_, file, *args, **kwargs):
        with open(file, "wb") as stream:
            stream.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    monkeypatch.setattr(Image.Image, "save", fail)
    file = tmp_path / "figure.png"
    file.write_bytes(b"precious")
    with pytest.raises(OSError, match="disk full"):
        FIGURES[name][0](file)
    assert file.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [file]


def test_page_does_not_depend_on_users_matplotlibrc(tmp_path):
    FIGURES["dots"][0](tmp_path / "plain.png")
    with rc_context({"savefig.bbox": "tight", "savefig.facecolor": "red", "font.size": 20}):
        FIGURES["dots"][0](tmp_path / "odd.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "odd.png").read_bytes()


LAID_OUT = {
    "losses": lambda: plots._losses_figure(RUNS),
    "curves": lambda: plots._scores_figure(scores([200, 400]), "fid", "title", {}),
    "dots": lambda: plots._scores_figure(scores([400]), "fid", "title", {}),
    "bands": lambda: plots._score_bands_figure(BANDS, "title", "FID, 15,803 images", plots.NFE_LABEL),
    "bands of epochs": lambda: plots._score_bands_figure({"ema": BANDS["ema"]}, "", "FID", "epoch"),
    "costs": lambda: plots._cost_against_nfe_figure(COSTS, "title", "KL (nats)", "optimum"),
    "criteria": lambda: plots._criteria_figure(CRITERIA, FAMILIES, "title", RHO, "exact $W_2^2$"),
    "factorial": lambda: plots._factorial_figure(FACTORIAL, "title", "FID"),
    "one panel": lambda: plots._factorial_figure(FACTORIAL[:18], "title", "FID"),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_nothing_overlaps_or_leaves_the_page(name):
    check_layout(LAID_OUT[name]())


# Losses


def test_running_mean_is_the_mean_of_its_window():
    values = RNG.uniform(size=200)
    reach = 4
    for k, mean in enumerate(plots._running_mean(values)):
        left = min(reach, k)
        assert mean == pytest.approx(values[k - left : k + left + 1].mean())
    np.testing.assert_allclose(plots._running_mean(np.full(7, 0.25)), 0.25)


def test_losses_are_drawn_per_scale_on_log_axes():
    figure = plots._losses_figure(RUNS)
    fine, coarse = figure.axes
    assert fine.get_yscale() == coarse.get_yscale() == "log"
    raw = [line for line in fine.lines if line.get_marker() == "."]
    np.testing.assert_allclose(raw[0].get_ydata(), [row["loss_64"] for row in RUNS["baseline"]])
    np.testing.assert_allclose(raw[1].get_ydata(), [row["loss_64"] for row in RUNS["dual"]])
    assert len(coarse.lines) == 2
    # A run keeps its colour in both panels though it is the first line of one and the second of the other.
    assert coarse.lines[0].get_color() == raw[1].get_color() != raw[0].get_color()
    assert len(plots._losses_figure({"baseline": RUNS["baseline"]}).axes) == 1


def test_useless_losses_are_skipped(tmp_path):
    rows = [{"step": 1, "loss_64": 0.5}, {"step": 2, "loss_64": float("nan")}, {"step": 3}]
    rows += [{"step": 4, "loss_64": float("inf")}, {"step": 5, "loss_64": 0.25}, {"step": 6, "loss_64": 0.0}]
    axes = plots._losses_figure({"run": rows}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.5], [5, 0.25]])
    with pytest.raises(ValueError, match="no run has a positive loss"):
        plot_losses({"run": rows[1:3]}, tmp_path / "figure.png")


@pytest.mark.parametrize("low, high", [(0.02, 0.0201), (0.02, 0.03), (0.02, 0.15), (0.005, 2.0)])
def test_loss_axis_always_has_numbers(low, high):
    rows = [{"step": k, "loss_64": loss} for k, loss in enumerate(np.linspace(high, low, 20))]
    figure = plots._losses_figure({"run": rows})
    render(figure)
    axes = figure.axes[0]
    bottom, top = axes.get_ylim()
    shown = [
        (t, label.get_text())
        for t, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if bottom <= t <= top
    ]
    assert 2 <= len(shown) <= 12
    assert all(float(text) == pytest.approx(t, rel=1e-4) for t, text in shown)


# Images


@pytest.mark.parametrize("columns, scale, padding", [(1, 1, 0), (3, 1, 2), (4, 3, 2), (6, 2, 1), (9, 1, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_pixel_by_pixel(columns, scale, padding, channels):
    images = IMAGES[:5, :channels, :4, :7]
    grid = image_grid(images, columns, scale, padding)
    columns = min(columns, 5)
    rows = -(-5 // columns)
    height, width = 4 * scale + padding, 7 * scale + padding
    assert grid.dtype == np.uint8 and grid.shape == (rows * height + padding, columns * width + padding, 3)
    for y in range(grid.shape[0]):
        for x in range(grid.shape[1]):
            (row, dy), (column, dx) = divmod(y - padding, height), divmod(x - padding, width)
            k = row * columns + column
            inside = row >= 0 and column >= 0 and k < 5 and dy < 4 * scale and dx < 7 * scale
            expected = images[k, :, dy // scale, dx // scale] if inside and column < columns else 255
            assert (grid[y, x] == expected).all()


def test_image_grid_takes_tensors_and_leaves_them_alone():
    tensor = torch.from_numpy(IMAGES.copy())
    np.testing.assert_array_equal(image_grid(tensor, 3), image_grid(IMAGES, 3))
    assert (tensor.numpy() == IMAGES).all()


def test_saved_grid_holds_the_same_pixels(tmp_path):
    save_image_grid(IMAGES, tmp_path / "grid.png", columns=4, scale=2, padding=3)
    with Image.open(tmp_path / "grid.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), image_grid(IMAGES, 4, 2, 3))


@pytest.mark.parametrize(
    "images",
    [IMAGES.astype(np.float32), IMAGES[0], IMAGES[:0], IMAGES.repeat(2, axis=1)],
    ids=["float", "3d", "none", "6 channels"],
)
def test_image_grid_refuses_what_is_no_stack_of_images(images):
    with pytest.raises(ValueError, match="images are .*; pass at least one as uint8"):
        image_grid(images, 2)


@pytest.mark.parametrize("columns, scale, padding", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_image_grid_refuses_impossible_layouts(columns, scale, padding):
    with pytest.raises(ValueError, match="is impossible"):
        image_grid(IMAGES, columns, scale, padding)


def pictures(figure):
    """Rendered pixels of every image on the page, in reading order."""
    pixels = render(figure)[:, :, :3]
    found = []
    for image in figure.images:
        height, width = image.get_array().shape[:2]
        top = pixels.shape[0] - int(image.oy) - height
        found.append(pixels[top : top + height, int(image.ox) : int(image.ox) + width])
    return found


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def test_samples_are_enlarged_exactly():
    figure = plots._samples_figure({"method": IMAGES, "coarse": COARSE[:, :1]}, "title")
    shown = pictures(figure)
    assert len(shown) == 12
    for picture, image in zip(shown[:6], IMAGES, strict=True):
        np.testing.assert_array_equal(picture, image.transpose(1, 2, 0).repeat(8, axis=0).repeat(8, axis=1))
    for picture, image in zip(shown[6:], COARSE, strict=True):
        np.testing.assert_array_equal(picture, np.kron(image[0], np.ones((16, 16), int))[..., None].repeat(3, axis=2))
    assert texts_of(figure) == ["title", "method", "coarse"]
    # Rows and columns line up, so that a column is a seed.
    left = [image.ox for image in figure.images]
    assert left[:6] == left[6:] == sorted(set(left))
    assert len({image.oy for image in figure.images[:6]}) == 1


@pytest.mark.parametrize("count", [1, 8, 40])
def test_samples_and_their_labels_fit_on_the_page(count):
    images = np.zeros((count, 3, 64, 64), dtype=np.uint8)
    labels = ("a", "WWWWWWWWWWWWWWWW", "several words that need wrapping")
    figure = plots._samples_figure(dict.fromkeys(labels, images), "A title of some length over little else")
    render(figure)
    assert figure.bbox.width < max(2400, count * 64) + count * 6 + 400
    first = min(image.ox for image in figure.images)
    for text in figure.texts:
        box = text.get_window_extent(figure.canvas.get_renderer())
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        if text is not figure.texts[0]:
            assert box.x1 < first


def test_unequal_sample_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equally long but hold {'a': 6, 'b': 5}"):
        plot_samples({"a": IMAGES, "b": IMAGES[:5]}, tmp_path / "figure.png", "title")
    with pytest.raises(ValueError, match="no row of samples"):
        plot_samples({}, tmp_path / "figure.png", "title")


@pytest.mark.parametrize("num_points, columns", [(2, 2), (6, 6), (10, 10), (11, 10), (19, 10), (51, 10)])
def test_trajectory_shows_first_last_and_even_points_between(num_points, columns):
    fine = [np.full((3, 16, 16), k, dtype=np.uint8) for k in range(num_points)]
    coarse = [np.full((3, 8, 8), 100 + k, dtype=np.uint8) for k in range(num_points)]
    points = [(3 * (num_points - 1 - k), 2 * (num_points - 1 - k)) for k in range(num_points)]
    figure = plots._trajectory_figure(fine, coarse, points, "")
    shown = [int(picture[0, 0, 0]) for picture in pictures(figure)]
    assert len(shown) == 2 * columns
    chosen = shown[:columns]
    assert chosen[0] == 0 and chosen[-1] == num_points - 1
    gaps = np.diff(chosen)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert shown[columns:] == [100 + k for k in chosen]
    assert len({image.get_array().shape for image in figure.images}) == 1
    texts = texts_of(figure)
    for k in chosen:
        assert f"point {k}" in texts
        assert f"$t_{{64}} = {points[k][0]}$" in texts and f"$t_{{32}} = {points[k][1]}$" in texts


def test_trajectory_of_one_scale():
    figure = plots._trajectory_figure(IMAGES, None, [(t,) for t, _ in POINTS], "")
    assert len(figure.images) == 6
    assert "$t = 999$" in texts_of(figure) and "fine\n16 × 16" in texts_of(figure)


def test_trajectory_refuses_unpaired_images(tmp_path):
    with pytest.raises(ValueError, match=r"6 points came with \[6, 5\] images"):
        plot_trajectory(IMAGES, COARSE[:5], POINTS, tmp_path / "figure.png")


# Scores


def test_scores_are_drawn_against_the_epoch():
    rows = scores([1000, 200, 400])
    axes = plots._scores_figure(rows, "fid", "title", {("dual", "dp_64"): "LIFT DP-64"}).axes[0]
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
    assert names == ["baseline diagonal", "LIFT DP-64", "dual dp_total"]


def test_scores_of_one_epoch_are_labelled_dots():
    rows = scores([400], num_images="15803", nfe="18")
    axes = plots._scores_figure(rows, "fid", "title", {}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "baseline diagonal",
        "dual dp_64",
        "dual dp_total",
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
    axes = plots._scores_figure(aggregate(rows), "fid", "", {}).axes[0]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[200, 31], [1000, 27.5]])
    plot_scores(aggregate(rows), "fid", tmp_path / "figure.png")
    with pytest.raises(ValueError, match="no row has a swd_mean"):
        plot_scores(aggregate(rows), "swd", tmp_path / "figure.png")


def test_scores_that_do_not_compare_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="num_images 15803 and 500 do not compare"):
        plot_scores(scores([200], num_images="500") + scores([400], num_images="15803"), "fid", file)
    with pytest.raises(ValueError, match="resize clean and pytorch-fid do not compare"):
        plot_scores(scores([200], resize="clean") + scores([400], resize="pytorch-fid"), "fid", file)
    with pytest.raises(ValueError, match="baseline diagonal has two values of fid with raw weights at epoch 200"):
        plot_scores(scores([200, 400]) + scores([200]), "fid", file)
    assert not file.exists()


def test_score_bands_are_mean_and_deviation():
    figure = plots._score_bands_figure(BANDS, "title", "FID", plots.NFE_LABEL)
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
        figure = plots._score_bands_figure({"raw": {"a": points}}, "", "KID", "epoch")
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


# Costs, criteria and the factorial comparison


def test_positions_that_are_kept_stand_apart():
    assert spread_out([0, 10, 1, 5, 2, 9, 7], gap=2) == [0, 1, 3, 4, 6]
    assert spread_out([], gap=1) == []


@pytest.mark.parametrize("low, high", [(1.0401, 1.0404), (1.04, 1.07), (0.2, 0.7), (3e-3, 40), (1e-7, 1e9)])
@pytest.mark.parametrize("name", ["x", "y"])
def test_numbers_of_a_logarithmic_axis_are_its_ticks(low, high, name):
    axes = Figure().subplots()
    axes.plot([low, high], [low, high])
    plots.log_axis(axes, name)
    axis = axes.xaxis if name == "x" else axes.yaxis
    ticks = axis.get_majorticklocs()
    view = axis.get_view_interval()
    assert axis.get_scale() == "log" and 2 <= len(ticks) <= 12
    assert view[0] <= ticks[0] and ticks[-1] <= view[1] and (np.diff(ticks) > 0).all()
    for tick, label in zip(ticks, axis.get_majorticklabels(), strict=True):
        text = label.get_text().strip("$").replace("\\cdot10^", "e").replace("10^", "1e").strip("}").replace("{", "")
        assert float(text) == pytest.approx(tick, rel=1e-5)


def test_costs_are_drawn_against_nfe_with_the_optimum_thick():
    figure = plots._cost_against_nfe_figure(COSTS, "title", "KL (nats)", "optimum")
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_ylabel() == "KL (nats)" and "NFE" in axes.get_xlabel()
    for line, (name, curve) in zip(axes.lines, COSTS.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_allclose(line.get_xydata(), list(curve.items()))
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths[0] > 2 * max(widths[1:])
    # The NFE that several families have are named before others, and every other one has a tick.
    labels = {int(tick): text.get_text() for tick, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert {6, 10, 18, 50, 58} <= labels.keys() and all(text == str(nfe) for nfe, text in labels.items())
    assert sorted([*labels, *axes.get_xticks(minor=True)]) == list(range(6, 59))


def test_costs_that_cannot_be_drawn_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no cost to draw"):
        plot_cost_against_nfe({"a": {}}, file)
    with pytest.raises(ValueError, match="a cost of a is nan"):
        plot_cost_against_nfe({"a": {4: 1.0, 8: float("nan")}}, file)
    with pytest.raises(ValueError, match="optimum 'b' is not among the curves a"):
        plot_cost_against_nfe({"a": {4: 1.0}}, file, optimum="b")
    assert not file.exists()


def test_every_criterion_has_a_panel_with_its_families():
    figure = plots._criteria_figure(CRITERIA, FAMILIES, "title", RHO, "exact distance")
    assert len(figure.axes) == len(CRITERIA) == 6
    for axes, (name, (costs, distances)) in zip(figure.axes, CRITERIA.items(), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_title().replace("\n", " ").startswith(name)
        assert axes.get_title().endswith(f"= {RHO[name]:.2f}".replace("-", "−"))
        for k, line in enumerate(axes.lines):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([costs[k::3], distances[k::3]], axis=1))
        assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 3
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == FAMILIES[:3]
    assert [handle.get_color() for handle in legend.legend_handles] == [line.get_color() for line in axes.lines]


def test_criteria_that_do_not_pair_up_are_refused(tmp_path):
    file, costs = tmp_path / "figure.png", np.ones(3)
    with pytest.raises(ValueError, match="no criterion"):
        plot_criteria({}, [], file)
    with pytest.raises(ValueError, match=r"kl has costs \[3\] and distances \[3\] but groups has \[2\]"):
        plot_criteria({"kl": (costs, costs)}, ["a", "b"], file, rho={"kl": 1})
    with pytest.raises(ValueError, match="correlation of kl is missing"):
        plot_criteria({"kl": (costs, costs)}, ["a", "b", "c"], file)
    with pytest.raises(ValueError, match="a distance of kl is 0"):
        plot_criteria({"kl": (costs, costs - 1)}, ["a", "b", "c"], file, rho={"kl": 1})
    assert not file.exists()


def test_factorial_panels_hold_their_schedule_and_spacing():
    figure = plots._factorial_figure(FACTORIAL, "title", "FID")
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
    figure = plots._factorial_figure(rows, "title", "FID")
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
