"""The figure of windows: its curves, its axis, and what it refuses."""

import math

import pytest

from figure_checks import check_file, check_layout
from figures.windows import _windows_figure, plot_windows

CURVES = {"els": (31, 15, 9, 5, 3), "bbels": (31, 15, 9, 3, 3), "90 % of the gradient": (27.0, 13, 9, 5, 3)}


def test_curves_are_sides_at_every_point():
    [axes] = _windows_figure(CURVES, "Windows").axes
    drawn = {line.get_label(): tuple(line.get_ydata()) for line in axes.lines}
    assert drawn == CURVES and tuple(axes.lines[0].get_xdata()) == (0, 1, 2, 3, 4)
    assert axes.get_yscale() == "log" and set(axes.get_yticks()) == {3, 5, 9, 17}


def test_the_file_appears_whole_and_nothing_overlaps(tmp_path):
    check_file(lambda file: plot_windows(CURVES, file, "Windows"), None, tmp_path)
    check_layout(_windows_figure(CURVES, "Windows"))


@pytest.mark.parametrize(
    ("curves", "says"),
    [
        ({}, "no window"),
        ({"els": ()}, "no window"),
        ({"els": (3, 5), "ls": (3,)}, "no window"),
        ({"els": (3, 0)}, "positive and finite"),
        ({"els": (3, math.nan)}, "positive and finite"),
    ],
)
def test_nothing_to_draw_is_refused(curves, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        plot_windows(curves, tmp_path / "windows.png")
