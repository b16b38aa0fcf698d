import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import figures.paths
import make_figures
import train_lift
from checkpoint import checkpoint_file, load_model, read_checkpoint, save_checkpoint
from children import signalling
from conftest import RUN, assert_same_run
from paths.families import cascade, diagonal, log_snr_shift
from paths.path import Path
from paths.schedule_file import save_schedule
from planning.regimes import (
    FAR,
    TimestepPairs,
    off_regime_note,
    pair_probabilities,
    parse_regime,
    resolve_regime,
    seen_range,
)
from scheduler import DDIMScheduler
from training.objective import step_generator

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


# Bands around paths


def target_of(path, t):
    """λ of the coarse scale where a path given by a rule has it."""
    lead = {"diagonal": 0.0, "image": np.log(4), "shift:-3.5": -3.5, "shift:2": 2.0}
    if path.startswith("heuristic"):
        return LOG_SNR[round(float(path.split(":")[1]) * t)].item()
    return min(max(LOG_SNR[t].item() + lead[path], LOG_SNR[999].item()), LOG_SNR[0].item())


@pytest.mark.parametrize("path", ["diagonal", "image", "shift:2", "shift:-3.5", "heuristic:0.8"])
@pytest.mark.parametrize("width", [0, 0.05, 1, 6.9])
def test_a_band_around_a_rule_is_even_around_it_at_every_fine_timestep(path, width):
    p = probabilities(f"band:{path},{width}").numpy()
    table = LOG_SNR.numpy()
    np.testing.assert_allclose(p.sum(1), 1e-3, rtol=1e-12)
    for t in range(0, 1000, 37):
        distance = np.abs(table - target_of(path, t))
        near = (distance <= width / 2) | (np.arange(1000) == distance.argmin())
        np.testing.assert_allclose(p[t], near / near.sum() / 1000, rtol=1e-12)


def test_the_coarse_clock_waits_at_the_end_of_the_schedule():
    pairs = probabilities("band:image,0").nonzero()
    clean = pairs[LOG_SNR[pairs[:, 0]] + np.log(4) >= LOG_SNR[0]]
    assert len(clean) > 1 and (clean[:, 1] == 0).all()
    assert (probabilities("band:shift:-3.5,0").nonzero()[-1] == 999).all()


@pytest.mark.parametrize("path", ["diagonal", "image", "shift:-3.5", "heuristic:0.8"])
def test_limits_of_a_band_around_a_rule_are_its_curve_and_independent_clocks(path):
    torch.testing.assert_close(probabilities(f"band:{path},inf"), probabilities("independent"), rtol=1e-12, atol=0)
    tied = probabilities(f"band:{path},0") > 0
    assert (tied.sum(1) == 1).all()
    if path == "diagonal":
        assert torch.equal(tied, torch.eye(1000, dtype=torch.bool))


def test_a_band_around_a_file_is_around_each_of_its_places(tmp_path):
    # The path goes down both axes, by itself.
    path = Path(((999, 999), (999, 500), (400, 500), (0, 0)), "hand-made", {})
    file = tmp_path / "path,with:comma.json"
    save_schedule(path, file, LOG_SNR, {})
    config = resolve_regime(f"band:{file},1", "dual")
    assert config["t_pairs"] == f"band:path:{path.fingerprint()},1" and config["t_pairs_points"][1] == [999, 500]
    assert resolve_regime(f"band:path:{file},1", "dual") == config
    p, table = pair_probabilities(config, LOG_SNR).numpy(), LOG_SNR.numpy()
    expected = np.zeros((1000, 1000))
    places = np.concatenate(
        [
            np.array(start) + np.outer((np.arange(1000) + 0.5) / 1000, np.subtract(end, start))
            for start, end in itertools.pairwise(path.points)
        ]
    )
    for t_64, t_32 in places.round().astype(int):
        near = np.abs(table - table[t_32]) <= 0.5
        expected[t_64] += near / near.sum() / len(places)
    np.testing.assert_allclose(p, expected, rtol=1e-9)
    limit = pair_probabilities(config | {"t_pairs": "band:path:x,0"}, LOG_SNR)
    along = pair_probabilities(config | {"t_pairs": "path:x"}, LOG_SNR)
    torch.testing.assert_close(limit, along, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["band:image,1", "band:diagonal,0.5", "band:shift:-3,inf", "band:image,inf"])
