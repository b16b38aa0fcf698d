"""What the KL paths minimise, how they are found off the grid, and that stages follow them."""

import argparse
import re
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compute_heatmap_30
import eval_fid_batch
import generate_with_path_30
import plan_path
import train_baseline
import train_lift
from checkpoint import MODEL_CLASSES, LoadedModel, load_model
from conftest import run_stage
from diffusion.sampler import sample_seeds
from diffusion.super_resolution import super_resolution_path, super_resolve
from evaluation import jobs
from evaluation.results_table import read_rows
from images.representation import REPRESENTATIONS
from model import LIFTDualTimestepModel
from paths.families import cascade, diagonal, through
from paths.optimal import Readings, kl_cost, kl_path, kl_step_cost, path_cost
from paths.path import Path, timestep_grid
from paths.refine import cost_off_grid
from paths.schedule_file import load_schedule, save_schedule
from planning.choice import PathSettings, choose_path, why_not
from planning.error_map import MSES
from planning.heatmap import heatmap_file
from planning.map_file import load_heatmap, save_heatmap
from planning.map_paths import KLProblem, beyond_seen, heatmap_path, kl_cascade, kl_lines, kl_refined, seen_cells
from planning.path_types import parse_path_type, path_type
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum, exact_heatmap

SPECTRUM = Spectrum.power_law(8)
LOW, HIGH = SPECTRUM.low.numpy(), SPECTRUM.high.numpy()
SCHEDULER = DDIMScheduler(prediction_type="v")
LOG_SNR = SCHEDULER.log_snr.numpy()
IMAGE_MAKERS = [name for name, kind in MODEL_CLASSES.items() if not kind.coarse_given]
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


# Families


def loaded(model_type="dual"):
    """A model as far as a path needs one."""
    config = {"model_type": model_type, "weights": "raw"}
    return LoadedModel(MODEL_CLASSES[model_type], SCHEDULER, config, "f" * 16, FilePath("x.pth"))


def chosen(text, model_type="dual", num_steps=8, spacing="uniform_t"):
    return choose_path(PathSettings(spacing=spacing), path_type(text), num_steps, loaded(model_type))


@pytest.mark.parametrize("model_type", ["dual", "single_t", "no_t"])
@pytest.mark.parametrize(("spacing", "num_steps"), [("uniform_t", 8), ("uniform_log_snr", 5), ("published", 18)])
def test_offsets_are_those_of_the_formulas_on_the_diagonal_of_the_spacing(model_type, spacing, num_steps):
    base = [t for t, _ in diagonal(num_steps, spacing, log_snr=LOG_SNR).points]
    first = base[0]

    def nearest(level):
        return int(np.argmin(np.abs(LOG_SNR[: first + 1] - level)))

    expected = {
        "shift:1.5": [nearest(LOG_SNR[t] + 1.5) for t in base],
        "shift:-2": [nearest(LOG_SNR[t] - 2) for t in base],
        "lead:2": [base[min(k + 2, num_steps)] for k in range(num_steps + 1)],
        "heuristic:0.8": [int(np.rint(0.8 * t)) for t in base],
        "diagonal": base,
    }
    for text, coarse in expected.items():
        path = chosen(text, model_type, num_steps, spacing)
        # All begin at noise and end clean in both scales.
        assert path.points == tuple(zip(base, [first, *coarse[1:-1], 0], strict=True)), text
        assert path.nfe == num_steps
    # A lead of the fine scale is that of the coarse one with the scales exchanged.
    mirrored = chosen("lead:-2", model_type, num_steps, spacing).points
    assert mirrored == tuple(point[::-1] for point in chosen("lead:2", model_type, num_steps, spacing).points)


