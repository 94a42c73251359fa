"""Requests to stop a run: by a signal, such as SIGTERM or Ctrl-C's SIGINT, or by a program."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxdp.common import streams
from jaxdp.common.errors import Stopped

# What schedulers, terminals and users send. SLURM and SGE warn by SIGUSR1 before the time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
URGENT = (signal.SIGTERM, signal.SIGINT)  # Sent again, they end the process.
SAME = 1.0  # Seconds in which a signal that comes again is the same one.


class StopRequest:
    """Whether this process was asked to stop; asked once, it stays asked.

    Work that may be interrupted anywhere, because a later start repeats or continues it, is ended
    at once by `Stopped`; other work looks at `asked` from time to time.

    Attributes:
      when: when the process would stop, if it were asked now; in words, such as "after this step".
    """

    def __init__(
        self,
        poll: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda line: None,
    ):
        """Makes a request that has not come yet.

        Args:
          poll: returns whether to stop; called where `asked` is read.
          say: called with a line of text, in any thread, as soon as the process is asked.
        """
        self._poll, self._say = poll, say
        self._asked = self._told = self._interruptible = False
        self._listeners: list[Callable[[], None]] = []
        self.when = ""

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked or self._poll()

    def ask(self, why: str) -> None:
        """Asks this process to stop, and tells everyone; `why` is a signal's name, for example."""
        if self._told:
            return
        self._asked = self._told = True
        streams.Readers.patience = False
        self._say(" ".join(filter(None, ("stopping", self.when, f"({why})"))))
        for listener in self._listeners:
            listener()
        # Another process may have asked: here the main thread has to be woken, too.
        main, here = threading.main_thread().ident, threading.get_ident()
        handled = callable(signal.getsignal(signal.SIGUSR1))
        if self._interruptible and handled and main not in (None, here):
            signal.pthread_kill(main, signal.SIGUSR1)

    def on_ask(self, listener: Callable[[], None]) -> None:
        """Adds a function to call, in any thread, as soon as this process is asked."""
        self._listeners.append(listener)
        if self._told:
            listener()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a request interrupt the block, or prevent it, by raising `Stopped`."""
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def ends_within(self, seconds: float, status: int) -> Iterator[None]:
        """Ends the process with a status if the block, asked to stop, doesn't end within seconds.

        It may wait in C++ code for others that never come.
        """
        over = threading.Event()

        def end() -> None:
            if not over.wait(seconds):
                sys.stdout.flush()
                os._exit(status)

        self.on_ask(lambda: threading.Thread(target=end, daemon=True).start())
        try:
            yield
        finally:
            over.set()

    def check(self) -> None:
        """Raises `Stopped` if this process was asked to stop, and may be interrupted here."""
        if self._interruptible and self._asked:
            raise Stopped

    def interrupt(self) -> None:
        """Asks this process to stop, without a word; to be called by handlers of signals."""
        self._asked = True
        self.check()


def heard() -> list[signal.Signals]:
    """Returns the `SIGNALS` to handle: not SIGHUP if nohup has this process ignore it.

    A shell lets what it starts with & ignore SIGINT, but a scheduler's script may send that, too.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not nohup]


class Received:
    """The signals that have come.

    One that comes again within a second is the same one: Ctrl-C and schedulers signal processes,
    and their parents pass it on.

    Attributes:
      first: the first one; 0 before.
      again: a SIGTERM or SIGINT that came again later, to end the process at once; 0 before.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self.first = self.again = 0
        self._since: dict[int, float] = {}  # When each came for the first time.

    def add(self, number: int) -> None:
        """Adds one that has just come."""
        now = time.monotonic()
        self.first = self.first or number
        if now - self._since.setdefault(number, now) > SAME and number in URGENT:
            self.again = self.again or number


class Listener:
    """Turns `SIGNALS` into a stop request, also while the main thread is busy in C++ code.

    There Python would handle no signal before that code returns: when a round or a compilation has
    ended. So Python only notes the signal's number in a pipe, and a thread reads it.

    A second SIGTERM or SIGINT ends the process; see `Received`.
    """

    def __init__(self, request: StopRequest):
        """Installs the handlers; call it in the main thread."""
        self._request = request
        self._received = Received()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in heard():
            signal.signal(number, self._interrupt)
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
            after_in_child=self._leave,
        )
        # While the interpreter ends, Python's handlers are gone, and a signal would end the process
        # with another status. What is registered first runs last.
        atexit.register(self._ignore)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        # Blocked if parallel.launcher has started this process; what came meanwhile comes now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _interrupt(self, number: int, frame: object) -> None:
        """Interrupts the main thread; the other thread may be in the middle of printing."""
        del number, frame
        self._request.interrupt()

    def _listen(self) -> None:
        while numbers := os.read(self._read, 100):
            for number in numbers:
                self._hear(number)

    def _hear(self, number: int) -> None:
        if number in SIGNALS:
            self._request.ask(signal.Signals(number).name)
            self._received.add(number)
            if self._received.again:
                os._exit(128 + number)

    def close(self) -> None:
        """Ends the thread; the handlers stay."""
        signal.set_wakeup_fd(-1)
        os.close(self._write)

    def _ignore(self) -> None:
        for number in heard():
            signal.signal(number, signal.SIG_IGN)

    def _leave(self) -> None:
        """Gives a forked process its signals back; those that come too early wait."""
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == self._interrupt:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