def test_bands_are_whole_where_a_schedule_ends_without_a_signal(text):
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    p = probabilities(text, scheduler)
    assert p.isfinite().all() and p.sum().item() == pytest.approx(1, abs=1e-12)
    t_64, t_32 = TimestepPairs({"t_pairs": text, "t_pairs_points": None}, scheduler).draw(
        20_000, torch.Generator().manual_seed(0)
    )
    assert (p[t_64, t_32] > 0).all() and set(range(1000)) >= set(t_64.tolist())
    if text.endswith("inf"):
        assert (p == p[0, 0]).all()
    else:
        # Nothing is near a pair without a signal, which is itself on the path.
        assert p[999].nonzero().tolist() == [[999]] and (p[:999, 999] == 0).all()


@pytest.mark.parametrize(
    ("text", "widths"), [("4-1", (4, 2.5, 1)), ("0-0.5", (0, 0.25, 0.5)), ("1e-1-3", (0.1, 1.55, 3))]
)
def test_the_width_of_a_band_changes_evenly_over_the_run(text, widths):
    config = resolve_regime(f"band:image,{text}", "dual")
    assert parse_regime(config["t_pairs"]).changes
    for progress, width in zip((0, 0.5, 1), widths, strict=True):
        found = pair_probabilities(config, LOG_SNR, progress)
        torch.testing.assert_close(found, probabilities(f"band:image,{width}"), rtol=1e-12, atol=0)
        pairs = TimestepPairs(config, SCHEDULER)
        drawn, expected = (
            one.draw(100, torch.Generator().manual_seed(1))
            for one in (pairs.at(progress), TimestepPairs(resolve_regime(f"band:image,{width}", "dual"), SCHEDULER))
        )
        assert torch.equal(drawn[0], expected[0]) and torch.equal(drawn[1], expected[1])


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("band:image,1.0", "band:image,1"),
        ("band:shift:2.0,4-1", "band:shift:2,4-1"),
        ("band:shift:-2,1e-3", "band:shift:-2,0.001"),
        ("band:heuristic:0.8,3-3", "band:heuristic:0.8,3"),
        ("band:diagonal,inf", "band:diagonal,inf"),
        ("band:1.50", "band:1.5"),
    ],
)
def test_one_way_to_write_a_band_comes_out(text, config):
    assert resolve_regime(text, "dual") == {"t_pairs": config, "t_pairs_points": None}
    assert str(parse_regime(config)) == config


REGIMES = ["independent", "same", "shift:2", "heuristic:0.8", "band:2", "band:0.1", "path"]
REGIMES += ["band:image,1", "band:diagonal,0.05", "band:heuristic:0.8,3", "band:shift:-3.5,inf", "band:path,0.7"]


