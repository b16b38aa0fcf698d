import copy
import math
import os
import pickle

import pytest
import torch

import checkpoint
from checkpoint import (
    COARSE_IMAGES,
    FORMAT_VERSION,
    MODEL_CLASSES,
    build_model,
    checkpoint_file,
    load_model,
    read_checkpoint,
    save_checkpoint,
    weights_fingerprint,
)
from conftest import ROOT
from runtime.device import select_device
from runtime.reports import say_once
from runtime.safe_write import replacing


def config(model_type="dual", **changes):
    return {
        "model_type": model_type,
        "hidden_dims": [8, 16],
        "channels": 3,
        "num_train_timesteps": 1000,
        "beta_schedule": "cosine_clipped",
        "prediction_type": "epsilon",
        "data_fingerprint": "0123456789abcdef",
    } | changes


def content(model_type="dual", ema=True, **changes):
    torch.manual_seed(0)
    model = build_model(config(model_type))
    ema_state = {name: value * 0.5 for name, value in model.state_dict().items()} if ema else None
    return {
        "model_state": model.state_dict(),
        "ema_state": ema_state,
        "config": config(model_type, **changes),
        "epoch": 3,
        "step": 120,
    }


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "lift_dual_timestep_3ep.pth"
    save_checkpoint(file, content())
    return file


def assert_only(file):
    """No temporary file was left beside this one."""
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("model_type", MODEL_CLASSES)
@pytest.mark.parametrize("ema", [False, True])
def test_a_model_comes_back_as_it_was(tmp_path, model_type, ema):
    file, saved = tmp_path / "model.pth", content(model_type)
    save_checkpoint(file, saved)
    loaded = load_model(file, ema=ema, given=(COARSE_IMAGES,))
    assert type(loaded.model) is MODEL_CLASSES[model_type]
    state = saved["ema_state" if ema else "model_state"]
    assert loaded.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.fingerprint == weights_fingerprint(state)
    assert loaded.weights == ("ema" if ema else "raw")
    assert loaded.config == saved["config"] | {"epoch": 3, "step": 120, "weights": loaded.weights}


def test_the_schedule_is_the_one_of_the_config(tmp_path):
    settings = {"num_train_timesteps": 100, "beta_schedule": "cosine_zero_terminal", "prediction_type": "v"}
    save_checkpoint(tmp_path / "model.pth", content(**settings))
    scheduler = load_model(tmp_path / "model.pth").scheduler
    assert {name: getattr(scheduler, name) for name in settings} == settings
    assert len(scheduler.alphas_cumprod) == 100


def test_a_file_is_plain_and_keeps_what_else_it_is_given(tmp_path):
    model = build_model(config())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    file = tmp_path / "new" / "folder" / "last.pth"
    save_checkpoint(file, content() | {"optimizer": optimizer.state_dict()})
    plain = torch.load(file, weights_only=True)
    assert plain["format_version"] == FORMAT_VERSION
    assert plain["config"] == config() and (plain["epoch"], plain["step"]) == (3, 120)
    restored = read_checkpoint(file)["optimizer"]["state"][0]
    assert all(torch.equal(restored[key], value) for key, value in optimizer.state_dict()["state"][0].items())
    assert_only(file)


def test_file_names():
    assert str(checkpoint_file("out", "dual", 400)) == "out/lift_dual_timestep_400ep.pth"
    assert str(checkpoint_file("out", "baseline", "last")) == "out/baseline_last.pth"
    assert len({checkpoint_file("out", name, 1) for name in MODEL_CLASSES}) == len(MODEL_CLASSES)


def test_raw_and_ema_have_fingerprints_of_their_own(file):
    raw, ema = load_model(file), load_model(file, ema=True)
    assert raw.fingerprint != ema.fingerprint
    assert load_model(file).fingerprint == raw.fingerprint and len(raw.fingerprint) == 16


@pytest.mark.parametrize(("decay", "ratio", "share"), [(0.99, None, "30%"), (0.9, None, ""), (0.9999, 0.05, "")])
def test_ema_weights_of_a_short_run_come_with_a_warning(tmp_path, capsys, monkeypatch, decay, ratio, share):
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    more = {} if ratio is None else {"ema_rampup_ratio": ratio}
    for file in files:
        save_checkpoint(file, content(ema_decay=decay, **more))
    load_model(files[0])
    assert capsys.readouterr().err == ""
    for file in (*files, files[0]):
        load_model(file, ema=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if share else 0)  # Once for each file.
    for file, line in zip(files, lines, strict=False):
        assert line.startswith(f"warning: {file}: the EMA weights still hold {share} of the initial weights after 120 ")
        assert "--ema_rampup_ratio 0.05" in line and "raw weights" in line
    say_once.cache_clear()
    monkeypatch.setenv("RANK", "1")
    load_model(files[0], ema=True)
    assert capsys.readouterr().err == ""


