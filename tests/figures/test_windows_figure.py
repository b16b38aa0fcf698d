"""Figures of windows: their curves, marks, limits and axes, and what they refuse."""

import math

import pytest

from figure_checks import check_file, check_layout, check_old_file_stays
from figures.windows import _window_shares_figure, _windows_figure, plot_window_shares, plot_windows

SIDES = {"els": (31, 15, 9, 5, 3), "bbels": (31, 15, 9, 3, 3), "90 % of the gradient": (27.0, 13, 9, 5, 3)}


def test_sides_are_drawn_at_every_point():
    [axes] = _windows_figure(SIDES, "Windows").axes
    drawn = {line.get_label(): tuple(line.get_ydata()) for line in axes.lines}
    assert drawn == SIDES and tuple(axes.lines[0].get_xdata()) == (0, 1, 2, 3, 4)
    assert axes.get_yscale() == "log" and set(axes.get_yticks()) == {3, 5, 9, 17}


def test_the_file_of_sides_appears_whole_and_nothing_overlaps(tmp_path):
    check_file(lambda file: plot_windows(SIDES, file, "Windows"), None, tmp_path)
    check_layout(_windows_figure(SIDES, "Windows"))


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
def test_no_sides_are_refused(curves, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        plot_windows(curves, tmp_path / "windows.png")


def curve(width, last=29):
    return {side: 1 - math.exp(-side / width) for side in range(1, last, 2)} | {last: 1.0}


LEVELS = {f"t = {t}": curve(1 + t / 150) for t in (50, 250, 500, 750, 950)}
PANELS = {
    "ResNet, zeros": LEVELS,
    "ResNet, circular": LEVELS,
    "UNet": {level: curve(6, 63) for level in LEVELS},
    "UNet with attention": {level: curve(12, 63) for level in list(LEVELS)[1:]},
    "DiT": {"t = 999": curve(20, 63)},
}
LIMITS = {"ResNet, zeros": 29, "ResNet, circular": 29}


def test_every_network_has_a_panel_and_every_level_its_look():
    figure = _window_shares_figure(PANELS, "Windows", (0.9,), LIMITS)
    assert [axes.get_title() for axes in figure.axes] == list(PANELS)
    first, _, third, fourth, last = figure.axes
    mark, limit, *curves = first.lines
    assert set(mark.get_ydata()) == {0.9} and set(limit.get_xdata()) == {29}
    for line, shares in zip(curves, LEVELS.values(), strict=True):
        assert line.get_xdata().tolist() == list(shares) and line.get_ydata().tolist() == list(shares.values())
    assert len(third.lines) == 1 + 5 and [line.get_color() for line in fourth.lines[1:]] == [
        line.get_color() for line in curves[1:]
    ]
    assert last.lines[1].get_color() not in {line.get_color() for line in curves}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*LEVELS, "t = 999", "receptive field"]


@pytest.mark.parametrize("panels", [PANELS, {"UNet": PANELS["UNet"]}, dict(list(PANELS.items())[:4])])
def test_nothing_overlaps(panels):
    check_layout(_window_shares_figure(panels, "Receptive fields", (0.9, 0.99), LIMITS))


def test_the_file_appears_whole_and_an_old_one_stays(tmp_path, monkeypatch):
    few = dict(list(PANELS.items())[:3])
    check_file(lambda file: plot_window_shares(few, file, "Windows", limits=LIMITS), None, tmp_path)
    check_old_file_stays(lambda file: plot_window_shares(PANELS, file), tmp_path / "new", monkeypatch)


@pytest.mark.parametrize(
    ("panels", "says"),
    [
        ({}, "no receptive field"),
        ({"UNet": {}}, "UNet has no noise level"),
        ({"UNet": {"t = 1": {}}}, "UNet, t = 1: windows have odd sides and shares from 0 to 1, not none at all"),
        ({"UNet": {"t = 1": {2: 0.5}}}, "not {2: 0.5}"),
        ({"UNet": {"t = 1": {-1: 0.5}}}, "not {-1: 0.5}"),
        ({"UNet": {"t = 1": {1: 1.2}}}, "not {1: 1.2}"),
        ({"UNet": {"t = 1": {1: math.nan}}}, "not {1: nan}"),
    ],
)
def test_no_shares_are_refused(panels, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        plot_window_shares(panels, tmp_path / "windows.png")
    assert not list(tmp_path.iterdir())
