import itertools
import json

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import make_figures
import map_plots
import train_lift
from checkpoint import checkpoint_file, load_model, read_checkpoint, save_checkpoint
from path import Path, cascade, diagonal, log_snr_shift
from regimes import FAR, TimestepPairs, off_regime_note, pair_probabilities, resolve_regime
from schedule_file import save_schedule
from scheduler import DDIMScheduler
from training import step_generator

SCHEDULER = DDIMScheduler()
LOG_SNR = SCHEDULER.log_snr
HAND_MADE = Path(((9, 9), (9, 5), (0, 0)), "hand-made", {})
CURVES = ("same", "shift:2", "shift:-3.5", "heuristic:0.8")


def probabilities(text, scheduler=SCHEDULER, points=None):
    return pair_probabilities({"t_pairs": text, "t_pairs_points": points}, scheduler.log_snr)


@pytest.mark.parametrize("text", [*CURVES, "independent", "band:2", "band:0.1"])
def test_every_clock_is_led_by_half_of_the_pairs(text):
    p = probabilities(text)
    assert p.shape == (1000, 1000) and p.sum().item() == pytest.approx(1, abs=1e-12) and p.min() >= 0
    # Either clock leads in half of the pairs, and is uniform there.
    for marginal in (p.sum(0), p.sum(1)):
        assert marginal.min().item() >= 0.0005 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("text", "equal"), [("band:0", "same"), ("shift:0", "same"), ("heuristic:1", "same"), ("band:inf", "independent")]
)
def test_limits_are_one_clock_and_independent_clocks(text, equal):
    torch.testing.assert_close(probabilities(text), probabilities(equal), rtol=1e-12, atol=0)


def test_one_clock_and_independent_clocks_are_what_their_names_say():
    torch.testing.assert_close(probabilities("same"), torch.eye(1000).double() / 1000)
    assert (probabilities("independent") == 1e-6).all()


def test_exchanging_the_scales_turns_a_shift_around():
    torch.testing.assert_close(probabilities("shift:-2"), probabilities("shift:2").T)
    torch.testing.assert_close(probabilities("band:2"), probabilities("band:2").T)


@pytest.mark.parametrize("width", [0.3, 2])
def test_a_band_holds_the_pairs_within_its_width_evenly(width):
    p, snr = probabilities(f"band:{width}"), SCHEDULER.snr.numpy()
    inside = np.abs(np.log(snr[:, None] / snr)) <= width
    np.testing.assert_array_equal(p.numpy() > 0, inside)
    # A pair is drawn from its row by half of the draws and from its column by the other half.
    for i, j in ((0, 0), (500, 480), (999, 930), (20, 25)):
        expected = inside[i, j] * (1 / inside[i].sum() + 1 / inside[:, j].sum()) / 2000
        assert p[i, j].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [2.0, -3.5])
def test_a_shift_holds_its_distance_until_a_clock_has_to_wait(shift):
    pairs = probabilities(f"shift:{shift}").nonzero()
    lead = LOG_SNR[pairs[:, 1]] - LOG_SNR[pairs[:, 0]]
    ahead, behind = (pairs[:, 1], pairs[:, 0]) if shift > 0 else (pairs[:, 0], pairs[:, 1])
    waits = (behind == 999) | (ahead == 0)
    # The nearest timestep is at most half of the largest gap between log SNRs away.
    largest_gap = LOG_SNR.diff().abs().max().item()
    assert (lead - shift).abs()[~waits].max() <= largest_gap / 2 + 1e-9
    assert (lead[waits].abs() <= abs(shift) + largest_gap / 2).all()
    found = {tuple(pair) for pair in pairs.tolist()}
    assert {(999, 999), (0, 0)} <= found and len(found) > 1000


def test_a_heuristic_keeps_its_ratio_until_the_fine_clock_has_to_wait():
    pairs = probabilities("heuristic:0.8").nonzero()
    moving = pairs[pairs[:, 0] < 999]
    assert (moving[:, 1] - 0.8 * moving[:, 0]).abs().max() <= 0.5 + 1e-9
    assert pairs[pairs[:, 0] == 999][:, 1].tolist() == list(range(799, 1000))


def test_pairs_along_a_path_are_even_over_steps_and_within_a_step():
    p = probabilities("path:x", points=HAND_MADE.points)
    # Half of the pairs are on the first step: t_64 = 9 and t_32 even in [5, 9], whose ends get half a timestep.
    expected = {9: 1 / 16, 8: 1 / 8, 7: 1 / 8, 6: 1 / 8}
    assert {j: p[9, j].item() for j in expected} == pytest.approx(expected, abs=1e-3)
    assert p[:9].sum().item() + p[9, 5].item() == pytest.approx(1 / 2 + 1 / 16, abs=1e-3)
    for i, j in p[:9].nonzero().tolist():
        assert abs(j - 5 * i / 9) <= 0.5 * (1 + 5 / 9) + 1e-9
    assert p[0, 0].item() == pytest.approx(1 / 2 * 1 / 18, abs=1e-3)


