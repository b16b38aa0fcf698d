"""The figure of noise levels: its curves, the lines across them, and what it refuses."""

import math

import pytest

from figure_checks import check_file, check_layout
from figures.levels import _levels_figure, plot_levels

CURVES = {
    "16 to 32 px": {-4.0: 9.0, 0.0: 7.0, 2.0: 6.5, 8.0: 8.0, math.inf: 8.2},
    "32 to 64 px": {0.0: 5.0, 4.0: 4.0, math.inf: 4.5, -math.inf: 9.0},
}


def test_every_stage_has_a_panel_with_its_least_marked():
    figure = _levels_figure(CURVES, "Levels", "SWD")
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == list(CURVES)
    assert first.lines[0].get_xdata().tolist() == [-4, 0, 2, 8] and first.lines[0].get_ydata().tolist() == [
        9,
        7,
        6.5,
        8,
    ]
    assert first.lines[1].get_xdata().tolist() == [2] and first.texts[0].get_text() == "2"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "noise"]
    assert set(second.lines[2].get_ydata()) == {4.5} and set(second.lines[3].get_ydata()) == {9.0}


def test_the_file_appears_whole_and_nothing_overlaps(tmp_path):
    check_file(lambda file: plot_levels(CURVES, file, "Levels"), None, tmp_path)
    check_layout(_levels_figure(CURVES, "Levels", "SWD ×1000"))


@pytest.mark.parametrize(
    ("curves", "says"),
    [
        ({}, "no stage"),
        ({"a": {math.inf: 1.0}}, "a has no finite level"),
        ({"a": {0.0: math.nan}}, "a has a score that is not finite"),
    ],
)
def test_nothing_to_draw_is_refused(curves, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        plot_levels(curves, tmp_path / "levels.png")
