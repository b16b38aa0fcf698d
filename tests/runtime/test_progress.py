"""What a stage says of how far it is: a bar for people, few lines for files."""

import io
import re
import sys

import pytest
from tqdm import tqdm

import runtime.progress
from runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which the test moves; tqdm and the lines go by them."""

    class Clock:
        now = 1000.0

        def time(self):
            return self.now

        monotonic = time

    clock = Clock()
    monkeypatch.setattr(runtime.progress, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.time)
    return clock


def written(monkeypatch, clock, steps, seconds, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=steps, unit="step", **options) as bar:
        for k in range(steps):
            clock.now += seconds
            bar.set_postfix_str(f"loss {k}")
            bar.update()
    return stream.getvalue()


def test_a_file_gets_a_line_per_half_minute_and_one_at_the_end(monkeypatch, clock):
    # 600 steps of a second each are ten minutes.
    lines = written(monkeypatch, clock, 600, 1.0, io.StringIO(), desc="lift").splitlines()
    assert 20 <= len(lines) <= 21
    assert all(
        re.fullmatch(r"lift: \d+ of 600 steps, loss \d+, \d\d:\d\d passed(, \d\d:\d\d left)?", line) for line in lines
    )
    assert lines[0] == "lift: 29 of 600 steps, loss 29, 00:30 passed, 09:31 left"
    assert lines[-1] == "lift: 600 of 600 steps, loss 599, 10:00 passed"


def test_what_is_quick_is_one_line_and_what_leaves_nothing_is_none(monkeypatch, clock):
    assert written(monkeypatch, clock, 1, 0.1, io.StringIO()) == "1 of 1 step, loss 0, 00:00 passed\n"
    assert written(monkeypatch, clock, 5, 0.1, io.StringIO(), leave=False) == ""
    assert written(monkeypatch, clock, 5, 0.1, io.StringIO(), disable=True) == ""


def test_messages_between_bring_no_control_characters(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=3, unit="img") as bar:
        bar.update()
        tqdm.write("warning", file=stream)
        clock.now += 60
        bar.update(2)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()][0] == "warning"
    assert stream.getvalue().splitlines()[-1] == "3 of 3 images, 01:00 passed"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_a_terminal_gets_one_bar(monkeypatch, clock):
    text = written(monkeypatch, clock, 100, 1.0, Terminal(), desc="lift", ncols=80)
    assert text.count("\n") == 1 and text.count("\r") >= 100 and "100%" in text.split("\r")[-1]


def test_iterating_counts_as_it_does_with_tqdm(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(Progress(range(4), unit="cell")) == [0, 1, 2, 3]
    assert stream.getvalue() == "4 of 4 cells, 00:00 passed\n"
