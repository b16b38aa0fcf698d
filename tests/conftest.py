"""What several test files share: one thread, no network, and a way to run a stage in this process."""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# A test that reaches for the hub is wrong, and must fail at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

import cli
import compute_heatmap_30
import eval_fid_batch
import train_baseline
import train_lift
from checkpoint import read_checkpoint
from data import load_images
from runtime.distributed import Processes
from runtime.reports import say_once
from runtime.settings import parse_settings
from training.settings import TrainingSettings
from training.trainer import Trainer

# Images of 16x16 pixels are quicker on one thread, and sums do not depend on the machine then.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--dataset synthetic --limit 12 --resolution 16 --hidden_dims 8,16 --batch_size 4 --epochs 2 --log_every 1 "
    "--device cpu --precision fp32"
).split()

# A remainder that fills no batch, and a learning rate at which six steps matter.
RUN = ("--limit", 14, "--lr", 0.005, "--save_every", 2, "--ema_decay", 0.9)
LAST = "checkpoints/lift_dual_timestep_last.pth"
LOG = "logs/lift_dual_timestep"


HARDWARE = ["--device", "cpu", "--precision", "fp32"]
# Four cells are crossed in four steps, of at most the five cells that a step may move.
STEPS = ["--num_steps", 4]
# What `table` holds for two seeds.
SCORED = ["--model_type", "baseline", "lift", "--path_type", "diagonal", "dp_64", "--seeds", 42, 43]
MEASURED = [("baseline", "diagonal"), ("dual", "diagonal"), ("dual", "dp_64")]


class Ended(NamedTuple):
    """How a stage ended: exit status, what it printed, the sentence it ended with (empty on success), and its notes."""

    status: int
    output: str
    message: str
    notes: str = ""


def run_stage(module, *flags) -> Ended:
    """Run `module` as a script with these flags, in this process, with its output captured."""
    out, err = io.StringIO(), io.StringIO()
    command = [f"{module.__name__}.py", *map(str, flags)]
    say_once.cache_clear()
    with mock.patch.object(sys, "argv", command), mock.patch.dict(os.environ):
        os.environ.pop("LIFT_DEBUG", None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.run_stage(module.main)
            except SystemExit as end:
                # Python prints a string as exit code to stderr and ends with status 1.
                if isinstance(end.code, str):
                    return Ended(1, out.getvalue(), end.code, err.getvalue())
                lines = err.getvalue().strip().splitlines()
                return Ended(end.code or 0, out.getvalue(), lines[-1] if end.code == 2 else "", err.getvalue())
    return Ended(0, out.getvalue(), "", err.getvalue())


def list_files(folder: Path) -> dict[str, tuple[str, int]]:
    """Content hash and modification time of every file below a folder, apart from the lock files of the cache."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


class NoRoom:
    """While entered, no file can grow beyond so many bytes, as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def results_of(model_type: str) -> Path:
    """Where results of tiny runs go, which have no name and are not in the published places."""
    return Path(f"results/{model_type}-published-16px-synthetic-seed42")


def read_log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / LOG / name).read_text().splitlines()]


def assert_same(one, other):
    """Nested containers and tensors are equal bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def assert_same_run(folder, reference):
    """Same resume file, but for how it was come by, log and samples."""
    ours, theirs = (read_checkpoint(place / LAST) | {"execution": {}, "settings": {}} for place in (folder, reference))
    assert_same(ours, theirs)
    for name in ("metrics.jsonl", "samples_4ep_fine.png", "samples_4ep_coarse.png"):
        assert (folder / LOG / name).read_bytes() == (reference / LOG / name).read_bytes()
    assert [row["step"] for row in read_log(folder, "speed.jsonl")] == [row["step"] for row in read_log(reference)]


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

    # The sample grids would take most of the time of such a run.
    with mock.patch("training.showing.GRID_STEPS", 2):
        yield flags


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def straight(stage, tiny, cache, tmp_path_factory):
    """Runs of four epochs without a stop, by their further flags; a folder each."""
    folders = {}

    def run(*flags):
        if flags not in folders:
            folder = tmp_path_factory.mktemp("straight")
            stage(train_lift, *tiny(folder), "--cache_dir", cache, *RUN, "--epochs", 4, *flags)
            folders[flags] = folder
        return folders[flags]

    return run


class Run(NamedTuple):
    """Where the trained models and what belongs to them lie."""

    folder: Path

    @property
    def baseline(self) -> Path:
        return self.folder / "checkpoints/baseline_2ep.pth"

    @property
    def lift(self) -> Path:
        return self.folder / "checkpoints/lift_dual_timestep_2ep.pth"

    @property
    def heatmap(self) -> Path:
        return self.folder / "results/heatmap_4_2ep.pth"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def images(self) -> np.ndarray:
        return load_images("synthetic", 16, self.cache, limit=12).pixels

    def heatmap_flags(self, output) -> list:
        flags = ["--checkpoint", self.lift, "--output", output, "--grid", 4, "--K", 1, "--num_images", 2]
        return [*flags, *STEPS, *HARDWARE, "--cache_dir", self.cache]

    def generate_flags(self, output, path_type="diagonal", count=5) -> list:
        checkpoint = self.baseline if path_type == "baseline" else self.lift
        flags = ["--checkpoint", checkpoint, "--output", output, "--num_images", count, "--heatmap", self.heatmap]
        return [*flags, "--path_type", path_type.replace("baseline", "diagonal"), *STEPS, *HARDWARE]

    def eval_flags(self, output) -> list:
        flags = ["--checkpoint_dir", self.folder / "checkpoints", "--heatmap_dir", self.folder / "results"]
        flags += ["--output", output, "--metrics", "swd", "--grid", 4, "--cache_dir", self.cache]
        return [*flags, *STEPS, *HARDWARE]


@pytest.fixture(scope="session")
def run(stage, tiny, tmp_path_factory):
    """A baseline and a LIFT model after two epochs, and the heatmap of its raw weights."""
    run = Run(tmp_path_factory.mktemp("run"))
    for module in (train_baseline, train_lift):
        stage(module, *tiny(run.folder), "--ema_decay", 0.5, "--lr", 0.003)
    stage(compute_heatmap_30, *run.heatmap_flags(run.heatmap))
    return run


@pytest.fixture(scope="session")
def table(stage, run):
    """The results of both models, both paths and two seeds."""
    file = run.folder / "results/fid_results.csv"
    stage(eval_fid_batch, *run.eval_flags(file), *SCORED)
    return file


@pytest.fixture
def trainer(tiny, tmp_path, cache):
    """`trainer(*flags)` is a new run of the dual model of three steps per epoch."""

    def make(*flags) -> Trainer:
        words = [*tiny(tmp_path), "--cache_dir", str(cache), *map(str, flags)]
        settings = parse_settings(TrainingSettings, "A run.", words, model_type="dual")
        run = Trainer(settings, cli.load_training_images(settings), Processes("cpu"))
        run.prepare()
        return run

    return make


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts whose `python` writes the commands it is given into a file."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    stamp = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("requirements*.txt")))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / f".venv/installed-{name}").write_bytes(stamp)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/bash\n[[ $1 == -c ]] && { echo 0; exit; }\nprintf "%s\\0" "$@" $\'\\n\' >>commands\n')
    python.chmod(0o755)
    return tmp_path
