"""Runs that are killed, stopped or starved of disk end as if nothing had happened; damaged files are named."""

import os
import random
import signal
import time
from unittest import mock

import pytest
import torch

import train_lift
from checkpoint import FORMAT_VERSION, bytes_of, read_checkpoint
from children import FORKS, KillAt, SleepAt, signalling, train_in_child
from conftest import LAST, LOG, RUN, NoRoom, assert_same, assert_same_run, list_files, read_log, run_stage
from runtime import safe_write
from runtime.safe_write import replacing, versions
from training import run_log, showing
from training.stop import STOP_SIGNALS
from training.trainer import Trainer

EVERY_STEP = ("--resume_minutes", 1e-9)


@pytest.fixture
def flags(tiny, cache, tmp_path, straight):
    """The flags of the run of four epochs that `straight` makes without a stop, with a resume file after every step."""
    straight()  # The images are in the cache then.
    return [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4, *EVERY_STEP]


@pytest.fixture
def child():
    """`child(flags, *patches)` starts a training process that has imported everything when this returns."""
    started = []

    def start(flags, *patches):
        ready = FORKS.Event()
        process = FORKS.Process(target=train_in_child, args=(flags, patches, ready))
        process.start()
        started.append(process)
        assert ready.wait(120)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def finish(stage, flags):
    """Go on until the run is done; starting it again changes nothing."""
    stage(train_lift, *flags, "--resume", "auto")
    output = stage(train_lift, *flags, "--resume", "auto").output
    assert output.endswith("is done: 4 of 4 epochs.\n") and output.count("\n") == 1


@pytest.fixture(scope="session")
def seconds(straight, tiny, cache, tmp_path_factory):
    """How long a run with a resume file after every step takes in a child."""
    straight()
    folder = tmp_path_factory.mktemp("timed")
    ready = FORKS.Event()
    flags = [*tiny(folder), "--cache_dir", cache, *RUN, "--epochs", 4, *EVERY_STEP]
    process = FORKS.Process(target=train_in_child, args=(flags, (), ready))
    process.start()
    assert ready.wait(120)
    start = time.monotonic()
    process.join()
    assert process.exitcode == 0
    assert_same_run(folder, straight())
    return time.monotonic() - start


# Killed


@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_at_a_random_moment(stage, child, flags, tmp_path, straight, seconds, number, attempt):
    process = child([*flags, "--resume", "auto"])
    process.join(random.Random(attempt).uniform(0, seconds))
    os.kill(process.pid, number) if process.is_alive() else None
    process.join()
    # A process that comes to its end is not killed, nor is one that does not listen yet stopped with 0.
    assert process.exitcode in (0, -number)
    finish(stage, flags)
    assert_same_run(tmp_path, straight())
    assert not list(tmp_path.rglob(".*.tmp*"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        ("os", "replace", 3),  # The first resume file takes its name.
        ("os", "replace", 4),  # The version before it steps aside.
        ("os", "replace", 5),  # The second resume file takes its name.
        ("os", "fsync", 9),
        ("torch", "save", 1),
        ("torch", "save", 6),
        ("torch", "save", 7),  # The snapshot of the second epoch, after its resume file.
        ("torch", "save", 8),
        ("torch", "save", 14),
        ("training.showing", "save_image_grid", 1),
        ("training.showing", "save_image_grid", 3),
        ("training.run_log:JsonLines", "write", 2),
    ],
)
def test_killed_within_a_save(stage, child, flags, tmp_path, straight, place, name, call, after):
    process = child(flags, (place, name, KillAt(call, after)))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(stage, flags)
    assert_same_run(tmp_path, straight())
    assert not list(tmp_path.rglob(".*.tmp*"))


@pytest.mark.parametrize("place", ["training.trainer.Trainer.save_snapshots", "training.showing.draw_grids"])
@pytest.mark.parametrize("epochs", [2, 4])
def test_killed_right_after_the_only_resume_file(stage, tiny, cache, tmp_path, straight, place, epochs):
    flags = [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--resume", "auto", "--epochs"]
    with mock.patch(place, mock.Mock(side_effect=KeyboardInterrupt)):
        assert run_stage(train_lift, *flags, epochs, "--save_every", 2 if epochs == 4 else 200).status == 130
    stage(train_lift, *flags, epochs)
    stage(train_lift, *flags, 4)
    assert_same_run(tmp_path, straight())
    names = [{file.name for file in place.rglob("*_[24]ep*")} for place in (tmp_path, straight())]
    assert names[0] == names[1] and len(names[0]) == 6


# Asked to stop


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step(stage, flags, tmp_path, straight, number):
    before = signal.getsignal(number)
    # Log rows of every second step, so that the run stops between two.
    flags = [*flags[:-2], "--log_every", 2]
    with signalling(4, number=number):
        ended = stage(train_lift, *flags)
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name} after step 5 of 12" in ended.output and "--resume auto" in ended.output
    assert str(tmp_path / LAST) in ended.output
    assert read_checkpoint(tmp_path / LAST)["step"] == 5
    assert [row["step"] for row in read_log(tmp_path)] == [2, 3, 4]
    finish(stage, flags)
    assert_same_run(tmp_path, straight("--log_every", 2))


