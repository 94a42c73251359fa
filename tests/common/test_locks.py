import errno
import fcntl
import os
import subprocess
import sys

import pytest

from jaxdp.common import locks


class Busy(Exception):
    pass


def busy(file):
    raise Busy(file)


@pytest.fixture(params=[None, *locks.NO_FLOCK], ids=lambda x: errno.errorcode.get(x, "flock"))
def without_flock(request, monkeypatch):
    """Disks with flock, and without it as each of them says so."""

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param is not None


def test_one_at_a_time(without_flock, tmp_path):
    said: list[str] = []
    with locks.held(tmp_path / "lock", busy, said.append):
        with pytest.raises(Busy) as raised, locks.held(tmp_path / "lock", busy):
            pass
        assert str(raised.value) == (f"{tmp_path}/lock.soft" if without_flock else "")
    with locks.held(tmp_path / "lock", busy):
        pass
    assert len(said) == without_flock and all("has no flock" in line for line in said)


def test_the_lock_of_a_process_that_was_killed_is_free(without_flock, tmp_path):
    lock = "SoftFileLock" if without_flock else "FileLock"
    path = tmp_path / ("lock.soft" if without_flock else "lock")
    killed = f"import filelock, os; x = filelock.{lock}({str(path)!r}); x.acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", killed]).returncode == 9
    assert path.exists()
    with locks.held(tmp_path / "lock", busy):
        pass


def test_another_error_is_no_missing_flock(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError), locks.held(tmp_path / "lock", busy):
        pass
