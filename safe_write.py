"""Writing files so that a crash leaves the old file or the new one, never a part of either."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file name beside `file`; on success fsync it and rename it to `file`.

    The folder is created if missing. If the block raises, the temporary file is removed and `file` stays as
    it was. Raises OSError if the folder cannot be written.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share a file system may share a process id.
    temporary = file.with_name(f".{file.stem}.{uuid.uuid4().hex[:12]}.tmp{file.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