def test_resume_auto_ten_times_in_a_row(stage, flags, tmp_path, straight):
    for step in range(10):
        with signalling(step):
            stage(train_lift, *flags, "--resume", "auto")
        assert read_checkpoint(tmp_path / LAST)["step"] == step + 1
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


def test_a_stop_while_the_samples_are_drawn_draws_them_later(stage, flags, tmp_path, straight):
    sample_seeds = showing.sample_seeds

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        return sample_seeds(*args, **kwargs)

    with mock.patch.object(showing, "sample_seeds", interrupted):
        ended = stage(train_lift, *flags)
    assert "stopped by SIGUSR1 after step 6 of 12" in ended.output
    assert not list((tmp_path / LOG).glob("samples_*"))
    finish(stage, flags)
    assert_same_run(tmp_path, straight())
    for scale in ("fine", "coarse"):
        name = f"samples_2ep_{scale}.png"
        assert (tmp_path / LOG / name).read_bytes() == (straight() / LOG / name).read_bytes()


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint_whole(stage, child, flags, tmp_path, straight):
    process = child(flags, ("training.trainer:Trainer", "train_step", SleepAt(4, tmp_path / "there")))
    while not (tmp_path / "there").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    # Launchers repeat a signal, which is no second request.
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGINT
    assert read_checkpoint(tmp_path / LAST)["step"] == 4
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


def test_two_processes_do_not_train_in_one_folder(child, refused, flags, tmp_path):
    process = child(flags, ("training.trainer:Trainer", "train_step", SleepAt(2, tmp_path / "there")))
    while not (tmp_path / "there").exists():
        assert process.is_alive()
        time.sleep(0.01)
    refused(train_lift, *flags, "--resume", says=("another process", tmp_path / "checkpoints"))


# Resume files


def halfway(stage, flags):
    """A run that has been stopped after seven of its twelve steps."""
    with signalling(6):
        stage(train_lift, *flags)


def test_so_many_resume_files_are_kept_newest_first(stage, flags, tmp_path):
    for keep, steps in ((3, [7, 6, 5]), (1, [9]), (2, [11, 10])):
        with signalling(steps[0] - 1):
            stage(train_lift, *flags, "--keep_last", keep, "--resume", "auto")
        kept = versions(tmp_path / LAST)
        assert [read_checkpoint(file)["step"] for file in kept] == steps
        names = [f"lift_dual_timestep_last{suffix}.pth" for suffix in ("", "_1", "_2")]
        assert [file.name for file in kept] == names[:keep]
    # Snapshots are kept in any case.
    assert (tmp_path / "checkpoints/lift_dual_timestep_2ep.pth").exists()


def truncate(content):
    return content[:-200]


def flip_bits(content):
    content = bytearray(content)
    # One alone may fall between two tensors, where it does no harm.
    for place in range(len(content) // 2, len(content) // 2 + 2000, 97):
        content[place] ^= 4
    return bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_bits, lambda content: b""])
def test_a_damaged_newest_resume_file_is_named_and_the_one_before_it_used(stage, flags, tmp_path, straight, damage):
    halfway(stage, flags)
    last, older = versions(tmp_path / LAST)
    last.write_bytes(damage(last.read_bytes()))
    ended = stage(train_lift, *flags, "--resume")
    assert f"warning: {last} is damaged; going on from {older}" in ended.output
    assert_same_run(tmp_path, straight())
    assert last.with_name(f"{last.name}.damaged").exists()


def test_a_kill_after_a_damaged_newest_file_still_leaves_a_whole_one(stage, child, flags, tmp_path, straight):
    halfway(stage, flags)
    last = versions(tmp_path / LAST)[0]
    last.write_bytes(truncate(last.read_bytes()))
    # The settings, two logs, and then the first rename of the first save.
    process = child([*flags, "--resume"], ("os", "replace", KillAt(4, after=True)))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


def test_a_resume_file_that_stepped_aside_is_found(stage, flags, tmp_path, straight):
    halfway(stage, flags)
    versions(tmp_path / LAST)[0].unlink()
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


