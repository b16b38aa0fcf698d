import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import compute_cross_jacobian
from checkpoint import read_checkpoint, save_checkpoint
from compute_cross_jacobian import PUBLISHED_RATIOS, comparable_ratios, jacobian_ratios, path_statistics
from conftest import HARDWARE, list_files
from paths.path import path_from_cells, timestep_grid
from planning.coupling import CONDITIONS
from planning.error_map import BLOCKS, error_map
from planning.map_file import load_heatmap, save_heatmap
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser, Spectrum, jacobian

WRITTEN = {
    "cross_jacobian_2ep.csv",
    "cross_jacobian_analysis_2ep.png",
    "cross_jacobian.json",
    "coupling_2ep.csv",
    "coupling_2ep.png",
    "path_statistics.csv",
    "path_comparison_across_epochs.png",
    "path_comparison_ema_across_epochs.png",
}


def read(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def heatmaps(run, tmp_path):
    """A folder with the heatmap of the raw weights alone."""
    folder = tmp_path / "heatmaps"
    folder.mkdir()
    shutil.copy(run.heatmap, folder)
    return folder


@pytest.fixture
def flags(run, heatmaps, tmp_path):
    places = {"--checkpoint_dir": run.folder / "checkpoints", "--heatmap_dir": heatmaps, "--cache_dir": run.cache}
    sizes = {"--grid": 4, "--K": 1, "--heatmap_images": 2, "--coupling_images": 5, "--coupling_timesteps": 3}
    words = [word for pair in (places | sizes | {"--output_dir": tmp_path / "out"}).items() for word in pair]
    return [*words, *HARDWARE]


# The stage


@pytest.fixture(scope="module")
def written(stage, run, tmp_path_factory):
    """What the stage writes for raw and EMA weights, the heatmap of the latter computed on the way, and prints."""
    folder = tmp_path_factory.mktemp("cross")
    shutil.copy(run.heatmap, folder)
    ended = stage(
        compute_cross_jacobian,
        *("--checkpoint_dir", run.folder / "checkpoints", "--heatmap_dir", folder, "--cache_dir", run.cache),
        *("--grid", 4, "--K", 1, "--heatmap_images", 2, "--coupling_images", 5, "--coupling_timesteps", 3),
        *("--num_steps", 4, "--output_dir", folder / "out", *HARDWARE),
    )
    return folder, ended.output


def test_missing_heatmaps_are_computed_and_others_kept(written, run):
    folder, output = written
    assert {file.name for file in folder.glob("*.pth")} == {"heatmap_4_2ep.pth", "heatmap_4_2ep_ema.pth"}
    assert output.count("computing") == 1 and "lift_dual_timestep_2ep.pth ema: computing" in output
    assert (folder / run.heatmap.name).read_bytes() == run.heatmap.read_bytes()
    assert {file.name for file in (folder / "out").iterdir()} == WRITTEN


def test_files_of_a_student_are_named_after_it(stage, run, tmp_path):
    """So that those of two students of a run do not take each other's place."""
    content = {key: value for key, value in read_checkpoint(run.lift).items() if key != "format_version"}
    for student in ("2calls", "4calls"):
        changed = content | {"config": content["config"] | {"student": student}}
        save_checkpoint(tmp_path / f"made/lift_dual_timestep_{student}.pth", changed)
    stage(
        compute_cross_jacobian,
        *("--checkpoint_dir", tmp_path / "made", "--heatmap_dir", tmp_path, "--cache_dir", run.cache),
        *("--grid", 4, "--K", 1, "--heatmap_images", 2, "--coupling_images", 5, "--coupling_timesteps", 3),
        *("--num_steps", 4, "--weights", "raw", "--output_dir", tmp_path / "out", *HARDWARE),
    )
    names = {file.name for file in (tmp_path / "out").glob("coupling_*")}
    assert names == {f"coupling_{student}calls_2ep.{ending}" for student in (2, 4) for ending in ("csv", "png")}
    assert [*json.loads((tmp_path / "out/cross_jacobian.json").read_text())] == ["2calls_2", "4calls_2"]


def test_every_cell_has_a_row(written):
    folder, output = written
    rows = read(folder / "out/cross_jacobian_2ep.csv")
    assert len(rows) == 2 * 16
    for weights, part in (("raw", rows[:16]), ("ema", rows[16:])):
        heatmap = load_heatmap(folder / f"heatmap_4_2ep{'_ema' if weights == 'ema' else ''}.pth")
        t_grid = heatmap["t_grid"].tolist()
        for place, row in enumerate(part):
            i, j = divmod(place, 4)
            assert (row["epoch"], row["weights"]) == ("2", weights)
            assert (int(row["t_64"]), int(row["t_32"])) == (t_grid[i], t_grid[j])
            assert float(row["log_snr_64"]) == heatmap["log_snr_grid"][i]
            assert float(row["log_snr_32"]) == heatmap["log_snr_grid"][j]
            blocks = {block: float(row[block]) for block in BLOCKS}
            assert blocks == {block: heatmap["jacobian"][block][i, j].item() for block in BLOCKS}
            assert float(row["HL_se"]) == heatmap["jacobian_se"]["HL"][i, j]
            assert float(row["ratio_HL"]) == pytest.approx(blocks["HL"] / blocks["HH"], rel=1e-6)
            assert float(row["ratio_LH"]) == pytest.approx(blocks["LH"] / blocks["LL"], rel=1e-6)
            # Of two images, the deviation is half the distance.
            above, below = heatmap["jacobian_per_image"][[BLOCKS.index("LH"), BLOCKS.index("LL")], i, j].double()
            residual = above - float(row["ratio_LH"]) * below
            expected = (residual[0] - residual[1]).abs() / 2 / below.mean()
            assert float(row["ratio_LH_se"]) == pytest.approx(expected.item(), rel=1e-5)
    assert "along fine timestep 999" in output
    least = min(rows[16:], key=lambda row: float(row["ratio_HL"]))
    told = re.search(r"EMA: \|J_HL\|² / \|J_HH\|² from (\S+) at fine timestep (\d+), coarse (\d+)", output)
    assert told.groups() == (f"{float(least['ratio_HL']):.3g}", least["t_64"], least["t_32"])


def test_coupling_has_a_row_per_timestep_and_condition(written):
    folder, output = written
    rows = read(folder / "out/coupling_2ep.csv")
    assert [(row["weights"], row["condition"]) for row in rows] == [
        (weights, condition) for weights in ("raw", "ema") for _ in range(3) for condition in CONDITIONS
    ]
    log_snr = DDIMScheduler().log_snr
    even = (log_snr[999] + log_snr[0]).item() / 2
    assert {int(row["t_64"]) for row in rows} == {999, int((log_snr - even).abs().argmin()), 0}
    for row in rows:
        assert float(row["log_snr_64"]) == log_snr[int(row["t_64"])]
        assert float(row["log_snr_32"]) == log_snr[int(row["t_32"])] and row["images"] == "5"
        own = next(r for r in rows if (r["weights"], r["t_64"]) == (row["weights"], row["t_64"]))
        for error in ("mse_64", "clipped_mse_64"):
            value, reference = float(row[error]), float(own[error])
            assert float(row[f"{error}_difference"]) == pytest.approx(value - reference, abs=1e-9 * reference)
            assert float(row[f"{error}_ratio"]) == pytest.approx(value / reference)
            assert float(row[f"{error}_se"]) > 0
            assert (float(row[f"{error}_ratio_se"]) == 0) == (value == reference)
    assert "EMA, clamped to [-1, 1]" in output


def test_statistics_are_those_of_the_published_paths(written):
    folder, output = written
    rows = read(folder / "out/path_statistics.csv")
    keys = [(row["epoch"], row["weights"], row["path_type"]) for row in rows]
    assert keys == [("2", weights, path_type) for weights in ("raw", "ema") for path_type in ("dp_64", "dp_total")]
    raw = load_heatmap(folder / "heatmap_4_2ep.pth")
    for row, cells in zip(rows, (raw["samples_64"], raw["samples_total"]), strict=False):
        leads = [j - i for i, j in cells]
        assert (int(row["t_32_leads"]), int(row["t_64_leads"]), int(row["equal"])) == tuple(
            sum(sign * d > 0 for d in leads) if sign else leads.count(0) for sign in (1, -1, 0)
        )
        assert int(row["points"]) == len(leads) == 5 and row["num_steps"] == "4"
        assert "factor B, max_jump 5" in row["criterion"]
    lines = [line for line in output.splitlines() if line.startswith("| 2 |")]
    assert len(lines) == 4 and lines[3].startswith("| 2 | EMA | DP-Total | ")


def test_figures_are_drawn(written):
    for name in WRITTEN:
        if name.endswith(".png"):
            with Image.open(written[0] / "out" / name) as image:
                assert min(image.size) > 500 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_paths_are_found_with_the_settings_of_the_heatmap_or_of_flags(stage, flags, heatmaps, tmp_path):
    stage(compute_cross_jacobian, *flags, "--weights", "raw")
    assert {row["num_steps"] for row in read(tmp_path / "out/path_statistics.csv")} == {"4"}
    before = list_files(heatmaps)
    stage(compute_cross_jacobian, *flags, "--weights", "raw", "--num_steps", 3, "--factor", "A", "--max_jump", 2)
    rows = read(tmp_path / "out/path_statistics.csv")
    assert {row["num_steps"] for row in rows} == {"3"} and {row["weights"] for row in rows} == {"raw"}
    assert all(row["criterion"].endswith("factor A, max_jump 2") for row in rows)
    assert list_files(heatmaps) == before


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--epochs", 7], 1, ("no lift_dual_timestep checkpoint of epoch 7",)),
        (["--checkpoint_dir", "nowhere"], 1, ("nowhere has no lift_dual_timestep checkpoint",)),
        (["--coupling_images", 13], 1, ("--coupling_images 13", "12")),
        (["--coupling_images", 1], 1, ("at least 2 images",)),
        (["--coupling_timesteps", 1], 1, ("grid of 1 timesteps",)),
        (["--num_steps", 7], 1, ("7 steps",)),
        # The heatmap of the EMA weights is missing, and would be computed for paths that cannot be.
        (["--weights", "ema", "--num_steps", 7], 1, ("7 steps",)),
        (["--weights", "both"], 2, ("'both'",)),
        (["--coupling_images", 0], 2, ("'0' is not a positive integer",)),
    ],
)
def test_what_cannot_be_is_refused(refused, flags, heatmaps, more, status, says):
    refused(compute_cross_jacobian, *flags, "--weights", "raw", *more, says=says, status=status)


