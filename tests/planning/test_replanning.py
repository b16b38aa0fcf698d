import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch

import compute_heatmap_30
import train_lift
import training.trainer
from checkpoint import checkpoint_file, load_model, read_checkpoint, save_checkpoint
from children import signalling
from conftest import HARDWARE, LAST, LOG, RUN, assert_same_run
from paths.families import cascade, diagonal, log_snr_shift
from paths.path import Path
from paths.schedule_file import load_schedule
from planning import replanning
from planning.map_file import load_heatmap
from planning.map_paths import seen_cells
from planning.regimes import TimestepPairs, off_regime_note, pair_probabilities, resolve_regime, seen_range
from planning.replanning import plan_within, replan
from scheduler import DDIMScheduler

SCHEDULER = DDIMScheduler()
LOG_SNR = SCHEDULER.log_snr.numpy()
SIZES = {name: getattr(replanning, name) for name in ("NUM_STEPS", "GRID_LINES")}  # Before `small`.
STEP = np.abs(np.diff(LOG_SNR)).max() / 2  # To the nearest timestep, at most.


def test_a_plan_within_reach_is_kept():
    planned = log_snr_shift(diagonal(9), 1, LOG_SNR)
    curve, path = plan_within(LOG_SNR, 30, planned, LOG_SNR)
    assert path.points == planned.points and path.kind == "follow"
    for t_64, t_32 in planned.points:
        assert curve[t_64] == pytest.approx(LOG_SNR[t_32], abs=1e-9)
    # Between its points it is straight in log SNR.
    (a, b), (c, d) = planned.points[3:5]
    middle = (a + c) // 2
    share = (LOG_SNR[middle] - LOG_SNR[a]) / (LOG_SNR[c] - LOG_SNR[a])
    assert curve[middle] == pytest.approx(LOG_SNR[b] + share * (LOG_SNR[d] - LOG_SNR[b]), abs=1e-9)


@pytest.mark.parametrize("width", [0.5, 2])
@pytest.mark.parametrize("planned", [cascade(18), diagonal(18), log_snr_shift(diagonal(18), -6, LOG_SNR)])
def test_a_plan_moves_the_band_by_half_its_width(width, planned):
    start = np.minimum(LOG_SNR + math.log(4), LOG_SNR[0])
    curve, path = plan_within(start, width, planned, LOG_SNR)
    assert np.abs(curve - start).max() <= width / 2 + 1e-12
    assert (np.diff(curve) <= 0).all()
    t_64, t_32 = np.array(path.points[1:-1]).T
    assert np.abs(LOG_SNR[t_32] - np.clip(start[t_64], LOG_SNR[-1], None)).max() <= width / 2 + STEP + 1e-12
    assert path.points[0] == (999, 999) and path.points[-1] == (0, 0) and path.num_scales == 2


def test_moving_again_and_again_comes_to_the_plan():
    planned = log_snr_shift(diagonal(18), 3, LOG_SNR)
    curve = LOG_SNR
    for _ in range(7):
        curve, path = plan_within(curve, 1, planned, LOG_SNR)
    assert path.points == planned.points


def narrowed(curve, width, planned):
    """`plan_within` timestep by timestep."""

    def within(wanted, t):
        return min(max(wanted, curve[t] - width / 2), curve[t] + width / 2)

    moved = []
    for t in range(1000):
        # The step of the planned path in which t_64 = t lies, and where in it, by log SNR.
        (a, b), (c, d) = next(step for step in itertools.pairwise(planned.points) if step[0][0] >= t >= step[1][0])
        share = (LOG_SNR[t] - LOG_SNR[a]) / (LOG_SNR[c] - LOG_SNR[a]) if c < a else 0
        moved.append(within(LOG_SNR[b] + share * (LOG_SNR[d] - LOG_SNR[b]), t))
    points = [planned.points[0]]
    for t_64, t_32 in planned.points[1:-1]:
        target = within(LOG_SNR[t_32], t_64)
        points.append((t_64, min(range(1000), key=lambda t: abs(LOG_SNR[t] - target))))
    points.append(planned.points[-1])
    return np.array(moved), tuple(point for k, point in enumerate(points) if point not in points[:k])


