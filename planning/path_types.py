"""Types of paths by name: what `--path_type` may say.

Types are names, such as `diagonal`, or families with parameters. `student` is the path that a model was distilled for.

    cascade:L[,K]   the coarse scale first, in K steps (half of all), to log SNR L (inf: timestep 0); then the fine one
    cascade:best    the cascade of least KL divergence on the heatmap
    shift:D         the diagonal of --spacing with λ_32 = λ_64 + D, λ = log SNR; D > 0: the coarse scale is ahead
    lead:K          that diagonal with the coarse scale K points ahead
    heuristic:F     that diagonal with t_32 = F t_64, 0 < F <= 1
    through:L,...   from noise through the timesteps of these log SNRs, one step each, and on to clean; of the residual
                    pair the coarse scale is ahead by what it is on the diagonal of the image
    schedule:FILE   the path of a schedule file
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

# Optima on a heatmap.
OPTIMA = ("dp_64", "dp_total", "kl", "kl_diagonal")
PATH_TYPES = ("diagonal", "image_diagonal", *OPTIMA, "student")
PATH_FAMILIES = {
    "cascade": "LOG_SNR[,STEPS] or best",
    "shift": "LOG_SNR",
    "lead": "POINTS",
    "heuristic": "FACTOR in (0, 1]",
    "through": "LOG_SNR[,LOG_SNR ...]",
    "schedule": "FILE",
}


class PathType(NamedTuple):
    """A type of path and the parameters of a family, which are numbers, `best` or a file."""

    name: str
    parameters: tuple[float | int | str, ...] = ()

    def __str__(self) -> str:
        words = (word if isinstance(word, str) else repr(word).removesuffix(".0") for word in self.parameters)
        return ":".join([self.name, ",".join(words)] if self.parameters else [self.name])

    @property
    def needs_heatmap(self) -> bool:
        """Whether the path is an optimum on an error map."""
        return self.name in OPTIMA or (self.name == "cascade" and self.parameters == ("best",))

    @property
    def file_name(self) -> str:
        """The type as a part of file names: letters, digits, `_`, `-`, `.` and `+`; of a file its name alone."""
        text = f"{self.name}_{Path(self.parameters[0]).stem}" if self.name == "schedule" else str(self)
        return re.sub(r"[^\w.+-]+", "_", text)


def parse_path_type(text: str) -> PathType:
    """The type of path that a text such as `dp_64` or `cascade:2,6` names. Raises ValueError for any other text."""
    name, colon, words = text.partition(":")
    if not colon and name in PATH_TYPES:
        return PathType(name)
    if not colon or name not in PATH_FAMILIES:
        known = ", ".join([*PATH_TYPES, *(f"{family}:{words}" for family, words in PATH_FAMILIES.items())])
        raise ValueError(f"'{text}' is no type of path; choose one of {known}")
    try:
        parameters = _parameters(name, words)
    except ValueError as error:
        raise ValueError(f"'{text}' is no type of path: {name} needs {PATH_FAMILIES[name]}") from error
    return PathType(name, parameters)


def _parameters(family: str, words: str) -> tuple[float | int | str, ...]:
    if family == "schedule" and words:
        return (words,)
    if family == "cascade" and words == "best":
        return (words,)
    if family == "lead":
        return (int(words),)
    if family == "through":
        places = tuple(float(word) + 0.0 for word in words.split(","))
        if not all(map(math.isfinite, places)):
            raise ValueError(words)
        return places
    first, *rest = words.split(",")
    # -0 and 0 are one number, and have one name.
    value, steps = float(first) + 0.0, tuple(map(int, rest))
    good = {
        "cascade": value > -math.inf and len(rest) <= 1 and min(steps, default=1) >= 1,
        "shift": math.isfinite(value) and not rest,
        "heuristic": 0 < value <= 1 and not rest,
    }
    if not good.get(family):
        raise ValueError(words)
    return (value, *steps)


def path_type(text: str) -> str:
    """Parse the text of `--path_type`; of several ways to write a type there is one that comes out."""
    try:
        return str(parse_path_type(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
