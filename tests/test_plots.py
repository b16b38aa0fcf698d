import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

import plots
from path import Path, diagonal, path_from_cells, timestep_grid
from plots import (
    image_grid,
    plot_blocks,
    plot_heatmap,
    plot_heatmap_pair,
    plot_losses,
    plot_path_comparison,
    plot_samples,
    plot_scores,
    plot_trajectory,
    save_image_grid,
)
from results_table import DESCRIPTION_FIELDS, RESULT_KEY, VALUE_FIELDS, aggregate
from scheduler import DDIMScheduler

N = 30
LOG_SNR = DDIMScheduler().log_snr.numpy()
T_GRID = timestep_grid(N)
LOG_SNR_GRID = LOG_SNR[T_GRID]
RNG = np.random.default_rng(0)
ERROR = np.exp(RNG.uniform(-9, 0, (N, N)))
BLOCKS = {block: np.exp(RNG.uniform(-9, 0, (N, N))) for block in ("HH", "HL", "LH", "LL")}
CELLS = [(0, 0), (0, 2), (3, 7), (4, 7), (20, 25), (29, 29)]
OTHER_CELLS = [(i, i) for i in range(N)]
PATHS = {
    "diagonal": diagonal(18),
    "DP": path_from_cells(CELLS, T_GRID, "dp_total", {}),
    "baseline": diagonal(18, num_scales=1),
}
IMAGES = RNG.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
COARSE = RNG.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
POINTS = [(999, 999), (900, 700), (500, 300), (200, 100), (50, 0), (0, 0)]
RUNS = {
    "baseline": [{"step": 50 * k, "epoch": k, "loss_64": 1 / (k + 1)} for k in range(40)],
    "dual": [{"step": 50 * k, "epoch": k, "loss_64": 2 / (k + 1), "loss_32": 3 / (k + 1)} for k in range(40)],
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


def render(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())  # [H, W, 4], row 0 on top


def heatmap_figure(error=ERROR, paths=None):
    return plots._heatmap_figure(error, T_GRID, LOG_SNR_GRID, "title", "error", paths)


FIGURES = {
    "heatmap": (
        lambda file: plot_heatmap(ERROR, T_GRID, LOG_SNR_GRID, file, "title", "error", {"DP": CELLS}),
        (900, 840),
    ),
    "pair": (
        lambda file: plot_heatmap_pair(ERROR, 2 * ERROR, T_GRID, LOG_SNR_GRID, CELLS, OTHER_CELLS, file),
        (1590, 810),
    ),
    "blocks": (lambda file: plot_blocks(BLOCKS, T_GRID, LOG_SNR_GRID, file), (1590, 1410)),
    "paths": (lambda file: plot_path_comparison(PATHS, LOG_SNR, file, "title"), (1650, 810)),
    "losses": (lambda file: plot_losses(RUNS, file), (1710, 690)),
    "curves": (lambda file: plot_scores(scores([200, 400]), "fid", file), (1140, 780)),
    "dots": (lambda file: plot_scores(scores([400]), "fid", file), (1110, 513)),
    "samples": (lambda file: plot_samples({"a": IMAGES, "b": COARSE}, file, "title"), None),
    "trajectory": (lambda file: plot_trajectory(IMAGES, COARSE, POINTS, file), None),
    "grid": (lambda file: save_image_grid(IMAGES, file, columns=4, scale=3), (4 * 50 + 2, 2 * 50 + 2)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    draw, size = FIGURES[name]
    draw(tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
        if size is None:
            assert 500 < picture.width < 3000 and 150 < picture.height < 1000
        else:
            assert picture.size == pytest.approx(size, abs=1)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["figure.png"]


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


# Error maps


def test_cell_is_centred_at_its_index():
    error = np.full((N, N), 1e-3)
    error[3, 7] = 1.0
    figure = heatmap_figure(error)
    pixels = render(figure)
    axes = figure.axes[0]
    norm, cmap = axes.images[0].norm, axes.images[0].cmap

    def color_at(x, y):
        column, row = axes.transData.transform((x, y))
        return pixels[pixels.shape[0] - 1 - int(row), int(column), :3]

    bright, dark = np.array([cmap(norm(value), bytes=True)[:3] for value in (1.0, 1e-3)])
    assert np.abs(bright.astype(int) - dark).max() > 100
    for dx in (-0.35, 0, 0.35):
        for dy in (-0.35, 0, 0.35):
            assert (color_at(7 + dx, 3 + dy) == bright).all()
    for x, y in ((6, 3), (8, 3), (7, 2), (7, 4), (3, 7), (7 - 0.65, 3), (7, 3 + 0.65)):
        assert (color_at(x, y) == dark).all()


def test_noise_is_at_the_lower_left_of_the_map():
    figure = heatmap_figure()
    render(figure)
    x_noise, y_noise = figure.axes[0].transData.transform((0, 0))
    x_clean, y_clean = figure.axes[0].transData.transform((N - 1, N - 1))
    assert x_noise < x_clean and y_noise < y_clean


@pytest.mark.parametrize("n", [2, 8, 30, 50])
def test_ticks_name_timestep_and_log_snr_of_their_line(n):
    t_grid = timestep_grid(n)
    error = np.ones((n, n))
    figure = plots._heatmap_figure(error, t_grid, LOG_SNR[t_grid], "title", "error", None)
    render(figure)
    main = figure.axes[0]
    top, right = main.child_axes
    for axis in (main.xaxis, main.yaxis, top.xaxis, right.yaxis):
        lines = axis.get_majorticklocs().astype(int)
        texts = [label.get_text() for label in axis.get_majorticklabels()]
        assert lines[0] == 0 and lines[-1] == n - 1 and len(lines) == len(texts) <= 8
        if axis in (main.xaxis, main.yaxis):
            assert texts == [str(t_grid[line]) for line in lines]
        else:
            values = [float(text.replace("−", "-")) for text in texts]
            np.testing.assert_allclose(values, LOG_SNR[t_grid[lines]], atol=0.0501)
    # A secondary axis shows the same cells only while its limits are those of the map.
    assert top.get_xlim() == main.get_xlim() and right.get_ylim() == main.get_ylim()


def test_infinite_log_snr_is_named():
    log_snr = LOG_SNR_GRID.copy()
    log_snr[0] = -np.inf
    figure = plots._heatmap_figure(ERROR, T_GRID, log_snr, "title", "error", None)
    render(figure)
    assert figure.axes[0].child_axes[0].get_xticklabels()[0].get_text() == "−∞"


def named_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_paths_run_through_cell_centres_with_a_white_outline():
    axes = heatmap_figure(paths={"one": CELLS, "two": OTHER_CELLS}).axes[0]
    lines = named_lines(axes)
    assert list(lines) == ["one", "two"]
    for name, cells in (("one", CELLS), ("two", OTHER_CELLS)):
        np.testing.assert_array_equal(lines[name].get_xdata(), [j for _, j in cells])
        np.testing.assert_array_equal(lines[name].get_ydata(), [i for i, _ in cells])
        below = axes.lines[axes.lines.index(lines[name]) - 1]
        np.testing.assert_array_equal(below.get_xydata(), lines[name].get_xydata())
        assert to_rgba(below.get_color()) == (1, 1, 1, 1)
        assert below.get_linewidth() > lines[name].get_linewidth()
    assert lines["one"].get_marker() != lines["two"].get_marker()
    assert lines["one"].get_color() != lines["two"].get_color()


def test_pair_shows_each_error_with_its_own_path_on_one_scale():
    figure = plots._heatmap_pair_figure(ERROR, 3 * ERROR, T_GRID, LOG_SNR_GRID, CELLS, OTHER_CELLS, "title")
    fine, total = figure.axes[:2]
    for axes, error, name, cells in ((fine, ERROR, "DP-64", CELLS), (total, 3 * ERROR, "DP-Total", OTHER_CELLS)):
        np.testing.assert_array_equal(axes.images[0].get_array(), error)
        (line,) = named_lines(axes).values()
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.array(cells)[:, ::-1])
        assert axes.images[0].norm.vmin == pytest.approx(ERROR.min())
        assert axes.images[0].norm.vmax == pytest.approx(3 * ERROR.max())


def test_blocks_are_where_their_titles_say():
    figure = plots._blocks_figure(BLOCKS, T_GRID, LOG_SNR_GRID, "title")
    maps = [axes for axes in figure.axes if axes.images]
    for axes, block in zip(maps, ("HH", "HL", "LH", "LL"), strict=True):
        assert f"J_{{{block}}}" in axes.get_title()
        np.testing.assert_array_equal(axes.images[0].get_array(), BLOCKS[block])
        assert axes.images[0].norm.vmax == pytest.approx(BLOCKS[block].max())


def laid_out(name):
    return {
        "heatmap": lambda: heatmap_figure(paths={f"path {k}": CELLS for k in range(5)}),
        "pair": lambda: plots._heatmap_pair_figure(ERROR, ERROR, T_GRID, LOG_SNR_GRID, CELLS, CELLS, "title"),
        "blocks": lambda: plots._blocks_figure(BLOCKS, T_GRID, LOG_SNR_GRID, "title"),
        "paths": lambda: plots._path_comparison_figure(PATHS, LOG_SNR, "title"),
        "losses": lambda: plots._losses_figure(RUNS),
        "curves": lambda: plots._scores_figure(scores([200, 400]), "fid", "title", {}),
        "dots": lambda: plots._scores_figure(scores([400]), "fid", "title", {}),
    }[name]()


@pytest.mark.parametrize("name", ["heatmap", "pair", "blocks", "paths", "losses", "curves", "dots"])
def test_nothing_overlaps_or_leaves_the_page(name):
    figure = laid_out(name)
    render(figure)
    renderer = figure.canvas.get_renderer()
    # The tight box of axes includes ticks, labels, titles, legends and secondary axes.
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    for k, box in enumerate(boxes):
        assert box.x0 >= -0.5 and box.y0 >= -0.5
        assert box.x1 <= figure.bbox.width + 0.5 and box.y1 <= figure.bbox.height + 0.5
        for other in boxes[:k]:
            overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
            overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert overlap_x <= 0.5 or overlap_y <= 0.5
    for axes in figure.axes:
        if axes.get_legend() is not None:
            assert axes.get_legend().get_window_extent(renderer).y0 >= axes.bbox.y1 - 0.5


def test_cells_without_a_logarithm_stay_grey():
    error = np.ones((N, N))
    error[0, 0], error[5, 5], error[9, 9] = 0, np.nan, np.inf
    mask = heatmap_figure(error).axes[0].images[0].get_array().mask
    assert {tuple(cell) for cell in np.argwhere(mask)} == {(0, 0), (5, 5), (9, 9)}
    render(heatmap_figure(np.zeros((N, N))))


def test_maps_may_be_tensors(tmp_path):
    arrays, tensors = tmp_path / "arrays.png", tmp_path / "tensors.png"
    plot_heatmap(ERROR, T_GRID, LOG_SNR_GRID, arrays, "title", "error")
    plot_heatmap(*map(torch.as_tensor, (ERROR, T_GRID, LOG_SNR_GRID)), tensors, "title", "error")
    assert arrays.read_bytes() == tensors.read_bytes()


def test_bad_maps_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match=r"error has shape \[30, 29\]"):
        plot_heatmap(ERROR[:, 1:], T_GRID, LOG_SNR_GRID, file, "title", "error")
    with pytest.raises(ValueError, match=r"path DP visits cell \(3, 30\)"):
        plot_heatmap(ERROR, T_GRID, LOG_SNR_GRID, file, "title", "error", {"DP": [(0, 0), (3, 30)]})
    with pytest.raises(ValueError, match="lack LH"):
        plot_blocks({k: v for k, v in BLOCKS.items() if k != "LH"}, T_GRID, LOG_SNR_GRID, file)
    assert not file.exists()


# Paths


def test_path_panels_hold_the_timesteps():
    figure = plots._path_comparison_figure(PATHS, LOG_SNR, "title")
    plane, curves = figure.axes
    reference, *lines = plane.lines
    np.testing.assert_array_equal(reference.get_xydata(), [[999, 999], [0, 0]])
    two_scales = [PATHS["diagonal"], PATHS["DP"]]
    assert len(lines) == 2  # The path of one scale has no place in the plane.
    for line, path in zip(lines, two_scales, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.array(path.points)[:, ::-1])
    styles = [(line.get_linestyle(), list(line.get_ydata())) for line in curves.lines]
    expected = [
        (linestyle, [point[scale] for point in path.points])
        for path in PATHS.values()
        for scale, linestyle in zip(range(path.num_scales), ("-", "--"), strict=False)
    ]
    assert styles == expected
    assert all(list(line.get_xdata()) == list(range(len(line.get_ydata()))) for line in curves.lines)


def test_paths_of_one_scale_alone_have_one_panel():
    figure = plots._path_comparison_figure({"baseline": PATHS["baseline"]}, LOG_SNR, "title")
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 1


def test_eight_paths_look_different():
    paths = {f"path {k}": Path(((999, 999), (500, 100 * k), (0, 0)), "test", {}) for k in range(8)}
    figure = plots._path_comparison_figure(paths, LOG_SNR, "title")
    handles = figure.legends[0].legend_handles
    assert len({handle.get_color() for handle in handles}) == len({handle.get_marker() for handle in handles}) == 8


@pytest.mark.parametrize("beta_schedule", ["cosine_clipped", "linear", "cosine_zero_terminal"])
def test_log_snr_ticks_agree_with_the_table(beta_schedule):
    table = DDIMScheduler(beta_schedule=beta_schedule, prediction_type="v").log_snr.numpy()
    ticks = plots._log_snr_ticks(table)
    assert {0.0, 999.0} <= ticks.keys() and len(ticks) >= 5
    assert min(np.diff(sorted(ticks))) > 40
    for t, text in ticks.items():
        if text == "−∞":
            assert table[int(t)] == -np.inf
        else:
            low, high = table[int(np.ceil(t))], table[int(np.floor(t))]
            assert low - 0.051 <= float(text.replace("−", "-")) <= high + 0.051


def test_impossible_comparisons_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no path"):
        plot_path_comparison({}, LOG_SNR, file, "title")
    with pytest.raises(ValueError, match="path three has 3 scales"):
        plot_path_comparison({"three": diagonal(5, num_scales=3)}, LOG_SNR, file, "title")
    with pytest.raises(ValueError, match=r"shape \[999\] but path diagonal starts at timestep 999"):
        plot_path_comparison(PATHS, LOG_SNR[:-1], file, "title")
    assert not file.exists()


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
    with pytest.raises(ValueError, match="baseline diagonal has two values of fid with raw weights at epoch 200"):
        plot_scores(scores([200, 400]) + scores([200]), "fid", file)
    assert not file.exists()
