import numpy as np
import pytest

import figures.losses
from figure_checks import check_file, check_layout, render
from figures.losses import plot_losses

RNG = np.random.default_rng(0)
RUNS = {
    "baseline": [{"step": 50 * k, "epoch": k, "loss_64": 1 / (k + 1)} for k in range(40)],
    "dual": [{"step": 50 * k, "epoch": k, "loss_64": 2 / (k + 1), "loss_32": 3 / (k + 1)} for k in range(40)],
}


def test_file_is_a_picture_of_the_announced_size(tmp_path):
    check_file(lambda file: plot_losses(RUNS, file), (1710, 690), tmp_path)


def test_nothing_overlaps_or_leaves_the_page():
    check_layout(figures.losses._losses_figure(RUNS))


def test_running_mean_is_the_mean_of_its_window():
    values = RNG.uniform(size=200)
    reach = 4
    for k, mean in enumerate(figures.losses._running_mean(values)):
        left = min(reach, k)
        assert mean == pytest.approx(values[k - left : k + left + 1].mean())
    np.testing.assert_allclose(figures.losses._running_mean(np.full(7, 0.25)), 0.25)


def test_losses_are_drawn_per_scale_on_log_axes():
    figure = figures.losses._losses_figure(RUNS)
    fine, coarse = figure.axes
    assert fine.get_yscale() == coarse.get_yscale() == "log"
    raw = [line for line in fine.lines if line.get_marker() == "."]
    np.testing.assert_allclose(raw[0].get_ydata(), [row["loss_64"] for row in RUNS["baseline"]])
    np.testing.assert_allclose(raw[1].get_ydata(), [row["loss_64"] for row in RUNS["dual"]])
    assert len(coarse.lines) == 2
    # A run keeps its colour in both panels though it is the first line of one and the second of the other.
    assert coarse.lines[0].get_color() == raw[1].get_color() != raw[0].get_color()
    assert len(figures.losses._losses_figure({"baseline": RUNS["baseline"]}).axes) == 1


def test_further_terms_have_panels_of_their_own_below():
    terms = [row | {"perceptual": 1 / (k + 2), "features": 1 / (k + 3)} for k, row in enumerate(RUNS["dual"])]
    figure = figures.losses._losses_figure({"baseline": RUNS["baseline"], "terms": terms})
    check_layout(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "fine scale",
        "coarse scale",
        "perceptual loss",
        "feature matching",
    ]
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 2, 2]
    np.testing.assert_allclose(figure.axes[3].lines[0].get_ydata(), [row["features"] for row in terms])
    assert "of features" in figure.axes[2].get_ylabel() and "of features" not in figure.axes[1].get_ylabel()
    # Three of them leave one place empty.
    three = [{name: value for name, value in row.items() if name != "loss_32"} for row in terms]
    figure = figures.losses._losses_figure({"terms": three})
    check_layout(figure)
    assert len(figure.axes) == 3


def test_useless_losses_are_skipped(tmp_path):
    rows = [{"step": 1, "loss_64": 0.5}, {"step": 2, "loss_64": float("nan")}, {"step": 3}]
    rows += [{"step": 4, "loss_64": float("inf")}, {"step": 5, "loss_64": 0.25}, {"step": 6, "loss_64": 0.0}]
    axes = figures.losses._losses_figure({"run": rows}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 0.5], [5, 0.25]])
    with pytest.raises(ValueError, match="no run has a positive fine or coarse loss"):
        plot_losses({"run": rows[1:3]}, tmp_path / "figure.png")


@pytest.mark.parametrize("low, high", [(0.02, 0.0201), (0.02, 0.03), (0.02, 0.15), (0.005, 2.0)])
def test_loss_axis_always_has_numbers(low, high):
    rows = [{"step": k, "loss_64": loss} for k, loss in enumerate(np.linspace(high, low, 20))]
    figure = figures.losses._losses_figure({"run": rows})
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
