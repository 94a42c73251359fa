"""Writes files safely, also where the disk may be full."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

from jaxdp.common.errors import ConfigError


class PatientFile:
    """An append-only file that keeps in memory what can't be written now, and tries again later.

    If the disk takes only a part of some data, the rest follows at the right byte. A failed write
    raises nothing.

    Attributes:
      error: why data is waiting; None when nothing is waiting.
      renewed: whether the file was removed by somebody, and begun again.
    """

    def __init__(self, path: Path):
        """Stores the path; the file and its folder are made by the first write."""
        self._path = path
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []
        self._begun = 0  # Bytes of self._waiting[0] that are already written.
        self.error: OSError | None = None
        self.renewed = False

    def write(self, data: bytes) -> None:
        """Appends data, now or as soon as the disk takes it."""
        self._waiting.append(data)
        self.flush()

    def flush(self) -> None:
        """Tries to write the waiting data."""
        try:
            if self._file is not None and not self._path.exists():
                self._file.close()
                self._file, self._begun, self.renewed = None, 0, True
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(self._path, "ab")
            while self._waiting:
                self._begun += self._file.write(self._waiting[0][self._begun :])
                if self._begun == len(self._waiting[0]):
                    self._begun = 0
                    del self._waiting[0]
            self.error = None
        except OSError as error:
            self.error = error

    def waiting(self) -> int:
        """Returns how many writes are not complete."""
        return len(self._waiting)

    def close(self) -> None:
        """Writes what it can and drops the rest; a partial write is removed from the file."""
        self.flush()
        if self._file is not None:
            if self._begun:
                self._file.truncate(self._file.tell() - self._begun)
            self._file.close()


DISK_FULL_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # Errors of a full disk, quota or file.

WAYS_OUT = {
    (errno.ENOSPC, errno.EDQUOT): "make room",
    (errno.EFBIG,): "raise the limit on the size of files (ulimit -f)",
    (errno.EACCES, errno.EPERM, errno.EROFS): "make it writable",
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP): "move away what is in its place",
}


def reason(error: BaseException) -> str:
    """Returns why a file can't be read or written, in the system's words where it has them."""
    number = error_number(error)
    return first_line(error) if number is None else os.strerror(number)


def way_out(why: str) -> str:
    """Returns what to do where a file can't be written, from a text that holds the `reason`."""
    for numbers, way in WAYS_OUT.items():
        if any(os.strerror(number) in why for number in numbers):
            return way
    return "see what is wrong with the disk"


def error_number(error: BaseException) -> int | None:
    """Returns the number (errno) of the system's error that is the cause of an error, if one is."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))  # In TensorStore's messages.
    return int(code[1]) if code else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and the errors that it was raised from or while handling."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def num_bytes(tree: Any) -> int:
    """Returns the size in bytes of all arrays, or ShapeDtypeStructs, in a tree."""
    import jax  # Not above: --help imports this file, and JAX takes a second.

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def require_space(folder: Path, size: int) -> None:
    """Raises OSError (ENOSPC) if the disk of a folder has less than `size` bytes free."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def temporary_file() -> IO[bytes]:
    """Opens a file without a name, which is gone when it is closed.

    Raises:
      ConfigError: no folder for temporary files can be written.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise no_temporary_files(error) from None


def no_temporary_files(error: OSError) -> ConfigError:
    """Returns the error to raise where a temporary file can't be made or written."""
    folder = tempfile.tempdir or "TMPDIR"
    return ConfigError(
        f"{folder} takes no temporary file ({reason(error)}): {way_out(reason(error))}, or set "
        "TMPDIR to another folder"
    )


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def write_atomically(path: Path, text: str) -> None:
    """Writes or replaces a file atomically: readers see the old text or the new one, never a part.

    Raises:
      ConfigError: the file can't be written, for example on a full disk; it stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # A power failure could else leave an empty file.
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"{path} can't be written ({reason(error)}): {way_out(reason(error))}, or use another "
            "--workdir"
        ) from None