# The second one moves one clock at a time, so that all its points at one t_64 fall together in a narrow band.
@pytest.mark.parametrize("planned", [log_snr_shift(diagonal(7), 2, LOG_SNR), cascade(9, remaining=20)])
@pytest.mark.parametrize("width", [0.3, 3.0])
@pytest.mark.parametrize("by", [0.0, -1.0])
def test_a_plan_is_what_its_rule_says_timestep_by_timestep(planned, width, by):
    start = np.clip(LOG_SNR + by, LOG_SNR[-1], LOG_SNR[0])
    curve, path = plan_within(start, width, planned, LOG_SNR)
    moved, points = narrowed(start, width, planned)
    assert path.points == points and (path.kind, path.provenance) == ("follow", {"width": width})
    # Where one clock stands the path is at several places at once.
    held = {t for (t, _), (u, _) in itertools.pairwise(planned.points) if t == u}
    there = [t for t in range(1000) if t not in held]
    assert len(there) >= 999
    np.testing.assert_allclose(curve[there], moved[there], rtol=0, atol=1e-9)
    assert (len(path.points) < len(planned.points)) == bool(held)


def test_a_clock_without_a_signal_stays():
    log_snr = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v").log_snr.numpy()
    curve, _ = plan_within(log_snr, 2, Path(((998, 998), (500, 300), (0, 0)), "planned", {}), log_snr)
    assert curve[999] == -np.inf and np.isfinite(curve[:999]).all()


@pytest.fixture(autouse=True)
def small():
    """Plans of a few steps on a small map, which take most of the time of these runs."""
    with mock.patch.multiple(replanning, NUM_STEPS=4, GRID_LINES=6):
        yield


def test_a_replan_is_within_reach_and_the_same_each_time(ideal):
    pairs = TimestepPairs(resolve_regime("follow:2", "dual"), SCHEDULER)
    curve = pairs.state["log_snr_32"].numpy()
    np.testing.assert_array_equal(curve, LOG_SNR)
    found = [replan(ideal.denoise, SCHEDULER, ideal.images, curve, 2.0, seed=3) for _ in range(2)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert 0 < np.abs(found[0][0] - curve).max() <= 1 + 1e-12


def test_what_a_network_says_off_its_band_draws_no_plan_there(ideal):
    def wrong(xs, ts):
        off = (SCHEDULER.log_snr[ts[1]] - SCHEDULER.log_snr[ts[0]]).abs() > 2
        factors = torch.where(off, -3.0, 1.0).to(xs[0])[:, None, None, None]
        return tuple(factors * prediction for prediction in ideal.denoise(xs, ts))

    planned = []
    lines = {"NUM_STEPS": 6, "GRID_LINES": 30}
    lines["plan_within"] = lambda curve, width, path, log_snr: (
        planned.append(path) or plan_within(curve, width, path, log_snr)
    )
    with mock.patch.multiple(replanning, **lines):
        replan(wrong, SCHEDULER, ideal.images, LOG_SNR, 2.0, seed=3)
    t_64, t_32 = np.array(planned[0].points).T
    assert np.abs(LOG_SNR[t_64] - LOG_SNR[t_32]).max() <= 1 + STEP


@pytest.fixture
def ideal():
    """Gaussian denoising of independent pixels, which the coarse image helps."""

    class Ideal:
        images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3

        def denoise(self, xs, ts):
            predictions = []
            for x, t, variance in zip(xs, ts, (0.09, 0.0225), strict=True):
                signal = SCHEDULER.alphas_cumprod[t][:, None, None, None].to(x)
                # The noise that the posterior mean of a Gaussian of this variance leaves.
                predictions.append(x * (1 - signal).sqrt() / (signal * variance + 1 - signal))
            return tuple(predictions)

    return Ideal()


def watched(module, name, calls):
    """A function of a module that goes on as it is, with its arguments and result kept in a list."""
    original = getattr(module, name)

    def call(*args, **options):
        calls.append((args, options, original(*args, **options)))
        return calls[-1][2]

    return mock.patch.object(module, name, call)


@pytest.mark.parametrize("schedule", ["cosine_clipped", "cosine_zero_terminal"])
def test_a_replan_measures_its_band_alone_on_lines_even_in_log_snr(schedule, ideal):
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type="v")
    table = scheduler.log_snr.numpy()
    start = 999 if schedule == "cosine_clipped" else 998  # The noisiest timestep that has a signal.
    curve, width = np.minimum(table + 1.0, table[0]), 2.0
    maps, paths = [], []
    with watched(replanning, "error_map", maps), watched(replanning, "kl_refined", paths):
        moved, path = replan(ideal.denoise, scheduler, ideal.images, curve, width, seed=11)
    [(args, options, _)], [(planned_on, planned_with, refined)] = maps, paths
    grid = np.array(args[3])
    # Six lines, and with every further one the same share of log SNR, as near as timesteps come.
    assert grid.tolist()[0] == start and grid[-1] == 0 and len(grid) == 6
    expected = np.linspace(table[start], table[0], 6)
    assert [np.abs(table - value).argmin() for value in expected] == grid.tolist()
    lines = table[grid]
    distance = np.abs(lines - curve[grid][:, None])
    cells = (distance <= width / 2) | (distance == distance.min(1, keepdims=True))
    np.testing.assert_array_equal(options["cells"].numpy(), cells)
    assert 6 <= cells.sum() < 36 and options["maps"] == "mse" and options["seed"] == 11
    # The path is planned within the band too, and moved to as far as the band reaches.
    least, most = planned_on[0]["seen_32"].numpy()
    np.testing.assert_allclose([least, most], [curve - 1, curve + 1], rtol=1e-12)
    assert refined.path.nfe == 4 and planned_on[2:] == (4, 1.0) and not planned_with
    again = plan_within(curve, width, refined.path, table)
    np.testing.assert_array_equal(moved, again[0])
    assert path == again[1] and path.points[0] == (start, start)


