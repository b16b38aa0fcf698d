"""Writing files so that a crash leaves the old file or the new one, never a part of either."""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import naming

# What a file system answers that knows no fsync (of a folder: CIFS, vboxsf, some of FUSE); the data are on their way.
CANNOT_SYNC = frozenset(
    {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
)
LONGEST_NAME = 255


def versions(file: str | os.PathLike) -> list[Path]:
    """`file` and the earlier versions of it that `replacing(keep=...)` left, newest first, as far as they exist."""
    file = Path(file)
    older = {}
    for candidate in file.parent.glob(f"{file.stem}_*{file.suffix}"):
        number = candidate.stem.removeprefix(f"{file.stem}_")
        if number.isdigit():
            older[int(number)] = candidate
    return [file] * file.exists() + [older[number] for number in sorted(older)]


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """A name cut to so many bytes, of which file systems allow 255."""
    return os.fsdecode(os.fsencode(name)[:most])


def beside(file: Path, suffix: str) -> Path:
    """The name of a file that belongs to another: with this suffix, and cut before it where that would be too long.

    Files that are told apart by what is cut off then share one.
    """
    return file.with_name(short_name(file.name, LONGEST_NAME - len(suffix)) + suffix)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


@contextmanager
def replacing(file: str | os.PathLike, keep: int | None = None) -> Iterator[Path]:
    """Yield a temporary file name beside `file`; on success fsync it and rename it to `file`.

    With `keep`, the `keep - 1` versions before it stay as `{stem}_1`, `{stem}_2` and so on, newest first, and older
    ones are deleted; whenever this is killed, a whole version is left if there was one. The folder is created if
    missing. If the block raises, the temporary file is removed and `file` stays as it was. Raises OSError if the folder
    cannot be written, with the name of the file if the disk is full.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share a file system may share a process id.
    ending = f".{uuid.uuid4().hex[:12]}.tmp{short_name(file.suffix, LONGEST_NAME // 2)}"
    temporary = file.with_name(short_name(f".{file.stem}", LONGEST_NAME - len(os.fsencode(ending))) + ending)
    try:
        with naming(file, temporary):
            yield temporary
        with naming(file, temporary), open(temporary, "rb") as stream:
            _sync(stream.fileno())
        if keep is not None:
            kept = versions(file)[: keep - 1]
            for number, version in reversed(list(enumerate(kept, start=1))):
                os.replace(version, file.with_name(f"{file.stem}_{number}{file.suffix}"))
        os.replace(temporary, file)
        if keep is not None:
            for version in versions(file)[keep:]:
                version.unlink()
        # The new name is not on the disk before its folder is.
        with contextlib.suppress(PermissionError):  # A folder may be written to, but not listed.
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                with naming(file):
                    _sync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # What has gone wrong before is what counts.
            temporary.unlink()


def remove_temporaries(folder: str | os.PathLike, stems: str = ".*") -> None:
    """Delete what killed writers left in a folder of files whose whole stem a regular expression matches.

    Nobody else may be writing to such files.
    """
    made = re.compile(rf"\.(?:{stems})\.[0-9a-f]+\.tmp.*")
    for temporary in Path(folder).glob(".*.tmp*"):
        if made.fullmatch(temporary.name):
            temporary.unlink(missing_ok=True)