@pytest.mark.parametrize("text", ["independent", "same", "shift:2", "heuristic:0.8", "band:2", "band:0.1", "path"])
def test_draws_follow_the_probabilities(text, tmp_path):
    if text == "path":
        save_schedule(cascade(4), tmp_path / "path.json", LOG_SNR, {})
        text = f"path:{tmp_path / 'path.json'}"
    config = resolve_regime(text, "dual")
    t_64, t_32 = TimestepPairs(config, SCHEDULER).draw(100_000, torch.Generator().manual_seed(1))
    assert t_64.dtype == t_32.dtype == torch.int64
    p = pair_probabilities(config, LOG_SNR)
    assert (p[t_64, t_32] > 0).all()
    blocks = p.view(10, 100, 10, 100).sum((1, 3)).flatten()
    counts = torch.bincount(t_64 // 100 * 10 + t_32 // 100, minlength=100)
    likely = blocks * 100_000 > 5
    assert chisquare(counts[likely], blocks[likely] / blocks[likely].sum() * counts[likely].sum()).pvalue > 1e-4


def test_published_and_shared_pairs_keep_the_random_numbers_of_earlier_runs():
    expected = torch.randint(1000, (2, 50), generator=step_generator(3, 7, torch.device("cpu")))
    for text, second in (("independent", 1), ("same", 0)):
        pairs = TimestepPairs(resolve_regime(text, "dual"), SCHEDULER)
        t_64, t_32 = pairs.draw(50, step_generator(3, 7, torch.device("cpu")))
        assert torch.equal(t_64, expected[0]) and torch.equal(t_32, expected[second])


@pytest.mark.parametrize("text", ["shift:1", "band:1", "heuristic:0.5"])
def test_a_schedule_that_ends_at_zero_snr_has_pairs_as_well(text):
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    p = probabilities(text, scheduler)
    assert p.isfinite().all() and p.sum().item() == pytest.approx(1) and p[999, 999] > 0
    if text == "band:1":
        assert p[999, :999].sum() == 0


def test_the_regime_of_a_run():
    assert resolve_regime(None, "dual")["t_pairs"] == resolve_regime("independent", "single_t")["t_pairs"]
    assert [resolve_regime(None, name)["t_pairs"] for name in ("baseline", "shared_t")] == [None, "same"]
    assert resolve_regime("shift:2.0", "dual") == {"t_pairs": "shift:2", "t_pairs_points": None}


def test_a_path_is_kept_point_by_point(tmp_path):
    file = tmp_path / "path.json"
    save_schedule(HAND_MADE, file, LOG_SNR, {})
    config = resolve_regime(f"path:{file}", "dual")
    assert config == {"t_pairs": f"path:{HAND_MADE.fingerprint()}", "t_pairs_points": [[9, 9], [9, 5], [0, 0]]}
    assert json.loads(json.dumps(config)) == config
    save_schedule(diagonal(5, num_scales=1), file, LOG_SNR, {})
    with pytest.raises(ValueError, match="moves 1 scale"):
        resolve_regime(f"path:{file}", "dual")


@pytest.mark.parametrize(
    "text", ["", "band", "band:", "band:-1", "band:nan", "shift:inf", "heuristic:0", "heuristic:1.1", "same:1", "up:2"]
)
def test_what_is_no_regime_is_refused(text):
    with pytest.raises(ValueError, match="no regime of timestep pairs"):
        resolve_regime(text, "dual")


@pytest.mark.parametrize(
    ("regime", "path", "distance"),
    [
        (None, cascade(6), None),
        ("same", diagonal(6), None),
        ("same", log_snr_shift(diagonal(6), 1, LOG_SNR.numpy()), None),
        ("same", log_snr_shift(diagonal(6), 3, LOG_SNR.numpy()), 3),
        ("same", cascade(6), (LOG_SNR[0] - LOG_SNR[999]).item()),
        ("band:4", log_snr_shift(diagonal(6), 3, LOG_SNR.numpy()), None),
        ("band:1", log_snr_shift(diagonal(6), 4, LOG_SNR.numpy()), 3),
        ("shift:3", log_snr_shift(diagonal(6), 3, LOG_SNR.numpy()), None),
        ("shift:3", diagonal(6), 3),
    ],
)
def test_a_path_far_from_what_was_seen_is_pointed_out(regime, path, distance):
    config = {"model_type": "dual"} | (resolve_regime(regime, "dual") if regime else {})
    note = off_regime_note(path, config, SCHEDULER)
    if distance is None:
        assert note is None
        return
    assert distance > FAR and f"--t_pairs {regime}" in note and path.kind in note
    assert float(note.split("up to ")[1].split()[0]) == pytest.approx(distance, rel=0.03)


def test_what_is_off_is_counted_by_brute_force():
    config = {"model_type": "single_t"} | resolve_regime("band:2", "single_t")
    path = log_snr_shift(diagonal(9), 5, LOG_SNR.numpy())
    table = LOG_SNR.tolist()
    seen = [(i, j) for i, j in itertools.product(range(1000), repeat=2) if abs(table[i] - table[j]) <= 2]
    far = 0
    for t_64, t_32 in path.points[:-1]:
        near = (abs(table[t_64] - table[i]) + abs(table[t_32] - table[j]) <= FAR for i, j in seen)
        far += not any(near)
    assert 0 < far < 9 and f"{far} of the 9 calls" in off_regime_note(path, config, SCHEDULER)


def test_the_mean_of_a_noisy_image_is_as_far_from_it_wherever_the_path_says():
    # Averaging four pixels leaves a quarter of the noise.
    path = log_snr_shift(diagonal(9), 5, LOG_SNR.numpy())
    for regime, off in (("same", False), ("shift:1.386", False), ("shift:5", True), ("shift:-1.386", True)):
        config = {"model_type": "single_t"} | resolve_regime(regime, "single_t")
        assert (off_regime_note(path, config, SCHEDULER, "noisy") is not None) == off
        assert (off_regime_note(path, config, SCHEDULER, "x0") is not None) == (regime != "shift:5")


@pytest.mark.parametrize("model_type", ["baseline", "shared_t"])
def test_models_with_one_clock_are_never_off(model_type):
    scales = 1 if model_type == "baseline" else 2
    assert off_regime_note(diagonal(4, num_scales=scales), {"model_type": model_type}, SCHEDULER) is None


def test_a_run_shows_its_regime_and_says_so_in_its_checkpoint(stage, tiny, cache, tmp_path, trainer):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--t_pairs", "band:1.5", "--model", "single_t")
    config = load_model(checkpoint_file(tmp_path / "checkpoints", "single_t", 2)).config
    assert (config["t_pairs"], config["t_pairs_points"]) == ("band:1.5", None)
    run = trainer("--t_pairs", "band:1.5", "--output_dir", tmp_path / "a", "--log_dir", tmp_path / "b")
    batches = [run.draw(*next(run.batches.epoch(0))) for run.step in range(50)]
    t_64, t_32 = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("t_64", "t_32"))
    difference = (LOG_SNR[t_64] - LOG_SNR[t_32]).abs()
    assert difference.max() <= 1.5 and difference.max() > 1 and len(t_64) >= 200


