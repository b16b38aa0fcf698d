"""Settings: what a flag says and what Python says are one object, checked alike; a setting is declared once."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import hidden_dims, positive_float, positive_int
from runtime.settings import REQUIRED, Settings, option, parse_command, parse_settings


@dataclass(frozen=True, kw_only=True)
class Frame(Settings):
    group = "frame"
    width: int = option(3, "of the frame", parse=positive_int, recorded=True)
    colour: str = option("red", choices=("red", "blue"))


@dataclass(frozen=True, kw_only=True)
class Drawing(Frame):
    file: str = option(REQUIRED, "what is drawn", flag="file")
    scale: float | None = option(None, "(that of the file)", parse=positive_float, recorded=True)
    sizes: tuple[int, ...] = option((1, 2), parse=positive_int, nargs="+", shortcuts={"--small": ((1,), "one")})
    widths: tuple[int, ...] = option((8, 16), parse=hidden_dims, recorded=True)
    mirrored: bool = option(False, "left to right")
    ink: bool | None = option(None, "with ink", parse=bool)
    resume: str | None = option(None, choices=("required", "auto"), nargs="?", const="required")
    ends: tuple[int, int] = option((1, 2), parse=int, nargs=2)
    at: int = option(0, parse=int)
    area: float | None = option(None, parse=positive_float)

    def check(self):
        if self.mirrored and self.colour == "blue":
            raise ValueError("--mirrored and blue exclude each other")
        if self.area is None:
            self._derive(area=float(self.width**2))


def parsed(*words):
    return parse_settings(Drawing, "Draw.", ["a.png", *words])


def test_flags_and_python_make_the_same_object():
    assert parsed() == Drawing(file="a.png") == Drawing(file=Path("a.png"))
    words = "--width 5 --colour blue --scale 2 --sizes 4 5 --widths 2,3 --no-ink --resume auto".split()
    same = Drawing(file="a.png", width=5, colour="blue", scale=2, sizes=[4, 5], widths=[2, 3], ink=False, resume="auto")
    assert parsed(*words) == same
    assert (same.scale, type(same.scale), same.sizes, same.widths) == (2.0, float, (4, 5), (2, 3))
    assert parsed("--small").sizes == (1,) and parsed("--resume").resume == "required" and parsed("--ink").ink is True
    assert parsed("--mirrored").mirrored and parsed("--width", "7").area == 49.0


@given(st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False), st.integers(min_value=1, max_value=10**12))
def test_numbers_come_through_to_the_last_bit(scale, width):
    settings = Drawing(file="a", scale=scale, width=width, area=1)
    assert (settings.scale, settings.width) == (scale, width)
    assert parsed("--scale", repr(scale), "--width", str(width), "--area", "1") == dataclasses.replace(
        settings, file="a.png"
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"width": 0}, "width: '0' is not a positive integer"),
        ({"width": 2.5}, "width: '2.5' is not"),
        ({"width": True}, "width = True"),
        ({"width": [3]}, "width = [3]"),
        ({"width": None}, "width must have a value"),
        ({"colour": None}, "colour must have a value"),
        ({"sizes": ()}, "sizes has 0 values"),
        ({"ends": (1, 2, 3)}, "ends has 3 values; give 2"),
        ({"at": "x"}, "at = 'x' is no value"),
        ({"ink": "no"}, "ink = 'no' is neither"),
        ({"ink": 0}, "ink = 0 is neither"),
        ({"colour": "green"}, "colour = 'green' is not one of red, blue"),
        ({"scale": float("nan")}, "scale: 'nan' is not a positive number"),
        ({"sizes": 3}, "sizes = 3 is not a list"),
        ({"sizes": "12"}, "sizes = '12' is not a list"),
        ({"sizes": (1, -1)}, "sizes: '-1' is not"),
        ({"mirrored": 1}, "mirrored = 1 is neither"),
        ({"resume": "always"}, "resume = 'always' is not one of"),
        ({"mirrored": True, "colour": "blue"}, "exclude each other"),
    ],
)
def test_values_that_a_flag_would_refuse_are_refused(values, says):
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        Drawing(file="a.png", **values)
    assert says in str(error.value)


def test_settings_are_frozen_and_complete():
    settings = Drawing(file="a.png")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.width = 4
    with pytest.raises(TypeError, match="file"):
        Drawing()
    with pytest.raises(TypeError, match="height"):
        Drawing(file="a.png", height=3)
    # A copy with changes is checked as well.
    with pytest.raises(ValueError, match="width"):
        dataclasses.replace(settings, width=-1)


def test_what_follows_from_other_settings_follows_anew_in_a_copy():
    assert Drawing(file="a.png", width=2).but(width=3).area == 9.0
    assert Drawing(file="a.png", width=2, area=5).but(width=3).area == 5.0
    assert Drawing(file="a.png", width=2).but(width=3).but(mirrored=True) == Drawing(
        file="a.png", width=3, mirrored=True
    )
    with pytest.raises(ValueError, match="width"):
        Drawing(file="a.png").but(width=-1)


def test_what_is_recorded_is_plain_and_goes_back_in():
    settings = Drawing(file="a.png", width=5, widths=(2, 3))
    assert settings.recorded() == {"width": 5, "scale": None, "widths": [2, 3]}
    assert Drawing(file="a.png", **settings.recorded()) == settings


def test_settings_are_printed_one_a_line():
    lines = str(Drawing(file="a.png")).splitlines()
    assert lines == sorted(lines) and "  width = 3" in lines and len(lines) == len(dataclasses.fields(Drawing))


@pytest.mark.parametrize(
    "words", [["--width", "0"], ["--colour", "green"], ["--mirrored", "--colour", "blue"], ["--height", "3"]]
)
def test_a_usage_error_is_one_sentence_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].count("error: ") == 1


def test_help_has_groups_defaults_and_every_flag(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    said = capsys.readouterr().out
    assert "frame:" in said and "of the frame (3)" in said and "(8,16)" in said and "(1 2)" in said
    for flag in ("--width", "--colour", "--scale", "--sizes", "--small", "--ink", "--no-ink", "--mirrored", "--resume"):
        assert flag in said
    assert said.index("frame:") < said.rindex("--width")
    # Flags of the class itself come before those that it takes over.
    assert said.index("--scale") < said.index("--width")


def test_a_stage_may_fix_or_leave_out_settings():
    made = parse_settings(Drawing, "Draw.", ["--width", "4"], leave_out=("colour",), file="b.png")
    assert (made.file, made.width, made.colour) == ("b.png", 4, "red")
    for flag in ("--colour", "b.png"):
        with pytest.raises(SystemExit):
            parse_settings(Drawing, "Draw.", [flag, "red"], leave_out=("colour",), file="b.png")


def test_a_setting_that_is_none_cannot_be_left_out():
    with pytest.raises(TypeError, match="no setting size"):
        parse_settings(Drawing, "Draw.", ["a.png"], leave_out=("size",))


def test_a_stage_may_have_commands():
    commands = {"draw": (Drawing, "a drawing"), "frame": (Frame, "a frame")}
    assert parse_command(commands, "Both.", ["frame", "--width", "9"]) == ("frame", Frame(width=9))
    assert parse_command(commands, "Both.", ["draw", "x"]) == ("draw", Drawing(file="x"))
    with pytest.raises(SystemExit):
        parse_command(commands, "Both.", [])


def test_parsers_are_asked_for_texts_only():
    # A parser that would take a number as it is must not be offered one.
    def shout(text):
        if not isinstance(text, str):
            raise argparse.ArgumentTypeError("no text")
        return text.upper()

    @dataclass(frozen=True, kw_only=True)
    class Loud(Settings):
        word: str = option("a", parse=shout)

    assert Loud(word="b").word == "B" and Loud(word=3).word == "3"
