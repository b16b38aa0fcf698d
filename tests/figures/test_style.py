import numpy as np
import pytest
from matplotlib.figure import Figure

from figures.style import log_axis, spread_out


def test_positions_that_are_kept_stand_apart():
    assert spread_out([0, 10, 1, 5, 2, 9, 7], gap=2) == [0, 1, 3, 4, 6]
    assert spread_out([], gap=1) == []


@pytest.mark.parametrize("low, high", [(1.0401, 1.0404), (1.04, 1.07), (0.2, 0.7), (3e-3, 40), (1e-7, 1e9)])
@pytest.mark.parametrize("name", ["x", "y"])
def test_numbers_of_a_logarithmic_axis_are_its_ticks(low, high, name):
    axes = Figure().subplots()
    axes.plot([low, high], [low, high])
    log_axis(axes, name)
    axis = axes.xaxis if name == "x" else axes.yaxis
    ticks = axis.get_majorticklocs()
    view = axis.get_view_interval()
    assert axis.get_scale() == "log" and 2 <= len(ticks) <= 12
    assert view[0] <= ticks[0] and ticks[-1] <= view[1] and (np.diff(ticks) > 0).all()
    for tick, label in zip(ticks, axis.get_majorticklabels(), strict=True):
        text = label.get_text().strip("$").replace("\\cdot10^", "e").replace("10^", "1e").strip("}").replace("{", "")
        assert float(text) == pytest.approx(tick, rel=1e-5)
