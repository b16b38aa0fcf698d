"""Weights & Biases with its real library, offline: what a training and its resumption leave for it, read back.

The format of its files is that of the log of LevelDB behind a header of seven bytes: records of a checksum (4 bytes), a
length (2) and a kind (1), in blocks of 32 KiB.
"""

import json
import os
import socket
import struct
import subprocess
import sys

import pytest

from conftest import ROOT
from training.run_log import read_metrics

proto = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed (requirements-dev.txt)")

HEADER, BLOCK, RECORD = 7, 32768, struct.Struct("<IHB")
WHOLE, LAST = 1, 4  # Kinds of records that end a message.


def records_of(file):
    """The messages of one run, in their order."""
    content = file.read_bytes()
    assert content.startswith(b":W&B")
    position, part = HEADER, b""
    while position + RECORD.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < RECORD.size:
            position += left
            continue
        _, length, kind = RECORD.unpack_from(content, position)
        position += RECORD.size
        part += content[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            message = proto.Record()
            message.ParseFromString(part)
            yield message
            part = b""


def said(file):
    """The run of a file, its config, and its rows as dictionaries."""
    messages = list(records_of(file))
    (run,) = [message.run for message in messages if message.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    rows = [message.history.item for message in messages if message.WhichOneof("record_type") == "history"]
    names = [{(item.key or "/".join(item.nested_key)): item.value_json for item in row} for row in rows]
    assert messages[-1].WhichOneof("record_type") == "exit"
    return run, config, [{name: json.loads(text) for name, text in row.items()} for row in names]


def test_an_offline_run_and_its_resumption_hold_losses_and_settings_and_try_no_network(tiny, cache, tmp_path):
    # A proxy that would notice whoever wants to leave the machine.
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), address)
        environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path), "NO_PROXY": "", "no_proxy": ""}
        flags = [*tiny(tmp_path), "--cache_dir", str(cache), "--log_every", "1", "--wandb", "--resume", "auto"]
        for epochs in (1, 2):
            command = [sys.executable, str(ROOT / "train_baseline.py"), *flags, "--epochs", str(epochs)]
            ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()
    folder = tmp_path / "logs/baseline"
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.name)
    (first, config, rows), (second, _, later) = map(said, files)
    # Both parts are of one run, which `wandb sync` puts together again.
    assert first.run_id == second.run_id == (folder / "wandb_id").read_text()
    assert (first.project, first.display_name) == ("lift", "baseline")
    settings = json.loads((folder / "settings.json").read_text())
    assert {name: config[name] for name in settings} == settings and config["hidden_dims"] == settings["hidden_dims"]
    logged = read_metrics(folder / "metrics.jsonl")
    assert len(logged) == len(rows) + len(later) and rows and later
    for row, expected in zip([*rows, *later], logged, strict=True):
        assert row["global_step"] == expected["step"]
        assert row["fine loss"] == pytest.approx(expected["loss_64"], rel=1e-6)
        assert row["lr"] == pytest.approx(expected["lr"]) and row["grad_norm"] == pytest.approx(expected["grad_norm"])
