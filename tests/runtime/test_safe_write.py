"""Writing beside and renaming, on file systems that know no fsync and on those that fail."""

import errno
import os
import stat

import pytest

from runtime.safe_write import beside, replacing, short_name


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


@pytest.mark.parametrize("letter", ["n", "é", "猫", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("length", [200, 237, 238, 250, 255])
@pytest.mark.parametrize("suffix", ["", ".pth", ".json", "." + "x" * 30])
def test_names_may_be_as_long_as_file_systems_take_them(tmp_path, letter, length, suffix):
    count = (length - len(suffix)) // len(os.fsencode(letter))
    file = tmp_path / (letter * count + suffix)
    for text in ("old", "new"):
        with replacing(file) as temporary:
            assert temporary.name.endswith(suffix) and temporary != file
            temporary.write_text(text)
        assert [(found, found.read_text()) for found in tmp_path.iterdir()] == [(file, text)]
    belonging = beside(file, ".lock")
    belonging.touch()
    assert belonging.name.endswith(".lock") and (length > 250 or belonging.name == f"{file.name}.lock")


def test_names_that_end_in_all_their_length(tmp_path):
    file = tmp_path / ("a." + "b" * 253)
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and short_name(file.name, 3) == "a.b"


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder"):
        pytest.fail("the work was done before the place was looked at")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
