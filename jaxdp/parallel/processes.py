"""The processes of a run: how they connect, communicate and wait, by `jax.distributed`."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # Its client has no public name; Orbax uses it, too.
from jax.experimental import multihost_utils

from jaxdp.common.errors import ConfigError, RunError

WAITING = 20.0  # Seconds in which processes that start together usually connect.
LATE = (
    "jaxdp: still waiting for the other processes: check that every one was started and can reach "
    "process 0; JAX ends this process after 300 s"
)


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects the processes of a run by `jax.distributed`, if there are several.

    Without arguments it follows the environment (SLURM, Open MPI, Kubernetes, TPU pods); without a
    launcher there this process runs alone.

    Raises:
      ConfigError: the arguments don't go together, or the other processes can't be reached.
    """
    check_identity(coordinator_address, num_processes, process_id)
    if num_processes is None and not scheduled_by():
        return
    # JAX waits for 300 s without a word, then aborts with a stack trace.
    late = threading.Timer(WAITING, print, [LATE], {"file": sys.stderr, "flush": True})
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"jax.distributed could not join the processes ({str(error).splitlines()[0]}): check "
            "that every process was started and can reach the coordinator"
        ) from error
    finally:
        late.cancel()


def check_identity(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises ConfigError if some arguments of `initialize` are missing or out of range."""
    given = [coordinator_address, num_processes, process_id]
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ConfigError(
            f"--coordinator_address={coordinator_address} --num_processes={num_processes} "
            f"--process_id={process_id} are incomplete: give all three, or none under a scheduler"
        )
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise ConfigError(
            f"--process_id={process_id} is out of range: number the processes from 0 to "
            f"num_processes - 1 = {(num_processes or 0) - 1}"
        )


def scheduled_by() -> str | None:
    """Returns the variable that shows that a scheduler started this process with others, if any."""
    environ = os.environ
    signs = {
        "SLURM_STEP_NUM_TASKS": int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1,
        "OMPI_COMM_WORLD_SIZE": int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1,
        "TPU_WORKER_HOSTNAMES": "," in environ.get("TPU_WORKER_HOSTNAMES", ""),
        "JOB_COMPLETION_INDEX": "JOB_COMPLETION_INDEX" in environ,  # A Kubernetes indexed job.
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in environ,
    }
    return next((name for name, found in signs.items() if found), None)


def is_main() -> bool:
    """Returns whether this is process 0, the one that writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached this barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def publish(text: str) -> None:
    """Publishes a text of this process to the others, in place of its last one."""
    key = f"jaxdp/told/{jax.process_index()}"
    _client().key_value_set(key, text, allow_overwrite=True)


def published() -> dict[int, str]:
    """Returns each process's last text from `tell`; waits until process 0, their store, answers."""
    found = _client().key_value_dir_get("jaxdp/told/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}


def _client() -> Any:
    return distributed.global_state.client  # None if this process runs alone.


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
    if _client() is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("jaxdp/end", round(1000 * seconds))
    if distributed.global_state.process_id == 0:
        time.sleep(1)  # The end of process 0 kills the others, which may still be printing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def from_main(text: str) -> str:
    """Returns process 0's text, cut to 1,000 bytes, on all processes; all have to call this."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8)
    data = np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)
    return data.tobytes().rstrip(b"\0").decode(errors="ignore")


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
