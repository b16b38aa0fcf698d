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
import os
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

REQUIRED = dataclasses.MISSING


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
) -> Any:
    """A field of a `Settings` class. A field that is None by default may be None, and no other."""
    if shown is None and default not in (REQUIRED, None) and not isinstance(default, bool):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) and not nargs else _words(default)
    text = f"{help} ({shown})".strip() if shown else help
    made = Option(text, parse, choices, nargs, metavar, flag, const, shortcuts, recorded)
    return dataclasses.field(default=default, metadata={"option": made})


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Values by name, checked when they are put together.

    Raises ValueError, naming the setting, for a value that its flag would not take, and for what `check` refuses.
    """

    group: ClassVar[str | None] = None  # Title above the flags of this class in --help.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that do not go together."""

    def _resolve(self, **values: Any) -> None:
        # For `check`, of what follows from other settings.
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def recorded(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps, in plain types: tuples become lists."""
        chosen = (field.name for field in dataclasses.fields(self) if field.metadata["option"].recorded)
        values = {name: getattr(self, name) for name in chosen}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        """One line per setting, `  name = value`, in the order of the alphabet."""
        return "\n".join(f"  {name} = {value}" for name, value in sorted(dataclasses.asdict(self).items()))


def _checked(field: dataclasses.Field, value: Any) -> Any:
    made: Option = field.metadata["option"]
    if value is None and field.default is None:
        return None
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{field.name} = {value!r} is neither True nor False.")
        return value
    if isinstance(made.nargs, int) or made.nargs in ("+", "*"):
        if isinstance(value, str) or not isinstance(value, Sequence | range):
            raise ValueError(f"{field.name} = {value!r} is not a list of values.")
        return tuple(_checked_one(field.name, made, one) for one in value)
    return _checked_one(field.name, made, value)


def _checked_one(name: str, made: Option, value: Any) -> Any:
    if made.nargs == "?" and value == made.const:
        return value
    if made.choices is not None and made.parse is str:
        if value not in made.choices:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(str, made.choices))}.")
        return value
    if isinstance(value, bool):
        if made.parse is bool:
            return value
        raise ValueError(f"{name} = {value!r} is a truth value, which it cannot be.")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    try:
        return made.parse(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}.") from error


S = TypeVar("S", bound=Settings)


def parse_settings(
    cls: type[S],
    description: str,
    argv: Sequence[str] | None = None,  # of the command line if None
    leave_out: Container[str] = (),  # settings without a flag
    allow_abbrev: bool = True,
    **fixed: Any,  # settings without a flag, and their values
) -> S:
    """The settings that the flags of a command give; a usage error ends it with one sentence and status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=allow_abbrev)
    _add_flags(parser, cls, {*fixed, *(name for name in _names(cls) if name in leave_out)})
    return _from_flags(parser, cls, vars(parser.parse_args(argv)), fixed)


def parse_command(
    commands: Mapping[str, tuple[type[S], str]], description: str, argv: Sequence[str] | None = None
) -> tuple[str, S]:
    """The command that the first word names, of those with their settings and help, and its settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (cls, text) in commands.items():
        _add_flags(subparsers.add_parser(name, help=text), cls, ())
    values = vars(parser.parse_args(argv))
    name = values.pop("command")
    return name, _from_flags(subparsers.choices[name], commands[name][0], values, {})


def _names(cls: type[Settings]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _from_flags(parser: argparse.ArgumentParser, cls: type[S], values: dict[str, Any], fixed: dict[str, Any]) -> S:
    try:
        return cls(**values | fixed)
    except ValueError as error:
        parser.error(str(error))


def _add_flags(parser: argparse.ArgumentParser, cls: type[Settings], without: Container[str]) -> None:
    titles = {}  # Of the class that names a setting first.
    for base in cls.__mro__:
        titles |= dict.fromkeys(base.__dict__.get("__annotations__", ()), base.__dict__.get("group"))
    groups: dict[str | None, Any] = {None: parser}
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        title = titles[field.name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], field, field.metadata["option"])


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
        group.add_argument(flag, help=made.help, **options)
    for shortcut, (value, text) in made.shortcuts.items():
        group.add_argument(shortcut, dest=field.name, action="store_const", const=value, help=text)
