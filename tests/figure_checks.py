"""What every figure must satisfy, whichever module draws it, and the parts that tests look at."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image


def render(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())  # [H, W, 4], row 0 on top


def check_file(draw, size, folder):
    """`draw` writes one PNG, of size (width, height) within a pixel if that is given."""
    draw(folder / "new" / "figure.png")
    with Image.open(folder / "new" / "figure.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
        if size is None:
            assert 500 < picture.width < 3000 and 150 < picture.height < 1000
        else:
            assert picture.size == pytest.approx(size, abs=1)
    assert [file.name for file in (folder / "new").iterdir()] == ["figure.png"]


def check_old_file_stays(draw, folder, monkeypatch):
    """`draw` raises if the disk is full, and leaves the file that is there as it is."""

    def fail(_, file, *args, **kwargs):
        with open(file, "wb") as stream:
            stream.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    monkeypatch.setattr(Image.Image, "save", fail)
    file = folder / "figure.png"
    file.write_bytes(b"precious")
    with pytest.raises(OSError, match="disk full"):
        draw(file)
    assert file.read_bytes() == b"precious"
    assert list(folder.iterdir()) == [file]


def overlap(box, other):
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return width > 0.5 and height > 0.5


def check_layout(figure):
    """Nothing overlaps or leaves the page, and numbers on an axis stand apart."""
    render(figure)
    renderer = figure.canvas.get_renderer()
    # The tight box of axes includes ticks, labels, titles, legends and secondary axes.
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= -0.5 and box.y0 >= -0.5
        assert box.x1 <= figure.bbox.width + 0.5 and box.y1 <= figure.bbox.height + 0.5
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    for axes in figure.axes:
        if axes.get_legend() is not None:
            assert axes.get_legend().get_window_extent(renderer).y0 >= axes.bbox.y1 - 0.5
        for part in (axes, *axes.child_axes):
            for axis in (part.xaxis, part.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
                boxes = [label.get_window_extent(renderer) for label in labels if label.get_visible()]
                assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))


def meshes(axes):
    return [artist for artist in axes.collections if isinstance(artist, QuadMesh)]


def maps_of(figure):
    """Panels with a map over log SNR; a colour bar is a mesh too, but has no secondary axes."""
    return [axes for axes in figure.axes if meshes(axes) and axes.child_axes]


def named_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