def test_heatmaps_that_do_not_fit_are_refused(refused, run, flags, heatmaps):
    raw, ema = heatmaps / "heatmap_4_2ep.pth", heatmaps / "heatmap_4_2ep_ema.pth"
    shutil.copy(raw, ema)
    refused(compute_cross_jacobian, *flags, says=("other weights", ema, "--force"))
    content = load_heatmap(raw)
    del content["format_version"]
    save_heatmap(raw, content | {"of": "x0"})
    refused(compute_cross_jacobian, *flags, says=("the Jacobian of x0", raw, "--of eps"))
    save_heatmap(raw, {name: value for name, value in content.items() if "jacobian" not in name})
    refused(compute_cross_jacobian, *flags, says=("denoising errors only", raw, "--maps all"))


def test_heatmaps_on_different_grids_are_refused(refused, stage, flags, heatmaps):
    stage(compute_cross_jacobian, *flags, "--weights", "ema", "--num_steps", 4)
    raw = heatmaps / "heatmap_4_2ep.pth"
    content = load_heatmap(raw)
    del content["format_version"]
    save_heatmap(raw, content | {"log_snr_grid": content["log_snr_grid"] + 0.1})
    refused(compute_cross_jacobian, *flags, says=("epoch 2", "different grids"))


# Ratios


