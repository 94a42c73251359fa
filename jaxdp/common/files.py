"""Writing to a disk that may be full."""

import errno
import os
import re
import shutil
from io import FileIO
from pathlib import Path
from typing import Any

from jaxdp.common.errors import ConfigError


class PatientFile:
    """A file that is only appended to; what can't be written waits in memory for the next time.

    Where the disk took a part of something, the rest follows at the very byte. Nothing raises.

    Attributes:
      error: why something is waiting; None when nothing is.
    """

    def __init__(self, path: Path):
        """Makes the file, and its folder, when there is something to write."""
        self._path = path
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []
        self._begun = 0  # Bytes written of what is the first of them.
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        """Appends, now or later."""
        self._waiting.append(data)
        self.flush()

    def flush(self) -> None:
        """Tries to write what is waiting."""
        try:
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
        """How many things have not been written, or not wholly."""
        return len(self._waiting)

    def close(self) -> None:
        """Writes what it can; the rest is lost, and nothing is left half written."""
        self.flush()
        if self._file is not None:
            if self._begun:
                self._file.truncate(self._file.tell() - self._begun)
            self._file.close()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(error: BaseException) -> str:
    """Why something could not be written: the system's words where the error has them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's.
    return os.strerror(int(code[1])) if code else first_line(error)


def num_bytes(tree: Any) -> int:
    """Of all arrays, or of what has their shapes and dtypes."""
    import jax  # Not above: the commands' --help comes through this file, and JAX takes a second.

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def require(folder: Path, size: int) -> None:
    """Raises OSError where so many bytes have no room."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces a file; whoever reads it sees the old text or the new, never a part.

    Raises:
      ConfigError: the disk is full, say; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} can't be written ({error.strerror}): make room, or use another --workdir"
        ) from None
