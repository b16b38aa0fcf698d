"""Writing beside and renaming, on file systems that know no fsync and on those that fail."""

import errno
import os
import stat

import pytest

from runtime.safe_write import replacing


def syncing(monkeypatch, number, of_folders):
    """Let fsync of folders, or of files, fail with an error number."""
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("of_folders", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_a_refused_fsync_is_no_error(tmp_path, monkeypatch, number, of_folders):
    syncing(monkeypatch, number, of_folders)
    for text in ("old", "new"):
        with replacing(tmp_path / "file", keep=2) as temporary:
            temporary.write_text(text)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "new", "file_1": "old"}


@pytest.mark.parametrize("of_folders", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_fsync_is_one(tmp_path, monkeypatch, number, of_folders):
    syncing(monkeypatch, number, of_folders)
    with pytest.raises(OSError, match=os.strerror(number)), replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").exists() == of_folders
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_opened_is_written_to(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