def test_ratios_of_gaussian_images_are_the_closed_form():
    scheduler, grid = DDIMScheduler(), [999, 600, 300, 100, 10]
    spectrum = Spectrum.power_law(8, 3)
    denoiser = GaussianDenoiser(scheduler, spectrum.low.view(3, 4, 4), spectrum.high.view(3, 3, 4, 4))
    images = denoiser.draw(64, torch.Generator().manual_seed(0))
    found = error_map(
        denoiser.denoise, scheduler, images, grid, num_probes=1, batch_size=400, progress=False, maps="blocks"
    )
    ratios = jacobian_ratios(found)
    for i, t_64 in enumerate(grid):
        for j, t_32 in enumerate(grid):
            exact = jacobian(spectrum, scheduler.log_snr[t_64], scheduler.log_snr[t_32])
            for name, (above, below) in {"ratio_HL": ("HL", "HH"), "ratio_LH": ("LH", "LL")}.items():
                expected = (exact[above] / exact[below]).item()
                assert abs(ratios[name][i, j] - expected) <= 4 * ratios[f"{name}_se"][i, j], (name, t_64, t_32)
                assert 0 < ratios[f"{name}_se"][i, j] < 0.5 * expected


def test_only_the_published_images_stand_beside_the_published_ratios():
    heatmap = {
        "t_grid": torch.from_numpy(timestep_grid(30)),
        "num_pixels_64": 4096,
        "beta_schedule": "cosine_clipped",
    }
    for dataset in ("huggan/AFHQv2", "data/afhq", "data/afhq_64/"):
        assert comparable_ratios(heatmap, dataset) == PUBLISHED_RATIOS
    assert comparable_ratios(heatmap, "afhq/cats") is None
    other = {"t_grid": torch.tensor([990, 0]), "num_pixels_64": 1024, "beta_schedule": "cosine"}
    other["representation"] = "residual"
    for name, value in other.items():
        assert comparable_ratios(heatmap | {name: value}, "huggan/AFHQv2") is None


