"""What the KL paths minimise, how they are found off the grid, and that stages follow them."""

import re

import numpy as np
import pytest
import torch

import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import load_model
from error_map import load_heatmap
from gaussian import Spectrum, exact_heatmap
from path import Readings, kl_cost, kl_path, kl_step_cost, path_cost, timestep_grid
from path_choice import KLProblem, kl_lines, kl_refined
from results_table import read_rows
from schedule_file import load_schedule
from scheduler import DDIMScheduler

SPECTRUM = Spectrum.power_law(8)
LOW, HIGH = SPECTRUM.low.numpy(), SPECTRUM.high.numpy()
SCHEDULER = DDIMScheduler(prediction_type="v")
LOG_SNR = SCHEDULER.log_snr.numpy()
CELLS = [(0, 0), (2, 1), (2, 4), (6, 5), (8, 8)]


def exact(n, **grid):
    return exact_heatmap(SPECTRUM, SCHEDULER, timestep_grid(n, log_snr=LOG_SNR, **grid))


def errors(a, b):
    """Low and detail band of Gaussian images seen at SNR a and b: Σ s / (1 + s (a + b/4)) and Σ s / (1 + s a)."""
    q = np.asarray(a + b / 4)
    return (LOW / (1 + LOW * q[..., None])).sum(-1), (HIGH / (1 + HIGH * np.asarray(a)[..., None])).sum(-1)


def band_cost(snr, weight):
    """½ Σ (M(k) - M(k+1)) ΔW over the two bands, at SNRs `[N + 1, 2]`."""
    a, b = snr.T
    weigh = np.log if weight == 1 else lambda s: s ** (1 - weight) / (1 - weight)
    low, detail = errors(a, b)
    return -(np.diff(low) * np.diff(weigh(a + b / 4)) + np.diff(detail) * np.diff(weigh(a))).sum() / 2


def cost_of(problem, cells):
    def step(a, b):
        return kl_step_cost(*problem[:3], a, b, weight=problem.weight, bands=problem.bands)

    return path_cost(step, cells)


def test_weight_0_counts_the_errors_of_both_scales_as_they_are():
    heatmap = exact(9)
    # A network whose two scales disagree about the low band.
    heatmap |= {"mse_32": 1.7 * heatmap["mse_32"], "mse_64_low": 0.6 * heatmap["mse_64_low"]}
    problem = KLProblem.of(heatmap, 0.0)
    assert not problem.bands
    snr = heatmap["snr_grid"].numpy()
    expected = 0.0
    for (i, j), (k, m) in zip(CELLS, CELLS[1:], strict=False):
        low, detail = errors(snr[i], snr[j])
        expected += ((low + detail) * (snr[k] - snr[i]) + 1.7 * low / 4 * (snr[m] - snr[j])) / 2
    assert cost_of(problem, CELLS) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_a_weight_counts_bands_which_for_an_exact_denoiser_are_those_of_the_maps(weight):
    heatmap = exact(9)
    problem = KLProblem.of(heatmap, weight)
    assert problem.bands and problem.weight == weight
    np.testing.assert_allclose(problem.mse_64, heatmap["mse_64"], rtol=1e-13)
    np.testing.assert_allclose(problem.mse_32, heatmap["mse_32"], rtol=1e-13)
    expected = band_cost(heatmap["snr_grid"].numpy()[np.array(CELLS)], weight)
    assert cost_of(problem, CELLS) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_scale_that_does_not_read_the_other_makes_no_free_move(weight):
    """Heads that ignore the other image: the better one of the low band counts, and no clock moves for nothing."""
    heatmap = exact(9)
    snr = heatmap["snr_grid"].numpy()
    a, b = snr[:, None] + 0 * snr, snr + 0 * snr[:, None]
    joint, detail = errors(a, b)
    blind_coarse, blind_fine = errors(0 * a, b)[0], errors(a, 0 * b)[0]
    maps = joint + detail, blind_coarse / 4, joint
    problem = KLProblem.of_maps(*maps, snr, weight)
    # Where 4 mse_32 exceeds mse_64, the maps of the two scales alone let the fine clock go on at no cost.
    start, end = (4, 0), (8, 0)
    assert (maps[0] < 4 * maps[1])[4:, 0].all()
    assert kl_step_cost(*maps[:2], snr, start, end, weight=weight, bands=True) == 0
    expected = band_cost(snr[np.array([start, end])], weight)
    assert cost_of(problem, [start, end]) == pytest.approx(expected, rel=1e-9) and expected > 1
    # Either head may be the blind one: what is minimised is what the other knows.
    for fine, coarse, fine_low in (maps, (blind_fine + detail, joint / 4, blind_fine)):
        blind = KLProblem.of_maps(fine, coarse, fine_low, snr, weight)
        np.testing.assert_allclose(blind.mse_64, joint + detail, rtol=1e-12)
        np.testing.assert_allclose(4 * blind.mse_32, joint, rtol=1e-12)
    steps = [kl_path(*problem[:3], 4, weight, bands=True), kl_path(*maps[:2], snr, 4, weight, bands=True)]
    assert steps[0][1] == pytest.approx(band_cost(snr[np.array(steps[0][0])], weight), rel=1e-9)
    assert band_cost(snr[np.array(steps[1][0])], weight) > 1.2 * steps[0][1]


