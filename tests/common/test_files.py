import errno
import gzip
import os
import shutil
import tempfile

import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.common.files import PatientFile, reason, way_out, write_atomically
from jaxdp.data import records
from jaxdp.data.cache import open_cache
from support.processes import limited


class FullDisk:
    """A raw file on a disk that takes `room` bytes."""

    room = 0

    def __init__(self, path, mode):
        self._file = open(path, mode, buffering=0)  # noqa: SIM115
        self.tell, self.truncate, self.close = map(
            self._file.__getattribute__, ("tell", "truncate", "close")
        )

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.room]
        FullDisk.room -= len(taken)
        return self._file.write(taken)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr("jaxdp.common.files.FileIO", FullDisk)
    return FullDisk


def test_what_has_no_room_is_written_later_at_the_very_byte(tmp_path, full_disk):
    file = PatientFile(tmp_path / "folder" / "file")
    for room, data in ((100, b"one\n"), (3, b"two, long\n"), (0, b"three\n"), (2, b"four\n")):
        full_disk.room = room
        file.write(data)
    assert file.waiting() == 3 and file.error.errno == errno.ENOSPC
    full_disk.room = 100
    file.flush()
    assert file.waiting() == 0 and file.error is None
    assert (tmp_path / "folder" / "file").read_bytes() == b"one\ntwo, long\nthree\nfour\n"


def test_a_part_that_stays_alone_is_removed_at_the_end(tmp_path, full_disk):
    file = PatientFile(tmp_path / "file")
    full_disk.room = 6
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"one\n"


def test_reasons_are_the_systems():
    inner = OSError(errno.EDQUOT, "Disk quota exceeded")
    outer = RuntimeError("Failed")
    outer.__cause__ = inner
    assert reason(outer) == "Disk quota exceeded"
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28'] [...]")
    assert reason(tensorstore) == "No space left on device"
    assert reason(ValueError("something\nelse")) == "ValueError: something"


def test_a_file_that_has_no_room_stays_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    with limited(0, 2), pytest.raises(ConfigError, match=r"config.json can't be written \(File "):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_only_a_full_disk_asks_for_room():
    ways = {number: way_out(f"x ({os.strerror(number)}; y)") for number in errno.errorcode}
    room = {number for number, way in ways.items() if way == "make room"}
    assert room == {errno.ENOSPC, errno.EDQUOT}
    assert ways[errno.EACCES] == ways[errno.EROFS] == "make it writable"
    assert all(ways.values())


def test_why_a_file_can_not_be_written_is_told_and_what_to_do(tmp_path):
    (tmp_path / "file.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"\(Is a directory\): move away what is in its"):
        write_atomically(tmp_path / "file", "text")


def test_a_file_that_is_removed_is_begun_again(tmp_path, full_disk):
    path = tmp_path / "folder" / "file"
    file = PatientFile(path)
    full_disk.room = 6
    file.write(b"one\n")
    file.write(b"two\n")
    shutil.rmtree(path.parent)
    full_disk.room = 100
    file.write(b"three\n")
    assert path.read_bytes() == b"two\nthree\n" and file.renewed


def test_temporary_files_need_a_folder_with_room(tmp_path, monkeypatch, config):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    config.tokenizer, config.data.cache_dir = "train:bpe:300", str(tmp_path / "cache")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none takes no temporary file .*TMPDIR"):
        open_cache(config)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"x"))
    full = open("/dev/full", "w+b", 4096)  # noqa: SIM115  The reader closes it.
    monkeypatch.setattr(records, "temporary_file", lambda: full)
    config.data.path, config.tokenizer = f"{tmp_path}/a.parquet.gz", "byte"
    with pytest.raises(ConfigError, match=r"takes no temporary file \(No space left.*make room"):
        open_cache(config)