@pytest.mark.parametrize(
    ("text", "steps", "waits"),
    [
        ("cascade:inf", 4, 0),
        ("cascade:99", 4, 0),
        ("cascade:2", 4, None),
        ("cascade:-1.5,7", 7, None),
        ("cascade:-5.7,1", 1, None),
        ("cascade:0,3", 3, None),
    ],
)
def test_a_cascade_waits_at_the_timestep_nearest_to_its_log_snr(text, steps, waits):
    level = float(text.split(":")[1].split(",")[0])
    if waits is None:
        waits = min(range(1000), key=lambda t: abs(LOG_SNR[t] - level))
        assert 0 < waits < 999
    coarse = [round(999 + (waits - 999) * k / steps) for k in range(steps + 1)]
    fine = [round(999 - 999 * k / (8 - steps)) for k in range(8 - steps + 1)]
    expected = [*((999, t) for t in coarse), *((t, waits) for t in fine[1:-1]), (0, 0)]
    for model_type in ("dual", "single_t", "no_t"):
        path = chosen(text, model_type)
        assert list(path.points) == expected and path.kind == "cascade"
    even = chosen(text, spacing="uniform_log_snr")
    assert even.points[steps] == (999, waits) and even.points != path.points and even.nfe == 8


@pytest.mark.parametrize("model_type", IMAGE_MAKERS)
def test_a_path_through_log_snrs_has_a_step_more_than_they_are(model_type):
    expected = [999, *(int(np.argmin(np.abs(LOG_SNR - level))) for level in (-2, 3.5)), 0]
    path = chosen("through:-2,3.5", model_type)
    clocks = MODEL_CLASSES[model_type].num_scales
    assert path.points == tuple((t,) * clocks for t in expected) and path.kind == "through"
    ahead = through((-2, 3.5), LOG_SNR, 2, 1.25).points[1:-1]
    assert [t_32 for _, t_32 in ahead] == [int(np.argmin(np.abs(LOG_SNR - level - 1.25))) for level in (-2, 3.5)]
    for bad in ((), (np.inf,), (3, 2), (1, 1), (-99,), (99,)):
        with pytest.raises(ValueError, match="lead through"):
            through(bad, LOG_SNR)


def test_what_enlarges_images_follows_no_path_from_noise(tmp_path):
    save_schedule(chosen("lead:1"), tmp_path / "free.json", LOG_SNR, solver={"name": "ddim"})
    for text in ("diagonal", "dp_64", "cascade:2", "through:1", f"schedule:{tmp_path}/free.json"):
        with pytest.raises(ValueError, match="A 'cascade' model enlarges images .* pass it to generate_cascade.py"):
            chosen(text, "cascade")


def test_a_schedule_is_followed_by_whom_it_suits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"free": chosen("lead:1"), "level": chosen("diagonal"), "one": diagonal(8, num_scales=1)}
    for name, path in paths.items():
        save_schedule(path, f"{name}.json", LOG_SNR, solver={"name": "ddim"})
    suits = {
        "free": ("dual", "single_t", "no_t"),
        "level": ("dual", "single_t", "no_t", "shared_t"),
        "one": ("baseline",),
    }
    for name, models in suits.items():
        text = f"schedule:{name}.json"
        for model_type in IMAGE_MAKERS:
            if model_type in models:
                assert why_not(model_type, text) == ""
                # Its steps are its own.
                assert chosen(text, model_type, num_steps=3).points == paths[name].points
            else:
                with pytest.raises(ValueError, match=f"{name}.json moves .* '{model_type}' model cannot follow"):
                    chosen(text, model_type)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        chosen("schedule:none.json")