@pytest.mark.parametrize("text", REGIMES)
def test_draws_follow_the_probabilities(text, tmp_path):
    if "path" in text:
        save_schedule(cascade(4), tmp_path / "path.json", LOG_SNR, {})
        text = text.replace("path", f"path:{tmp_path / 'path.json'}")
    config = resolve_regime(text, "dual")
    t_64, t_32 = TimestepPairs(config, SCHEDULER).draw(100_000, torch.Generator().manual_seed(1))
    assert t_64.dtype == t_32.dtype == torch.int64
    p = pair_probabilities(config, LOG_SNR)
    assert (p[t_64, t_32] > 0).all()
    # In blocks over the plane, and by the difference of the clocks, which tells the places within a narrow band.
    t = torch.arange(1000)
    difference = (t[:, None] - t + 999).flatten()
    for shares, found in (
        (p.view(10, 100, 10, 100).sum((1, 3)).flatten(), t_64 // 100 * 10 + t_32 // 100),
        (torch.zeros(1999, dtype=torch.float64).index_add_(0, difference, p.flatten()), t_64 - t_32 + 999),
    ):
        counts = torch.bincount(found, minlength=len(shares))
        likely = shares * 100_000 > 5
        assert likely.any()
        expected = shares[likely] / shares[likely].sum() * counts[likely].sum()
        assert likely.sum() == 1 or chisquare(counts[likely], expected).pvalue > 1e-4


def test_draws_by_a_law_share_their_tables():
    """A step draws from a copy that knows how much of the run is over."""
    pairs = TimestepPairs(resolve_regime("band:2", "dual"), SCHEDULER)
    tables = []
    for progress in (0.0, 0.5):
        copy = pairs.at(progress)
        copy.draw_by(torch.ones(2, 1000).double(), 4, torch.Generator().manual_seed(0))
        tables.append(copy._rows[1])
    assert tables[0] is tables[1]


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
    "text",
    ["", "band", "band:", "band:-1", "band:nan", "shift:inf", "heuristic:0", "heuristic:1.1", "same:1", "up:2"]
    + ["band:image,", "band:,1", "band:image,-1", "band:image,nan", "band:image,inf-1", "band:image,4-", "band:image,x"]
    + ["band:shift:x,1", "band:heuristic:2,1", "band:path:,1"],
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
        ("band:shift:1,0", log_snr_shift(diagonal(6), 1, LOG_SNR.numpy()), None),
        # It starts at pure noise in both scales, where the coarse one of the band is ahead.
        ("band:shift:3,0", log_snr_shift(diagonal(6), 3, LOG_SNR.numpy()), 3),
        ("band:image,1", diagonal(6), None),
        ("band:image,1", log_snr_shift(diagonal(6), 5, LOG_SNR.numpy()), 5 - np.log(4) - 0.5),
        ("band:shift:-2,2", diagonal(6), None),
        ("band:image,6", log_snr_shift(diagonal(6), 5, LOG_SNR.numpy()), None),
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


@pytest.mark.parametrize("text", ["band:2", "band:image,1"])
def test_what_is_off_is_counted_by_brute_force(text):
    config = {"model_type": "single_t"} | resolve_regime(text, "single_t")
    path = log_snr_shift(diagonal(9), 5, LOG_SNR.numpy())
    table = LOG_SNR.numpy()
    seen_64, seen_32 = np.nonzero(pair_probabilities(config, LOG_SNR).numpy())
    off = [
        (np.abs(table[t_64] - table[seen_64]) + np.abs(table[t_32] - table[seen_32])).min()
        for t_64, t_32 in path.points[:-1]
    ]
    far = sum(distance > FAR for distance in off)
    note = off_regime_note(path, config, SCHEDULER)
    assert 0 < far < 9 and f"{far} of the 9 calls" in note and f"up to {max(off):.3g} " in note


@pytest.mark.parametrize("text", ["same", "heuristic:0.8", "band:2", "band:image,1", "shift:-3.5"])
@pytest.mark.parametrize("schedule", ["cosine_clipped", "cosine_zero_terminal"])
def test_the_range_seen_is_that_of_every_pair_that_is_drawn(text, schedule):
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type="v")
    config, table = {"model_type": "dual"} | resolve_regime(text, "dual"), scheduler.log_snr.numpy()
    t_64, t_32 = (t.numpy() for t in TimestepPairs(config, scheduler).draw(300_000, torch.Generator().manual_seed(0)))
    least, most = seen_range(config, scheduler).numpy()
    assert ((table[t_32] >= least[t_64]) & (table[t_32] <= most[t_64])).all()
    # Of so many pairs some come to the ends of a range.
    assert np.mean([table[t_32[t_64 == t]].max() == most[t] for t in range(0, 1000, 10)]) > 0.4
    assert np.mean([table[t_32[t_64 == t]].min() == least[t] for t in range(0, 1000, 10)]) > 0.4


