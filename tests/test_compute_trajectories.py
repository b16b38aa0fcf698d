"""The stage of trajectories: what it measures, prints and writes, what it keeps, and what it refuses."""

import math
import shutil

import numpy as np
import pytest
import torch

import compute_trajectories
from checkpoint import build_model, load_model, read_checkpoint, save_checkpoint
from conftest import HARDWARE, list_files, results_of
from diffusion.multistep import Line, Parabola
from diffusion.sampler import SeededNoise, image_seeds
from diffusion.step import level_of
from paths.families import diagonal, log_snr_shift
from paths.path import Path
from planning.deviation import deviation
from planning.trajectories import Band, Trajectories, fine_trajectories
from planning.trajectory_file import (
    load_trajectories,
    near_diagonal,
    save_trajectories,
    trajectories_of,
    trajectory_fingerprint,
)

LINES = 8
FEW = ["--num_images", 3, "--lines", LINES, *HARDWARE]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(run, tmp_path_factory):
    """Checkpoints by name: those of the run, and models of random weights with its config but for some changes."""
    folder = tmp_path_factory.mktemp("models")
    content = read_checkpoint(run.lift)
    changes = {
        "residual in a band": {"representation": "residual", "t_pairs": "band:2"},
        "shared_t": {"model_type": "shared_t", "t_pairs": "same"},
        "single_t": {"model_type": "single_t"},
        "no_t": {"model_type": "no_t"},
        "zero terminal": {"beta_schedule": "cosine_zero_terminal", "prediction_type": "v"},
        "flow": {"beta_schedule": "flow", "prediction_type": "velocity"},
    }
    files = {"baseline": run.baseline, "dual": run.lift}
    for name, changed in changes.items():
        config = content["config"] | changed
        torch.manual_seed(1)
        model = build_model(config)
        for parameter in model.parameters():  # Layers that begin at zero would say nothing.
            parameter.data += 0.02 * torch.randn_like(parameter)
        files[name] = folder / f"{name.replace(' ', '_')}.pth"
        state = {"config": config, "model_state": model.state_dict(), "ema_state": None}
        save_checkpoint(files[name], content | state)
    return files


def expected_lines(loaded, count=LINES, start=None):
    log_snr = loaded.scheduler.log_snr.numpy()
    start = 999 if start is None else start
    path = diagonal(count, "uniform_log_snr", loaded.model.num_scales, log_snr, start=start)
    if loaded.config["representation"] == "residual" and loaded.model.num_scales == 2:
        path = log_snr_shift(path, math.log(4), log_snr)
    return path.points


def assert_measured(found, loaded, cells=None, seed=0, count=3):
    """The same by the function itself, from the noise of the seeds of samples."""
    source = SeededNoise(image_seeds(seed, count))
    noise = tuple(source.draw((3, 16 >> scale, 16 >> scale)) for scale in range(loaded.model.num_scales))
    lines = [list(point) for point in expected_lines(loaded)]
    assert found.points.tolist() == lines
    again = fine_trajectories(loaded.denoise, loaded.scheduler, lines, noise, cells, progress=False)
    assert torch.equal(found.cells, again.cells) and found.nfe == again.nfe
    for one, other in zip(found.bands, again.bands, strict=True):
        assert one.scales == other.scales and one.result == other.result
        torch.testing.assert_close(one.variances, other.variances, rtol=1e-4, atol=1e-9)
        rows = [torch.cat([band.states.flatten(0, 1), band.seen.flatten(0, 1)]) for band in (one, other)]
        products = [row @ row.T for row in rows]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4 * products[0].max().item())


def test_a_baseline_is_measured_along_its_lines(stage, models, tmp_path):
    ended = stage(compute_trajectories, "--checkpoint", models["baseline"], *FEW)
    file = results_of("baseline") / "trajectories_baseline_2ep.pth"
    assert f"3 trajectories of {LINES} steps, {LINES} network calls each\n" in ended.output
    assert f"trajectories {file}" in ended.output.replace(f"{tmp_path}/", "")
    found, said = load_trajectories(file)
    loaded = load_model(models["baseline"])
    assert_measured(found, loaded)
    assert (said["fingerprint"], said["weights"], said["epoch"]) == (loaded.fingerprint, "raw", 2)
    assert (said["num_images"], said["lines"], said["start"], said["seed"]) == (3, LINES, 999, 0)
    assert (said["model_type"], said["representation"], said["precision"]) == ("baseline", "overcomplete", "fp32")
    paths = [[[0], [2], [5]], [[0], [3], [7]]]
    values = deviation(found, Line())(paths)
    assert np.isfinite(values).all() and (values > 0).all()


