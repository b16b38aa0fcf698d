"""Several processes train as one does, stop together and write once; a step in parts is a whole step."""

import os
import socket
import subprocess
import sys

import pytest
import torch

import train_lift
from checkpoint import load_model, read_checkpoint
from children import FORKS, SignalAt, signalling, train_in_child
from conftest import LAST, LOG, ROOT, RUN, TINY, assert_same_run, read_log
from runtime import distributed
from runtime.distributed import Processes
from runtime.safe_write import versions

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_in_child(environment, flags, patches):
    """One of several processes, told by its environment who it is."""
    os.environ.update(environment)
    train_in_child(flags, patches, None)


@pytest.fixture
def ranks():
    """`ranks(count, flags, {rank: patches})` starts the processes of one run, as srun would."""
    started = []

    def start(count, flags, patches=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(count):
            values = (str(rank), str(count), str(rank), "127.0.0.1", str(port))
            arguments = (dict(zip(NAMES, values, strict=True)), flags, (patches or {}).get(rank, ()))
            processes.append(FORKS.Process(target=rank_in_child, args=arguments))
            processes[-1].start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def flags(tiny, cache, tmp_path, straight):
    straight()  # The images are in the cache then.
    return [*tiny(tmp_path), "--cache_dir", cache, *RUN, "--epochs", 4]


def assert_nearly_the_same_run(folder, reference):
    """Up to rounding, which grows as training goes on and which AdamW amplifies for weights without a gradient."""
    rows, expected = read_log(folder), read_log(reference)
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-4), (row["step"], name)
    inputs = [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (16, 8)]
    t = torch.arange(0, 1000, 125)
    for ema in (False, True):
        predictions = [load_model(place / LAST, ema=ema).model(*inputs, t, t.flip(0)) for place in (folder, reference)]
        for ours, theirs in zip(*predictions, strict=True):
            assert theirs.std() > 0.1
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_one(ranks, flags, tmp_path, straight, count):
    for process in ranks(count, flags):
        process.join(120)
        assert process.exitcode == 0
    assert_nearly_the_same_run(tmp_path, straight())
    # What is written is written once, and as by one process.
    names = [{str(f.relative_to(place)) for f in place.rglob("*.*") if "tfevents" not in f.name}
             for place in (tmp_path, straight())]  # fmt: skip
    assert names[0] == names[1]
    assert len(list((tmp_path / LOG / "tensorboard").iterdir())) == 1


def test_the_first_step_of_two_processes_is_that_of_one_to_rounding(ranks, flags, tmp_path, straight):
    for process in ranks(2, flags):
        process.join(120)
    for name in ("loss_64", "loss_32", "grad_norm"):
        assert read_log(tmp_path)[0][name] == pytest.approx(read_log(straight())[0][name], rel=1e-6)


def test_two_processes_learn_from_all_losses_of_a_step(ranks, flags, tmp_path, straight):
    flags = [*flags, "--t_law", "importance"]
    for process in ranks(2, flags):
        process.join(120)
        assert process.exitcode == 0
    folders = tmp_path, straight("--t_law", "importance")
    found, one = (read_checkpoint(folder / LAST)["objective_state"] for folder in folders)
    assert torch.equal(found["seen"], one["seen"]) and one["seen"].sum(1).tolist() == [48, 48]
    torch.testing.assert_close(found["squares"], one["squares"], rtol=1e-3, atol=1e-6)