def test_details_keep_the_error_that_was_measured_there():
    mse_64, mse_32, low = (np.full((3, 3), value) for value in (10.0, 2.0, 3.0))
    problem = KLProblem.of_maps(mse_64, mse_32, low, np.array([0.1, 1.0, 9.0]), 1.0)
    assert problem.mse_64 == pytest.approx(np.full((3, 3), 10.0)) and problem.mse_32 == pytest.approx(low / 4)
    problem = KLProblem.of_maps(mse_64, 0.5 * mse_32, 2 * low, np.array([0.1, 1.0, 9.0]), 1.0)
    # Low 4 · 1 in place of 6, and details 10 - 6.
    assert problem.mse_64 == pytest.approx(np.full((3, 3), 8.0)) and problem.mse_32 == pytest.approx(mse_32 / 2)


def test_on_other_lines():
    heatmap = exact(20, spacing="uniform_log_snr")
    problem = KLProblem.of(heatmap, 1.0)
    same = problem.on_lines(heatmap["log_snr_grid"].numpy())
    for one, other in zip(problem[:3], same[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    between = LOG_SNR[[900, 500, 100, 3]]
    moved = problem.on_lines(between)
    low, detail = errors(np.exp(between)[:, None] + np.zeros(4), np.exp(between) + np.zeros((4, 1)))
    np.testing.assert_allclose(moved.mse_64, low + detail, rtol=5e-3)
    np.testing.assert_allclose(moved.mse_32, low / 4, rtol=5e-3)
    assert (moved.snr == np.exp(between)).all() and moved[3:] == (1.0, True)


def test_a_heatmap_without_denoising_errors_is_refused():
    heatmap = exact(5)
    del heatmap["mse_64"], heatmap["mse_32"], heatmap["mse_64_low"]
    with pytest.raises(ValueError, match="--maps all"):
        KLProblem.of(heatmap, 1.0)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_refined_path_is_that_of_a_very_fine_grid(weight, diagonal):
    """From 30 measured lines, against the exact optimum over 100 exact lines, both at their true cost."""
    refined = kl_refined(exact(30, spacing="uniform_log_snr"), LOG_SNR, 4, weight, diagonal)
    fine = exact(100, spacing="uniform_log_snr")
    problem = KLProblem.of(fine, weight)
    cells, best = kl_path(*problem[:3], 4, weight, diagonal=diagonal, bands=problem.bands)

    def true_cost(timesteps):
        snr = np.exp(np.interp(timesteps, np.arange(len(LOG_SNR)), LOG_SNR))
        if weight:
            return band_cost(snr, weight)
        low, detail = errors(*snr.T)
        return ((low + detail)[:-1] * np.diff(snr[:, 0]) + low[:-1] / 4 * np.diff(snr[:, 1])).sum() / 2

    assert true_cost(fine["t_grid"].numpy()[np.array(cells)]) == pytest.approx(best, rel=1e-9)
    assert best * 0.995 < true_cost(refined.points) < best * 1.001
    assert best * 0.995 < true_cost(np.array(refined.path.points)) < best * 1.002
    assert refined.cost == pytest.approx(true_cost(refined.points), rel=2e-3)
    assert refined.cost <= refined.path_cost <= refined.grid_cost
    points = np.array(refined.path.points)
    assert len(points) == 5 and (points[:, 0] == points[:, 1]).all() == diagonal


def test_the_cost_ends_where_it_is_told_to():
    heatmap = exact(30, spacing="uniform_log_snr")
    refined = kl_refined(heatmap, LOG_SNR, 3, 1.0, start=700, end=50)
    assert refined.points[0].tolist() == [700, 700] and refined.points[-1].tolist() == [50, 50]
    assert refined.path.points[0] == (700, 700) and refined.path.points[-1] == (0, 0)
    points = np.array([*refined.path.points[:-1], (50, 50)])
    assert (np.diff(points, axis=0) <= 0).all() and points[-2].min() >= 50
    assert refined.path_cost == pytest.approx(band_cost(np.exp(LOG_SNR[points]), 1.0), rel=2e-3)
    provenance = refined.path.provenance
    assert (provenance["start"], provenance["end"]) == (700, 50)
    grid = kl_lines(heatmap, LOG_SNR, 700, 50, 60)
    assert {t for point in provenance["grid_path"] for t in point} <= set(grid.tolist())
    assert band_cost(np.exp(LOG_SNR[np.array(provenance["grid_path"])]), 1.0) == pytest.approx(
        refined.grid_cost, rel=2e-3
    )


@pytest.mark.parametrize(("start", "end", "n"), [(None, 0, 30), (800, 100, 12), (20, 10, 60)])
def test_lines_are_even_in_log_snr_from_start_to_end(start, end, n):
    lines = kl_lines(exact(5, start=950), LOG_SNR, start, end, n)
    first = start or 950
    assert lines[0] == first and lines[-1] == end and (np.diff(lines) < 0).all()
    assert len(lines) == min(n, first - end + 1)
    if n < 60:
        targets = np.linspace(LOG_SNR[first], LOG_SNR[end], n)
        nearest = np.abs(LOG_SNR[:, None] - targets).argmin(0)
        # Near the clean end lines that would coincide are a timestep apart.
        far = lines > end + n
        assert (lines[far] == nearest[far]).all() and far.sum() > n / 2
    else:
        assert lines.tolist() == list(range(20, 9, -1))


@pytest.mark.parametrize(("start", "end"), [(951, 0), (None, 950), (50, 60), (50, -1)])
def test_lines_off_the_map_are_refused(start, end):
    with pytest.raises(ValueError, match="spans 950 to 0; choose within"):
        kl_lines(exact(5, start=950), LOG_SNR, start, end, 10)


def test_band_cost_of_these_tests_is_that_of_one_step_by_hand():
    """s = 1 in one mode of each band, from a = b = 0 to a = 1, b = 4: ½ [(1 - 1/3) ΔW(q) + (1 - 1/2) ΔW(a)]."""
    start, end = Readings(2.0, 0.25, 1e-9, 1e-9), Readings(1 / 3 + 1 / 2, 1 / 12, 1.0, 4.0)
    by_hand = (2 / 3 * (2 * 2**0.5) + 1 / 2 * 2) / 2
    assert kl_cost(start, end, weight=0.5, bands=True) == pytest.approx(by_hand, rel=1e-4)


# Stages

HARDWARE = ["--device", "cpu", "--precision", "fp32", "--num_steps", 3]


@pytest.fixture(scope="module")
def run(stage, tiny, tmp_path_factory):
    """Folder of a LIFT model and a baseline after one epoch, and the heatmap of a small grid."""
    folder = tmp_path_factory.mktemp("run")
    for module in (train_baseline, train_lift):
        stage(module, *tiny(folder), "--epochs", 1, "--lr", 0.003)
    flags = ["--checkpoint", folder / "checkpoints/lift_dual_timestep_1ep.pth", "--cache_dir", folder / "cache"]
    flags += ["--output", folder / "results/heatmap_4_1ep.pth", "--grid", 4, "--K", 1, "--num_images", 2, *HARDWARE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_heatmap_30, "draw", lambda content, file: None)
        stage(compute_heatmap_30, *flags)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The timesteps of every network call of the stages that sample."""
    seen = []

    def load(*arguments):
        loaded = load_model(*arguments)
        denoise = loaded.model.denoise

        def counted(xs, ts):
            seen.append(tuple(t.unique().item() for t in ts))
            return denoise(xs, ts)

        loaded.model.denoise = counted
        return loaded

    for module in (generate_with_path_30, eval_fid_batch):
        monkeypatch.setattr(module, "load_model", load)
    return seen


@pytest.mark.parametrize(("path_type", "weight"), [("kl", 1), ("kl", 0), ("kl_diagonal", 1)])
def test_images_along_kl_paths(stage, run, tmp_path, calls, path_type, weight):
    checkpoint, heatmap = run / "checkpoints/lift_dual_timestep_1ep.pth", run / "results/heatmap_4_1ep.pth"
    flags = ["--checkpoint", checkpoint, "--heatmap", heatmap, "--output", tmp_path / "samples", *HARDWARE]
    flags += ["--path_type", path_type, "--num_images", 2, *([] if weight else ["--kl_weight", 0])]
    output = stage(generate_with_path_30, *flags).output
    assert f"2 new with 3 network calls each; path {path_type} " in output
    path = load_schedule(tmp_path / "samples/schedule.json")
    assert calls == list(path.points[:-1]) and path.nfe == 3 and path.kind == path_type
    expected = kl_refined(load_heatmap(heatmap), LOG_SNR, 3, weight, path_type == "kl_diagonal")
    assert path.points == expected.path.points
    assert path.provenance["criterion"] == f"{path_type}, weight {weight}"
    assert path.provenance["cost"] == expected.path_cost
    assert path.provenance["heatmap_weights"] == load_model(checkpoint).fingerprint
    assert path_type == "kl" or all(t_64 == t_32 for t_64, t_32 in path.points)


def test_scores_of_kl_paths(stage, run, tmp_path, calls):
    flags = ["--checkpoint_dir", run / "checkpoints", "--heatmap_dir", run / "results", "--grid", 4]
    flags += ["--model_type", "lift", "--path_type", "kl", "kl_diagonal", "--metrics", "swd", "--num_images", 3]
    flags += ["--cache_dir", run / "cache", "--output", tmp_path / "scores.csv", *HARDWARE]
    stage(eval_fid_batch, *flags)
    rows = read_rows(tmp_path / "scores.csv")
    assert [(row["path_type"], row["nfe"]) for row in rows] == [("kl", "3"), ("kl_diagonal", "3")]
    assert len(calls) == 6
    content = load_heatmap(run / "results/heatmap_4_1ep.pth")
    prints = [kl_refined(content, LOG_SNR, 3, 1.0, diagonal).path.fingerprint() for diagonal in (False, True)]
    assert [row["path_fingerprint"] for row in rows] == prints
    # A path of another weight is another row.
    output = stage(eval_fid_batch, *flags, "--kl_weight", 0).output
    assert "scored already" not in output and len(read_rows(tmp_path / "scores.csv")) == 4


def test_kl_paths_refuse(refused, run, tmp_path):
    checkpoints, heatmap = run / "checkpoints", run / "results/heatmap_4_1ep.pth"
    flags = ["--output", tmp_path / "samples", "--path_type", "kl", *HARDWARE]
    lift = ["--checkpoint", checkpoints / "lift_dual_timestep_1ep.pth", *flags]
    baseline = ["--checkpoint", checkpoints / "baseline_1ep.pth", "--heatmap", heatmap, *flags]
    refused(generate_with_path_30, *baseline, says=("--path_type kl", "two clocks", "'baseline'"))
    refused(generate_with_path_30, *lift, "--heatmap", "missing.pth", says=("missing.pth", "does not exist"))
    refused(generate_with_path_30, *lift, "--heatmap", heatmap, "--ema", says=(heatmap, "other weights"))
    refused(generate_with_path_30, *lift, "--kl_weight", 2, says=("--kl_weight", "'2'"), status=2)
    content = {name: value for name, value in load_heatmap(heatmap).items() if not re.match("mse|eps_mse", name)}
    torch.save(content, tmp_path / "blocks.pth")
    refused(generate_with_path_30, *lift, "--heatmap", tmp_path / "blocks.pth", says=("no denoising errors",))
