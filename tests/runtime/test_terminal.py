"""What cannot be printed is lost, said at the end, and no reason to stop."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT, run_stage
from runtime.terminal import printing

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
LETTERS = "± ö 猫 \udcff"


@contextmanager
def printing_to(monkeypatch, name, file, encoding="utf-8"):
    with open(file, "w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, name, stream)
        yield
        monkeypatch.undo()


@needs_full
@pytest.mark.parametrize("lines", [1, 3000])
@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_under_the_output_is_said_at_the_end(monkeypatch, lines, flush):
    done = []
    with printing_to(monkeypatch, "stdout", FULL), pytest.raises(OSError, match="not complete.*No space.*all else is"):
        with printing():
            for k in range(lines):
                print("a line of some length", k, flush=flush)
                done.append(k)
    assert len(done) == lines


@needs_full
@pytest.mark.parametrize("lines", [1, 3000])
def test_a_full_disk_under_the_reports_is_no_error(monkeypatch, capsys, lines):
    with printing_to(monkeypatch, "stderr", FULL), printing():
        for k in range(lines):
            print("progress", k, file=sys.stderr, flush=True)
        print("the result")
    assert sys.stderr is not None


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "± ö 猫 ?"), ("latin-1", "± ö ? ?"), ("ascii", "? ? ? ?")])
def test_letters_that_a_terminal_lacks_become_question_marks(monkeypatch, tmp_path, encoding, shown):
    with printing_to(monkeypatch, "stdout", tmp_path / "out", encoding), printing():
        print(LETTERS)
    assert (tmp_path / "out").read_text(encoding) == f"{shown}\n"


def test_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr
    for error in (None, ValueError("no")):
        with pytest.raises(ValueError) if error else printing():
            with printing():
                assert sys.stdout.fileno() == before[0].fileno() and sys.stdout is not before[0]
                if error:
                    raise error
        assert (sys.stdout, sys.stderr) == before


def test_without_streams_nothing_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with printing():
        print("nothing")
        print("nothing", file=sys.stderr)


def test_a_closed_pipe_is_left_to_the_stage(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            with printing():
                print("nobody reads this", flush=True)
        finally:
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


def test_an_error_of_a_stage_is_said_in_words(tmp_path):
    class Stage:
        __name__ = "stage"

        @staticmethod
        def main():
            (tmp_path / "missing" / "file").read_bytes()

    place = tmp_path / "missing" / "file"
    says = f"error: {place} cannot be read or written (No such file or directory); check the name."
    assert run_stage(Stage).message == says


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_stage_runs_without_standard_streams(tmp_path, closed):
    """Files that are opened later must not get the numbers of those that were closed."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import runtime.startup\nimport os, sys\n"
        f"open({str(tmp_path / 'file')!r}, 'wb')\n"
        "for number in range(3):\n    os.fstat(number)\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\nos.write(1, b'from a library')\nprint('printed')\n"
        "print('reported', file=sys.stderr)\nfile.write('content')\n"
    )
    # A script of the folder of the stages, wherever that is.
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/startup.py").write_bytes((ROOT / "runtime/startup.py").read_bytes())
    done = subprocess.run(["bash", "-c", f"{sys.executable} {script} {closed}"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "content"
    assert ("printed" in done.stdout) == ("1>" not in closed) and ("reported" in done.stderr) == ("2>" not in closed)