def test_torchrun_starts_it(flags, tmp_path, straight):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command += ["train_lift.py", *map(str, flags), "--run", "torchrun"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 processes") == 1
    assert_nearly_the_same_run(tmp_path, straight())


def test_a_signal_to_one_process_stops_all_after_the_same_step(ranks, flags, stage, tmp_path, straight):
    for process in ranks(2, flags, {1: [("training.trainer:Trainer", "train_step", SignalAt(4))]}):
        process.join(120)
        assert process.exitcode == 0
    assert [read_checkpoint(file)["step"] for file in versions(tmp_path / LAST)] == [5]
    # Another number of processes goes on from there and says that roundings may differ.
    output = stage(train_lift, *flags, "--resume").output
    assert "note: processes is 1 and was 2" in output
    assert_nearly_the_same_run(tmp_path, straight())


def test_one_process_goes_on_where_another_number_of_them_stopped(stage, ranks, flags, tmp_path, straight):
    with signalling(4):
        stage(train_lift, *flags)
    for process in ranks(2, [*flags, "--resume", "auto"]):
        process.join(120)
        assert process.exitcode == 0
    assert_nearly_the_same_run(tmp_path, straight())


def test_three_processes_resume_bit_for_bit(ranks, tiny, cache, tmp_path, straight):
    straight()  # The images are in the cache then.

    def flags(folder, *more):
        common = ["--cache_dir", cache, *RUN, "--batch_size", 6, "--limit", 18, "--epochs", 4]
        return [*map(str, [*tiny(folder), *common, *more])]

    parts = {1: [("training.trainer:Trainer", "train_step", SignalAt(4))]}
    for folder, more, patches in (("once", (), {}), ("twice", (), parts), ("twice", ("--resume",), {})):
        for process in ranks(3, flags(tmp_path / folder, *more), patches):
            process.join(120)
            assert process.exitcode == 0
    assert_same_run(tmp_path / "twice", tmp_path / "once")


def test_processes_that_read_different_things_do_not_train(ranks, flags, tmp_path):
    different = {1: [("training.trainer", "resolve_regime", OtherSeed())]}
    for process in ranks(2, flags, different):
        process.join(120)
        assert process.exitcode == 1
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.jsonl"))


class OtherSeed:
    """Makes a function, whose result goes into the config of a run, that changes the seed there."""

    def __call__(self, function):
        return lambda *arguments: function(*arguments) | {"seed": 43}


def test_a_step_in_parts_is_a_whole_step(stage, flags, tmp_path, straight):
    assert "2 parts per step" in stage(train_lift, *flags, "--accumulate", 2).output
    assert_nearly_the_same_run(tmp_path, straight())


@pytest.mark.parametrize("count, accumulate", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_shares_and_parts_make_up_the_batch_of_one_process(trainer, count, accumulate):
    run = trainer("--batch_size", 12, "--accumulate", accumulate)
    images = next(run.batches.epoch(0))[:2]
    whole = run.draw(*images)
    shares = []
    for rank in range(count):
        run.processes.rank, run.processes.count = rank, count
        share = run.draw(*images)
        size = len(share.x_64) // accumulate
        shares += [share.rows(slice(start, start + size)) for start in range(0, len(share.x_64), size)]
    for field, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert parts == (None,) * len(parts) if field is None else torch.equal(field, torch.cat(parts))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(refused, flags):
    refused(train_lift, *flags, "--accumulate", 3, says=("--batch_size 4", "1 process(es)", "--accumulate 3"))


@pytest.fixture
def environment(monkeypatch):
    """`environment(rank, count, gpus)` is a process of several on a host with so many GPUs, without a group."""

    def set_to(rank, count, gpus):
        for name, value in zip(NAMES[:3], (rank, count, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, timeout: None)

    return set_to


def test_every_process_has_its_own_gpu(environment):
    for rank in range(3):
        environment(rank, 3, gpus=4)
        assert Processes().device == torch.device("cuda", rank) and Processes().is_main == (rank == 0)
        environment(rank, 3, gpus=1)  # As SLURM binds them.
        assert Processes().device == torch.device("cuda", 0)
        environment(rank, 3, gpus=0)
        assert Processes().device == torch.device("cpu")
        environment(rank, 3, gpus=4)
        assert Processes("cpu").device == torch.device("cpu")


def test_more_processes_than_gpus_and_one_gpu_for_all_are_refused(environment):
    environment(2, 3, gpus=2)
    with pytest.raises(ValueError, match=r"^Process 2 of this host finds 2 GPU\(s\); start at most one process per"):
        Processes()
    environment(1, 3, gpus=4)
    with pytest.raises(ValueError, match=r"^--device 0 names one GPU for 3 processes; leave it out or give cpu\.$"):
        Processes("0")


def test_shares_are_even_and_in_order(environment):
    shares = []
    for rank in range(4):
        environment(rank, 4, gpus=0)
        shares += list(range(12))[Processes().share(12)]
    assert shares == list(range(12))


def test_half_an_environment_is_named(environment, monkeypatch):
    environment(0, 2, gpus=0)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="^RANK is set but LOCAL_RANK not; start with torchrun, or unset RANK"):
        Processes("cpu")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("x", "2", "0"), "RANK is 'x', which is no whole number"),
        (("0", "two", "0"), "WORLD_SIZE is 'two', which is no whole number"),
        (("0", "2", "0.5"), "LOCAL_RANK is '0.5', which is no whole number"),
        (("-1", "2", "0"), "RANK is '-1', which is no whole number"),
        (("2", "2", "0"), "Of 2 process(es) (WORLD_SIZE) none has RANK 2 and LOCAL_RANK 0"),
        (("0", "0", "0"), "Of 0 process(es) (WORLD_SIZE) none has RANK 0"),
        (("0", "2", "1"), "none has RANK 0 and LOCAL_RANK 1"),
        (("0", "", "0"), "RANK is set but WORLD_SIZE not"),
        (("1", "", ""), "RANK is set but WORLD_SIZE, LOCAL_RANK not"),
    ],
)
def test_an_environment_that_is_no_place_in_a_run_is_one_sentence(refused, monkeypatch, tmp_path, values, says):
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)
    refused(train_lift, *TINY, *(f"--{name}_dir={tmp_path}" for name in ("output", "log")), says=(says, "unset RANK"))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in NAMES[3:] for value in (None, "")] + [("MASTER_PORT", "x")]
)
def test_processes_that_cannot_meet_say_so(monkeypatch, name, value):
    for known, text in zip(NAMES, ("0", "2", "0", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(known, text)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^The 2 processes cannot find each other \(.*; set MASTER_ADDR and MASTER_P"):
        Processes("cpu")


@pytest.mark.parametrize("values", [("", "", ""), ("", "4", "x"), ("", None, None), ("0", "1", "0"), (" 0", "1 ", "0")])
def test_what_is_set_but_empty_is_not_set(monkeypatch, values):
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    alone = Processes("cpu")
    assert (alone.rank, alone.count, alone.local_rank) == (0, 1, 0)


def test_a_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # What an allocation may leave behind.
    alone = Processes("cpu")
    assert (alone.rank, alone.count, alone.is_main) == (0, 1, True)
    assert alone.any(True, False) == [True, False] and alone.sum(torch.ones(2)).tolist() == [1, 1]
    assert alone.share(5) == slice(0, 5)
