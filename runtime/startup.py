"""What a stage imports before anything else: from here on an interrupt ends it without a word.

Importing PyTorch takes seconds, in which there is nothing to save; `cli.run_stage` takes over.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _starts_a_stage() -> bool:
    place = getattr(sys.modules["__main__"], "__file__", None)
    return place is not None and Path(place).resolve().parent == Path(__file__).resolve().parent.parent


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, an interrupt raises KeyboardInterrupt where it ended the process so far.

    So does whatever a library makes of one, such as an ImportError.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGINT, before)


def _open_standard_streams() -> None:
    """Open those that a stage was started without, whose numbers files would get that are opened later."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


# An interrupt that someone else handles, or that is to be ignored as of a job in the background, stays as it is.
if _starts_a_stage():
    _open_standard_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