def test_what_is_not_seen_has_the_range_of_its_neighbour():
    points = [[999, 999], [600, 999], [0, 0]]
    config = {"model_type": "dual", "t_pairs": "path:s.json", "t_pairs_points": points}
    least, most = seen_range(config, SCHEDULER)
    seen = pair_probabilities(config, LOG_SNR) > 0
    missing = (~seen.any(1)).nonzero()[:, 0].tolist()
    rows = seen.any(1).nonzero()[:, 0]
    for t in missing[:50]:
        near = rows[(rows - t).abs() == (rows - t).abs().min()]
        assert any(least[t] == LOG_SNR[seen[row]].min() and most[t] == LOG_SNR[seen[row]].max() for row in near)
    for t in rows[::20].tolist():
        assert (least[t], most[t]) == (LOG_SNR[seen[t]].min(), LOG_SNR[seen[t]].max())


@pytest.mark.parametrize("config", [{}, {"t_pairs": None}, {"t_pairs": "independent"}])
def test_all_pairs_have_no_range(config):
    assert seen_range({"model_type": "dual"} | config, SCHEDULER) is None


def test_a_band_that_changes_was_seen_up_to_the_checkpoint():
    path = log_snr_shift(diagonal(9), 5, LOG_SNR.numpy())
    seen = {"model_type": "dual", "epochs": 10}
    for text, epoch, off in (("8-0", 10, False), ("0-8", 10, False), ("0-8", 1, True), ("0-0.1", 10, True)):
        config = seen | {"epoch": epoch} | resolve_regime(f"band:image,{text}", "dual")
        assert (off_regime_note(path, config, SCHEDULER) is not None) == off
    # Of an epoch that is not over the steps count: 19 of 20 are nearly all.
    config = {"model_type": "dual", "epochs": 1, "epoch": 0, "step": 19} | resolve_regime("band:image,0-8", "dual")
    assert off_regime_note(path, config, SCHEDULER) is not None
    assert off_regime_note(path, config | {"steps_per_epoch": 20}, SCHEDULER) is None


def test_no_distance_is_lost_at_zero_snr():
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    config = {"model_type": "dual"} | resolve_regime("band:image,1", "dual")
    assert off_regime_note(log_snr_shift(diagonal(6), np.log(4), scheduler.log_snr.numpy()), config, scheduler) is None
    note = off_regime_note(Path(((999, 999), (500, 999), (0, 0)), "fine first", {}), config, scheduler)
    assert "1 of the 2 calls" in note and "up to inf" in note


def test_the_mean_of_a_noisy_image_is_as_far_from_it_wherever_the_path_says():
    # Averaging four pixels leaves a quarter of the noise.
    path = log_snr_shift(diagonal(9), 5, LOG_SNR.numpy())
    for regime, off in (("same", False), ("shift:1.386", False), ("shift:5", True), ("shift:-1.386", True)):
        config = {"model_type": "single_t"} | resolve_regime(regime, "single_t")
        assert (off_regime_note(path, config, SCHEDULER, "noisy") is not None) == off
        assert (off_regime_note(path, config, SCHEDULER, "x0") is not None) == (regime != "shift:5")


# At the very edge of a band

WHOLE = torch.arange(6, -7, -1, dtype=torch.float64)  # Log SNRs, of 13 timesteps, whose distances are exact.


def band_of_whole_distances(targets, width):
    """Which pairs are in a band around the targets of every t_64; of two timesteps as near the cleaner is nearest."""
    return [[abs(s - target) <= width / 2 or t == nearest(target) for t, s in enumerate(WHOLE)] for target in targets]


def nearest(target):
    return min(range(len(WHOLE)), key=lambda t: (abs(WHOLE[t] - target), t))


