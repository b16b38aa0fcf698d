"""Settings of a stage or a module: typed, checked, frozen, and each declared once.

    @dataclass(frozen=True, kw_only=True)
    class ShapeSettings(Settings):
        group = "shape"
        sides: int = option(4, "number of sides", parse=positive_int)

    ShapeSettings(sides=6)                               # from Python
    parse_settings(ShapeSettings, "Draw.").sides         # from the flags of a command, here --sides

A class takes over the settings of the classes that it inherits from, and is accepted wherever one of them is.
"""

import argparse
import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

REQUIRED = dataclasses.MISSING
S = TypeVar("S", bound="Settings")


class Option(NamedTuple):
    """How one setting is written as a flag, checked and kept."""

    help: str
    parse: Callable[[str], Any]
    choices: Sequence[Any] | None
    nargs: int | str | None
    metavar: str | tuple[str, ...] | None
    flag: str | None  # None: the name of the field
    const: Any
    shortcuts: Mapping[str, tuple[Any, str]]
    recorded: bool
    absent: Any
    aliases: Sequence[str]


def option(
    default: Any,  # REQUIRED if there is none; a bool makes a switch
    help: str = "",  # the default follows in brackets
    *,
    parse: Callable[[str], Any] = str,  # text to value; raises ArgumentTypeError
    choices: Sequence[Any] | None = None,
    nargs: int | str | None = None,  # as of argparse, but a list of values becomes a tuple
    metavar: str | tuple[str, ...] | None = None,
    shown: str | None = None,  # what stands in the brackets in place of the default; "" leaves them out
    flag: str | None = None,  # such as "--model"; without dashes an argument that needs no flag
    const: Any = None,  # with nargs "?": the value of the flag alone
    shortcuts: Mapping[str, tuple[Any, str]] = {},  # noqa: B006 - further flags: the value each sets, and its help
    recorded: bool = False,  # part of what a checkpoint says of its training
    absent: Any = REQUIRED,  # what it stands for in older files that do not say, if there are any
    aliases: Sequence[str] = (),  # further names of the flag
) -> Any:
    """A field of a `Settings` class. A field that is None by default may be None, and no other."""
    if shown is None and default not in (REQUIRED, None) and not isinstance(default, bool):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) and not nargs else _words(default)
    text = f"{help} ({shown})".strip() if shown else help
    made = Option(text, parse, choices, nargs, metavar, flag, const, shortcuts, recorded, absent, aliases)
    return dataclasses.field(default=default, metadata={"option": made})


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Values by name, checked when they are put together.

    Raises ValueError, naming the setting, for a value that its flag would not take, and for what `check` refuses.
    """

    group: ClassVar[str | None] = None  # Title above the flags of this class in --help.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        object.__setattr__(self, "_derived", {})
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that do not go together."""

    def _derive(self, **values: Any) -> None:
        # For `check`: values that follow from other settings, with what was given in their place.
        for name, value in values.items():
            self._derived.setdefault(name, getattr(self, name))
            object.__setattr__(self, name, value)

    def but(self: "S", **changes: Any) -> "S":
        """A checked copy with changes; what was not given, but followed from other settings, follows anew."""
        return dataclasses.replace(self, **self._derived | changes)

    def recorded(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps, in plain types: tuples become lists."""
        chosen = (field.name for field in dataclasses.fields(self) if field.metadata["option"].recorded)
        return _plain({name: getattr(self, name) for name in chosen})

    def given(self) -> dict[str, Any]:
        """All settings without what followed from others, in plain types: what makes the same settings again."""
        return _plain({field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | self._derived)

    @classmethod
    def absent(cls) -> dict[str, Any]:
        """What older files that do not say stand for, setting by setting."""
        options = {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}
        return {name: made.absent for name, made in options.items() if made.absent is not REQUIRED}

    def __str__(self) -> str:
        """One line per setting, `  name = value`, in the order of the alphabet."""
        return lines_of(dataclasses.asdict(self))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def lines_of(values: Mapping[str, Any]) -> str:
    """One line per value, `  name = value`, in the order of the alphabet."""
    return "\n".join(f"  {name} = {value}" for name, value in sorted(values.items()))


def _checked(field: dataclasses.Field, value: Any) -> Any:
    name, made = field.name, field.metadata["option"]
    if value is None:
        if field.default is None:
            return None
        raise ValueError(f"{name} must have a value, not None.")
    if isinstance(field.default, bool) or made.parse is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r} is neither True nor False.")
        return value
    if made.nargs is None or made.nargs == "?":
        return _checked_one(name, made, value)
    count = made.nargs if isinstance(made.nargs, int) else None
    if isinstance(value, str) or not isinstance(value, Sequence | range):
        raise ValueError(f"{name} = {value!r} is not a list of values.")
    if not value or (count is not None and len(value) != count):
        raise ValueError(f"{name} has {len(value)} values; give {count or 'one or more'}.")
    return tuple(_checked_one(name, made, one) for one in value)


def _checked_one(name: str, made: Option, value: Any) -> Any:
    if made.choices is not None and made.parse is str:
        if value not in made.choices:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(str, made.choices))}.")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value")
        if isinstance(value, list | tuple):
            found = made.parse(",".join(map(str, value)))
            if not isinstance(found, tuple):
                raise ValueError("a list")
            return found
        return made.parse(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name} = {value!r} is no value that it can have.") from error


def parse_settings(
    cls: type[S],
    description: str,
    argv: Sequence[str] | None = None,  # of the command line if None
    leave_out: Sequence[str] = (),  # settings without a flag
    allow_abbrev: bool = True,
    stored: Callable[[dict[str, Any]], dict[str, Any]] | None = None,  # from values to those of flags not given
    **fixed: Any,  # settings without a flag, and their values
) -> S:
    """The settings that the flags of a command give; a usage error ends it with one sentence and status 2.

    Raises what `stored` raises.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=allow_abbrev)
    _add_flags(parser, cls, {*fixed, *leave_out})
    # An argument that may be missing would take the word of the one behind it, were there a flag between them.
    options = (field.metadata["option"] for field in dataclasses.fields(cls))
    optional = any(made.nargs == "?" and made.flag and not made.flag.startswith("-") for made in options)
    parse = parser.parse_intermixed_args if optional else parser.parse_args
    values = vars(parse(argv))
    if stored is not None:
        parser.set_defaults(**stored(values | fixed))
        values = vars(parse(argv))
    return _from_flags(parser, cls, values, fixed)


