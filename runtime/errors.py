"""What the system refuses, in one sentence: the file, the reason and the way out."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS_OUT = {
    errno.EACCES: "get the right to it, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EFBIG: "make room there, or name another place",
    errno.EIO: "look after the disk, or name another place",
    errno.ELOOP: "its links go in a circle",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the name",
    errno.ENOSPC: "make room there, or name another place",
    errno.EPERM: "get the right to it, or name another place",
    errno.EROFS: "name another place",
}


def in_words(error: OSError) -> str:
    """An error as one sentence, with the name of the file that it is about if it says one."""
    place = error.filename if error.filename2 is None else error.filename2
    if error.errno is None or not isinstance(place, str | bytes | os.PathLike):
        return str(error)
    place = Path(os.fsdecode(place))
    if error.errno == errno.EISDIR:
        return f"{place} is a folder, where a file is needed; name a file."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        blocking = next((above for above in (place, *place.parents) if above.is_file()), None)
        if blocking is not None:
            return f"{blocking} is a file, where a folder is needed; name another place."
    way_out = WAYS_OUT.get(error.errno)
    return f"{place} cannot be read or written ({error.strerror}){f'; {way_out}' if way_out else ''}."


def need_file(file: str | os.PathLike, what: str, way_out: str) -> Path:
    """The name of a file that must be there; raises FileNotFoundError with the way out."""
    file = Path(file)
    if not file.is_file():
        instead = " is a folder, and as a file it" if file.is_dir() else " is no file, and as one it"
        raise FileNotFoundError(f"{what} {file}{instead if file.exists() else ''} does not exist; {way_out}.")
    return file


@contextmanager
def naming(file: str | os.PathLike, other_name: str | os.PathLike | None = None) -> Iterator[None]:
    """Within, what the system refuses to write names this file, if it names none or the other name of it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # The writer of torch.save says in words of its own that its stream has failed.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        if cause.filename is not None and (other_name is None or Path(cause.filename) != Path(other_name)):
            raise
        raise OSError(cause.errno, cause.strerror, os.fspath(file)) from error
