import numpy as np
import pytest
import torch
from PIL import Image

import figures.images
from figure_checks import check_file, check_old_file_stays, render
from figures.images import image_grid, plot_samples, plot_trajectory, save_image_grid

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
COARSE = RNG.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
POINTS = [(999, 999), (900, 700), (500, 300), (200, 100), (50, 0), (0, 0)]
FIGURES = {
    "samples": (lambda file: plot_samples({"a": IMAGES, "b": COARSE}, file, "title"), None),
    "trajectory": (lambda file: plot_trajectory(IMAGES, COARSE, POINTS, file), None),
    "grid": (lambda file: save_image_grid(IMAGES, file, columns=4, scale=3), (4 * 50 + 2, 2 * 50 + 2)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


@pytest.mark.parametrize("name", ["trajectory", "grid"])
def test_failing_plot_leaves_the_old_file(name, tmp_path, monkeypatch):
    check_old_file_stays(FIGURES[name][0], tmp_path, monkeypatch)


# Grids


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


# Samples and trajectories


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
    figure = figures.images._samples_figure({"method": IMAGES, "coarse": COARSE[:, :1]}, "title")
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
    figure = figures.images._samples_figure(dict.fromkeys(labels, images), "A title of some length over little else")
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
    figure = figures.images._trajectory_figure(fine, coarse, points, "")
    shown = [int(picture[0, 0, 0]) for picture in pictures(figure)]
    assert len(shown) == 2 * columns
    chosen = shown[:columns]
    assert chosen[0] == 0 and chosen[-1] == num_points - 1
    gaps = np.diff(chosen)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert shown[columns:] == [100 + k for k in chosen]
    assert len({image.get_array().shape for image in figure.images}) == 1
    texts = texts_of(figure)
    assert [text for text in texts if text.startswith("point")] == [f"point {k}" for k in chosen]
    timesteps = [f"$t = {points[k][scale]}$" for scale in (0, 1) for k in chosen]
    assert [text for text in texts if text.startswith("$t")] == timesteps


def test_trajectory_of_one_scale():
    figure = figures.images._trajectory_figure(IMAGES, None, [(t,) for t, _ in POINTS], "")
    assert len(figure.images) == 6
    assert "$t = 999$" in texts_of(figure) and "fine\n16 × 16" in texts_of(figure)


def test_trajectory_refuses_unpaired_images(tmp_path):
    with pytest.raises(ValueError, match=r"6 points came with \[6, 5\] images"):
        plot_trajectory(IMAGES, COARSE[:5], POINTS, tmp_path / "figure.png")