def test_two_clocks_are_measured_within_reach(stage, models):
    """Of a model that was trained on all pairs: wherever either scale leads by at most so much."""
    loaded = load_model(models["dual"])
    log_snr = loaded.scheduler.log_snr[[point[0] for point in expected_lines(loaded)[:-1]]]
    apart = (log_snr[:, None] - log_snr).abs()
    counts = []
    for reach in (0, 2.5, 6):
        ended = stage(
            compute_trajectories, "--checkpoint", models["dual"], *FEW, "--reach", reach, "--output", f"{reach}.pth"
        )
        found, said = load_trajectories(f"{reach}.pth")
        assert torch.equal(found.cells >= 0, apart <= reach) and said["reach"] == reach
        counts.append(found.nfe - LINES)
        beside = f", of which {counts[-1]} beside the diagonal" if reach else ""
        assert f"{LINES} steps, {found.nfe} network calls each{beside}\n" in ended.output
        assert_measured(found, loaded, apart <= reach)
    assert counts[0] == 0 < counts[1] < counts[2]


def test_a_residual_pair_is_measured_where_it_was_trained(stage, models):
    stage(compute_trajectories, "--checkpoint", models["residual in a band"], *FEW, "--reach", 9, "--seed", 3)
    [file] = [file for file in results_of("dual").parent.rglob("*.pth")]
    assert file.name == "trajectories_2ep.pth"
    found, said = load_trajectories(file)
    loaded = load_model(models["residual in a band"])
    lines, log_snr = expected_lines(loaded)[:-1], loaded.scheduler.log_snr.tolist()
    expected = torch.eye(LINES, dtype=torch.bool)
    for i, (fine, _) in enumerate(lines):
        trained = [value for value in log_snr if abs(value - log_snr[fine]) <= 2]
        for j, (_, coarse) in enumerate(lines):
            lead = abs(log_snr[coarse] - log_snr[lines[i][1]])
            expected[i, j] |= lead <= 9 and min(abs(log_snr[coarse] - value) for value in trained) <= 0.05
    assert LINES < expected.sum() < LINES**2
    assert torch.equal(found.cells >= 0, expected)
    assert said["representation"] == "residual" and [band.scales for band in found.bands] == [(1,), (0,)]
    assert_measured(found, loaded, expected, seed=3)


def test_one_shared_clock_has_the_lines_alone(stage, models):
    stage(compute_trajectories, "--checkpoint", models["shared_t"], *FEW, "--output", "found.pth")
    found, _ = load_trajectories("found.pth")
    assert found.nfe == LINES and torch.equal(found.cells >= 0, torch.eye(LINES, dtype=torch.bool))
    assert_measured(found, load_model(models["shared_t"]))


def test_trajectories_begin_where_there_is_a_signal(stage, refused, models, tmp_path):
    model = ["--checkpoint", models["zero terminal"], "--reach", 0]
    stage(compute_trajectories, *model, *FEW, "--output", tmp_path / "found.pth")
    found, said = load_trajectories("found.pth")
    assert said["start"] == 998 and found.points[0].tolist() == [998, 998] and found.log_snr[:-1].isfinite().all()
    output = ["--output", tmp_path / "other.pth"]
    says = ("--start 999 is beyond timestep 998", "has a signal")
    refused(compute_trajectories, *model, *FEW, *output, "--start", 999, says=says)
    refused(compute_trajectories, *model, *FEW, *output, "--start", 1000, says=("--start 1000 is beyond",))
    says = (f"--lines {LINES} are more than the {LINES - 1} timesteps below --start",)
    refused(compute_trajectories, *model, *FEW, *output, "--start", LINES - 1, says=says)
    stage(compute_trajectories, *model, *FEW, *output, "--start", LINES)
    assert load_trajectories(tmp_path / "other.pth")[0].points[:, 0].tolist() == list(range(LINES, -1, -1))


def test_flow_has_no_signal_at_its_last_timestep(stage, models, tmp_path):
    # A sampler forgets what it sees there, and a cost that kept it would be of other paths.
    stage(compute_trajectories, "--checkpoint", models["flow"], "--reach", 0, *FEW, "--output", tmp_path / "found.pth")
    found, said = load_trajectories(tmp_path / "found.pth")
    assert said["start"] == found.points[0, 0] == 998
    level = level_of(load_model(models["flow"]).scheduler, 998)
    assert found.log_snr[0, 0].item() == pytest.approx(2 * level.log_snr)


