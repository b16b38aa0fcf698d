"""Reflow as a stage: rounds, straightness, one step, kills and what it refuses."""

import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch

import distill
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import load_model, read_checkpoint
from children import FORKS, Always, KillAt, distill_in_child, signalling
from conftest import HARDWARE, assert_same, list_files, run_stage
from diffusion.pairs import pair_seeds
from diffusion.sampler import SeededNoise, sample
from paths.families import diagonal
from training import reflow

# Four shards, of which the last one is short, and few images by which straightness is measured.
CONSTANTS = {"SHARD_SIZE": 3, "STRAIGHT_IMAGES": 4, "STRAIGHT_STEPS": 5}
PATCHES = [("training.reflow", name, Always(value)) for name, value in CONSTANTS.items()]
REFLOW = ["--method", "reflow", "--num_pairs", 10, "--num_steps", 3, "--epochs", 2, "--log_every", 1, *HARDWARE]
NAMES = ("reflow1", "reflow2", "reflow2_1calls")


@pytest.fixture(autouse=True, scope="module")
def small(tiny):
    with mock.patch.multiple(reflow, **CONSTANTS), mock.patch("training.showing.GRID_STEPS", 2):
        yield


@pytest.fixture(scope="module")
def teachers(stage, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    shared = [*tiny(folder), "--lr", 0.005, "--ema_decay", 0.5]
    stage(train_baseline, *shared, "--preset", "flow", "--run", "mine", "--classes")
    stage(train_lift, *shared, "--preset", "flow", "--run", "mine", "--representation", "residual")
    stage(train_lift, *shared, "--preset", "flow", "--run", "mine", "--model", "single_t")
    shutil.move(folder / "checkpoints/baseline_2ep.pth", folder / "classes.pth")
    for file in folder.glob("checkpoints/baseline*"):
        file.unlink()
    shutil.rmtree(folder / "logs/baseline")
    stage(train_baseline, *shared)
    return folder


@pytest.fixture(scope="module")
def flags(teachers):
    def of(folder, *more, teacher="classes.pth"):
        places = ["--output_dir", folder / "made", "--log_dir", folder / "logs", "--cache_dir", teachers / "cache"]
        return [*REFLOW, "--teacher", teachers / teacher, *places, *more]

    return of


ROUNDS = ("--rounds", 2, "--one_step")


@pytest.fixture(scope="module")
def whole(stage, flags, tmp_path_factory):
    """Two rounds and a student of one step of a teacher that knows classes, without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, stage(distill, *flags(folder, *ROUNDS)).output


def student(folder, name, stem="baseline"):
    return folder / f"made/{stem}_{name}.pth"


def assert_same_students(folder, other):
    for name in NAMES:
        for ending in ("", "_last"):
            files = (student(place, name + ending) for place in (folder, other))
            assert_same(*(read_checkpoint(file) | {"settings": {}, "execution": {}} for file in files))
        logs = (place / f"logs/baseline_{name}/metrics.jsonl" for place in (folder, other))
        assert len({log.read_bytes() for log in logs}) == 1
        pairs = (list_files(place / f"made/pairs_{name}") for place in (folder, other))
        one, two = ({file: digest for file, (digest, _) in files.items()} for files in pairs)
        assert one == two and len(one) == 5
    for name in NAMES[:2]:
        files = [place / f"logs/baseline_{name}/straightness.json" for place in (folder, other)]
        assert files[0].read_text() == files[1].read_text()


def test_each_student_is_the_teacher_of_the_next(whole, teachers):
    folder, output = whole
    before = load_model(teachers / "classes.pth", ema=True)
    for number, name in enumerate(NAMES):
        file = student(folder, name)
        content = read_checkpoint(file)
        assert content["epoch"] == 2 and content["step"] == 4
        said = json.loads((folder / f"made/pairs_{name}/pairs.json").read_text())
        assert said["teacher_fingerprint"] == content["config"]["teacher_fingerprint"] == before.fingerprint
        assert said["weights"] == "ema" and said["first_seed"] == pair_seeds(42, number, 10).start
        assert content["config"]["coupling"] == "pairs" and content["config"]["student"] == name
        assert content["config"].get("only_time") == (999 if name.endswith("calls") else None)
        # Pairs are what the teacher makes of the noise of their seeds, classes in turn.
        seeds = pair_seeds(42, number, 10)
        noise = [SeededNoise(seeds).draw((3, 16, 16))]
        labels = torch.arange(10) % 3
        images = sample(before.denoise, before.scheduler, diagonal(3, "uniform_t", 1), noise, labels=labels).images[0]
        shards = [np.load(folder / f"made/pairs_{name}/pairs_{k:05d}.npz") for k in range(4)]
        torch.testing.assert_close(torch.from_numpy(np.concatenate([shard["fine"] for shard in shards])), images)
        assert np.concatenate([shard["labels"] for shard in shards]).tolist() == labels.tolist()
        before = load_model(file, ema=True)
    for name, model in zip(NAMES[:2], ("classes", "baseline_reflow1"), strict=True):
        measured = json.loads((folder / f"logs/baseline_{name}/straightness.json").read_text())
        assert measured["student"]["fingerprint"] == load_model(student(folder, name), ema=True).fingerprint
        assert measured["teacher"]["steps"] == 6 and len(measured["teacher"]["straightness"]) == 1
        assert f"straightness of {model}.pth: " in output and f"straightness of baseline_{name}.pth: " in output


def test_what_is_done_is_not_done_again(whole, flags, stage):
    folder, _ = whole
    kept = {file: times for file, times in list_files(folder).items() if file.endswith((".npz", ".pth", ".json"))}
    output = stage(distill, *flags(folder, *ROUNDS, "--resume", "auto")).output
    assert output.count("is done: 2 of 2 epochs.") == 3
    assert {file: times for file, times in list_files(folder).items() if file in kept} == kept


@pytest.mark.parametrize(
    ("place", "name", "call", "after"),
    [
        ("numpy", "savez", 2, False),  # Within a shard of the first round.
        ("numpy", "savez", 2, True),
        ("training.reflow", "seal_pairs", 1, False),
        ("training.trainer.Trainer", "train_step", 3, True),  # Within the first round of training.
        ("training.trainer.Trainer", "save_snapshots", 1, False),
        ("training.reflow", "write_straightness", 1, False),
        ("numpy", "savez", 6, False),  # Within a shard of the second.
        ("training.trainer.Trainer", "train_step", 10, False),  # The student of one step.
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bits(whole, flags, tmp_path, stage, place, name, call, after):
    words = flags(tmp_path, *ROUNDS, "--resume", "auto", "--resume_minutes", 1e-9)
    ready = FORKS.Event()
    kill = (place, name, KillAt(call, after))
    process = FORKS.Process(target=distill_in_child, args=(words, [*PATCHES, kill], ready))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    stage(distill, *words)
    assert_same_students(tmp_path, whole[0])
    assert not list(tmp_path.rglob(".*.tmp*"))


def test_a_signal_ends_the_round_and_begins_no_other(whole, flags, tmp_path, stage):
    with signalling(2):
        ended = stage(distill, *flags(tmp_path, *ROUNDS))
    assert "stopped by SIGTERM after step 3 of 4" in ended.output
    assert not (tmp_path / "made/pairs_reflow2").exists() and not student(tmp_path, "reflow1").exists()
    stage(distill, *flags(tmp_path, *ROUNDS, "--resume"))
    assert_same_students(tmp_path, whole[0])


def test_a_student_is_sampled_in_one_step(whole, stage, tmp_path):
    file = student(whole[0], NAMES[-1])
    output = tmp_path / "samples"
    words = ["--checkpoint", file, "--ema", "--num_steps", 1, "--num_images", 3, "--output", output, *HARDWARE]
    assert "3 new with 1 network calls each" in stage(generate_with_path_30, *words).output


def test_a_pair_keeps_both_scales_and_raw_weights_may_teach(flags, teachers, stage, tmp_path):
    teacher = "checkpoints/lift_dual_timestep_2ep.pth"
    more = ["--teacher_weights", "raw", "--path_type", "cascade:2", "--num_steps", 4, "--solver", "heun"]
    output = stage(distill, *flags(tmp_path, *more, teacher=teacher)).output
    loaded = load_model(teachers / teacher)
    content = read_checkpoint(student(tmp_path, "reflow1", "lift_dual_timestep"))
    assert content["config"]["teacher_fingerprint"] == loaded.fingerprint
    assert content["config"]["representation"] == "residual"
    shards = [np.load(tmp_path / f"made/pairs_reflow1/pairs_{k:05d}.npz") for k in range(4)]
    assert [{*shard.files} for shard in shards] == [{"fine", "coarse", "made_by"}] * 4
    fine, coarse = (np.concatenate([shard[name] for shard in shards]) for name in ("fine", "coarse"))
    assert fine.shape == (10, 3, 16, 16) and coarse.shape == (10, 3, 8, 8)
    # The fine image is that which both scales compose.
    np.testing.assert_allclose(fine.reshape(10, 3, 8, 2, 8, 2).mean((3, 5)), coarse, atol=1e-5)
    assert " fine, " in output and " coarse (per dimension" in output


def test_a_dry_run_makes_nothing(flags, tmp_path, stage):
    output = stage(distill, *flags(tmp_path, "--dry_run")).output
    assert "10 pairs of a teacher of 12 images of 'synthetic'" in output and "position: step 0 of 4" in output
    assert not list_files(tmp_path)


@pytest.mark.parametrize(
    ("more", "teacher", "status", "says"),
    [
        ([], "checkpoints/baseline_2ep.pth", 1, ["vp cosine_clipped and predicts epsilon", "--preset flow"]),
        ([], "checkpoints/single_t_2ep.pth", 1, ["predicts the fine scale alone", "--model dual"]),
        (["--solver", "euler_maruyama"], "classes.pth", 2, ["--solver euler_maruyama draws noise on the way"]),
        (["--eta", 0.5], "classes.pth", 2, ["--solver ddim with --eta draws noise on the way"]),
        (["--num_pairs", 1_000_001], "classes.pth", 2, ["exceeds the 1000000 pairs"]),
        (["--num_pairs", 3], "classes.pth", 1, ["--batch_size 4 exceeds --num_pairs 3"]),
        (["--resume"], "classes.pth", 1, ["baseline_reflow1_last.pth does not exist"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(flags, tmp_path, refused, more, teacher, status, says):
    refused(distill, *flags(tmp_path, *more, teacher=teacher), says=says, status=status)


def test_another_teacher_and_other_pairs_are_refused(whole, flags, teachers, tmp_path, refused):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    resumed = flags(tmp_path, *ROUNDS, "--resume", "auto")
    refused(distill, *resumed, "--teacher_weights", "raw", says=["pairs for which the teacher was", "another --run"])
    refused(distill, *resumed, "--num_pairs", 9, says=["the number of pairs was 10, not 9"])
    refused(distill, *resumed, "--num_steps", 2, says=["the path was"])
    refused(distill, *resumed, "--limit", 9, says=["the data of the teacher"])
    refused(distill, *flags(tmp_path, *ROUNDS), says=["baseline_reflow1_last.pth exists already", "--resume"])
    os.truncate(tmp_path / "made/pairs_reflow2/pairs_00001.npz", 100)
    # All that was done before is as it was, and the shard is made again.
    ended = run_stage(distill, *resumed)
    assert ended.status == 0 and "pairs_00001.npz is damaged" in ended.notes and "it is made again" in ended.notes
    assert_same_students(tmp_path, whole[0])