@pytest.mark.parametrize(
    ("text", "canonical", "name"),
    [
        ("dp_64", "dp_64", "dp_64"),
        ("cascade:2.0,06", "cascade:2,6", "cascade_2_6"),
        ("cascade:inf", "cascade:inf", "cascade_inf"),
        ("cascade:best", "cascade:best", "cascade_best"),
        ("cascade:-0", "cascade:0", "cascade_0"),
        ("shift:-1.25", "shift:-1.25", "shift_-1.25"),
        ("shift:0.1", "shift:0.1", "shift_0.1"),
        ("lead:-2", "lead:-2", "lead_-2"),
        ("heuristic:.8", "heuristic:0.8", "heuristic_0.8"),
        ("through:-2.0,+3.50", "through:-2,3.5", "through_-2_3.5"),
        ("schedule:a b/c d:e.json", "schedule:a b/c d:e.json", "schedule_c_d_e"),
    ],
)
def test_a_type_of_path_has_one_text_and_a_name_for_files(text, canonical, name):
    assert path_type(text) == canonical == path_type(canonical)
    assert parse_path_type(text) == parse_path_type(canonical)
    assert parse_path_type(text).file_name == name
    needs = {text for text in ("dp_64", "dp_total", "kl", "kl_diagonal", "cascade:best")}
    assert parse_path_type(text).needs_heatmap == (canonical in needs)


@given(st.floats(allow_nan=False), st.integers(1, 99))
def test_numbers_in_the_text_of_a_type_keep_their_value(value, steps):
    texts = [f"cascade:{value},{steps}"] * (value > -np.inf) + [f"shift:{value}"] * bool(np.isfinite(value))
    for text in texts:
        kind = parse_path_type(text)
        assert kind.parameters[0] == value and parse_path_type(str(kind)) == kind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("zigzag", "dp_total"),
        ("diagonal:1", "dp_total"),
        ("", "dp_total"),
        ("cascade", "cascade:LOG_SNR"),
        ("cascade:", "cascade needs LOG_SNR[,STEPS] or best"),
        ("cascade:fast", "cascade needs"),
        ("cascade:nan", "cascade needs"),
        ("cascade:-inf", "cascade needs"),
        ("cascade:2,0", "cascade needs"),
        ("cascade:2,1.5", "cascade needs"),
        ("cascade:2,3,4", "cascade needs"),
        ("cascade:best,3", "cascade needs"),
        ("shift:inf", "shift needs LOG_SNR"),
        ("shift:nan", "shift needs"),
        ("shift:1,2", "shift needs"),
        ("lead:1.5", "lead needs POINTS"),
        ("heuristic:0", "heuristic needs FACTOR in (0, 1]"),
        ("heuristic:1.01", "heuristic needs"),
        ("heuristic:nan", "heuristic needs"),
        ("heuristic:0.5,2", "heuristic needs"),
        ("schedule:", "schedule needs FILE"),
    ],
)
def test_a_text_that_names_no_type_of_path_is_refused(text, says):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        path_type(text)
    assert str(error.value).startswith(f"'{text}' is no type of path") and says in str(error.value)


@pytest.mark.parametrize(
    ("text", "spacing", "says"),
    [
        ("cascade:-6", "uniform_t", "cascade:-6 waits at timestep 999, where it starts; choose a log SNR above -5.7"),
        ("cascade:2,8", "uniform_t", "8 of 8 steps"),
        ("cascade:-5.7,7", "uniform_t", "num_steps is 7 from timestep 999 to 99"),
        ("cascade:2", "published", "'published'"),
    ],
)
def test_families_refuse_what_makes_no_path(text, spacing, says):
    with pytest.raises(ValueError, match=says):
        chosen(text, spacing=spacing)


FREE = ["cascade:2", "shift:1", "lead:1", "heuristic:0.8"]
ON_MAPS = ["dp_64", "dp_total", "kl", "kl_diagonal", "cascade:best"]


