"""Paths on a heatmap, what they say of themselves, and where they may begin and end; test_choice.py has their costs."""

import numpy as np
import pytest
import torch

from paths.optimal import find_optimal_path_n_steps_lambda
from paths.path import timestep_grid
from planning.map_paths import heatmap_path, kl_lines, kl_refined, path_mses, representation_of, seen_cells
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap

SCHEDULER = DDIMScheduler(prediction_type="v")
LOG_SNR = SCHEDULER.log_snr.numpy()


@pytest.fixture(scope="module")
def heatmap():
    grid = timestep_grid(10, spacing="uniform_log_snr", start=900, log_snr=LOG_SNR)
    return exact_heatmap(Spectrum.power_law(8), SCHEDULER, grid)


@pytest.mark.parametrize(
    ("options", "content", "said"),
    [
        ({}, {}, "dp_total, factor B, max_jump 5"),
        ({"factor": "C", "max_jump": 3}, {"of": "eps"}, "dp_total, factor C, max_jump 3"),
        ({"normalisation": "sum"}, {}, "dp_total, factor B, max_jump 5, normalisation sum"),
        ({}, {"of": "x0"}, "dp_total, factor B, max_jump 5, Jacobian of x0"),
    ],
)
def test_a_published_path_says_what_it_is_optimal_for(heatmap, options, content, said):
    path, cost = heatmap_path(heatmap | content | {"fingerprint": "abc"}, "dp_total", 4, **options)
    made = path.provenance
    assert (made["criterion"], made["cost"], made["heatmap_weights"], path.kind) == (said, cost, "abc", "dp_total")
    # By hand: squared norms over a number of pixels or none, times 1 / (S (1 + S)) or S / (4 (1 + S)²).
    snr = np.exp(heatmap["log_snr_grid"].numpy())
    weight = snr / (4 * (1 + snr) ** 2) if options.get("factor") == "C" else 1 / (snr * (1 + snr))
    pixels = (1, 1) if "normalisation" in options else (64**2, 16**2)
    fine, coarse = (heatmap["jacobian"][block].numpy() / n for block, n in zip(("HH", "LL"), pixels, strict=True))
    maps = fine * weight[:, None], coarse * weight
    cells, best = find_optimal_path_n_steps_lambda(*maps, np.log(snr), 4, options.get("max_jump", 5))
    assert made["cells"] == [list(cell) for cell in cells] and cost == pytest.approx(best, rel=1e-9)
    assert path.points == tuple(tuple(heatmap["t_grid"][list(cell)].tolist()) for cell in cells)


def test_a_map_that_does_not_say_is_over_complete_and_unclamped(heatmap):
    names = [representation_of(content).name for content in ({}, {"representation": "residual"})]
    assert names == ["overcomplete", "residual"]
    assert path_mses(heatmap) == ("mse_64", "mse_32", "mse_64_low")
    clamped = path_mses(heatmap | {"clipped_mse_64": heatmap["mse_64"]})
    assert clamped == ("clipped_mse_64", "clipped_mse_32", "clipped_mse_64_low")


def test_lines_may_begin_at_the_noisiest_timestep_and_end_one_below_their_start(heatmap):
    assert kl_lines(heatmap, LOG_SNR, 900, 0, 2).tolist() == [900, 0]
    assert kl_lines(heatmap, LOG_SNR, 900, 899, 60).tolist() == [900, 899]
    assert kl_lines(heatmap, LOG_SNR, None, 899, 2).tolist() == [900, 899]
    for start, end in ((901, 0), (900, 900), (5, -1)):
        with pytest.raises(ValueError, match=f"from timestep {start} to {end} is not on this heatmap, .* 900 to 0"):
            kl_lines(heatmap, LOG_SNR, start, end, 10)


def test_a_cell_on_the_edge_of_what_was_seen_was_seen():
    table = np.array([3.0, 2.0, 1.0, 0.0, -1.0])
    seen = torch.from_numpy(np.stack([table - 1, table + 1]))
    t_grid = np.array([4, 3, 2, 1, 0])
    cells = seen_cells({"t_grid": torch.from_numpy(t_grid), "seen_32": seen}, t_grid, table)
    lines = table[t_grid]
    np.testing.assert_array_equal(cells, np.abs(lines[:, None] - lines) <= 1)


@pytest.mark.parametrize("num_steps", [2, 5])
def test_a_path_in_a_band_without_width_is_on_its_curve(heatmap, num_steps):
    path = kl_refined(heatmap | {"seen_32": torch.from_numpy(np.stack([LOG_SNR, LOG_SNR]))}, LOG_SNR, num_steps).path
    assert path.nfe == num_steps and all(t_64 == t_32 for t_64, t_32 in path.points)