def test_a_reach_below_the_spacing_of_lines_is_said(stage, models, tmp_path):
    model = ["--checkpoint", models["dual"], *FEW]
    ended = stage(compute_trajectories, *model, "--reach", 0.01, "--output", tmp_path / "a.pth")
    assert "no pair of lines beside the diagonal is within --reach 0.01" in ended.notes
    tied = stage(compute_trajectories, *model, "--reach", 0, "--output", tmp_path / "b.pth")
    assert "note:" not in tied.notes


@pytest.mark.parametrize("kind", ["single_t", "no_t"])
def test_a_model_that_predicts_less_than_it_reads_is_refused(refused, models, kind):
    says = f"is a '{kind}' model: Trajectories are not defined for a model that reads 2 scales and predicts 1, because"
    message = refused(compute_trajectories, "--checkpoint", models[kind], *FEW, says=(says,))
    assert message.endswith("; take a model that predicts all it reads.") and "likelihood" not in message


@pytest.mark.parametrize("flags", [["--num_images", 1], ["--lines", 2], ["--reach", -0.5], ["--reach", "nan"]])
def test_numbers_that_measure_nothing_are_refused(refused, models, flags):
    says = ("--num_images must be 2 or more, --lines 3 or more, and --reach 0 or more",)
    refused(compute_trajectories, "--checkpoint", models["dual"], *HARDWARE, *flags, says=says, status=2)


def test_a_file_is_kept_or_replaced(stage, refused, models, tmp_path):
    file = tmp_path / "found.pth"
    flags = ["--checkpoint", models["baseline"], *FEW, "--output", file]
    first = stage(compute_trajectories, *flags)
    assert "are kept" not in first.output
    before = list_files(tmp_path)["found.pth"]
    # What does not change what is measured does not matter either.
    again = stage(compute_trajectories, *flags, "--batch_size", 2)
    assert f"the trajectories of {file} have these settings and are kept" in again.output
    assert f"3 trajectories of {LINES} steps, {LINES} network calls each" in again.output
    assert list_files(tmp_path)["found.pth"] == before
    for other, names in (
        (["--num_images", 4], "num_images"),
        (["--seed", 1, "--start", 900], "start, seed"),
        (["--lines", 9], "lines"),
        (["--ema"], "fingerprint, weights"),
    ):
        says = (f"{file} exists with another {names}; pass --force or another --output",)
        refused(compute_trajectories, *flags, *other, says=says)
    replaced = stage(compute_trajectories, *flags, "--num_images", 4, "--force")
    assert "4 trajectories" in replaced.output and "are kept" not in replaced.output
    assert load_trajectories(file)[1]["num_images"] == 4


def test_what_is_no_file_of_trajectories_stays(stage, refused, run, models, tmp_path):
    flags = ["--checkpoint", models["baseline"], *FEW, "--output"]
    for kind, source in (("checkpoint", models["baseline"]), ("heatmap", run.heatmap)):
        file = tmp_path / f"{kind}.pth"
        shutil.copy(source, file)
        refused(compute_trajectories, *flags, file, says=(f"{file} holds no trajectories; make them with",))
        with pytest.raises(ValueError, match="holds no trajectories"):
            load_trajectories(file)
    says = ("is a checkpoint, which no trajectories replace; pass another --output",)
    refused(compute_trajectories, *flags, tmp_path / "checkpoint.pth", "--force", says=says)


def test_a_damaged_file_is_named_and_computed_again(stage, refused, models, tmp_path):
    file = tmp_path / "found.pth"
    flags = ["--checkpoint", models["baseline"], *FEW, "--output", file]
    stage(compute_trajectories, *flags)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip"):
        file.write_bytes(damaged)
        refused(compute_trajectories, *flags, says=(f"{file} is damaged", "compute it again"))
    stage(compute_trajectories, *flags, "--force")
    assert load_trajectories(file)[0].nfe == LINES
    with pytest.raises(FileNotFoundError, match=r"none.pth.*compute_trajectories.py"):
        load_trajectories(tmp_path / "none.pth")
    content = torch.load(file, weights_only=True)
    for lacking in ({"points": 0}, {"bands": [{"scales": (0,)}]}):
        torch.save(content | {"trajectories": lacking}, file)
        with pytest.raises(ValueError, match="lacks what trajectories have.*--force"):
            load_trajectories(file)
    torch.save(content | {"format_version": 99}, file)
    with pytest.raises(ValueError, match="format version 99; update LIFT"):
        load_trajectories(file)


