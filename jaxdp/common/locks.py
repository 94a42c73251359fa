"""Locks that processes hold by a file, also on disks without flock."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

# Lustre mounted without -o flock, some NFS and FUSE.
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(
    path: Path, busy: Callable[[str], None], say: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Holds the lock of a path; when a process dies, its lock is released.

    On a disk without flock it makes the file PATH.soft instead. What a process has left there that
    was killed is removed by the next one on the same machine; elsewhere the user has to.

    Args:
      path: the file of the lock.
      busy: called if another process holds the lock, with the file to remove if that process has
        died on another machine ("" with flock); it raises, or returns in order to wait.
      say: called with a line of text if the disk has no flock.

    Raises:
      OSError: the file can't be opened.
    """
    try:
        lock = _acquired(filelock.FileLock(path, fallback_to_soft=False), "", busy)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        say(f"The disk of {path.parent} has no flock: the file {path.name}.soft is the lock.")
        soft = f"{path}.soft"
        lock = _acquired(filelock.SoftFileLock(soft), soft, busy)
    try:
        yield
    finally:
        lock.release()


def _acquired(
    lock: filelock.BaseFileLock, file: str, busy: Callable[[str], None]
) -> filelock.BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        busy(file)
        lock.acquire()
    return lock