def parse_command(
    commands: Mapping[str, tuple[type[S], str]], description: str, argv: Sequence[str] | None = None
) -> tuple[str, S]:
    """The command that the first word names, of those with their settings and help, and its settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (cls, text) in commands.items():
        _add_flags(subparsers.add_parser(name, help=text), cls, set())
    values = vars(parser.parse_args(argv))
    name = values.pop("command")
    return name, _from_flags(subparsers.choices[name], commands[name][0], values, {})


def _from_flags(parser: argparse.ArgumentParser, cls: type[S], values: dict[str, Any], fixed: dict[str, Any]) -> S:
    try:
        return cls(**values | fixed)
    except ValueError as error:
        parser.error(str(error))


def _add_flags(parser: argparse.ArgumentParser, cls: type[Settings], without: set[str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if without - fields.keys():
        raise TypeError(f"{cls.__name__} has no setting {', '.join(sorted(without - fields.keys()))}")
    # The flags of a class come before those that it takes over, each under the title of the class that had it first.
    titles = {name: base.__dict__.get("group") for base in cls.__mro__ for name in inspect.get_annotations(base)}
    groups: dict[str | None, Any] = {None: parser}
    for name in dict.fromkeys(name for base in cls.__mro__ for name in inspect.get_annotations(base)):
        if name not in fields or name in without:
            continue
        title = titles[name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], fields[name], fields[name].metadata["option"])


def _add_flag(group: Any, field: dataclasses.Field, made: Option) -> None:
    flag = made.flag or f"--{field.name}"
    if isinstance(field.default, bool):
        group.add_argument(flag, dest=field.name, action="store_true", help=made.help)
    elif made.parse is bool:
        group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=made.help)
    else:
        options = {"type": made.parse, "choices": made.choices, "nargs": made.nargs, "metavar": made.metavar}
        options |= {"const": made.const} if made.const is not None else {}
        if flag.startswith("-"):
            options |= {"dest": field.name, "required": field.default is REQUIRED}
        if field.default is not REQUIRED:
            options["default"] = field.default
        group.add_argument(flag, *made.aliases, help=made.help, **options)
    for shortcut, (value, text) in made.shortcuts.items():
        group.add_argument(shortcut, dest=field.name, action="store_const", const=value, help=text)