def test_a_short_schedule_is_planned_on_all_of_its_timesteps(ideal):
    scheduler, maps = DDIMScheduler(num_train_timesteps=6), []
    with watched(replanning, "error_map", maps):
        _, path = replan(ideal.denoise, scheduler, ideal.images, scheduler.log_snr.numpy(), 99.0, seed=0)
    assert maps[0][0][3] == [5, 4, 3, 2, 1, 0] and path.points[0] == (5, 5)


def test_a_plan_is_as_large_as_the_manual_says(ideal):
    maps, paths, largest = [], [], []

    def denoise(xs, ts):
        largest.append(len(xs[0]))
        return ideal.denoise(xs, ts)

    with mock.patch.multiple(replanning, **SIZES), watched(replanning, "error_map", maps):
        with watched(replanning, "kl_refined", paths):
            replan(denoise, SCHEDULER, ideal.images, LOG_SNR, 0.5, seed=0)
    assert len(maps[0][0][3]) == 60 and paths[0][2].path.nfe == 18 and max(largest) == 64


# In a run

FOLLOW = ("--t_pairs", "follow:1", "--replan_every", 1, "--replan_images", 2)


def test_a_run_moves_its_band_and_its_checkpoints_say_where(stage, refused, tiny, cache, tmp_path):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, *FOLLOW, "--save_every", 1, "--ema_decay", 0.5)
    states = [read_checkpoint(checkpoint_file(tmp_path / "checkpoints", "dual", epoch)) for epoch in (1, 2)]
    curves = [state["regime_state"]["log_snr_32"].numpy() for state in states]
    before = LOG_SNR
    for epoch, curve in zip((1, 2), curves, strict=True):
        assert 0 < np.abs(curve - before).max() <= 0.5 + 1e-12
        path = load_schedule(tmp_path / LOG / f"path_{epoch}ep.json")
        t_64, t_32 = np.array(path.points[1:-1]).T
        assert np.abs(LOG_SNR[t_32] - curve[t_64]).max() <= 0.5 + STEP
        before = curve
    config = load_model(checkpoint_file(tmp_path / "checkpoints", "dual", 2)).config
    assert (config["t_pairs"], config["replan_every"], config["replan_images"]) == ("follow:1", 1, 2)
    seen = pair_probabilities(config, SCHEDULER.log_snr) > 0
    for t in range(0, 1000, 111):
        distance = np.abs(LOG_SNR - curves[1][t])
        expected = (distance <= 0.5) | (np.arange(1000) == distance.argmin())
        np.testing.assert_array_equal(seen[t].numpy(), expected)
    assert off_regime_note(load_schedule(tmp_path / LOG / "path_2ep.json"), config, SCHEDULER) is None
    assert "follow:1" in off_regime_note(cascade(6), config, SCHEDULER)
    flags = ["--checkpoint", checkpoint_file(tmp_path / "checkpoints", "dual", 2), "--cache_dir", cache, "--grid", 4]
    flags += ["--output", tmp_path / "map.pth", "--maps", "mse", "--num_images", 2, *HARDWARE]
    stage(compute_heatmap_30, *flags)
    content = load_heatmap(tmp_path / "map.pth")
    assert torch.equal(content["seen_32"], seen_range(config, SCHEDULER)) and content["measured"].all()
    # What was measured of it alone is the same.
    output = stage(compute_heatmap_30, *flags, "--coarse", 3, "--output", tmp_path / "thin.pth").notes
    assert "note: --coarse interpolates between pairs of timesteps that this model was not trained on" in output
    stage(compute_heatmap_30, *flags, "--seen_only", "--output", tmp_path / "seen.pth")
    seen = load_heatmap(tmp_path / "seen.pth")
    cells = seen_cells(content, content["t_grid"].numpy(), LOG_SNR)
    np.testing.assert_array_equal(seen["measured"], cells)
    assert 4 <= cells.sum() < 9 and torch.equal(seen["mse_32"][seen["measured"]], content["mse_32"][seen["measured"]])
    says = ("exists with another seen_only", "--force")
    refused(compute_heatmap_30, *flags, "--output", tmp_path / "seen.pth", says=says)
    refused(compute_heatmap_30, *flags, "--seen_only", "--coarse", 3, says=("leave it out",), status=2)