def test_who_can_follow_which_type():
    def followed(model_type):
        return [text for text in ("diagonal", *FREE, *ON_MAPS) if not why_not(model_type, text)]

    assert followed("dual") == ["diagonal", *FREE, *ON_MAPS]
    assert followed("single_t") == followed("no_t") == ["diagonal", *FREE, "dp_64"]
    assert followed("baseline") == ["diagonal", "kl_diagonal"] and followed("shared_t") == ["diagonal"]
    assert why_not("baseline", "kl").endswith("use --path_type diagonal or kl_diagonal.")
    for text in FREE + ON_MAPS:
        assert "two clocks" in why_not("shared_t", text) and text in why_not("shared_t", text)
    for text in ON_MAPS[1:]:
        assert "coarse prediction" in why_not("no_t", text) and "'no_t' model does not make" in why_not("no_t", text)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_cascade_on_a_map_is_near_the_best_by_the_closed_form(weight):
    heatmap = exact(30, spacing="uniform_log_snr")
    path = kl_cascade(heatmap, LOG_SNR, 6, weight)
    made = path.provenance
    snr = np.exp(LOG_SNR)
    cost = band_cost if weight else plain_cost

    def true_cost(points):
        return cost(snr[np.array(points)], *([weight] if weight else []))

    # The cost is what the interpolated map says of these points.
    assert made["cost"] == pytest.approx(true_cost(path.points), rel=0.01 if weight else 0.05)
    points = np.array(path.points)
    first, remaining = made["first_steps"], made["remaining"]
    assert (points[: first + 1, 0] == 999).all() and (points[first:-1, 1] == remaining).all()
    assert made["waits_at_log_snr"] == LOG_SNR[remaining] and path.kind == "cascade"
    # Neither another line nor another split, with the inner points of a much finer search, does better.
    lines = np.unique(np.linspace(0, 990, 34).astype(int))
    best = min(
        true_cost(cascade(6, LOG_SNR, k, int(t), spacing).points)
        for k in range(1, 6)
        for t in lines
        for spacing in ("uniform_log_snr", "uniform_t", "karras")
        if t <= 999 - k
    )
    assert true_cost(path.points) < best * (1.005 if weight else 1.02)
    coarser = kl_cascade(heatmap, LOG_SNR, 6, weight, num_lines=20)
    assert made["cost"] <= coarser.provenance["cost"] * (1 + 1e-9)
    # Two lines at least for each step.
    assert kl_cascade(heatmap, LOG_SNR, 6, weight, num_lines=3) == kl_cascade(heatmap, LOG_SNR, 6, weight, num_lines=12)
    assert kl_cascade(heatmap, LOG_SNR, 6) == kl_cascade(heatmap, LOG_SNR, 6, 1.0)


def plain_cost(snr):
    low, detail = errors(*snr.T)
    return ((low + detail)[:-1] * np.diff(snr[:, 0]) + low[:-1] / 4 * np.diff(snr[:, 1])).sum() / 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
def test_a_cascade_to_the_clean_coarse_image_is_super_resolution_of_it(prediction_type):
    """Bit for bit: the fine image from the coarse ones that the first leg made, and from the same fine noise."""
    torch.manual_seed(0)
    model = LIFTDualTimestepModel((8, 16), channels=3).eval()
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    path = chosen("cascade:inf,3", num_steps=7)
    seeds, shapes = [5, 8, 13], [(3, 16, 16), (3, 8, 8)]
    coarse = []

    def capture(k, images):
        if path.points[k][1] == 0 and not coarse:
            assert k == 3
            coarse.append(images[1])

    with torch.no_grad():
        [(_, samples)] = sample_seeds(model.denoise, scheduler, path, seeds, shapes, 3, callback=capture)
        base = Path([(t_64,) for t_64, _ in path.points[3:]], "fine leg", {})
        leg = super_resolution_path(base)
        [(fine, nfe)] = super_resolve(model.denoise, scheduler, leg, coarse[0], seeds)
    assert (samples.nfe, nfe) == (7, 4)
    assert torch.equal(fine, samples.images[0]) and fine.std() > 0.05
    # It is these coarse images that it is made of.
    with torch.no_grad():
        [(other, _)] = super_resolve(model.denoise, scheduler, leg, coarse[0].flip(0), seeds)
    assert (other - fine).abs().max() > 1e-3


