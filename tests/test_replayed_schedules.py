"""Stages that follow a schedule of another model: what they do with it, what they say, and what they pass on."""

import json

import pytest

import eval_fid_batch
import generate_with_path_30
import interpolate
import plan_path
import train_lift
from checkpoint import load_model, read_checkpoint
from conftest import HARDWARE, STEPS
from paths.schedule_file import load_schedule
from planning.replay import replay


@pytest.fixture(scope="module")
def plan(stage, run, tmp_path_factory):
    """The schedule of four calls that is optimal on the map of the raw weights."""
    folder = tmp_path_factory.mktemp("plan")
    stage(plan_path, "--heatmap", run.heatmap, "--nfe", 4, "--bootstrap", 0, "--output", folder)
    return folder / "schedule_optimal_4.json"


@pytest.fixture(scope="module")
def other(stage, tiny, run, tmp_path_factory):
    """A model of another process."""
    folder = tmp_path_factory.mktemp("other")
    flags = ["--cache_dir", run.cache, "--ema_decay", 0.5, "--epochs", 1]
    stage(train_lift, *tiny(folder), *flags, "--beta_schedule", "cosine", "--prediction_type", "v", "--run", "other")
    return folder / "checkpoints/lift_dual_timestep_1ep.pth"


def lines(ended):
    return [line for line in ended.notes.splitlines() if "schedule" in line]


def flags_of(checkpoint, schedule, output):
    return ["--checkpoint", checkpoint, "--schedule", schedule, "--output", output, *HARDWARE]


def test_a_plan_says_what_it_was_made_for(run, plan):
    said, config = json.loads(plan.read_text()), load_model(run.lift).config
    for key in ("representation", "resolution", "epoch", "data_fingerprint", "beta_schedule", "num_train_timesteps"):
        assert said[key] == config[key] is not None
    assert (said["model_fingerprint"], said["weights"]) == (load_model(run.lift).fingerprint, "raw")
    assert said["run"] == config.get("run")


def test_a_plan_is_followed_by_log_snr_and_a_copy_stays_a_plan_for_its_own_weights(stage, run, plan, other, tmp_path):
    own, copy = tmp_path / "own", tmp_path / "copy"
    assert lines(stage(generate_with_path_30, *flags_of(run.lift, plan, own), "--num_images", 1)) == []
    assert load_schedule(own / "schedule.json") == load_schedule(plan)

    note, warning = lines(stage(generate_with_path_30, *flags_of(other, plan, copy), "--num_images", 1))
    assert note.startswith(
        f"note: schedule {plan} was made for 'cosine_clipped' with 1000 timesteps, and is followed at"
    )
    assert warning.startswith(f"warning: schedule {plan} was made for other weights (")
    assert "(run other, epoch 1, raw)" in warning
    copied, planned = load_schedule(copy / "schedule.json"), load_schedule(plan)
    assert copied.points == replay(str(plan), load_model(other).scheduler).points != planned.points
    kept = ("model_fingerprint", "resolution", "representation", "weights", "epoch", "run", "criterion", "cost")
    assert [copied.provenance[key] for key in kept] == [planned.provenance[key] for key in kept]
    assert copied.provenance["beta_schedule"] == "cosine"

    # The weights it was made for follow the copy where the plan was, and it is still of other weights for these.
    back, again = tmp_path / "back", tmp_path / "again"
    [note] = lines(stage(generate_with_path_30, *flags_of(run.lift, copy / "schedule.json", back), "--num_images", 1))
    assert "'cosine' with 1000 timesteps, and is followed" in note
    [warning] = lines(stage(generate_with_path_30, *flags_of(other, copy / "schedule.json", again), "--num_images", 1))
    assert warning.startswith("warning: ") and "other weights" in warning


def test_a_path_made_by_hand_comes_with_a_note(stage, run, tmp_path):
    folders = tmp_path / "raw", tmp_path / "ema"
    made = [*run.generate_flags(folders[0], count=1), "--path_type", "shift:1"]
    assert lines(stage(generate_with_path_30, *made)) == []
    flags = flags_of(run.lift, folders[0] / "schedule.json", folders[1])
    [line] = lines(stage(generate_with_path_30, *flags, "--ema", "--num_images", 1))
    assert line.startswith("note: ") and "epoch 2, raw) than it is followed with" in line and "epoch 2, ema)" in line


def test_an_evaluation_says_it_once_for_each_weights(stage, run, plan, other, tmp_path):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--num_images", 4, "--seeds", 42, 43, "--model_type", "lift"]
    flags += ["--path_type", f"schedule:{plan}", "--weights", "raw", "ema"]
    [line] = lines(stage(eval_fid_batch, *flags))
    assert "epoch 2, raw) than it is followed with" in line and "epoch 2, ema)" in line
    said = lines(stage(eval_fid_batch, *flags, "--checkpoint_dir", other.parent, "--output", tmp_path / "others.csv"))
    assert [line.split(": ")[0] for line in said] == ["note", "warning", "warning"]


def test_interpolation_follows_it_too(stage, run, plan, other, tmp_path):
    flags = [*flags_of(other, plan, tmp_path / "frames"), *STEPS, "--seeds", 1, 2, "--frames", 3]
    assert [line.split(": ")[0] for line in lines(stage(interpolate, *flags))] == ["note", "warning"]


def test_a_training_along_a_plan_sees_the_noise_of_the_plan(stage, tiny, run, plan, other, tmp_path):
    flags = ["--cache_dir", run.cache, "--beta_schedule", "cosine", "--prediction_type", "v", "--epochs", 1]
    ended = stage(train_lift, *tiny(tmp_path), *flags, "--t_pairs", f"path:{plan}")
    assert [line.split(": ")[0] for line in lines(ended)] == ["note"]
    config = read_checkpoint(tmp_path / "checkpoints/lift_dual_timestep_1ep.pth")["config"]
    followed = replay(str(plan), load_model(other).scheduler)
    assert config["t_pairs"] == f"path:{followed.fingerprint()}"
    assert config["t_pairs_points"] == [list(point) for point in followed.points]


def test_what_was_changed_or_is_of_other_scales_is_refused_before_anything_is_written(
    stage, refused, tiny, run, plan, tmp_path
):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", run.cache, "--epochs", 1, "--representation", "residual")
    residual = tmp_path / "checkpoints/lift_dual_timestep_1ep.pth"
    refused(
        generate_with_path_30, *flags_of(residual, plan, tmp_path / "a"), says=(plan, "overcomplete pair of scales")
    )
    content = json.loads(plan.read_text())
    content["beta_schedule"] = "linear"
    altered = tmp_path / "altered.json"
    altered.write_text(json.dumps(content))
    refused(generate_with_path_30, *flags_of(run.lift, altered, tmp_path / "b"), says=(altered, "was changed after"))
