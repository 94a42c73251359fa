"""Ends a process whose run makes no progress any more, so that a scheduler can restart it."""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import jax

from jaxdp.common.streams import Readers
from jaxdp.parallel import messages

T = TypeVar("T")

TICK = 0.5  # Seconds between two looks at the clock.
FACTOR = 10  # An activity may take this many times longer than it has taken so far.
SLOW = 10  # What is slow, or done for the first time, may take this many times hang_seconds.


class Beat(NamedTuple):
    """A sign of progress.

    Attributes:
      number: counts the beats of a process.
      doing: the activity that begins now.
      done: steps done until now.
      at: seconds on the watchdog's clock.
      slow: whether the activity may take long.
    """

    number: int
    doing: str
    done: int
    at: float
    slow: bool


class Watchdog:
    """Ends the process when no progress has been reported for too long.

    Too long is `seconds`, or FACTOR times the longest that the same activity has taken so far, if
    that is longer. What is slow, such as compiling and writing, and what is done for the first time
    may take SLOW times `seconds`. A thread counts the time in ticks, so that none passes while the
    process is stopped (Ctrl-Z), the machine sleeps, or nobody takes what is printed (Ctrl-S).
    (JAX keeps its own time: where there are several processes, stopping one for 100 s ends the
    run.)

    An activity is compared with itself, the first time too: a round of 500 local steps that takes
    longer than `seconds` takes as long the next time, but compiling says nothing about training.

    Each process tells the others where it is, through JAX's key-value store.
    """

    def __init__(self, seconds: float):
        """Prepares; watching starts with `with`, and never if `seconds` is 0."""
        self._seconds = seconds
        self._clock = self._answered = 0.0
        self._beat = Beat(0, "starting", 0, 0.0, slow=True)
        self._longest: dict[str, float] = {}  # By activity.
        self._heard: dict[int, tuple[str, float]] = {}  # By process: last message, and when.
        self._every = min(5.0, max(seconds / 10, TICK))  # Seconds between messages to the others.
        self._ended = threading.Event()
        parts = [self._watch] + [self._talk] * (jax.process_count() > 1)
        self._threads = [
            threading.Thread(target=part, name="watchdog", daemon=True) for part in parts
        ]

    def beat(self, doing: str, done: int, slow: bool = False) -> None:
        """Reports progress.

        Args:
          doing: the activity that begins now; it counts as slow the first time.
          done: steps done until now.
          slow: whether it may take long.
        """
        last, now = self._beat, self._clock
        slow = slow or doing not in self._longest
        self._longest.setdefault(doing, 0.0)
        before = self._longest.get(last.doing, 0.0)
        self._longest[last.doing] = max(before, now - last.at)
        self._beat = Beat(last.number + 1, doing, done, now, slow)

    def each(self, items: Iterable[T], doing: str, done: int) -> Iterator[T]:
        """Yields the items, with a beat before each; the first time, all of them count as slow."""
        slow = doing not in self._longest
        for item in items:
            self.beat(doing, done, slow)
            yield item

    def tick(self) -> None:
        """Advances the clock by TICK seconds; ends the process if progress is overdue."""
        if Readers.waiting:
            return
        self._clock += TICK
        beat = self._beat
        waited = self._clock - beat.at
        if waited > self._limit(beat):
            longest = max(self._longest.get(beat.doing, 0.0), TICK)
            end(
                f"no progress for {waited:.0f} s (the longest before took {longest:g} s): "
                f"{beat.doing} after step {beat.done}{self._who_lags()}; run again to go on from "
                "the newest checkpoint, and if it was slow and didn't hang, with a larger "
                f"hang_seconds (now {self._seconds:g}; 0: wait for ever)"
            )

    def _limit(self, beat: Beat) -> float:
        limit = max(self._seconds, FACTOR * self._longest.get(beat.doing, 0.0))
        return max(limit, SLOW * self._seconds) if beat.slow else limit

    def _who_lags(self) -> str:
        """Returns a text about which of the other processes are silent or behind."""
        if jax.process_count() == 1:
            return ""
        patience = 3 * self._every
        if self._clock - self._answered > patience:
            return "; process 0 does not answer"
        beats = {i: Beat(*json.loads(text)) for i, (text, _) in self._heard.items()}
        seen = {i: f"process {i} ({b.doing} after step {b.done})" for i, b in beats.items()}
        silent = [
            seen.get(i, f"process {i} (never heard from)")
            for i in range(jax.process_count())
            if i not in seen or self._clock - self._heard[i][1] > patience
        ]
        if silent:
            return f"; silent: {', '.join(silent)}"
        least = min(b.number for b in beats.values())
        last = [seen[i] for i, b in beats.items() if b.number == least]
        if len(last) == len(beats):
            return "; all processes are at the same point"
        return f"; the others wait for {', '.join(last)}"

    def talk(self) -> None:
        """Tells the others where this process is; asks where they are only after a long wait."""
        beat = self._beat
        # The time is new in each message: it shows that this process is alive.
        messages.publish(json.dumps(beat._replace(at=self._clock)))
        if self._clock - beat.at > self._limit(beat) / 2:
            for process, text in messages.published().items():
                if self._heard.get(process, ("", 0.0))[0] != text:
                    self._heard[process] = text, self._clock
        self._answered = self._clock

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            self.tick()

    def _talk(self) -> None:
        while not self._ended.wait(self._every):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.talk()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._every)


def end(message: str) -> None:
    """Prints all stacks and a message, and ends the process whatever the main thread does."""
    signal.alarm(10)  # Ends the process even if nobody reads and printing blocks.
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"{show_cursor}jaxdp: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
