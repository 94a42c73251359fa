"""How the processes of a run end together when one of them fails, or dies."""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax

from jaxdp.common.errors import WRONG_INPUT, ConfigError, RunError
from jaxdp.parallel.links import CUT_OFF, Links
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
        yield
        return
    over = threading.Event()
    # Two threads, as one waits for ever for an answer of process 0 if that is cut off.
    threads = [
        threading.Thread(target=_tell_of_lost, args=(links, over), daemon=True),
        threading.Thread(target=_end_with_others, args=(over,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    except Exception as error:
        over.set()
        _tell_failure(error)
        raise
    finally:
        over.set()
        for thread in threads:
            thread.join(10)  # One that is still inside of JAX would abort Python's end.
        links.close()


def _tell_failure(error: Exception) -> None:
    status = WRONG_INPUT if isinstance(error, ConfigError) else 1
    known = isinstance(error, ConfigError | RunError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    _tell([number(), status, " ".join(text.split())])


def _tell(failure: list) -> None:
    """Tells all processes the number of one that has failed, its status and why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another process was first.
        client().key_value_set(FAILED, json.dumps(failure))


def _tell_of_lost(links: Links, over: threading.Event) -> None:
    """Tells all processes of one that has ended, or ends this one if it is cut off from them."""
    while not over.wait(LOOK):
        lost = links.lost()
        if lost and over.wait(LOOK):  # Others may say why it has ended.
            return
        if lost.get(0) == CUT_OFF:  # It can't be told anything, either.
            print(f"jaxdp: process 0 has failed: {CUT_OFF}", file=sys.stderr, flush=True)
            os._exit(1)
        for process, why in lost.items():
            _tell([process, 1, why])


def _end_with_others(over: threading.Event) -> None:
    """Ends this process with a line when another one has told of a failure."""
    while not over.wait(LOOK):
        try:
            told = client().key_value_try_get(FAILED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return  # Process 0 has ended.
        else:
            if not over.wait(LOOK):  # If this process fails for the same reason, it says so itself.
                process, status, text = json.loads(told)
                print(f"jaxdp: process {process} has failed: {text}", file=sys.stderr, flush=True)
                exit_after_failure(status)


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
