"""An interrupt ends a stage without a word, whether it is importing, at work, or on its way out."""

from runtime.startup import interruptible

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cli
from conftest import ROOT

STAGES = sorted(file.stem for file in ROOT.glob("*.py") if "run_stage(main)" in file.read_text(encoding="utf-8"))
# Those that are interrupted, another few in each order of their names.
CHOSEN = np.random.default_rng(8).permutation(STAGES)[:4]


def handles_interrupts(process):
    """Whether Python would make an exception of an interrupt by now, as /proc says."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1)


def start(name, *flags, **options):
    command = [sys.executable, ROOT / f"{name}.py", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_begins_with_it(name):
    first = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body[1]
    assert isinstance(first, ast.Import) and [alias.name for alias in first.names] == ["runtime.startup"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc")
@pytest.mark.parametrize("k", range(len(CHOSEN)))
def test_a_stage_that_is_importing_ends_quietly(k):
    # Where the tests run in the background, interrupts are ignored, and would be by the stage.
    process = start(CHOSEN[k], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    # Python handles interrupts soon after its own start, and no more from the first line of the stage on.
    for handled in (True, False):
        deadline = time.monotonic() + 60
        while handles_interrupts(process) != handled:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "what takes long comes before"
    time.sleep(k * 0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode == -signal.SIGINT


def test_an_interrupt_that_is_ignored_stays_so():
    process = start("aggregate_results", "--help", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"") and output.startswith(b"usage: aggregate_results.py")


def raising(*errors):
    """A stage that raises these errors, each while it handles the one before."""

    def main():
        try:
            if errors[1:]:
                raising(*errors[:-1])()
        finally:
            raise errors[-1]

    return main


@pytest.mark.parametrize(
    "errors",
    [(KeyboardInterrupt(),), (KeyboardInterrupt(), ImportError("initialization failed"), RuntimeError("lost"))],
)
def test_whatever_comes_of_an_interrupt_ends_a_stage_quietly(capsys, errors):
    with pytest.raises(SystemExit) as end:
        cli.run_stage(raising(*errors))
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_an_error_without_an_interrupt_is_one():
    with pytest.raises(ImportError, match="no module"):
        cli.run_stage(raising(ValueError(), ImportError("no module")))


@pytest.fixture
def handler():
    """A way to set what an interrupt does, until the end of the test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda new: signal.signal(signal.SIGINT, new)
    signal.signal(signal.SIGINT, before)


def test_interrupts_are_exceptions_within_a_stage_only(handler):
    handler(signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *args: None])
def test_what_others_make_of_an_interrupt_is_left_alone(handler, own):
    handler(own)
    with interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is own
    assert signal.getsignal(signal.SIGINT) is own