def made_up(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    low = Band((0, 1), 0, draw(5).abs(), draw(2, 4, 5), draw(2, 6, 5))
    high = Band((0,), 0, draw(3).abs(), draw(1, 4, 3), draw(1, 6, 3))
    cells = torch.tensor([[0, 1, -1], [2, 3, 4], [-1, -1, 5]])
    points = torch.tensor([[900, 900], [500, 400], [100, 90], [0, 0]])
    log_snr = torch.tensor([[-3.0, -3], [0, 0.5], [3, 3.2], [math.inf, math.inf]], dtype=torch.float64)
    return Trajectories(points, log_snr, cells, (low, high), 6)


def test_a_file_holds_what_was_saved(tmp_path):
    trajectories, said = made_up(), {"fingerprint": "f", "seed": 3, "run": None}
    save_trajectories(tmp_path / "found.pth", trajectories, said)
    found, content = load_trajectories(tmp_path / "found.pth")
    assert content == said | {"format_version": 1}
    assert (found.nfe, len(found.bands)) == (6, 2)
    for name in ("points", "log_snr", "cells"):
        assert torch.equal(getattr(found, name), getattr(trajectories, name))
    for one, other in zip(found.bands, trajectories.bands, strict=True):
        assert (one.scales, one.result) == (other.scales, other.result) and torch.equal(one.variances, other.variances)
        # These are numbers of float32 to begin with.
        assert one.states.dtype == one.seen.dtype == torch.float64
        assert torch.equal(one.states, other.states) and torch.equal(one.seen, other.seen)
    paths = np.array([[[0, 0], [1, 1], [2, 2]], [[0, 0], [0, 1], [1, 2]]])
    assert (deviation(found, Parabola())(paths) == deviation(trajectories, Parabola())(paths)).all()


def test_the_fingerprint_is_that_of_what_was_measured(tmp_path):
    trajectories = made_up()
    save_trajectories(tmp_path / "found.pth", trajectories, {"fingerprint": "f"})
    one = trajectory_fingerprint(trajectories)
    assert len(one) == 16 and trajectory_fingerprint(load_trajectories(tmp_path / "found.pth")[0]) == one
    low, high = trajectories.bands
    others = [
        trajectories._replace(points=trajectories.points + 1),
        trajectories._replace(cells=trajectories.cells.T.contiguous()),
        trajectories._replace(bands=(low, high._replace(seen=high.seen + 1e-3))),
        trajectories._replace(bands=(low._replace(states=-low.states), high)),
    ]
    assert len({one, *map(trajectory_fingerprint, others)}) == 5


def test_a_default_file_is_found_without_the_model(models):
    class Chosen:
        checkpoint, ema = str(models["dual"]), True

    assert trajectories_of(Chosen).name == "trajectories_2ep_ema.pth"
    Chosen.checkpoint, Chosen.ema = str(models["baseline"]), False
    file = trajectories_of(Chosen)
    assert file.name == "trajectories_baseline_2ep.pth" and file.parent == results_of("baseline")


def test_pairs_near_the_diagonal_by_hand():
    """log SNR falls by 1 a timestep from 5; lines at 8, 6, 5, 2 of both, the coarse ones two ahead."""
    log_snr = 5.0 - np.arange(11.0)
    path = Path([(8, 6), (6, 4), (5, 3), (2, 0), (0, 0)], "lines", {})

    def near(reach, seen=None):
        return near_diagonal(path, log_snr, reach, seen).int().tolist()

    assert near(0) == np.eye(4, dtype=int).tolist()
    assert near(1) == near(1.9) == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert near(2) == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert near(3) == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert near(100) == np.ones((4, 4), dtype=int).tolist()
    # Trained from as noisy as the fine image to three ahead; beyond the noisiest line nothing is told apart.
    fine = torch.from_numpy(log_snr)
    seen = torch.stack([fine, (fine + 3).clamp(max=5.0)])
    # Fine 8: coarse 8 to 5; 6: 6 to 3; 5: 5 to 2; 2: 2 to 0.
    assert near(100, seen) == [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    # By less than a timestep they may be off: of 0.05 in log SNR.
    assert near(100, seen + torch.tensor([[0.04], [0.0]])) == near(100, seen)
    assert near(100, seen + torch.tensor([[0.06], [0.0]])) == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
