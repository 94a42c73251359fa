"""Texts that the processes of a run send each other, by JAX's key-value store in process 0.

No device takes part.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable

import jax

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import first_line
from jaxdp.parallel.processes import client, is_main
from jaxdp.parallel.rendezvous import PATIENCE

PAUSE = 1.0  # Seconds for which a wait can't be interrupted by a signal.
_calls = itertools.count()  # Numbers the calls of `gather` and `from_main`.


def gather(text: str, name: str = "") -> list[str]:
    """Returns the texts that all processes give, in their order; all have to call this.

    It waits for as long as the others are alive, however long they take.

    Args:
      text: this process's text.
      name: a new one where not all processes have made the same calls before; by default, calls go
        together in their order.

    Raises:
      RunError: process 0 has ended.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    key = name or f"jaxdp/gather/{next(_calls)}"
    client().key_value_set(f"{key}/{jax.process_index()}", text)
    if is_main():  # So each process sends a message or two, however many there are.
        texts = [_wait_for(f"{key}/{i}", f"process {i}") for i in range(count)]
        client().key_value_set(f"{key}/all", json.dumps(texts))
    return json.loads(_wait_for(f"{key}/all", "the other processes"))


def from_main(text: str) -> str:
    """Returns process 0's text on all processes; all have to call this."""
    if jax.process_count() == 1:
        return text
    key = f"jaxdp/from_main/{next(_calls)}"
    if is_main():
        client().key_value_set(key, text)
    return _wait_for(key, "process 0")


def on_main(action: Callable[[], None]) -> None:
    """Runs an action on process 0; raises its ConfigError in all processes."""
    problem = ""
    if is_main():
        try:
            action()
        except ConfigError as error:
            problem = str(error)
    problem = from_main(problem)
    if problem:
        raise ConfigError(problem)


def barrier(name: str = "") -> None:
    """Waits until all processes have called this, like `gather`."""
    gather("", name)


def publish(text: str) -> None:
    """Publishes a text of this process to the others, in place of its last one."""
    key = f"jaxdp/told/{jax.process_index()}"
    client().key_value_set(key, text, allow_overwrite=True)


def published() -> dict[int, str]:
    """Returns each process's last text of `publish`; waits until process 0, the store, answers."""
    found = client().key_value_dir_get("jaxdp/told/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}


def set_once(key: str, text: str) -> None:
    """Sets a key of JAX's key-value store; raises JaxRuntimeError if a process has set it."""
    client().key_value_set(key, text)


def get(key: str, seconds: float) -> str | None:
    """Returns the text of a key once a process has set it; None if none does in this time."""
    try:
        return client().blocking_key_value_get(key, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _wait_for(key: str, who: str) -> str:
    """Returns the text of a key once it is set; says so if that takes long."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            text = get(key, PAUSE)
        except jax.errors.JaxRuntimeError as error:
            raise RunError(
                f"process 0, through which the processes talk, has ended ({first_line(error)}):"
                " see what it printed; run again to go on from the newest checkpoint"
            ) from None
        if text is not None:
            return text
        if time.monotonic() > until:
            print(f"jaxdp: waiting for {who} ...", file=sys.stderr, flush=True)
            until = math.inf