def test_ema_weights_are_read_in_one_place():
    # So that no stage samples, maps or scores them without that warning.
    files = [file for pattern in ("*.py", "*/*.py") for file in ROOT.glob(pattern) if file.parent.name != "tests"]
    assert len(files) > 50
    assert {file.name for file in files if "ema_state" in file.read_text()} == {"checkpoint.py", "trainer.py"}


def test_a_fingerprint_follows_names_and_values_alone():
    state = {"a": torch.arange(24.0).reshape(1, 2, 3, 4), "b": torch.tensor(3)}
    # sha256 of "a(1, 2, 3, 4)torch.float32", 24 float32, "b()torch.int64" and one int64, by sha256sum.
    assert weights_fingerprint(state) == "5e5bb00fa4afb2d0"
    same = [
        {"b": state["b"], "a": state["a"]},
        {"a": state["a"].contiguous(memory_format=torch.channels_last), "b": state["b"]},
        {"a": torch.nn.Parameter(state["a"]), "b": state["b"]},
    ]
    assert {weights_fingerprint(other) for other in same} == {weights_fingerprint(state)}
    flipped = state["a"].clone()
    flipped[0, 1, 2, 3] = math.nextafter(23.0, 24.0)
    flipped[0, 0, 0, 0] = 1e-30
    different = [
        {"a": flipped, "b": state["b"]},
        {"a": state["a"].reshape(2, 1, 3, 4), "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    ]
    assert len({weights_fingerprint(other) for other in [state, *different]}) == 6


def test_missing_files_are_named(tmp_path):
    for file in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^Checkpoint .* does not exist; train first or pass another") as e:
            load_model(file)
        assert str(file) in str(e.value)


DAMAGED = r"^Checkpoint .*model\.pth is damaged or not a checkpoint \(\w+\); use another or train again\.$"


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_truncated_files_are_refused(file, kept):
    damaged = file.with_name("model.pth")
    whole = file.read_bytes()
    damaged.write_bytes(whole[: int(kept * len(whole))] if isinstance(kept, float) else whole[:kept])
    with pytest.raises(ValueError, match=DAMAGED):
        load_model(damaged)


@pytest.mark.parametrize("ema", [False, True])
def test_one_flipped_bit_in_a_weight_is_noticed(file, ema):
    whole = bytearray(file.read_bytes())
    state = read_checkpoint(file)["ema_state" if ema else "model_state"]
    values = state["unet.middle1.conv1.weight"].numpy().tobytes()
    assert whole.count(values) == 1
    whole[whole.index(values) + len(values) // 2] ^= 1
    damaged = file.with_name("model.pth")
    damaged.write_bytes(whole)
    torch.load(damaged, weights_only=True)  # The library does not notice.
    with pytest.raises(ValueError, match=DAMAGED):
        load_model(damaged)


def test_a_flipped_byte_is_noticed_or_harmless_wherever_it_is(file):
    whole, intact = file.read_bytes(), read_checkpoint(file)
    fingerprints = [weights_fingerprint(intact[key]) for key in ("model_state", "ema_state")]
    refused = 0
    for place in range(7, len(whole), len(whole) // 60):
        damaged = file.with_name("model.pth")
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            got = read_checkpoint(damaged)
        except ValueError:
            refused += 1
            continue
        assert [weights_fingerprint(got[key]) for key in ("model_state", "ema_state")] == fingerprints
        assert got["config"] == intact["config"]
    assert refused > 20


class Harmful:
    """Something whose unpickling would run code."""

    def __reduce__(self):
        return (os.mkdir, (Harmful.folder,))


@pytest.mark.parametrize("how", ["pickle", "torch", "text"])
def test_foreign_files_are_refused_and_run_nothing(tmp_path, how):
    file, Harmful.folder = tmp_path / "model.pth", str(tmp_path / "harm")
    if how == "pickle":
        file.write_bytes(pickle.dumps(Harmful()))
    elif how == "torch":
        torch.save({"model_state": Harmful()}, file)
    else:
        file.write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(ValueError, match=DAMAGED):
        load_model(file)
    assert_only(file)


@pytest.mark.parametrize(
    "foreign, lacks",
    [
        ({"weight": torch.zeros(2)}, "format_version, model_state, ema_state, config, epoch, step"),
        (torch.zeros(2), "format_version, model_state, ema_state, config, epoch, step"),
        ({"format_version": 1, "model_state": {}, "config": {}, "step": 1}, "ema_state, epoch"),
    ],
)
def test_other_peoples_checkpoints_are_refused(tmp_path, foreign, lacks):
    file = tmp_path / "model.pth"
    torch.save(foreign, file)
    with pytest.raises(ValueError, match=rf"model\.pth is not a LIFT checkpoint: it lacks {lacks}\.$"):
        load_model(file)


def test_files_of_a_later_version_are_refused(tmp_path):
    file = tmp_path / "model.pth"
    save_checkpoint(file, content() | {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(ValueError, match=r"^Checkpoint .* has format version 2, newer than the 1 .*; update LIFT\.$"):
        load_model(file)


def test_absent_ema_weights_are_named(tmp_path):
    file = tmp_path / "model.pth"
    save_checkpoint(file, content(ema=False))
    assert load_model(file).weights == "raw"
    with pytest.raises(ValueError, match=r"^Checkpoint .*model\.pth holds no EMA weights; leave --ema out or train"):
        load_model(file, ema=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["config"].update(hidden_dims=[8, 24]),
        lambda c: c["config"].update(hidden_dims=[8, 12]),
        lambda c: c["config"].update(hidden_dims=[]),
        lambda c: c["config"].update(channels=1),
        lambda c: c["config"].update(model_type="baseline"),
        lambda c: c["config"].update(model_type="dall-e"),
        lambda c: c["config"].update(beta_schedule="sine"),
        lambda c: c["config"].pop("prediction_type"),
        lambda c: c["model_state"].pop("embed.mlp.0.weight"),
        lambda c: c["model_state"].update(extra=torch.zeros(1)),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, change):
    file, saved = tmp_path / "model.pth", copy.deepcopy(content())
    change(saved)
    save_checkpoint(file, saved)
    with pytest.raises(ValueError, match=r"^Checkpoint .*model\.pth does not fit the model its config describes"):
        load_model(file)


def test_a_failing_save_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(content, target):
        with open(target, "wb") as stream:
            stream.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(file, content())
    assert file.read_bytes() == before
    assert_only(file)


def test_replacing_swaps_the_whole_file_at_the_end(tmp_path):
    file = tmp_path / "a" / "table.csv"
    with replacing(file) as temporary:
        assert temporary.parent == file.parent and temporary.suffix == ".csv" and not file.exists()
        temporary.write_text("old")
    assert file.read_text() == "old"
    with replacing(str(file)) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert_only(file)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_keeps_the_old_file_if_the_block_raises(tmp_path, error):
    file = tmp_path / "table.csv"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert_only(file)


def test_replacing_syncs_the_new_file_before_it_takes_the_name(tmp_path, monkeypatch):
    file, events = tmp_path / "table.csv", []
    sync, rename = os.fsync, os.replace

    def record_sync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def record_rename(source, target):
        events.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    with replacing(file) as temporary:
        temporary.write_text("new")
    inode = file.stat().st_ino
    # The new name itself is synced with its folder.
    assert events == [("sync", inode), ("rename", inode), ("sync", tmp_path.stat().st_ino)]


def test_replacing_without_a_folder_it_can_make_raises_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), replacing(tmp_path / "file" / "table.csv"):
        pass


@pytest.fixture(params=[0, 2])
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_devices_are_found_by_every_name(gpus):
    first = "cuda:0" if gpus else "cpu"
    for name in ("0", "cuda", "cuda:0", None):
        assert select_device(name) == torch.device(first)
    assert select_device("cpu") == torch.device("cpu")
    if gpus:
        assert select_device("1") == select_device("cuda:1") == torch.device("cuda:1")


def test_devices_that_do_not_exist_are_named(gpus):
    for name in ("7", "cuda:7"):
        with pytest.raises(
            ValueError, match=rf"^--device {name} does not exist: this machine has {gpus} GPU\(s\); use"
        ):
            select_device(name)
    for name in ("foo", "cuda:", "cuda1", "-1", "cuda:-1", "", "cpu:0:1"):
        with pytest.raises(ValueError, match=rf"^--device {name} is not a device; give a GPU index such as 0, cuda:1"):
            select_device(name)
