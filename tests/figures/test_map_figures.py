import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

import figures.maps
from figure_checks import check_file, check_layout, maps_of, meshes, named_lines, render
from figures.maps import SHARED_SCALES, plot_heatmap, plot_heatmap_pair, plot_maps, plot_path_density
from paths.path import timestep_grid
from scheduler import DDIMScheduler

N = 30
LOG_SNR = DDIMScheduler().log_snr.numpy()
T_GRID = timestep_grid(N)
LOG_SNR_GRID = LOG_SNR[T_GRID]
RNG = np.random.default_rng(0)
ERROR = np.exp(RNG.uniform(-9, 0, (N, N)))
MAPS = {name: np.exp(RNG.uniform(-9, 9, (N, N))) for name in ("HH", "HL", "LH", "LL", "mse_64", "mse_32")}
BLOCKS = ("HH", "HL", "LH", "LL")
# What is known of a model that predicts the fine scale alone.
FINE_MAPS = {name: MAPS[name] for name in ("HH", "HL", "mse_64")}
CELLS = [(0, 0), (0, 2), (3, 7), (4, 7), (20, 25), (29, 29)]
OTHER_CELLS = [(i, i) for i in range(N)]
DENSITY = np.where(RNG.uniform(size=(N, N)) < 0.1, RNG.uniform(size=(N, N)), 0)


def heatmap_figure(error=ERROR, paths=None):
    return figures.maps._heatmap_figure(error, T_GRID, LOG_SNR_GRID, "title", "error", paths)


def maps_figure(maps, of="eps", shared=SHARED_SCALES):
    return figures.maps._maps_figure(maps, LOG_SNR_GRID, T_GRID, "title", of, shared)


def density_figure(density, cost_interval=(3.91, 4.875)):
    return figures.maps._path_density_figure(
        ERROR, density, LOG_SNR_GRID, T_GRID, CELLS, 4.6667, cost_interval, "title", "error"
    )


def edges_between(positions):
    """Half way between the positions, and as far beyond the outermost."""
    gaps = np.diff(positions) / 2
    return np.concatenate([[positions[0] - gaps[0]], positions[:-1] + gaps, [positions[-1] + gaps[-1]]])