# Leads


def test_leads_of_a_path_made_by_hand():
    grid, log_snr = torch.tensor([999, 600, 300, 100, 0]), torch.tensor([-5.0, -1.0, 0.0, 4.0, 9.0])
    # Leads of t_32 in cells are 0, 2, 1, -2, -1, 0, and in log SNR 0, 5, 1, -9, -5, 0.
    cells = [(0, 0), (0, 2), (1, 2), (4, 2), (4, 3), (4, 4)]
    found = path_statistics(path_from_cells(cells, grid, "made", {}), grid, log_snr)
    assert found == {
        "points": 6,
        "t_32_leads": 2,
        "t_64_leads": 2,
        "equal": 2,
        "largest_lead_cells": 2,
        "largest_lead_lambda": -9.0,
    }


def test_leads_equal_brute_force():
    rng, n = np.random.default_rng(0), 30
    t_grid = timestep_grid(n)
    log_snr = DDIMScheduler().log_snr[t_grid]
    signs = set()
    for _ in range(50):
        corners = sorted({(0, 0), (n - 1, n - 1)} | {tuple(rng.integers(0, n, 2)) for _ in range(2)})
        fine, coarse = np.maximum.accumulate(corners, axis=0).T
        cells = list(dict.fromkeys(zip(fine.tolist(), coarse.tolist(), strict=True)))
        found = path_statistics(path_from_cells(cells, t_grid, "made", {}), torch.from_numpy(t_grid), log_snr)
        ahead, behind, furthest, furthest_lambda = 0, 0, 0, 0.0
        for i, j in cells:
            ahead, behind = ahead + (log_snr[j] > log_snr[i]), behind + (t_grid[j] > t_grid[i])
            if abs(j - i) > abs(furthest):
                furthest = j - i
            if abs(log_snr[j] - log_snr[i]) > abs(furthest_lambda):
                furthest_lambda = (log_snr[j] - log_snr[i]).item()
        assert (found["t_32_leads"], found["t_64_leads"]) == (ahead, behind)
        assert found["points"] == len(cells) == ahead + behind + found["equal"]
        assert found["largest_lead_cells"] == furthest
        assert found["largest_lead_lambda"] == pytest.approx(furthest_lambda)
        signs.add(math.copysign(1, furthest) if furthest else 0)
    assert signs >= {1, -1}
