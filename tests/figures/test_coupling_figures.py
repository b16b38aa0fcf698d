import numpy as np
import pytest

import figures.coupling
from figure_checks import check_file, check_layout, maps_of, meshes, named_lines
from figures.coupling import plot_cross_jacobian
from paths.path import timestep_grid
from scheduler import DDIMScheduler

N = 30
LOG_SNR = DDIMScheduler().log_snr.numpy()
T_GRID = timestep_grid(N)
LOG_SNR_GRID = LOG_SNR[T_GRID]
RNG = np.random.default_rng(0)
RATIOS = {
    f"epoch {epoch}": {name: np.exp(RNG.uniform(-9, 1, (N, N))) for name in ("ratio_HL", "ratio_LH")}
    for epoch in (200, 400)
}
PUBLISHED = {(999, 999): 0.0004, (999, 482): 0.0016}


def cross_jacobian_figure(ratios, published):
    return figures.coupling._cross_jacobian_figure(ratios, LOG_SNR_GRID, T_GRID, "title", published)


def test_file_is_a_picture_of_the_announced_size(tmp_path):
    check_file(
        lambda file: plot_cross_jacobian(RATIOS, LOG_SNR_GRID, T_GRID, file, published=PUBLISHED),
        (1230, 1665),
        tmp_path,
    )


@pytest.mark.parametrize("panels, published", [(RATIOS, PUBLISHED), ({"a": RATIOS["epoch 200"]}, {})])
def test_nothing_overlaps_or_leaves_the_page(panels, published):
    check_layout(cross_jacobian_figure(panels, published))


def test_cross_jacobian_panels_share_a_scale():
    panels = maps_of(cross_jacobian_figure(RATIOS, PUBLISHED))
    contents = [(label, name, values) for label, ratios in RATIOS.items() for name, values in ratios.items()]
    everything = np.stack([values for _, _, values in contents])
    for axes, (label, name, values) in zip(panels, contents, strict=True):
        (mesh,) = meshes(axes)
        np.testing.assert_array_equal(mesh.get_array(), values)
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((everything.min(), everything.max()))
        assert axes.get_title().startswith(label) and f"J_{{{name[-2:]}}}" in axes.get_title()


def test_ratios_along_the_noisiest_line_stand_beside_the_published_ones():
    figure = cross_jacobian_figure(RATIOS, PUBLISHED)
    (axes,) = [axes for axes in figure.axes if axes.lines]
    lines = named_lines(axes)
    for label, ratios in RATIOS.items():
        np.testing.assert_array_equal(lines[label].get_xdata(), T_GRID)
        np.testing.assert_array_equal(lines[label].get_ydata(), ratios["ratio_HL"][0])  # Row 0 is t_64 = 999.
    stars = lines[next(name for name in lines if "published" in name)]
    np.testing.assert_array_equal(stars.get_xydata(), [[999, 0.0004], [482, 0.0016]])
    assert axes.get_yscale() == "log" and axes.xaxis_inverted()
    assert "999" in axes.get_title(loc="left")
    assert not any("published" in name for name in named_lines(cross_jacobian_figure(RATIOS, {}).axes[-1]))


def test_incomplete_ratios_are_refused(tmp_path):
    file = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="no cross-Jacobian ratio"):
        plot_cross_jacobian({}, LOG_SNR_GRID, T_GRID, file)
    with pytest.raises(ValueError, match="a lacks ratio_LH"):
        plot_cross_jacobian({"a": {"ratio_HL": RATIOS["epoch 200"]["ratio_HL"]}}, LOG_SNR_GRID, T_GRID, file)
    with pytest.raises(ValueError, match="published ratio is at fine timestep 500 but the line drawn is at 999"):
        plot_cross_jacobian(RATIOS, LOG_SNR_GRID, T_GRID, file, published={(500, 0): 1.0})
    assert not file.exists()
