"""Writing to a disk that may be full."""

import re
from io import FileIO
from pathlib import Path


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
        self._waiting = bytearray()
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        """Appends, now or later."""
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        """Tries to write what is waiting."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(self._path, "ab")
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self.error = None
        except OSError as error:
            self.error = error

    def waiting(self) -> bytes:
        """What has not been written yet; it may begin within a line."""
        return bytes(self._waiting)

    def close(self) -> None:
        """Writes what it can; the rest is lost."""
        self.flush()
        if self._file is not None:
            self._file.close()


def reason(error: BaseException) -> str:
    """Why something could not be written: the system's words where the error has them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    # TensorStore: "... [OS error 28: ENOSPC No space left on device] ...".
    system = re.search(r"OS error \d+: (?:E[A-Z0-9]+ )?([^\]\n]+)", str(error))
    return system[1].strip() if system else first_line(error)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