def test_a_run_draws_from_where_its_band_is(trainer):
    run = trainer(*FOLLOW)
    assert not run.replan_due
    run.step = 3
    assert run.replan_due
    run.replan()
    curve = run.objective.pairs.state["log_snr_32"]
    batches = [run.draw(*next(run.batches.epoch(0))[:2]) for run.step in range(50)]
    t_64, t_32 = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("t_64", "t_32"))
    assert ((SCHEDULER.log_snr[t_32] - curve[t_64]).abs() <= 0.5 + STEP).all() and (t_64 != t_32).any()
    assert run.model.training


def test_a_run_replans_after_so_many_epochs_and_its_checkpoints_hold_the_path_before_too(trainer):
    run = trainer("--t_pairs", "follow:1", "--replan_every", 2, "--replan_images", 5, "--ema_decay", 0.5)
    assert len(run.batches) == 3
    due = [run.step for run.step in range(20) if run.replan_due]
    assert due == [6, 12, 18]
    curves, calls = [run.objective.pairs.state["log_snr_32"].numpy()], []
    with watched(training.trainer, "replan", calls):
        for run.step in (6, 12):
            run.replan()
            save_checkpoint(run.snapshot_file, run.snapshot())
            config = load_model(run.snapshot_file).config
            state = config["regime_state"]
            curves.append(state["log_snr_32"].numpy())
            np.testing.assert_array_equal(curves[-1], calls[-1][2][0])
            np.testing.assert_array_equal(state["before_32"], curves[-2])
            assert (config["epoch"], config["replan_every"]) == (run.step // 3, 2)
            # Nothing is trained around the new path yet.
            before = config | {"regime_state": state | {"log_snr_32": state["before_32"]}}
            assert torch.equal(seen_range(config, SCHEDULER), seen_range(before, SCHEDULER))
            # A file saved within the next epoch has seen some of it.
            run.step += 1
            save_checkpoint(run.last_file, run.snapshot())
            later = load_model(run.last_file).config
            assert (later["epoch"], later["step"], later["steps_per_epoch"]) == (run.step // 3, run.step, 3)
            assert not torch.equal(seen_range(later, SCHEDULER), seen_range(before, SCHEDULER))
    # Images are those of the run, each once and in order, others each time; weights are the averaged ones.
    pixels = (run.batches.pixels.float() / 127.5 - 1).tolist()
    chosen = [[pixels.index(image) for image in args[2].tolist()] for args, _, _ in calls]
    assert all(len(set(images)) == 5 and images == sorted(images) for images in chosen) and chosen[0] != chosen[1]
    assert all(args[0].__self__ is run.ema and args[4] == 1 for args, _, _ in calls)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_the_first_path_is_the_diagonal_of_the_image(representation):
    lead = math.log(4) if representation == "residual" else 0
    config = resolve_regime("follow:1", "dual") | {"representation": representation}
    curve = TimestepPairs(config, SCHEDULER).state["log_snr_32"].numpy()
    np.testing.assert_allclose(curve, np.minimum(LOG_SNR + lead, LOG_SNR[0]), rtol=1e-12)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_run_that_replans_resumes_exactly(stage, tiny, cache, tmp_path, straight, step):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, *FOLLOW, "--resume", "auto", "--epochs", 4]
    with signalling(step):
        stage(train_lift, *flags)
    assert read_checkpoint(tmp_path / LAST)["step"] == step + 1
    stage(train_lift, *flags)
    assert_same_run(tmp_path, straight(*FOLLOW))
    for epoch in range(1, 5):
        name = f"{LOG}/path_{epoch}ep.json"
        assert (tmp_path / name).read_bytes() == (straight(*FOLLOW) / name).read_bytes()


def test_a_run_that_replans_may_be_prolonged(stage, tiny, cache, tmp_path, straight):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, *FOLLOW, "--resume", "auto", "--epochs"]
    stage(train_lift, *flags, 2)
    stage(train_lift, *flags, 4)
    assert_same_run(tmp_path, straight(*FOLLOW))


