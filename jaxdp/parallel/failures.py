"""How the processes of a run end together when one of them fails, or dies."""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from jaxdp.common.errors import WRONG_INPUT, ConfigError, RunError
from jaxdp.parallel.links import Links
from jaxdp.parallel.processes import client, number

LOOK = 0.5  # Seconds between two looks for a failure of another process.
FAILED = "jaxdp/failed"  # What the first process that fails tells the others.


@contextlib.contextmanager
def shared(links: Links) -> Iterator[None]:
    """Lets the end of this process end the others, wherever they wait for it, and vice versa.

    Args:
      links: what `connect` has returned; they are closed at the end.
    """
    if client() is None:
        with contextlib.closing(links):
            yield
        return
    _delay_abort()
    over = threading.Event()
    watching = [
        threading.Thread(target=watch, args=(links, over), daemon=True)
        for watch in (_watch_links, _watch_store)
    ]
    for thread in watching:
        thread.start()
    try:
        yield
    except Exception as error:
        over.set()
        _tell_failure(error)
        raise
    finally:
        over.set()
        links.wake()
        for thread in watching:
            thread.join(10)  # One that is still inside of JAX would abort Python's end.
        links.close()


def _delay_abort() -> None:
    """Makes an abort of this process wait for 6 seconds: its signal's handler is sleep(SIGABRT).

    JAX aborts a process as soon as process 0 has ended; `_watch_links` then has time to say so,
    and to end it with a status in place of a signal and a core dump.
    """
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _tell_failure(error: Exception) -> None:
    status = WRONG_INPUT if isinstance(error, ConfigError) else 1
    known = isinstance(error, ConfigError | RunError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    _tell([number(), status, " ".join(text.split())])


def _tell(failure: list) -> None:
    """Tells all processes the number of one that has failed, its status and why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another process was first.
        client().key_value_set(FAILED, json.dumps(failure))


def _watch_links(links: Links, over: threading.Event) -> None:
    """Ends this process with a line when process 0 has ended; tells all when another one has."""
    while not over.is_set():
        for process, how in links.lost().items():
            if process == 0:  # It had the key-value store, so JAX aborts this process in a moment.
                _say(process, how)
                _exit(1)
            if not over.wait(LOOK):  # Others may say why it has ended.
                _tell([process, 1, how])


def _watch_store(_: Links, over: threading.Event) -> None:
    """Ends this process with a line when another one has told that it has failed."""
    while not over.wait(LOOK):
        try:
            told = client().key_value_try_get(FAILED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return  # Process 0 has ended.
        else:
            if not over.wait(LOOK):  # If this process fails for the same reason, it says so itself.
                process, status, text = json.loads(told)
                _say(process, text)
                exit_after_failure(status)


def _say(process: int, why: str) -> None:
    print(f"jaxdp: process {process} has failed: {why}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def explaining_lost_peers() -> Iterator[None]:
    """Turns a collective's error after another process has died into one line.

    Raises:
      RunError: instead of JaxRuntimeError.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        # Gloo's error on CPUs, NCCL's on GPUs; JAX's coordination service can be first.
        if jax.process_count() == 1 or not re.search("gloo|nccl|coordination", reason, re.I):
            raise
        raise RunError(
            f"another process of the run has ended or can't be reached ({reason[:200]}): see what "
            "it printed; run again to go on from the newest checkpoint"
        ) from error


def exit_after_failure(status: int, seconds: float = 5.0) -> None:
    """Ends this process after a failure, if it is one of several; else returns.

    At an ordinary exit the processes would wait for each other.

    Args:
      status: exit status.
      seconds: how long to wait for others that failed in the same way.
    """
    if client() is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().wait_at_barrier("jaxdp/end", round(1000 * seconds))
    if number() == 0:
        time.sleep(1)  # The end of process 0 kills the others, which may still be printing.
    _exit(status)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