def test_optima_are_those_of_the_map_of_these_weights_under_every_setting(tmp_path):
    file, content = tmp_path / "map.pth", exact(20, spacing="uniform_log_snr") | {"fingerprint": "f" * 16}
    save_heatmap(file, content)
    for name, value in (("max_jump", 4), ("factor", "A"), ("normalisation", "sum")):
        for kind in ("dp_64", "dp_total"):
            settings = PathSettings(**{name: value})
            path = choose_path(settings, kind, 6, loaded(), file)
            expected, cost = heatmap_path(content, kind, 6, **{name: value})
            assert path == expected and path.provenance["cost"] == cost and path.kind == kind
            assert path != heatmap_path(content, kind, 6)[0]
    optima = {
        "kl": kl_refined(content, LOG_SNR, 4, 0.5).path,
        "kl_diagonal": kl_refined(content, LOG_SNR, 4, 0.5, diagonal=True).path,
        "cascade:best": kl_cascade(content, LOG_SNR, 4, 0.5),
    }
    for kind, optimum in optima.items():
        path = choose_path(PathSettings(kl_weight=0.5), kind, 4, loaded(), file)
        assert path.points == optimum.points and path.kind == kind.split(":")[0]
        said = {"criterion": f"{kind}, weight 0.5", "heatmap_weights": "f" * 16}
        assert path.provenance == optimum.provenance | said
    save_heatmap(file, content | {"fingerprint": "e" * 16})
    with pytest.raises(ValueError, match=r"map.pth was computed with other weights than the raw ones"):
        choose_path(PathSettings(), "kl", 4, loaded(), file)


def test_heatmap_files_tell_the_model_the_epoch_and_the_weights():
    dual = {"model_type": "dual"}
    assert str(heatmap_file("r", dual, 9, "raw")) == "r/heatmap_30_9ep.pth"
    assert str(heatmap_file("r", dual, 9, "ema", 4)) == "r/heatmap_4_9ep_ema.pth"
    assert str(heatmap_file("r", dual | {"student": "4calls"}, 9, "raw")) == "r/heatmap_30_4calls_9ep.pth"
    assert str(heatmap_file("r", {"model_type": "single_t"}, 9, "ema")) == "r/heatmap_30_single_t_9ep_ema.pth"


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

    def load(*arguments, **options):
        loaded = load_model(*arguments, **options)
        denoise = loaded.model.denoise

        def counted(xs, ts):
            seen.append(tuple(t.unique().item() for t in ts))
            return denoise(xs, ts)

        loaded.model.denoise = counted
        return loaded

    for module in (generate_with_path_30, jobs):
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


def around(curve, width):
    """The range of λ_32 within a band around a curve `[T]` of λ_32 by t_64."""
    return torch.from_numpy(np.stack([curve - width / 2, curve + width / 2]))


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
@pytest.mark.parametrize("width", [1.0, 4.0])
@pytest.mark.parametrize("off_band", [lambda far: 30.0 + 0 * far, lambda far: np.exp(far), lambda far: np.exp(-far)])
def test_a_path_keeps_to_where_the_network_was_trained_and_to_its_errors_there(representation, width, off_band):
    """By its true cost it is no worse than the best diagonal, whatever the errors are beyond the edge of the band."""
    lead = REPRESENTATIONS[representation].image_lead
    grid = timestep_grid(60, spacing="uniform_log_snr", log_snr=LOG_SNR)
    ideal = exact_heatmap(SPECTRUM, SCHEDULER, grid, representation=representation)
    lines = LOG_SNR[grid]
    far = np.abs(lines - lines[:, None] - lead) - width / 2
    factor = torch.from_numpy(np.where(far > 0, off_band(far), 1.0))
    content = ideal | {name: factor * ideal[name] for name in MSES} | {"seen_32": around(LOG_SNR + lead, width)}
    problem = KLProblem.of(ideal, 1.0)
    true_cost = cost_off_grid(grid, *problem[:2], LOG_SNR, weight=1.0, bands=problem.bands)
    for num_steps in (3, 8, 18):
        refined = kl_refined(content, LOG_SNR, num_steps)
        best = kl_refined(ideal, LOG_SNR, num_steps, diagonal=True).path
        inner = np.array(refined.path.points[1:-1])
        # To the nearest timestep of a range, at the noisy end.
        assert beyond_seen(content, inner.astype(float), LOG_SNR).max() <= 0.3
        assert refined.path_cost > 0 and true_cost(refined.path.points) <= 1.02 * true_cost(best.points)
    unaware = kl_refined({name: value for name, value in content.items() if name != "seen_32"}, LOG_SNR, 8)
    if off_band(np.ones(1)) > 1:
        assert true_cost(unaware.path.points) > 1.1 * true_cost(kl_refined(content, LOG_SNR, 8).path.points)


