"""The stage of students: a consistency model from a teacher, and what belongs to which method."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import distill
import eval_fid_batch
import generate_with_path_30
import train_baseline
import train_lift
from checkpoint import find_checkpoints, load_model, read_checkpoint
from conftest import HARDWARE, assert_same
from planning.students import Cost
from training.trainer import Trainer

CONSISTENCY = ("--method", "consistency", "--epochs", 2, "--run", "fast")


@pytest.fixture(scope="module")
def teachers(stage, tiny, tmp_path_factory):
    """A baseline and a residual pair that predict v, and a flow."""
    found = {}
    for name, script, more in (
        ("baseline", train_baseline, ("--preset", "improved")),
        ("dual", train_lift, ("--preset", "improved", "--representation", "residual")),
        ("flow", train_baseline, ("--preset", "flow")),
    ):
        folder = tmp_path_factory.mktemp(name)
        stage(script, *tiny(folder), *more, "--ema_decay", 0.5, "--lr", 0.003)
        [found[name]] = (folder / "checkpoints").glob("*_2ep.pth")
    return found


def of(teacher):
    return ["--teacher", teacher, "--cache_dir", teacher.parent.parent / "cache", *HARDWARE]


@pytest.mark.parametrize(("kind", "calls"), [("baseline", 2), ("dual", 2), ("flow", 2)])
def test_a_consistency_model_starts_from_its_teacher_and_takes_its_steps(
    stage, teachers, tmp_path, monkeypatch, kind, calls
):
    monkeypatch.chdir(tmp_path)
    teacher = teachers[kind]
    stage(distill, *CONSISTENCY, *of(teacher))
    [file] = Path("checkpoints/fast").glob("*_consistency.pth")
    content, first = read_checkpoint(file), load_model(teacher, ema=True)
    config = content["config"]
    assert config["teacher_fingerprint"] == first.fingerprint
    assert (config["objective"], config["consistency"], config["consistency_solver"]) == ("consistency", "ict", "heun")
    loaded = load_model(file)
    assert Cost.of(loaded.config) == (24, 24 * calls)  # Six steps of four images.
    walk = ["--checkpoint", file, "--num_images", 2, "--output", "samples", *HARDWARE]
    said = stage(generate_with_path_30, *walk, "--solver", "consistency", "--path_type", "through:0").output
    assert "2 new with 2 network calls each; path through" in said
    stage(eval_fid_batch, "--run", "fast", "--solver", "consistency", "--num_steps", 1, "--metrics", "swd",
          "--num_images", 8, "--cache_dir", teacher.parent.parent / "cache", *HARDWARE)  # fmt: skip


def test_tuning_needs_no_steps_of_the_teacher(stage, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage(distill, *CONSISTENCY, *of(teachers["baseline"]), "--consistency", "ect", "--lr", 1e-12)
    loaded = load_model("checkpoints/fast/baseline_consistency.pth")
    assert loaded.config["consistency_solver"] is None and Cost.of(loaded.config) == (24, 0)
    for name, value in read_checkpoint(teachers["baseline"])["ema_state"].items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["ict", "ect"])
def test_the_step_of_the_teacher_may_be_chosen(stage, teachers, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    chosen = ["--consistency", form, "--consistency_solver", "ddim", "--epochs", 1]
    stage(distill, *CONSISTENCY, *of(teachers["baseline"]), *chosen)
    loaded = load_model("checkpoints/fast/baseline_consistency.pth")
    assert loaded.config["consistency_solver"] == "ddim" and Cost.of(loaded.config) == (12, 12)


def test_a_stopped_student_ends_as_one_in_one_go(stage, teachers, tmp_path, monkeypatch):
    """With the averaged target network of `ct`, which is in the resume file."""
    flags = [*CONSISTENCY, *of(teachers["baseline"]), "--consistency", "ct", "--resume_minutes", 1e-9]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "parts":
            with monkeypatch.context() as patched:
                patched.setattr("training.trainer.Trainer.train_step", stopping_at(4))
                with pytest.raises(RuntimeError, match="the power went"):
                    distill_here(flags)
        stage(distill, *flags, *(["--resume"] if name == "parts" else []))
    contents = [
        read_checkpoint(tmp_path / name / "checkpoints/fast/baseline_consistency_last.pth")
        | {"execution": {}, "settings": {}}
        for name in ("whole", "parts")
    ]
    assert_same(*contents)


def stopping_at(step):
    train_step = Trainer.train_step

    def stopping(trainer, *batch):
        if trainer.step == step:
            raise RuntimeError("the power went")
        return train_step(trainer, *batch)

    return stopping


def distill_here(flags):
    with mock.patch.object(sys, "argv", ["distill.py", *map(str, flags)]):
        distill.main()


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("progressive", ["--num_pairs", 5], "--num_pairs belongs to --method reflow"),
        ("progressive", ["--one_step"], "--one_step belongs to --method reflow"),
        ("progressive", ["--solver", "heun"], "--solver belongs to --method reflow"),
        ("progressive", ["--num_steps", 4], "--num_steps belongs to --method reflow"),
        ("progressive", ["--end", "t0"], "--end belongs to --method reflow"),
        ("progressive", ["--consistency", "ect"], "--consistency belongs to --objective consistency"),
        ("progressive", ["--t_law", "log_normal", "--from", 4], "leave --t_law out"),
        ("consistency", ["--from", 4], "--from belongs to --method progressive"),
        ("consistency", ["--rounds", 2], "--rounds belongs to --method progressive and reflow"),
        ("consistency", ["--path_type", "shift:1"], "--path_type belongs to --method progressive and reflow"),
        ("consistency", ["--end", "t0"], "--end belongs to --method reflow"),
        ("consistency", ["--max_jump", 6], "--max_jump belongs to --method progressive and reflow"),
        ("reflow", ["--to", 2], "--to belongs to --method progressive"),
        ("reflow", ["--consistency_solver", "ddim"], "--consistency_solver belongs to --objective consistency"),
    ],
)  # fmt: skip
def test_what_belongs_to_another_method_is_refused(refused, teachers, tmp_path, monkeypatch, method, more, says):
    monkeypatch.chdir(tmp_path)
    refused(distill, "--method", method, *of(teachers["flow"]), *more, says=(says,), status=2)


def test_students_as_teachers(stage, refused, teachers, tmp_path, monkeypatch):
    """Of reflow along their own path; of consistency only by the weights that it starts from."""
    monkeypatch.chdir(tmp_path)
    rounds = ["--method", "progressive", "--from", 4, "--to", 2, "--epochs", 1, "--run", "few"]
    stage(distill, *rounds, *of(teachers["flow"]))
    student = Path("checkpoints/few/baseline_2calls.pth")
    cache = ["--cache_dir", teachers["flow"].parent.parent / "cache", *HARDWARE]
    again = ["--teacher", student, "--epochs", 1, *cache]
    stage(distill, "--method", "reflow", "--path_type", "student", "--num_pairs", 8, *again, "--run", "straight")
    config = read_checkpoint("checkpoints/straight/baseline_reflow1.pth")["config"]
    assert (config["objective"], config["coupling"]) == ("denoising", "pairs")
    assert "student_points" not in config and "teacher_points" not in config
    other = ["--method", "consistency", *again, "--run", "ends"]
    refused(distill, *other, says=("knows the noise levels of its own 2 step(s) alone",))
    stage(distill, *other, "--consistency", "ect")


def test_models_without_a_path_of_their_own_are_left_out_of_scores(stage, refused, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teachers["baseline"]
    stage(distill, "--method", "progressive", "--from", 4, "--to", 2, "--epochs", 1, "--run", "fast", *of(teacher))
    flags = ["--path_type", "student", "--metrics", "swd", "--num_images", 8, *HARDWARE, "--output", "table.csv"]
    flags += ["--cache_dir", teacher.parent.parent / "cache"]
    student = "checkpoints/fast/baseline_2calls.pth"
    ended = stage(eval_fid_batch, "--checkpoint", teacher, student, *flags)
    assert f"note: left out: {teacher} is no student" in ended.notes
    assert len(Path("table.csv").read_text().splitlines()) == 2
    refused(eval_fid_batch, "--checkpoint", teacher, *flags, says=(f"{teacher} is no student",))


def test_students_are_found_beside_each_other(tmp_path):
    names = ["2calls", "16calls", "consistency", "reflow1", "reflow1_1calls", "reflow2"]
    others = ["baseline_2calls_last", "baseline_2calls_last_1", "baseline_last", "baseline_other", "dual_2calls"]
    for name in (*(f"baseline_{name}" for name in names), *others):
        (tmp_path / f"{name}.pth").touch()
    found = find_checkpoints(tmp_path, "baseline")
    assert [file.name for file in found.values()] == [f"baseline_{name}.pth" for name in names]
    with pytest.raises(ValueError, match="no baseline checkpoint of epoch 2"):
        find_checkpoints(tmp_path, "baseline", [2])
    (tmp_path / "baseline_3ep.pth").touch()
    assert list(find_checkpoints(tmp_path, "baseline")) == [3]