def test_an_earlier_run_goes_on_and_a_run_of_another_regime_does_not(stage, refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--resume", "auto"]
    stage(train_lift, *flags)
    settings_file = next((tmp_path / "logs").rglob("settings.json"))
    last = checkpoint_file(tmp_path / "checkpoints", "dual", "last")
    content, settings = read_checkpoint(last), json.loads(settings_file.read_text())
    for name in ("t_pairs", "t_pairs_points", "loss_weights", "min_snr_gamma"):
        del content["config"][name], settings[name]
    save_checkpoint(last, content)
    settings_file.write_text(json.dumps(settings))
    stage(train_lift, *flags, "--epochs", 3)
    assert read_checkpoint(last)["config"]["t_pairs"] == "independent"
    for change in (["--t_pairs", "same"], ["--loss_weights", "1,0.5"], ["--min_snr_gamma", "5"]):
        refused(train_lift, *flags, *change, "--epochs", 4, says=[change[0][2:], "resume with the same value"])


def test_models_without_a_choice_refuse_one(refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--model"]
    refused(train_lift, *flags, "shared_t", "--t_pairs", "band:1", says=["one shared timestep", "band:1"])
    refused(train_lift, *flags, "single_t", "--loss_weights", "1,2", says=["fine scale alone"])
    refused(train_lift, *flags, "dual", "--t_pairs", "band:x", says=["no regime"], status=2)
    refused(train_lift, *flags, "dual", "--loss_weights", "0,0", says=["not a pair of weights"], status=2)


def test_the_figure_counts_pairs_against_independent_ones(stage, tmp_path):
    figure = map_plots._timestep_pairs_figure({"one": ([0, 999, 999, 999], [0, 0, 0, 999])}, 1000, "")
    [mesh] = [artist for axes in figure.axes for artist in axes.collections if axes.get_title() == "one"]
    counts = np.ma.filled(mesh.get_array(), 0).reshape(40, 40)  # Of t_64 and t_32.
    assert (counts[0, 0], counts[39, 0], counts[39, 39]) == pytest.approx((400, 800, 400)) and counts.sum() == 1600
    file = tmp_path / "pairs.png"
    stage(
        make_figures,
        "t_pairs",
        "independent",
        "same",
        "band:2",
        "shift:1",
        "band:1",
        "--num_pairs",
        1000,
        "--output",
        file,
    )
    assert file.stat().st_size > 5000
    with pytest.raises(ValueError, match="not all within 0 to 999"):
        map_plots.plot_timestep_pairs({"one": ([1000], [0])}, 1000, file)