@pytest.mark.parametrize("resume", ["required", "auto"])
def test_a_run_is_not_started_afresh_over_damaged_resume_files(refused, stage, flags, tmp_path, resume):
    halfway(stage, flags)
    for file in versions(tmp_path / LAST):
        file.write_bytes(truncate(file.read_bytes()))
    refused(train_lift, *flags, "--resume", resume, says=("damaged", "_last_1.pth"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"format_version": FORMAT_VERSION + 1}, ("newer than", "update LIFT")),
        ({"weights": torch.zeros(3)}, ("not a LIFT checkpoint", "format_version")),
    ],
)
def test_a_newest_file_that_is_not_ours_is_not_passed_over(refused, stage, flags, tmp_path, content, says):
    halfway(stage, flags)
    file = tmp_path / LAST
    if "format_version" in content:
        content = torch.load(file, weights_only=True) | content
    torch.save(content, file)
    refused(train_lift, *flags, "--resume", says=(file, *says))


def test_only_temporary_files_of_the_run_itself_are_cleared_away(stage, flags, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mine = [f".lift_dual_timestep_{name}.0a.tmp.pth" for name in ("last", "2ep", "100ep")]
    students = [f".lift_dual_timestep_{name}.0a.tmp.pth" for name in ("4calls", "4calls_last", "reflow1_1calls_last")]
    others = [*students, ".baseline_last.0a.tmp.pth"]
    for name in (*mine, *others):
        (folder / name).touch()
    stage(train_lift, *flags)
    assert {file.name for file in folder.glob(".*.tmp.*")} == {*others}


def test_versions_are_in_order_and_of_this_file_alone(tmp_path):
    for name in ("a_last_10.pth", "a_last_2.pth", "a_last.pth", "a_last_x.pth", "aa_last_1.pth", "a_last_1.png"):
        (tmp_path / name).touch()
    assert [file.name for file in versions(tmp_path / "a_last.pth")] == ["a_last.pth", "a_last_2.pth", "a_last_10.pth"]
    assert versions(tmp_path / "b.pth") == []


def test_a_full_disk_at_the_end_of_a_write_leaves_the_versions_as_they_were(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    for text in "123":
        with replacing(file, keep=2) as temporary:
            temporary.write_text(text)
    before = list_files(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in before} == {"a.txt": "3", "a_1.txt": "2"}
    monkeypatch.setattr(safe_write.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError), replacing(file, keep=2) as temporary:
        temporary.write_text("4")
    assert list_files(tmp_path) == before


# A full disk


def starved(size, steps):
    """A `train_step` at the start of which, for these steps, the disk is full, and has room again for others."""
    train_step, room = Trainer.train_step, NoRoom(size)

    def step(self, *batch):
        if self.step in steps and not hasattr(self, "starved"):
            room.__enter__()
            self.starved = True
        elif self.step not in steps and hasattr(self, "starved"):
            room.__exit__()
            del self.starved
        return train_step(self, *batch)

    return mock.patch.object(Trainer, "train_step", step), room


# The thread that writes for TensorBoard dies of it and is replaced.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [10, 3_000, 300_000, 800_000])
def test_a_full_disk_costs_no_step_and_no_row(flags, tmp_path, straight, capfd, size):
    patch, _ = starved(size, range(3, 8))
    with patch:
        ended = run_stage(train_lift, *flags)
    assert ended.status == 0, ended.message
    assert_same_run(tmp_path, straight())
    assert read_checkpoint(tmp_path / LAST)["step"] == 12
    # The snapshot that there was no room for was written when there was.
    for epoch in (2, 4):
        name = f"checkpoints/lift_dual_timestep_{epoch}ep.pth"
        assert_same(read_checkpoint(tmp_path / name), read_checkpoint(straight() / name))


# The thread that writes for TensorBoard dies of it and is replaced.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_that_a_full_disk_kept_out_of_the_log_come_through_a_stop(stage, flags, tmp_path, straight):
    append = run_log.JsonLines.write

    def full(self, sync=True):
        raise OSError(f"{self.file} could not be written")

    with mock.patch.object(run_log.JsonLines, "write", full), signalling(4):
        stage(train_lift, *flags)
    assert run_log.JsonLines.write is append
    assert read_log(tmp_path) == []
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


def test_a_row_that_does_not_fit_names_its_file_and_the_bytes(tmp_path):
    file = run_log.JsonLines(tmp_path / "rows.jsonl", 0)
    file.append({"step": 1})
    with NoRoom(15):
        file.append({"step": 2})
        with pytest.raises(
            OSError, match=r"rows\.jsonl could not be written: it needs 12 bytes more \(File too large\)"
        ):
            file.write()
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n' and file.pending == '{"step": 2}\n'
    file.append({"step": 3})
    assert [row["step"] for row in run_log.read_metrics(tmp_path / "rows.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied"), OSError(5, "I/O error")])
def test_what_lies_between_a_file_and_the_run_is_not_taken_for_damage(stage, flags, tmp_path, error):
    halfway(stage, flags)
    before = list_files(tmp_path)
    with mock.patch.object(torch, "load", mock.Mock(side_effect=error)):
        assert run_stage(train_lift, *flags, "--resume").status == 1
    assert list_files(tmp_path) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_old_checkpoint_survives_a_full_disk_and_the_message_says_what_is_needed(
    stage, flags, tmp_path, straight, capsys
):
    patch, room = starved(800_000, range(5, 13))
    with patch:
        try:
            ended = run_stage(train_lift, *flags)
        finally:
            room.__exit__()
    needed = bytes_of(read_checkpoint(straight() / LAST))
    assert ended.status == 1
    for part in (
        f"{tmp_path / LAST} could not be saved",
        f"needs at least {needed:,} bytes",
        "are free",
        "the last good",
    ):
        assert part in ended.message
    assert len(ended.message.splitlines()) == 1
    assert read_checkpoint(tmp_path / LAST)["step"] == 5
    finish(stage, flags)
    assert_same_run(tmp_path, straight())


# Steps that are not finite


def spoiled(*steps, value=float("nan")):
    """A `draw` after which, at these steps, one pixel of noise is not a number."""
    draw = Trainer.draw

    def spoil(self, *images):
        batch = draw(self, *images)
        if self.step in steps:
            batch.noise_64[0, 0, 0, 0] = value
        return batch

    return mock.patch.object(Trainer, "draw", spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_is_skipped_and_counted(stage, flags, tmp_path, straight, value):
    seen = {}
    train_step = Trainer.train_step

    def watching(self, *batch):
        def state():
            optimizer = self.optimizer.state_dict()["state"]
            return {name: value.clone() for name, value in self.model.state_dict().items()}, {
                (k, name): value.clone() for k, values in optimizer.items() for name, value in values.items()
            }

        before = state()
        values = train_step(self, *batch)
        seen[self.step - 1] = (before, state())
        return values

    with spoiled(4, 7, 8, value=value), mock.patch.object(Trainer, "train_step", watching):
        stage(train_lift, *flags)
    for step, (before, after) in seen.items():
        if step in (4, 7, 8):
            assert_same(before, after)
        else:
            assert any(not torch.equal(before[0][name], after[0][name]) for name in before[0])
    rows = read_log(tmp_path)
    assert [row["bad_steps"] for row in rows] == [0] * 4 + [1] * 3 + [2] + [3] * 4
    assert [row["step"] for row in rows if "loss_64" not in row] == [5, 8, 9]
    assert rows[:4] == read_log(straight())[:4]
    final = read_checkpoint(tmp_path / LAST)
    assert all(torch.isfinite(value).all() for state in ("model_state", "ema_state") for value in final[state].values())
    assert {state["step"].item() for state in final["optimizer"]["state"].values()} == {9}


def test_a_row_is_the_mean_of_its_good_steps(stage, flags, tmp_path, straight):
    with spoiled(1):
        stage(train_lift, *flags, "--log_every", 3)
    first, single = read_log(tmp_path)[0], read_log(straight())
    assert first["bad_steps"] == 1 and first["step"] == 3
    # The step after the skipped one sees the weights of the first one, so that only the first loss is known.
    with spoiled(1, 2):
        stage(train_lift, *flags[:-2], "--log_every", 3, "--output_dir", tmp_path / "c", "--log_dir", tmp_path / "l")
    [row, *_] = [run_log.read_metrics(file) for file in (tmp_path / "l").rglob("metrics.jsonl")][0]
    assert row["bad_steps"] == 2 and row["loss_64"] == single[0]["loss_64"]


def test_too_many_bad_steps_in_a_row_end_the_run(flags, tmp_path, straight):
    flags = [*flags, "--max_bad_steps", 3]
    with spoiled(1, 2, 5, 6, 7, 8):
        ended = run_stage(train_lift, *flags)
    assert ended.status == 1
    for part in ("3 steps in a row", "step 8", tmp_path / LAST, "--lr"):
        assert str(part) in ended.message
    # What is kept is of the last good step, and resuming without the cause goes on from there.
    assert read_checkpoint(tmp_path / LAST)["step"] == 7
    assert all(torch.isfinite(value).all() for value in read_checkpoint(tmp_path / LAST)["model_state"].values())
