"""What is reported to people: lines on stderr, said once, and Markdown tables of benchmarks and studies."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

from runtime.safe_write import replacing


def printable(text: str) -> str:
    """A text without the bytes of names that are no letters."""
    return text.encode("utf-8", "replace").decode()


@functools.cache
def say_once(line: str) -> None:
    """Print a line, such as `note: ...`, on stderr, once per run and by its first process."""
    if os.environ.get("RANK", "0") in ("", "0"):
        print(printable(line), file=sys.stderr)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows with equal keys, which are the header."""

    def text(cell: Any) -> str:
        return (f"{cell:.3g}" if cell < 100 else f"{cell:,.0f}") if isinstance(cell, float) else str(cell)

    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *(map(text, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(text: str, file: str | os.PathLike | None) -> None:
    """Print a report, and write it to a file as a whole, whose folder need not be there; None writes none."""
    print(text)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