FIGURES = {
    "heatmap": (
        lambda file: plot_heatmap(ERROR, T_GRID, LOG_SNR_GRID, file, "title", "error", {"DP": CELLS}),
        (900, 840),
    ),
    "pair": (
        lambda file: plot_heatmap_pair(ERROR, 2 * ERROR, T_GRID, LOG_SNR_GRID, CELLS, OTHER_CELLS, file),
        (1590, 810),
    ),
    "maps": (lambda file: plot_maps(MAPS, LOG_SNR_GRID, T_GRID, file), (1492, 1155)),
    "fine maps": (lambda file: plot_maps(FINE_MAPS, LOG_SNR_GRID, T_GRID, file, "title"), (1492, 795)),
    "density": (
        lambda file: plot_path_density(ERROR, DENSITY, LOG_SNR_GRID, T_GRID, CELLS, 2, (1, 3), file),
        (1110, 870),
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


LAID_OUT = {
    "heatmap": lambda: heatmap_figure(paths={f"path {k}": CELLS for k in range(5)}),
    "pair": lambda: figures.maps._heatmap_pair_figure(ERROR, ERROR, T_GRID, LOG_SNR_GRID, CELLS, CELLS, "title"),
    "maps": lambda: maps_figure(MAPS),
    "blocks": lambda: maps_figure({name: MAPS[name] for name in BLOCKS}),
    "fine maps": lambda: maps_figure(FINE_MAPS),
    "fine blocks": lambda: maps_figure({name: MAPS[name] for name in BLOCKS[:2]}),
    "errors": lambda: maps_figure({name: MAPS[name] for name in ("mse_64", "mse_32")}),
    "coarse grid": lambda: figures.maps._maps_figure(
        {"HH": np.ones((4, 4))}, LOG_SNR[[999, 666, 333, 0]], [999, 666, 333, 0], "title", "eps", SHARED_SCALES
    ),
    "density": lambda: density_figure(DENSITY),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_nothing_overlaps_or_leaves_the_page(name):
    check_layout(LAID_OUT[name]())


# Maps over grid lines


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
    figure = figures.maps._heatmap_figure(error, t_grid, LOG_SNR[t_grid], "title", "error", None)
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
    figure = figures.maps._heatmap_figure(ERROR, T_GRID, log_snr, "title", "error", None)
    render(figure)
    assert figure.axes[0].child_axes[0].get_xticklabels()[0].get_text() == "−∞"


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
    figure = figures.maps._heatmap_pair_figure(ERROR, 3 * ERROR, T_GRID, LOG_SNR_GRID, CELLS, OTHER_CELLS, "title")
    fine, total = figure.axes[:2]
    for axes, error, name, cells in ((fine, ERROR, "DP-64", CELLS), (total, 3 * ERROR, "DP-Total", OTHER_CELLS)):
        np.testing.assert_array_equal(axes.images[0].get_array(), error)
        (line,) = named_lines(axes).values()
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.array(cells)[:, ::-1])
        assert axes.images[0].norm.vmin == pytest.approx(ERROR.min())
        assert axes.images[0].norm.vmax == pytest.approx(3 * ERROR.max())


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
    assert not file.exists()


# Maps over log SNR


def test_cells_lie_around_their_log_snr():
    figure = maps_figure(MAPS)
    for axes in maps_of(figure):
        (mesh,) = meshes(axes)
        x, y = np.moveaxis(mesh.get_coordinates(), -1, 0)
        edges = edges_between(LOG_SNR_GRID)
        np.testing.assert_allclose(x, np.broadcast_to(edges, (N + 1, N + 1)))
        np.testing.assert_allclose(y, np.broadcast_to(edges[:, None], (N + 1, N + 1)))
        assert axes.get_xlabel() in ("coarse log SNR", "")


def test_color_at_a_log_snr_is_that_of_its_cell():
    error = np.full((N, N), 1e-3)
    error[2, 27] = 1.0  # Cells near the ends are many pixels wide.
    figure = maps_figure({"HH": error})
    pixels = render(figure)
    (axes,) = maps_of(figure)
    (mesh,) = meshes(axes)

    def color_at(i, j):
        column, row = axes.transData.transform((LOG_SNR_GRID[j], LOG_SNR_GRID[i]))
        return pixels[pixels.shape[0] - 1 - int(row), int(column), :3]

    # Meshes and images round colours differently.
    bright, dark = np.array([mesh.cmap(mesh.norm(value), bytes=True)[:3] for value in (1.0, 1e-3)])
    np.testing.assert_allclose(color_at(2, 27), bright, atol=1)
    for cell in ((2, 26), (2, 28), (1, 27), (3, 27), (27, 2)):
        np.testing.assert_allclose(color_at(*cell), dark, atol=1)


def test_panels_of_a_column_share_their_scale_and_others_do_not():
    figure = maps_figure(MAPS)
    panels = maps_of(figure)
    names = ["HH", "LL", "HL", "LH", "mse_64", "mse_32"]
    for axes, name in zip(panels, names, strict=True):
        (mesh,) = meshes(axes)
        np.testing.assert_array_equal(mesh.get_array(), MAPS[name])
        partner = names[names.index(name) ^ 1]
        assert mesh.norm.vmin == pytest.approx(min(MAPS[name].min(), MAPS[partner].min()))
        assert mesh.norm.vmax == pytest.approx(max(MAPS[name].max(), MAPS[partner].max()))
        mark = {"mse_64": "fine error", "mse_32": "coarse error"}.get(name, f"J_{{{name}}}")
        assert mark in axes.get_title()
    render(figure)
    left = [round(axes.bbox.x0) for axes in panels]
    assert left[0] == left[1] < left[2] == left[3] < left[4] == left[5]
    bars = [axes.get_xlabel() for axes in figure.axes if axes not in panels]
    assert bars == list(SHARED_SCALES)


def test_absent_maps_leave_no_gap():
    def names(*maps):
        return [axes.get_title() for axes in maps_of(maps_figure({name: MAPS[name] for name in maps}))]

    assert len(names("mse_64", "mse_32")) == 2
    assert ["J_{HH}" in names(*BLOCKS)[0], len(names(*BLOCKS))] == [True, 4]
    assert len(maps_figure({"mse_32": MAPS["mse_32"]}).axes) == 2  # Its panel and its colour bar.


def test_maps_of_the_fine_prediction_stand_in_one_row():
    figure = maps_figure(FINE_MAPS)
    render(figure)
    panels = maps_of(figure)
    for axes, (name, values) in zip(panels, FINE_MAPS.items(), strict=True):
        (mesh,) = meshes(axes)
        np.testing.assert_array_equal(mesh.get_array(), values)
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((values.min(), values.max()))
        assert ("fine error" if name == "mse_64" else f"J_{{{name}}}") in axes.get_title()
        assert axes.get_xlabel() and axes.child_axes[0].get_xlabel()
    assert len({round(axes.bbox.y0) for axes in panels}) == 1
    assert [bool(axes.get_ylabel()) for axes in panels] == [True, False, False]


def test_blocks_of_the_image_predicted_are_named_so():
    titles = [axes.get_title() for axes in maps_of(maps_figure({"HL": MAPS["HL"]}, of="x0"))]
    assert titles == [r"$J_{HL} = \partial \hat{x}_\mathrm{fine}\,/\,\partial x_\mathrm{coarse}$"]


def test_only_outer_panels_have_numbers():
    panels = maps_of(maps_figure(MAPS))
    for k, axes in enumerate(panels):
        column, row = divmod(k, 2)
        top, right = axes.child_axes
        assert bool(axes.get_xlabel()) == (row == 1) and bool(top.get_xlabel()) == (row == 0)
        assert bool(axes.get_ylabel()) == (column == 0) and bool(right.get_ylabel()) == (column == 2)


@pytest.mark.parametrize("n", [2, 5, 30, 60])
def test_timesteps_stand_at_their_log_snr(n):
    t_grid = timestep_grid(n)
    figure = figures.maps._maps_figure({"HH": np.ones((n, n))}, LOG_SNR[t_grid], t_grid, "title", "eps", SHARED_SCALES)
    render(figure)
    (axes,) = maps_of(figure)
    top, right = axes.child_axes
    for axis in (top.xaxis, right.yaxis):
        texts = [int(label.get_text()) for label in axis.get_majorticklabels()]
        assert {999, 0} <= set(texts) <= set(t_grid.tolist()) and 2 <= len(texts) <= 8
        np.testing.assert_allclose(axis.get_majorticklocs(), LOG_SNR[texts])
    assert top.get_xlim() == axes.get_xlim() and right.get_ylim() == axes.get_ylim()


def test_bad_maps_over_log_snr_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no map"):
        plot_maps({}, LOG_SNR_GRID, T_GRID, file)
    with pytest.raises(ValueError, match="no colour scale is given for other"):
        plot_maps({"HH": ERROR, "other": ERROR}, LOG_SNR_GRID, T_GRID, file)
    with pytest.raises(ValueError, match=r"HL has shape \[30, 29\]"):
        plot_maps({"HL": ERROR[:, 1:]}, LOG_SNR_GRID, T_GRID, file)
    with pytest.raises(ValueError, match="finite values that rise"):
        plot_maps({"HH": ERROR}, LOG_SNR_GRID[::-1], T_GRID, file)
    with pytest.raises(ValueError, match="no prediction 'v'"):
        plot_maps({"HH": ERROR}, LOG_SNR_GRID, T_GRID, file, of="v")
    assert not file.exists()


# Path density


def test_density_lies_over_the_map_and_the_path_over_both():
    figure = density_figure(DENSITY)
    axes = figure.axes[0]
    error, visited = meshes(axes)
    np.testing.assert_array_equal(error.get_array(), ERROR)
    np.testing.assert_array_equal(visited.get_array().filled(0), DENSITY)
    assert (visited.get_array().mask == (DENSITY == 0)).all()
    assert (visited.norm.vmin, visited.norm.vmax) == (0, 1)
    low, high = visited.cmap([0.01, 0.99])
    assert low[3] < 0.3 < 0.9 < high[3] < 1  # The map shows through what is seldom visited.
    greys = error.cmap([0.0, 0.5, 1.0])[:, :3]
    assert (greys == greys[:, :1]).all()
    ((name, line),) = named_lines(axes).items()
    np.testing.assert_allclose(line.get_xydata(), LOG_SNR_GRID[np.array(CELLS)[:, ::-1]])
    assert line.get_zorder() > visited.get_zorder()
    assert "4.667" in name and "95 %" in name and "3.91 to 4.875" in name
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [name]


def test_impossible_densities_are_refused(tmp_path):
    def draw(density=DENSITY, cells=CELLS, interval=(1, 3)):
        plot_path_density(ERROR, density, LOG_SNR_GRID, T_GRID, cells, 2, interval, tmp_path / "figure.png")

    with pytest.raises(ValueError, match="density spans 0 to 1.5"):
        draw(density=np.eye(N) * 1.5)
    with pytest.raises(ValueError, match="density spans nan"):
        draw(density=np.full((N, N), np.nan))
    with pytest.raises(ValueError, match=r"density has shape \[29, 30\]"):
        draw(density=DENSITY[1:])
    with pytest.raises(ValueError, match="interval of the cost is 3 to 1"):
        draw(interval=(3, 1))
    with pytest.raises(ValueError, match=r"visits cell \(0, 30\)"):
        draw(cells=[(0, 0), (0, 30)])
    assert not list(tmp_path.iterdir())
