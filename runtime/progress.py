"""How far a stage is: one bar on a terminal, and elsewhere a short line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
PLURALS = {"img": "images", "NFE": "NFE"}


class Progress(tqdm):
    """`tqdm` on standard error; where that is no terminal a line per half minute at most, and one at the end.

    Lines hold no control characters. With leave=False, which takes a bar away at its end, there is no last line.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._in_lines = not (sys.stderr and sys.stderr.isatty())
        self._last_line = time.monotonic()
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a line if one is due; what tqdm calls."""
        if not self._in_lines:
            return super().display(msg, pos)
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Take the bar away for a message; what tqdm calls."""
        if not self._in_lines:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar or write the last line."""
        if self._in_lines and not self.disable:
            if self.leave:
                self._write_line()
            self.leave = False  # Or tqdm begins a new line after its bar.
        super().close()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        state = self.format_dict
        total, rate, elapsed = state["total"], state["rate"], state["elapsed"]
        rate = rate or (self.n - self.initial) / max(elapsed, 1e-9)
        name = f"{self.desc.removesuffix(': ')}: " if self.desc else ""
        count = total or self.n
        unit = PLURALS.get(self.unit, f"{self.unit}s") if count != 1 else self.unit
        parts = [f"{self.n} of {total} {unit}" if total else f"{self.n} {unit}"]
        parts += [self.postfix] if self.postfix else []
        parts.append(f"{tqdm.format_interval(elapsed)} passed")
        if total and self.n < total and rate > 0:
            parts.append(f"{tqdm.format_interval((total - self.n) / rate)} left")
        print(f"{name}{', '.join(parts)}", file=self.fp, flush=True)
