"""Where a stage prints to: a terminal of few letters or a full disk loses what is printed, and not the results."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Losing:
    """A stream that goes on without what cannot be written; a pipe that its reader has closed is no such case."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None  # The first, if something was lost.

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is waiting, or lose it."""
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.error = self.error or error
            discard(self._stream)


def discard(stream: TextIO) -> None:
    """Let what waits in a stream, which would fail again, and what is written from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def printing() -> Iterator[None]:
    """Within, letters that a terminal lacks become question marks, and what a full disk refuses is lost.

    Raises OSError at the end if that was more than reports of progress and errors.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    printed, reports = (stream and _Losing(stream) for stream in before)
    sys.stdout, sys.stderr = printed, reports
    try:
        yield
        if printed is not None:
            printed.flush()
            if printed.error is not None:
                raise OSError(f"What was printed is not complete ({printed.error.strerror}); all else is done.")
    finally:
        sys.stdout, sys.stderr = before