def test_a_full_disk_costs_the_file_of_a_path_alone(trainer, capsys):
    run = trainer(*FOLLOW)
    run.log_dir.mkdir(parents=True)
    with mock.patch("training.trainer.save_schedule", side_effect=OSError("disk full")):
        run.replan()
    assert "path_0ep.json could not be written (disk full)" in capsys.readouterr().err
    assert np.abs(run.objective.pairs.state["log_snr_32"].numpy() - LOG_SNR).max() > 0


def test_a_run_that_learns_variances_replans_by_its_predictions(trainer):
    run = trainer("--t_pairs", "follow:1", "--replan_every", 2, "--replan_images", 5, "--objective", "hybrid")
    calls = []
    with watched(training.trainer, "replan", calls):
        run.replan()
    [((denoise, *_), _, _)] = calls
    xs, ts = (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)), (torch.tensor([3, 700]),) * 2
    with torch.no_grad():
        for alone, whole in zip(denoise(xs, ts), run.ema.denoise(xs, ts), strict=True):
            assert torch.equal(alone, whole[:, :3])


def test_a_run_replans_on_all_of_its_images_at_most(trainer):
    for flags, said in (
        (["--replan_images", 12], (10, 12)),
        (["--replan_every", 3], (3, 12)),
        (["--limit", 17], (10, 16)),
    ):
        config = trainer("--t_pairs", "follow:1", *flags).config
        assert (config["replan_every"], config["replan_images"]) == said


def test_flags_of_replanning_are_refused_where_they_mean_nothing(refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache]
    refused(train_lift, *flags, "--replan_every", 2, says=["follow:W"], status=2)
    refused(train_lift, *flags, "--t_pairs", "follow:1", "--replan_images", 99, says=["--replan_images exceeds"])
    refused(
        train_lift, *flags, "--t_pairs", "follow:1", "--model", "single_t", says=["errors of both scales"], status=2
    )
    refused(train_lift, *flags, "--t_pairs", "follow:1", "--model", "shared_t", says=["one shared timestep"], status=2)
    for width in ("0", "inf", "x", ""):
        refused(train_lift, *flags, "--t_pairs", f"follow:{width}", says=["no regime"], status=2)