@pytest.mark.parametrize("width", [0, 1.5, 2, 4, 5.5, 24])
@pytest.mark.parametrize("shift", [0, 1, -2, 0.5, -1.5, 30])
def test_the_edge_of_a_band_is_in_it_and_of_two_nearest_the_cleaner(width, shift):
    config = resolve_regime(f"band:shift:{shift},{width}", "dual")
    inside = torch.tensor(band_of_whole_distances((WHOLE + shift).clamp(-6, 6).tolist(), width))
    expected = inside.double() / inside.sum(1, keepdim=True) / 13
    torch.testing.assert_close(pair_probabilities(config, WHOLE), expected, rtol=1e-12, atol=0)
    pairs = TimestepPairs(config, SimpleNamespace(log_snr=WHOLE))
    t_64, t_32 = pairs.draw(4000, torch.Generator().manual_seed(1))
    # Of so many draws each pair of the band gets some.
    drawn = torch.zeros(13, 13, dtype=torch.bool)
    drawn[t_64, t_32] = True
    assert torch.equal(drawn, inside)


@pytest.mark.parametrize("width", [0, 1, 3, 12, 11.5])
def test_a_band_of_clocks_holds_pairs_exactly_its_width_apart(width):
    inside = (WHOLE[:, None] - WHOLE).abs() <= width
    torch.testing.assert_close(pair_probabilities({"t_pairs": f"band:{width}"}, WHOLE) > 0, inside)


@pytest.mark.parametrize("shift", [1, 0.5, -2.5])
def test_a_shift_that_falls_between_two_timesteps_takes_the_cleaner(shift):
    expected = torch.zeros(13, 13, dtype=torch.float64)
    for t, value in enumerate(WHOLE.tolist()):
        expected[t, nearest(value + shift)] += 1 / 26
        expected[nearest(value - shift), t] += 1 / 26
    torch.testing.assert_close(pair_probabilities({"t_pairs": f"shift:{shift}"}, WHOLE), expected)


def test_a_call_is_far_beyond_its_limit_and_not_at_it():
    scheduler = SimpleNamespace(log_snr=WHOLE / 4)
    config = {"model_type": "dual"} | resolve_regime("same", "dual")
    path = Path(((6, 6), (6, 0), (0, 0)), "hand-made", {})  # λ_64 = 0 and λ_32 = 1.5.
    assert FAR == WHOLE[0] / 4 and off_regime_note(path, config, scheduler) is None
    note = off_regime_note(Path(((7, 7), (7, 0), (0, 0)), "hand-made", {}), config, scheduler)
    assert "1 of the 2 calls" in note and "up to 1.75 at fine and coarse timestep (7, 0)" in note


# After a replan


def shifted(by, table=None):
    """A curve of `follow`: the diagonal with the coarse scale ahead, within the schedule."""
    table = LOG_SNR if table is None else table
    return (table + by).clamp(table[-1], table[0])


def band_around(curve, width):
    """Which pairs are in a band around a curve, [T, T], timestep by timestep."""
    table, seen = LOG_SNR.numpy(), np.zeros((1000, 1000), bool)
    for t, target in enumerate(curve.tolist()):
        distance = np.abs(table - target)
        seen[t] = (distance <= width / 2) | (np.arange(1000) == distance.argmin())
    return seen


def following(epoch=None, before=0.0, now=0.0, **further):
    """The config of a checkpoint whose path is moved every second epoch; curves by their shift."""
    config = {"model_type": "dual", "representation": "overcomplete", "epochs": 9, "epoch": epoch, "replan_every": 2}
    state = {"before_32": shifted(before), "log_snr_32": shifted(now)}
    return config | resolve_regime("follow:1", "dual") | {"regime_state": state} | further


