import numpy as np
import pytest

import figures.paths
from figure_checks import check_file, check_layout, render
from figures.paths import plot_path_and_samples, plot_path_comparison, plot_paths_across_epochs
from paths.families import diagonal
from paths.path import Path, path_from_cells, timestep_grid
from scheduler import DDIMScheduler

LOG_SNR = DDIMScheduler().log_snr.numpy()
CELLS = [(0, 0), (0, 2), (3, 7), (4, 7), (20, 25), (29, 29)]
PATHS = {
    "diagonal": diagonal(18),
    "DP": path_from_cells(CELLS, timestep_grid(30), "dp_total", {}),
    "baseline": diagonal(18, num_scales=1),
}
EPOCHS = {
    (epoch, weights): {"DP": PATHS["DP"], "diagonal": diagonal(epoch // 100)}
    for epoch in range(200, 1401, 200)
    for weights in ("raw", "ema")
    if (epoch, weights) != (1400, "ema")
}
IMAGES = np.random.default_rng(0).integers(0, 256, (13, 3, 16, 16), dtype=np.uint8)
FIGURES = {
    "overview": (lambda file: plot_path_and_samples(PATHS["DP"], IMAGES, 1000, file, "title"), (1650, 690)),
    "paths": (lambda file: plot_path_comparison(PATHS, LOG_SNR, file, "title"), (1650, 810)),
    "epochs": (lambda file: plot_paths_across_epochs(EPOCHS, LOG_SNR, file), (1545, 1635)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


LAID_OUT = {
    "overview": lambda: figures.paths._path_and_samples_figure(PATHS["DP"], IMAGES, 1000, "title"),
    "paths": lambda: figures.paths._path_comparison_figure(PATHS, LOG_SNR, "title"),
    "epochs": lambda: figures.paths._paths_across_epochs_figure(EPOCHS, LOG_SNR, "title"),
    "one epoch": lambda: figures.paths._paths_across_epochs_figure(
        {(400, "ema"): EPOCHS[400, "ema"]}, LOG_SNR, "title"
    ),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_nothing_overlaps_or_leaves_the_page(name):
    check_layout(LAID_OUT[name]())


# Paths


def test_an_overview_holds_the_path_and_every_image():
    figure = figures.paths._path_and_samples_figure(PATHS["DP"], IMAGES, 1000, "title")
    plane, pictures = figure.axes
    np.testing.assert_array_equal(plane.lines[-1].get_xydata(), np.array(PATHS["DP"].points)[:, ::-1])
    shown = pictures.images[0].get_array()
    pixels = 4 * 16 + 4  # Enlarged four times, with a margin.
    for k, image in enumerate(IMAGES):
        top, left = 4 + k // 6 * pixels, 4 + k % 6 * pixels
        np.testing.assert_array_equal(shown[top : top + 64 : 4, left : left + 64 : 4], image.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="scale"):
        figures.paths._path_and_samples_figure(PATHS["baseline"], IMAGES, 1000, "title")


def test_path_panels_hold_the_timesteps():
    figure = figures.paths._path_comparison_figure(PATHS, LOG_SNR, "title")
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
    figure = figures.paths._path_comparison_figure({"baseline": PATHS["baseline"]}, LOG_SNR, "title")
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 1


def test_eight_paths_look_different():
    paths = {f"path {k}": Path(((999, 999), (500, 100 * k), (0, 0)), "test", {}) for k in range(8)}
    figure = figures.paths._path_comparison_figure(paths, LOG_SNR, "title")
    handles = figure.legends[0].legend_handles
    assert len({handle.get_color() for handle in handles}) == len({handle.get_marker() for handle in handles}) == 8


@pytest.mark.parametrize("beta_schedule", ["cosine_clipped", "linear", "cosine_zero_terminal"])
def test_log_snr_ticks_agree_with_the_table(beta_schedule):
    table = DDIMScheduler(beta_schedule=beta_schedule, prediction_type="v").log_snr.numpy()
    ticks = figures.paths._log_snr_ticks(table)
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


# Epochs


def test_epochs_go_right_and_weights_down():
    figure = figures.paths._paths_across_epochs_figure(EPOCHS, LOG_SNR, "title")
    render(figure)
    panels = {}
    for axes in figure.axes:
        epoch, weights = axes.get_title().removeprefix("epoch ").split(", ")
        panels[int(epoch), {"raw weights": "raw", "EMA": "ema"}[weights]] = axes
    assert panels.keys() == EPOCHS.keys()
    colors = set()
    for key, axes in panels.items():
        _, *lines = axes.lines
        for line, path in zip(lines, EPOCHS[key].values(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.array(path.points)[:, ::-1])
        colors.add(tuple(line.get_color() for line in lines))
    assert len(colors) == 1
    centre = {key: (round(axes.bbox.x0), round(axes.bbox.y0)) for key, axes in panels.items()}
    # Seven epochs stand in rows of four and three.
    assert centre[200, "raw"][0] < centre[400, "raw"][0] < centre[800, "raw"][0]
    assert centre[200, "raw"][0] == centre[200, "ema"][0] == centre[1000, "raw"][0] == centre[1000, "ema"][0]
    assert centre[200, "raw"][1] > centre[200, "ema"][1] > centre[1000, "raw"][1] > centre[1000, "ema"][1]


def test_a_path_keeps_its_color_where_another_is_absent():
    panels = {(200, "raw"): EPOCHS[200, "raw"], (400, "raw"): {"diagonal": diagonal(4)}}
    one, other = figures.paths._paths_across_epochs_figure(panels, LOG_SNR, "title").axes
    assert other.lines[1].get_color() == one.lines[2].get_color() != one.lines[1].get_color()


def test_impossible_epochs_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no path"):
        plot_paths_across_epochs({(200, "raw"): {}}, LOG_SNR, file)
    with pytest.raises(ValueError, match="epoch 200 has weights 'best'"):
        plot_paths_across_epochs({(200, "best"): EPOCHS[200, "raw"]}, LOG_SNR, file)
    with pytest.raises(ValueError, match="path a of epoch 200 has 1 scales"):
        plot_paths_across_epochs({(200, "raw"): {"a": diagonal(5, num_scales=1)}}, LOG_SNR, file)
    assert not file.exists()
