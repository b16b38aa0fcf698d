"""Maps predicted without a network: an exact denoiser predicts itself, and the study of a tiny model."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import compute_heatmap_30
import local_maps
from checkpoint import load_model
from conftest import HARDWARE
from data import to_float
from exact_models import REPRESENTATIONS, rng
from paths.path import timestep_grid
from planning.error_map import error_map
from planning.map_paths import kl_refined
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap
from truth.local_pair import LocalPairDenoiser

# Of tiny maps.
SMALL = (
    "--num_images",
    2,
    "--num_known",
    4,
    "--grid",
    3,
    "--windows",
    1,
    3,
    "--nfe",
    2,
    3,
    "--lines",
    8,
    "--machines",
    "els",
)
PREDICTORS = ["Gaussian, closed form", "Gaussian denoiser", "ideal", "els 1", "els 3"]


def rows_of(name):
    with open(f"{name}.csv", newline="", encoding="utf-8") as stream:
        return {(row["predictor"], int(row["nfe"])): row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module", params=REPRESENTATIONS)
def control(request, stage, tmp_path_factory):
    name = tmp_path_factory.mktemp("control") / "folder" / "maps"
    flags = ["--resolution", 8, *SMALL, "--representation", request.param, "--output", name, *HARDWARE]
    return name, stage(local_maps, "gaussian", *flags)


def test_a_denoiser_predicts_its_own_map_and_path(control):
    rows = rows_of(control[0])
    assert {name for name, _ in rows} == {local_maps.MEASURED, local_maps.DIAGONAL, *PREDICTORS}
    for nfe in (2, 3):
        own = rows["Gaussian denoiser", nfe]  # The network again, by another way.
        for scale in ("64", "32"):
            assert float(own[f"rho_{scale}"]) == pytest.approx(1, abs=1e-12)
            assert float(own[f"log_error_{scale}"]) < 1e-6
        assert float(own["excess"]) == pytest.approx(0, abs=1e-9) and float(own["distance"]) == 0
        for name in (local_maps.DIAGONAL, *PREDICTORS):
            assert float(rows[name, nfe]["excess"]) > -1e-9
        # Four images say less of Gaussian images than their variances do.
        assert float(rows["ideal", nfe]["log_bias_64"]) > 0.1
        assert float(rows["ideal", nfe]["excess"]) > 0


def test_the_page_shows_the_rows(control):
    name, ended = control
    rows, text = rows_of(name), Path(f"{name}.md").read_text(encoding="utf-8")
    assert ended.output == text
    for (predictor, nfe), row in rows.items():
        section = text.split(f"Paths of {nfe} steps")[1].split("Paths of")[0]
        assert f"| {predictor} | {float(row['lead_mean']):+.2f} (" in section
        assert f"| {float(row['excess']):+.2%} |" in section
        if predictor != local_maps.DIAGONAL:
            assert f"| {predictor} | {float(row['rho_64']):.3f} | {float(row['rho_32']):.3f} |" in text
    assert Path(f"{name}_maps.png").exists() and Path(f"{name}_paths.png").exists()


def heatmap_of(representation, resolution=8):
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", representation=representation)
    grid = timestep_grid(9, start=950)
    return exact_heatmap(Spectrum.power_law(resolution), scheduler, grid), scheduler.log_snr.numpy()


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_paths_and_costs_are_those_of_the_planner_of_stages(representation, weight):
    content, log_snr = heatmap_of(representation)
    planner = local_maps.Planner(content, log_snr, weight, 30)
    for nfe in (3, 6):
        refined = kl_refined(content, log_snr, nfe, weight, num_lines=30)
        cells = planner.best(content, nfe)
        assert [list(map(int, planner.t_grid[list(cell)])) for cell in cells] == refined.path.provenance["grid_path"]
        assert planner.cost(content, cells) == pytest.approx(refined.grid_cost, rel=1e-12)
        points, cost = planner.best_diagonal(content, nfe)
        tied = kl_refined(content, log_snr, nfe, weight, diagonal=True, num_lines=30)
        assert cost == pytest.approx(tied.grid_cost, rel=1e-12) and cost >= planner.cost(content, cells)
        lead = math.log(4) if representation == "residual" else 0
        assert points[1:-1, 1] == pytest.approx(np.minimum(points[1:-1, 0] + lead, log_snr[0]), abs=1e-12)


def test_agreement_lead_and_distance_by_hand():
    one, other = ({"mse_64": torch.tensor(a).double(), "mse_32": torch.tensor(b).double()} for a, b in (
        ([[4.0, 3.0], [2.0, 1.0]], [[8.0, 4.0], [2.0, 1.0]]), ([[2.0, 6.0], [1.0, 0.5]], [[8.0, 4.0], [2.0, 1.0]])
    ))  # fmt: skip
    found = local_maps.agreement(one, other)
    assert found["rho_64"] == pytest.approx(spearmanr([4, 3, 2, 1], [2, 6, 1, 0.5]).statistic)
    assert found["log_error_64"] == pytest.approx(math.log(2)) and found["log_bias_64"] == pytest.approx(
        math.log(2) / 2
    )
    assert found["rho_32"] == 1 and found["log_error_32"] == 0
    points = np.array([[-9.0, -9.0], [-4.0, -1.0], [0.0, -1.0], [3.0, 3.0], [9.0, 9.0]])
    lead = local_maps.lead_of(points, 0.0)
    assert lead == dict(lead_mean=2 / 3, lead_min=-1.0, lead_max=3.0, points_ahead=1, points_behind=1)
    assert local_maps.lead_of(points, 1.0)["points_behind"] == 2
    assert local_maps.distance(points, points + [[0.0, 3.0]]) == 1.5
    assert (
        local_maps.lead_of(points[:2], 0.0)["lead_mean"] is None and local_maps.distance(points[:2], points[:2]) is None
    )


def test_a_local_machine_predicts_itself_on_the_map():
    """A network that is a machine of the known images, measured on others."""
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
    images = torch.rand(8, 1, 8, 8, generator=rng(3), dtype=torch.float64) * 2 - 1
    network = LocalPairDenoiser(scheduler, images[2:], "els", 3).denoise
    settings = local_maps.GaussianMapSettings(
        output="unused", windows=(1, 3), machines=("els",), nfe=(3,), lines=20, seed=1, batch_size=5
    )
    maps = local_maps.predicted_maps(settings, scheduler, network, images[:2], images[2:], [900, 700, 500, 300, 0])
    rows, _ = local_maps.rows_of(maps, scheduler.log_snr.numpy(), settings)
    by_name = {row["predictor"]: row for row in rows}
    assert by_name["els 3"]["excess"] == 0 and by_name["els 3"]["log_error_64"] < 1e-12
    assert by_name["els 1"]["log_error_64"] > 0.01


@pytest.fixture(scope="module")
def study(stage, run, tmp_path_factory):
    name = tmp_path_factory.mktemp("study") / "maps"
    flags = ["--checkpoint", run.lift, "--on", "train", *SMALL, "--output", name]
    stage(local_maps, "trained", *flags, "--cache_dir", run.cache, *HARDWARE)
    return name


def test_the_study_of_a_model_measures_it_as_its_heatmap_does(study, run):
    rows = rows_of(study)
    assert len(rows) == 2 * (2 + len(PREDICTORS))
    text = Path(f"{study}.md").read_text(encoding="utf-8")
    assert "raw weights, training images" in text and "2 images measured, 4 others known" in text
    loaded = load_model(run.lift)
    t_grid = local_maps.grid_lines(SimpleNamespace(grid=3, grid_spacing="uniform_t"), loaded.scheduler)
    order = np.random.default_rng(42).permutation(12)
    x = to_float(torch.from_numpy(run.images()[np.sort(order[:2])]))
    network = error_map(loaded.denoise, loaded.scheduler, x, t_grid, maps="mse", seed=42, progress=False)
    known = to_float(torch.from_numpy(run.images()[np.sort(order[2:6])]))
    machine = LocalPairDenoiser(loaded.scheduler, known, "els", 3)
    theory = error_map(machine.denoise, loaded.scheduler, x, t_grid, maps="mse", seed=42, progress=False)
    off = (theory["clipped_mse_64"] / network["clipped_mse_64"]).log().abs().mean().item()
    assert float(rows["els 3", 2]["log_error_64"]) == pytest.approx(off, rel=1e-5)


def test_the_map_of_a_network_may_come_from_a_file(stage, study, run, tmp_path):
    flags = ["--checkpoint", run.lift, "--on", "train", *SMALL, "--heatmap", run.heatmap]
    stage(local_maps, "trained", *flags, "--output", tmp_path / "maps", "--cache_dir", run.cache, *HARDWARE)
    rows = rows_of(tmp_path / "maps")
    assert len(rows) == 2 * (2 + len(PREDICTORS))
    assert float(rows["network", 2]["excess"]) == 0 and float(rows["network", 2]["seconds"]) == 0


def test_what_cannot_be_predicted_is_refused(stage, refused, run, tmp_path):
    flags = ["trained", *SMALL, "--output", tmp_path / "maps", "--cache_dir", run.cache, *HARDWARE]
    lift = ["--checkpoint", run.lift]
    refused(local_maps, *flags, "--checkpoint", run.baseline, "--on", "train", says=("baseline", "two clocks"))
    refused(local_maps, *flags, *lift, says=("all its images", "--on train"))
    refused(local_maps, *flags, *lift, "--on", "train", "--num_known", 11, says=("--num_known", "2 to 10"))
    refused(local_maps, *flags, *lift, "--on", "train", "--num_images", 11, says=("--num_images", "at most 10"))
    of_file = ["--on", "train", "--heatmap", run.heatmap]
    refused(local_maps, *flags, *lift, *of_file, "--grid", 5, says=("--grid is 5", "4 lines"))
    refused(local_maps, *flags, *lift, "--ema", *of_file, says=("not of these weights",))
    blocks = tmp_path / "blocks.pth"
    stage(compute_heatmap_30, *run.heatmap_flags(blocks), "--maps", "blocks")
    refused(local_maps, *flags, *lift, "--on", "train", "--heatmap", blocks, says=("no denoising errors", "--maps mse"))
    refused(local_maps, *flags, *lift, "--windows", 4, says=("--windows 4", "odd"), status=2)
    refused(local_maps, *flags, *lift, "--borders", "circular", "--machines", "bbels", says=("bbels",), status=2)
