"""stdout and stderr: no command ends because of them, and lines of no use can be hidden."""

import contextlib
import io
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence

TICK = 0.5  # Seconds between two looks at whether to wait on.


class Readers:
    """Whether to wait for those who read the streams.

    Attributes:
      waiting: whether a write waits for one that takes nothing, as after Ctrl-S, in `less`, or at
        the other end of an ssh connection that is lost.
      patience: whether a write waits on; a process that is asked to stop has none.
    """

    waiting = False
    patience = True


class _Stream(io.FileIO):
    """A file descriptor to write to; drops what can't be written.

    Its reader may have gone (`| head`, `| tee` after Ctrl-C), its terminal may be closed, its disk
    full. The log then has a gap, and the program goes on.
    """

    _stuck = False

    def write(self, data) -> int:
        written, view = 0, memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            while written < len(view) and self._taken():
                # It takes this much at a time, or None if someone has made it non-blocking.
                written += super().write(view[written : written + select.PIPE_BUF]) or 0
        return len(view)

    def _taken(self) -> bool:
        """Waits until something can be written; returns whether it can."""
        hurry = self._stuck and not Readers.patience
        while not select.select([], [self.fileno()], [], 0 if hurry else TICK)[1]:
            self._stuck, Readers.waiting = True, Readers.patience
            if not Readers.patience:
                return False
        self._stuck = Readers.waiting = False
        return True


def protect() -> None:
    """Makes this process's stdout and stderr harmless; call it before files are opened.

    A write that fails is dropped, a character that the stream can't encode becomes "?", and a
    stream that was closed (`>&-`) leads nowhere. In a notebook or a test, where others have put
    their own objects in place of the streams, those stay as they are.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file to be opened would get this number, and what libraries print.
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is original and not isinstance(stream, _Text):
            setattr(sys, name, safe := _Text.like(stream, number))
            setattr(sys, f"__{name}__", safe)


class _Text(io.TextIOWrapper):
    """A harmless stream of text."""

    @classmethod
    def like(cls, stream: io.TextIOWrapper | None, number: int) -> "_Text":
        """Makes a stream to a file descriptor, with another stream's encoding and buffering."""
        raw = _Stream(number, "w", closefd=False)
        at_once = stream is not None and stream.write_through  # python -u
        keeps = stream is not None and stream.errors == "backslashreplace"  # As stderr does.
        return cls(
            raw if at_once else io.BufferedWriter(raw),  # type: ignore[arg-type]
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace" if keeps else "replace",
            line_buffering=number == 2 or (stream is not None and stream.line_buffering),
            write_through=at_once,
        )


FILTER = """
import sys
texts = [text.encode() for text in sys.argv[1:]]
for line in sys.stdin.buffer:
    if not any(text in line for text in texts):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""


@contextlib.contextmanager
def hidden(texts: Sequence[str]) -> Iterator[None]:
    """Hides lines on stderr that contain one of the texts, also those written by C++.

    Every other line is shown at once. A process of its own looks at the lines: should this one die,
    its last words are shown, too.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Without stderr, or a process, nothing is hidden.
            stack.enter_context(_filtered(2, texts))
        yield


@contextlib.contextmanager
def _filtered(stderr: int, texts: Sequence[str]) -> Iterator[None]:
    """Leads what is written to a file descriptor through a process that leaves out some lines."""
    terminal = os.dup(stderr)
    try:
        # In a session of its own, Ctrl-C doesn't end it.
        process = subprocess.Popen(
            [sys.executable or "python3", "-I", "-S", "-c", FILTER, *texts],
            stdin=subprocess.PIPE,
            stdout=terminal,
            start_new_session=True,
        )
        assert process.stdin is not None
        _flush()
        os.dup2(process.stdin.fileno(), stderr)
        process.stdin.close()
        try:
            yield
        finally:
            _flush()
            os.dup2(terminal, stderr)
            # It ends when nobody has its stdin any more; a process started meanwhile may keep it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
    finally:
        os.close(terminal)


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