def test_moved_pairs_are_drawn_around_the_new_path_and_remember_the_one_before():
    first = TimestepPairs(following(regime_state=None), SCHEDULER)
    curves = [LOG_SNR, shifted(0.5), shifted(3.0)]
    pairs = first
    for before, now in itertools.pairwise(curves):
        pairs = pairs.moved_to(now)
        state = pairs.state
        assert torch.equal(state["log_snr_32"], now) and torch.equal(state["before_32"], before)
        assert state["log_snr_32"].dtype == torch.float64 and pairs.follow_width == 1
    # A move changes no other object, and the share of the run that is over has no say.
    for name in ("log_snr_32", "before_32"):
        torch.testing.assert_close(first.state[name], LOG_SNR, rtol=1e-12, atol=0)
    t_64, t_32 = pairs.at(0.3).draw(50_000, torch.Generator().manual_seed(5))
    again = pairs.draw(50_000, torch.Generator().manual_seed(5))
    assert torch.equal(t_64, again[0]) and torch.equal(t_32, again[1])
    band = band_around(shifted(3.0), 1)
    expected = band / band.sum(1, keepdims=True) / 1000
    assert band[t_64, t_32].all()
    # t_64 is even, and so is t_32 within the band at each; in tens, so that each is drawn often.
    assert chisquare(np.bincount(t_64, minlength=1000)).pvalue > 1e-4
    counts = np.bincount(t_64 // 10 * 100 + t_32 // 10, minlength=10_000)
    shares = expected.reshape(100, 10, 100, 10).sum((1, 3)).ravel() * 50_000
    likely = shares > 5
    assert chisquare(counts[likely], shares[likely] / shares[likely].sum() * counts[likely].sum()).pvalue > 1e-4


def test_pairs_that_go_on_from_a_state_are_those_that_were_moved():
    config = following(before=0.5, now=1.0)
    resumed, first = TimestepPairs(config, SCHEDULER), TimestepPairs(config | {"regime_state": None}, SCHEDULER)
    moved = first.moved_to(shifted(0.5)).moved_to(shifted(1.0))
    assert torch.equal(moved.state["before_32"], shifted(0.5))
    drawn = [pairs.draw(500, torch.Generator().manual_seed(2)) for pairs in (resumed, moved)]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    np.testing.assert_array_equal(pair_probabilities(config, LOG_SNR) > 0, band_around(shifted(1.0), 1))


# Replanned after epochs 2, 4, ...: at once nothing is trained around the new path, later both count.
# Within an epoch steps decide, three to each here.
@pytest.mark.parametrize(
    ("epoch", "steps", "curves"),
    [
        (1, {}, (0, 2)),
        (2, {}, (0,)),
        (3, {}, (0, 2)),
        (4, {}, (0,)),
        (4, {"steps_per_epoch": 3, "step": 12}, (0,)),
        (4, {"steps_per_epoch": 3, "step": 13}, (0, 2)),
        (5, {"steps_per_epoch": 3, "step": 17}, (0, 2)),
        (6, {"steps_per_epoch": 3, "step": 18}, (0,)),
    ],
)
def test_a_checkpoint_has_seen_the_band_before_and_once_it_trained_on_the_new_one(epoch, steps, curves):
    config = following(epoch, before=0.0, now=2.0, **steps)
    seen = np.any([band_around(shifted(by), 1) for by in curves], 0)
    least, most = seen_range(config, SCHEDULER).numpy()
    np.testing.assert_array_equal(least, np.where(seen, LOG_SNR, np.inf).min(1))
    np.testing.assert_array_equal(most, np.where(seen, LOG_SNR, -np.inf).max(1))
    # The old band ends at a shift of 0.5 and the new one at 2.5, and from there FAR is to be crossed.
    for by, far in ((0.0, False), (1.8, False), (2.4, len(curves) == 1), (3.8, len(curves) == 1), (4.4, True)):
        path = log_snr_shift(diagonal(6), by, LOG_SNR.numpy())
        assert (off_regime_note(path, config, SCHEDULER) is not None) == far, by


def test_before_the_first_replan_the_band_is_where_it_began():
    for representation, by in (("overcomplete", 0.0), ("residual", np.log(4))):
        config = following(1, representation=representation)
        pairs = TimestepPairs(config | {"regime_state": None}, SCHEDULER)
        for state in (None, pairs.state):
            least, most = seen_range(config | {"regime_state": state}, SCHEDULER).numpy()
            seen = band_around(shifted(by), 1)
            np.testing.assert_array_equal(least, np.where(seen, LOG_SNR, np.inf).min(1))
            np.testing.assert_array_equal(most, np.where(seen, LOG_SNR, -np.inf).max(1))


@pytest.mark.parametrize("model_type", ["baseline", "shared_t"])
def test_models_with_one_clock_are_never_off(model_type):
    scales = 1 if model_type == "baseline" else 2
    assert off_regime_note(diagonal(4, num_scales=scales), {"model_type": model_type}, SCHEDULER) is None


def test_a_run_shows_its_regime_and_says_so_in_its_checkpoint(stage, tiny, cache, tmp_path, trainer):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--t_pairs", "band:1.5", "--model", "single_t")
    config = load_model(checkpoint_file(tmp_path / "checkpoints", "single_t", 2)).config
    assert (config["t_pairs"], config["t_pairs_points"]) == ("band:1.5", None)
    run = trainer("--t_pairs", "band:1.5", "--output_dir", tmp_path / "a", "--log_dir", tmp_path / "b")
    batches = [run.draw(*next(run.batches.epoch(0))[:2]) for run.step in range(50)]
    t_64, t_32 = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("t_64", "t_32"))
    difference = (LOG_SNR[t_64] - LOG_SNR[t_32]).abs()
    assert difference.max() <= 1.5 and difference.max() > 1 and len(t_64) >= 200


