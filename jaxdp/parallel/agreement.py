"""Lets the processes of a run agree on the point at which all of them stop."""

import contextlib
import itertools
import threading
from typing import Any

import jax

from jaxdp.common.errors import RunError, Stopped
from jaxdp.common.stopping import StopRequest
from jaxdp.parallel import messages

AGAIN = 10.0  # Seconds after which a question to process 0 is asked again.
PATIENCE = 60.0  # Seconds to wait for an agreement; a process that hangs is the watchdog's matter.
_numbers = itertools.count()


class Agreement:
    """Tells all processes of a run to stop at the same point of it, soon after one was asked.

    Every process calls `reached` at the same points of the run: before it dispatches a round, and
    before each batch of an evaluation. Nothing dispatched can be taken back, and a process that
    dispatched more than another would wait for it for ever. So when one process is asked to stop,
    each of them publishes how often it has called `reached`, in a thread beside the main one, and
    `reached` answers no more until all have; the highest number is the point. Those behind go on to
    it, and there all of them stop: the round that the furthest had already dispatched is the last.
    As no process dispatches a round before the one before the last has ended, that is at most one
    round after the one under way. (TSL's PreemptionSyncManager, behind
    jax.experimental.multihost_utils.reached_preemption_sync_point, has the same protocol, but takes
    SIGTERM only.)

    As long as nobody asks, `reached` takes a lock that nobody has: no device and no other process
    takes part. A process that is alone has neither thread nor messages.
    """

    def __init__(self, request: StopRequest):
        """Prepares for this process's request; the threads begin with `with`."""
        self._request = request
        self._calls = 0
        self._last: int | None = None  # Calls of `reached` that are still answered with no.
        self._lock, self._decided = threading.Lock(), threading.Event()
        self._key = f"jaxdp/stop/{next(_numbers)}"
        self._alone = jax.process_count() == 1
        self._thread = threading.Thread(target=self._wait, name="agreement", daemon=True)

    def reached(self) -> bool:
        """Returns whether to stop here; after a yes there is no other answer."""
        if self._alone:
            return self._request.asked
        self._settle()
        with self._lock:
            if self._last is not None and self._calls >= self._last:
                return True
            self._calls += 1
            return False

    def start_together(self, prepared: bool) -> None:
        """Ends the part of a run in which each process works for itself, and may be interrupted.

        Waits for all processes.

        Args:
          prepared: whether this process has not been interrupted.

        Raises:
          Stopped: in all processes, if one was asked to stop.
        """
        if not self._alone:
            self._settle()  # No process is past the barrier yet, so all of them stop there.
            messages.barrier(f"{self._key}/start")
        if self.reached() or not prepared:
            raise Stopped

    def _settle(self) -> None:
        """Waits for the others to agree, if this process was asked."""
        if self._request.asked and not self._decided.is_set():
            self._tell("asked")
            self._decided.wait(PATIENCE)

    def _tell(self, what: str) -> None:
        """Tells all processes, unless one of them has told them already."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            messages.set_once(self._key, what)

    def _wait(self) -> None:
        """Waits until a process is asked; decides where to stop."""
        with contextlib.suppress(jax.errors.JaxRuntimeError, RunError):  # Process 0 has ended.
            told = None
            while told is None:
                told = messages.get(self._key, AGAIN)
            if told == "asked":
                self._request.ask("as another process")
                with self._lock:
                    counts = messages.gather(str(self._calls), f"{self._key}/calls")
                    self._last = max(map(int, counts))
        self._decided.set()

    def __enter__(self) -> "Agreement":
        if not self._alone:
            self._thread.start()
            self._request.on_ask(lambda: self._tell("asked"))
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the thread."""
        if not self._alone:
            self._tell("over")
            self._thread.join(AGAIN)