def test_how_far_points_are_from_what_was_seen():
    log_snr, t_grid = np.array([4.0, 2.0, 1.0, -1.0, -np.inf]), torch.tensor([3, 1, 0])
    seen = torch.tensor([[3.0, 1.0, 0.0, -1.0, -np.inf], [4.0, 3.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    content = {"seen_32": seen, "t_grid": t_grid}
    points = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 1, (1, 1.5): 0, (1, 3): 2, (3, 0): 4, (3, 4): 0, (1.5, 0): 2}
    found = beyond_seen(content, np.array(list(points), dtype=float), log_snr)
    np.testing.assert_allclose(found, list(points.values()))
    assert not beyond_seen({"t_grid": t_grid}, np.array(list(points)), log_snr).any()
    # Of every line at least the nearest cell.
    cells = seen_cells(content | {"seen_32": seen + 20}, t_grid.numpy(), log_snr)
    np.testing.assert_array_equal(cells, [[False, False, True]] * 3)
    np.testing.assert_array_equal(seen_cells(content, t_grid.numpy(), log_snr), [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert seen_cells({"t_grid": t_grid}, t_grid.numpy(), log_snr) is None


def test_a_band_holds_no_cascade():
    with pytest.raises(ValueError, match="needs a model that was trained on all pairs"):
        kl_cascade(exact(9) | {"seen_32": around(LOG_SNR, 1.0)}, LOG_SNR, 4)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_best_schedule_of_one_clock_is_that_of_brute_force(weight):
    """Two inner points anywhere on a coarse table of timesteps, from the closed form of the whole image."""
    table = DDIMScheduler(num_train_timesteps=60).log_snr.numpy()
    grid = timestep_grid(30, 60, "uniform_log_snr", log_snr=table)
    snr = np.exp(table)
    whole = sum(errors(snr, 0 * snr))
    content = {"t_grid": torch.from_numpy(grid), "snr_grid": torch.from_numpy(snr[grid]), "model_type": "baseline"}
    content["mse_64"] = torch.from_numpy(whole[grid])[:, None].expand(30, 30)
    clock = table if weight == 1 else snr ** (1 - weight) / (1 - weight)

    def cost(timesteps):
        m, w = whole[timesteps], clock[timesteps]
        # The chain's own sum at weight 0, as everywhere.
        return ((m[:-1] - (m[1:] if weight else 0)) * np.diff(w)).sum() / 2

    best = min(cost([59, i, j, 0]) for i in range(58, 1, -1) for j in range(i - 1, 0, -1))
    refined = kl_refined(content, table, 3, weight, diagonal=True)
    assert all(t_64 == t_32 for t_64, t_32 in refined.path.points)
    # Between its lines the map is interpolated.
    assert cost([t for t, _ in refined.path.points]) == pytest.approx(best, rel=2e-3)
    assert refined.path_cost == pytest.approx(best, rel=2e-2)


def test_the_best_schedule_of_a_baseline_goes_all_the_way(stage, refused, run, tmp_path):
    """Its map is measured along its one clock, by the evaluation that needs it, and its path has one scale."""
    flags = ["--checkpoint_dir", run / "checkpoints", "--heatmap_dir", tmp_path, "--grid", 4, "--metrics", "swd"]
    flags += ["--model_type", "baseline", "--path_type", "diagonal", "kl_diagonal", "--num_images", 3]
    flags += ["--heatmap_images", 2, "--cache_dir", run / "cache", "--output", tmp_path / "scores.csv", *HARDWARE]
    stage(eval_fid_batch, *flags)
    rows = read_rows(tmp_path / "scores.csv")
    assert [(row["path_type"], row["nfe"]) for row in rows] == [("diagonal", "3"), ("kl_diagonal", "3")]
    content = load_heatmap(tmp_path / "heatmap_4_baseline_1ep.pth")
    assert content["model_type"] == "baseline" and "mse_64" in content and "jacobian" not in content
    points = [point[:1] for point in kl_refined(content, LOG_SNR, 3, 1.0, diagonal=True).path.points]
    assert rows[1]["path_fingerprint"] == Path(points, "kl_diagonal", {}).fingerprint()
    flags = ["--checkpoint", run / "checkpoints/baseline_1ep.pth", "--heatmap", tmp_path / "heatmap_4_baseline_1ep.pth"]
    flags += ["--path_type", "kl_diagonal", "--num_images", 2, "--output", tmp_path / "samples"]
    stage(generate_with_path_30, *flags, *HARDWARE)
    assert load_schedule(tmp_path / "samples/schedule.json").points == tuple(points)
    flags = ["--heatmap", tmp_path / "heatmap_4_baseline_1ep.pth", "--output", tmp_path / "plan"]
    refused(plan_path, *flags, says=("model of one scale", "kl_diagonal"))


def test_a_heatmap_that_does_not_say_where_its_model_was_trained(stage, refused, run, tiny, tmp_path):
    """The checkpoint does: paths keep to it, and a cascade is refused before any map is computed."""
    stage(train_lift, *tiny(tmp_path), "--cache_dir", run / "cache", "--epochs", 1, "--t_pairs", "band:diagonal,1")
    checkpoint, file = tmp_path / "checkpoints/lift_dual_timestep_1ep.pth", tmp_path / "map.pth"
    flags = ["--checkpoint", checkpoint, "--cache_dir", run / "cache", "--output", file, "--grid", 4, "--maps", "mse"]
    stage(compute_heatmap_30, *flags, "--num_images", 2, *HARDWARE)
    content = load_heatmap(file)
    del content["seen_32"], content["format_version"]
    rises = content["clipped_mse_64"] * torch.exp((content["log_snr_grid"] - content["log_snr_grid"][:, None]).abs())
    save_heatmap(file, content | {"clipped_mse_64": rises})
    flags = ["--checkpoint", checkpoint, "--heatmap", file, "--num_images", 1, "--output", tmp_path / "samples"]
    stage(generate_with_path_30, *flags, "--path_type", "kl", *HARDWARE)
    t_64, t_32 = np.array(load_schedule(tmp_path / "samples/schedule.json").points).T
    assert np.abs(LOG_SNR[t_64] - LOG_SNR[t_32]).max() < 0.5 + 0.1
    flags = ["--checkpoint_dir", tmp_path / "checkpoints", "--heatmap_dir", tmp_path / "none", "--model_type", "lift"]
    flags += ["--path_type", "cascade:best", "--metrics", "swd", "--num_images", 3, "--cache_dir", run / "cache"]
    flags += ["--output", tmp_path / "scores.csv", *HARDWARE]
    failed = run_stage(eval_fid_batch, *flags)
    assert failed.status == 1 and "cascade:best needs a model that was trained on all pairs" in failed.message
    assert not (tmp_path / "none").exists()


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
