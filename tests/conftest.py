"""What several test files share: one thread, no network, and a way to run a stage in this process."""

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# A test that reaches for the hub is wrong, and must fail at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import cli

# Images of 16x16 pixels are quicker on one thread, and sums do not depend on the machine then.
torch.set_num_threads(1)

TINY = (
    "--dataset synthetic --limit 12 --resolution 16 --hidden_dims 8,16 --batch_size 4 --epochs 2 --log_every 1 "
    "--device cpu --precision fp32"
).split()


class Ended(NamedTuple):
    """How a stage ended: exit status, what it printed, and the sentence it ended with (empty on success)."""

    status: int
    output: str
    message: str


def run_stage(module, *flags) -> Ended:
    """Run `module` as a script with these flags, in this process, with its output captured."""
    out, err = io.StringIO(), io.StringIO()
    command = [f"{module.__name__}.py", *map(str, flags)]
    with mock.patch.object(sys, "argv", command), mock.patch.dict(os.environ):
        os.environ.pop("LIFT_DEBUG", None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.run_stage(module.main)
            except SystemExit as end:
                # Python prints a string as exit code to stderr and ends with status 1.
                if isinstance(end.code, str):
                    return Ended(1, out.getvalue(), end.code)
                lines = err.getvalue().strip().splitlines()
                return Ended(end.code or 0, out.getvalue(), lines[-1] if end.code == 2 else "")
    return Ended(0, out.getvalue(), "")


def list_files(folder: Path) -> dict[str, tuple[str, int]]:
    """Content hash and modification time of every file below a folder, apart from the lock files of the cache."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


@pytest.fixture(scope="session")
def stage():
    """`stage(module, *flags) -> Ended` runs a stage that must succeed."""

    def run(module, *flags) -> Ended:
        ended = run_stage(module, *flags)
        assert ended.status == 0, ended.message
        return ended

    return run


@pytest.fixture
def refused(tmp_path):
    """`refused(module, *flags, says=...)` runs a stage that must end with one sentence and change no file.

    The files of `tmp_path` and of the folders in `keeps` are compared before and after.
    """

    def run(module, *flags, says: tuple[str, ...], status: int = 1, keeps: tuple[Path, ...] = ()) -> str:
        before = [list_files(folder) for folder in (tmp_path, *keeps)]
        ended = run_stage(module, *flags)
        assert ended.status == status, ended
        assert "error: " in ended.message and len(ended.message.splitlines()) == 1
        assert "Traceback" not in ended.message
        for part in says:
            assert str(part) in ended.message
        assert [list_files(folder) for folder in (tmp_path, *keeps)] == before
        return ended.message

    return run


@pytest.fixture(scope="session")
def tiny():
    """`tiny(folder)`: flags of a training run of seconds that keeps everything it writes in one folder."""

    def flags(folder: Path) -> list[str]:
        places = {"--output_dir": "checkpoints", "--log_dir": "logs", "--cache_dir": "cache"}
        return [*TINY, *(word for flag, name in places.items() for word in (flag, str(folder / name)))]

    import training

    # The sample grids would take most of the time of such a run.
    with mock.patch.object(training, "GRID_STEPS", 2):
        yield flags
