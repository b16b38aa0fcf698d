import numpy as np
import pytest

import figures.costs
from figure_checks import check_file, check_layout
from figures.costs import _distance_against_nfe_figure, plot_cost_against_nfe, plot_criteria, plot_distance_against_nfe

RNG = np.random.default_rng(0)
COSTS = {
    "optimum": {n: 4 + 20 / n for n in range(6, 59)},
    "diagonal": {n: 5 + 30 / n for n in (6, 10, 18, 50)},
    "published": {18: 7.5},
}
DISTANCES = np.exp(RNG.normal(size=60))
FAMILIES = ["diagonal", "optimum", "random"] * 20
# Costs of a narrow range, of a common one, and of many decades.
CRITERIA = {
    f"criterion {k} of a name that is too long for one line": (
        DISTANCES**power * np.exp(RNG.normal(size=60)),
        DISTANCES,
    )
    for k, power in enumerate((0.02, 1, 8, 1, 1))
}
CRITERIA["narrow"] = (1.04 * DISTANCES**0.005, DISTANCES)
RHO = {name: 1 - 0.3 * k for k, name in enumerate(CRITERIA)}
FIGURES = {
    "costs": (lambda file: plot_cost_against_nfe(COSTS, file, optimum="optimum"), (1140, 780)),
    "criteria": (lambda file: plot_criteria(CRITERIA, FAMILIES, file, rho=RHO), (1290, 900)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_file_is_a_picture_of_the_announced_size(name, tmp_path):
    check_file(*FIGURES[name], tmp_path)


LAID_OUT = {
    "costs": lambda: figures.costs._cost_against_nfe_figure(COSTS, "title", "KL (nats)", "optimum"),
    "criteria": lambda: figures.costs._criteria_figure(CRITERIA, FAMILIES, "title", RHO, "exact $W_2^2$"),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_nothing_overlaps_or_leaves_the_page(name):
    check_layout(LAID_OUT[name]())


def test_costs_are_drawn_against_nfe_with_the_optimum_thick():
    figure = figures.costs._cost_against_nfe_figure(COSTS, "title", "KL (nats)", "optimum")
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_ylabel() == "KL (nats)" and "NFE" in axes.get_xlabel()
    for line, (name, curve) in zip(axes.lines, COSTS.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_allclose(line.get_xydata(), list(curve.items()))
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths[0] > 2 * max(widths[1:])
    # The NFE that several families have are named before others, and every other one has a tick.
    labels = {int(tick): text.get_text() for tick, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert {6, 10, 18, 50, 58} <= labels.keys() and all(text == str(nfe) for nfe, text in labels.items())
    assert sorted([*labels, *axes.get_xticks(minor=True)]) == list(range(6, 59))


def test_costs_below_nothing_are_drawn_on_an_even_axis():
    figure = figures.costs._cost_against_nfe_figure({"a": {4: -2.0, 8: 3.0}, "b": {4: 1.0}}, "title", "cost", "a")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(4, -2), (8, 3)])
    assert axes.get_ylim()[0] < -2 and axes.get_ylim()[1] > 3


def test_costs_that_cannot_be_drawn_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no cost to draw"):
        plot_cost_against_nfe({"a": {}}, file)
    with pytest.raises(ValueError, match="a cost of a is nan"):
        plot_cost_against_nfe({"a": {4: 1.0, 8: float("nan")}}, file)
    with pytest.raises(ValueError, match="optimum 'b' is not among the curves a"):
        plot_cost_against_nfe({"a": {4: 1.0}}, file, optimum="b")
    assert not file.exists()


def test_every_criterion_has_a_panel_with_its_families():
    figure = figures.costs._criteria_figure(CRITERIA, FAMILIES, "title", RHO, "exact distance")
    assert len(figure.axes) == len(CRITERIA) == 6
    for axes, (name, (costs, distances)) in zip(figure.axes, CRITERIA.items(), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_title().replace("\n", " ").startswith(name)
        assert axes.get_title().endswith(f"= {RHO[name]:.2f}".replace("-", "−"))
        for k, line in enumerate(axes.lines):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([costs[k::3], distances[k::3]], axis=1))
        assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 3
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == FAMILIES[:3]
    assert [handle.get_color() for handle in legend.legend_handles] == [line.get_color() for line in axes.lines]


def test_criteria_that_do_not_pair_up_are_refused(tmp_path):
    file, costs = tmp_path / "figure.png", np.ones(3)
    with pytest.raises(ValueError, match="no criterion"):
        plot_criteria({}, [], file)
    with pytest.raises(ValueError, match=r"kl has costs \[3\] and distances \[3\] but groups has \[2\]"):
        plot_criteria({"kl": (costs, costs)}, ["a", "b"], file, rho={"kl": 1})
    with pytest.raises(ValueError, match="correlation of kl is missing"):
        plot_criteria({"kl": (costs, costs)}, ["a", "b", "c"], file)
    with pytest.raises(ValueError, match="a distance of kl is 0"):
        plot_criteria({"kl": (costs, costs - 1)}, ["a", "b", "c"], file, rho={"kl": 1})
    assert not file.exists()


def test_distances_in_panels_share_axes_and_colours():
    panels = {"ddim": {"even": {4: 10.0, 8: 1.0}, "best": {4: 5.0}}, "dpmpp_2m": {"best": {4: 1e-6, 8: 1e-7}}}
    figure = _distance_against_nfe_figure(panels, "title", "W2²", 1e-3)
    one, other = (axes for axes in figure.axes if axes.axison)
    assert [one.get_title(), other.get_title()] == ["ddim", "dpmpp_2m"]
    assert one.get_ylim() == other.get_ylim() and one.get_yscale() == "log"
    assert one.get_ylim()[0] == pytest.approx(1e-3) and 10 < one.get_ylim()[1] < 20
    [best], [below] = ([line for line in axes.lines if line.get_label() == "best"] for axes in (one, other))
    assert best.get_color() == below.get_color()
    np.testing.assert_array_equal(below.get_ydata(), [1e-6, 1e-7])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["even", "best"]
    with pytest.raises(ValueError, match="a panel without curves"):
        plot_distance_against_nfe({"ddim": {}}, "never.png")
    with pytest.raises(ValueError, match="distance of ddim, best"):
        plot_distance_against_nfe({"ddim": {"best": {4: 0.0}}}, "never.png")