def test_the_band_of_a_run_changes_from_its_first_step_to_its_last(trainer):
    run = trainer("--t_pairs", "band:diagonal,6-0", "--batch_size", 12, "--epochs", 11)
    assert len(run.batches) == 1
    spreads = []
    for run.step in range(11):
        batch = run.draw(*next(run.batches.epoch(0))[:2])
        spreads.append((LOG_SNR[batch.t_64] - LOG_SNR[batch.t_32]).abs().max().item())
        # The nearest timestep is always there.
        assert spreads[-1] <= (6 - 0.6 * run.step) / 2 + 1e-9
    assert spreads[0] > 1.5 and spreads[-1] == 0


def test_a_band_that_changes_resumes_exactly_and_not_to_another_end(stage, refused, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--t_pairs", "band:image,4-1", "--resume", "auto"]
    with signalling(4):
        stage(train_lift, *flags, "--epochs", 4)
    refused(train_lift, *flags, "--epochs", 5, says=["epochs = 4, not 5", "resume with the same value"])
    stage(train_lift, *flags, "--epochs", 4)
    assert_same_run(tmp_path, straight("--t_pairs", "band:image,4-1"))
    stage(train_lift, *flags, "--epochs", 4)


def test_a_band_around_a_file_is_resumed_with_its_file(stage, refused, tiny, cache, tmp_path):
    file = tmp_path / "path.json"
    save_schedule(diagonal(5), file, LOG_SNR, {})
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--resume", "auto", "--t_pairs"]
    stage(train_lift, *flags, f"band:{file},1")
    moved = file.rename(tmp_path / "moved.json")
    stage(train_lift, *flags, f"band:{moved},1", "--epochs", 3)
    refused(train_lift, *flags, "band:image,1", "--epochs", 4, says=["t_pairs = band:path:", "schedule file"])


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
    refused(train_lift, *flags, "shared_t", "--t_pairs", "band:1", says=["one shared timestep", "band:1"], status=2)
    refused(train_lift, *flags, "single_t", "--loss_weights", "1,2", says=["fine scale alone"], status=2)
    refused(train_lift, *flags, "dual", "--loss_weights", "1", says=["a loss for each scale"], status=2)
    refused(train_lift, *flags, "dual", "--t_pairs", "band:x", says=["no regime"], status=2)
    refused(train_lift, *flags, "dual", "--loss_weights", "0,0", says=["not a pair of weights"], status=2)


def test_the_figure_counts_pairs_against_independent_ones(stage, tmp_path):
    figure = figures.paths._timestep_pairs_figure({"one": ([0, 999, 999, 999], [0, 0, 0, 999])}, 1000, "")
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
        "band:image,4-1",
        "--num_pairs",
        1000,
        "--output",
        file,
    )
    assert file.stat().st_size > 5000
    with pytest.raises(ValueError, match="not all within 0 to 999"):
        figures.paths.plot_timestep_pairs({"one": ([1000], [0])}, 1000, file)
