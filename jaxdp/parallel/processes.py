"""The processes of a run: how they connect, communicate, wait and end, by `jax.distributed`."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src import distributed  # Its client has no public name; Orbax uses it, too.
from jax.experimental import multihost_utils

import jaxdp
from jaxdp.common import nvidia
from jaxdp.common.errors import WRONG_INPUT, ConfigError, RunError
from jaxdp.common.files import first_line
from jaxdp.parallel import rendezvous
from jaxdp.parallel.identity import Identity, host_and_port

PROXIES = {"grpc_proxy", "https_proxy", "http_proxy"}  # What gRPC reads.
LONG = 7 * 24 * 3600  # Seconds; as long as one process may tokenise while others wait.
LOOK = 0.5  # Seconds between two looks for a failure of another process.
FAILED = "jaxdp/failed"  # What the first process that fails tells the others.
_calls = itertools.count()  # Numbers the calls of `gather` and `from_main`.


def connect(identity: Identity | None) -> rendezvous.Links:
    """Connects the processes of a run by `jax.distributed`; without others does nothing.

    Args:
      identity: which of them this is; None if it runs alone.

    Returns:
      What shows that one of them has ended, for `ending_together`.

    Raises:
      ConfigError: the processes don't go together, or the address can't be used.
      RunError: some process doesn't come, or they can't be connected.
    """
    if identity is None:
        return rendezvous.Links({})
    links = rendezvous.meet(identity, _facts())
    if os.environ.keys() & PROXIES:  # gRPC would look for process 0 at the proxy.
        host, _ = host_and_port(identity.address, identity.where)
        os.environ.update(no_grpc_proxy=host)
    # JAX would catch SIGTERM itself, in place of common/stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            identity.address,
            identity.count,
            identity.id,
            identity.local_device_ids,
            cluster_detection_method="deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"jax.distributed could not join the processes ({first_line(error)}): check that "
            f"every process can reach process 0 at {identity.where}"
        ) from error
    return links


def _facts() -> dict[str, str]:
    """Returns what has to be equal in all processes before JAX looks for devices."""
    sources, hashed = Path(jaxdp.__file__).parent, hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        hashed.update(path.read_bytes())
    return {
        "the version of jaxdp": f"{jaxdp.__version__} ({hashed.hexdigest()[:8]})",
        "the version of jax": jax.__version__,
        "the version of jaxlib": jaxlib.__version__,
        "the kind of devices (JAX_PLATFORMS)": _platform(),
    }


def _platform() -> str:
    """Returns the kind of devices that JAX will look for, without looking."""
    first = (jax.config.values["jax_platforms"] or "").split(",")[0]
    if not first:
        first = "cuda" if nvidia.device_files() else "cpu"
    return "cuda" if first == "gpu" else first


def number() -> int:
    """Returns the number of this process, 0 until it is connected; doesn't start JAX's devices."""
    return distributed.global_state.process_id


def is_main() -> bool:
    """Returns whether this is process 0, the one that writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached this barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(text: str) -> list[str]:
    """Returns the texts that all processes give, in their order; all have to call this.

    It waits for as long as the others are alive, however long they take. No device takes part.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    key = f"jaxdp/gather/{next(_calls)}"
    _client().key_value_set(f"{key}/{jax.process_index()}", text)
    if is_main():  # So each process sends a message or two, however many there are.
        texts = [_wait_for(f"{key}/{i}", f"process {i}") for i in range(count)]
        _client().key_value_set(f"{key}/all", json.dumps(texts))
    return json.loads(_wait_for(f"{key}/all", "the other processes"))


def from_main(text: str) -> str:
    """Returns process 0's text on all processes; all have to call this. No device takes part."""
    if jax.process_count() == 1:
        return text
    key = f"jaxdp/from_main/{next(_calls)}"
    if is_main():
        _client().key_value_set(key, text)
    return _wait_for(key, "process 0")


def _wait_for(key: str, who: str) -> str:
    """Returns the text of a key once it is set; says so if that takes long."""
    said = False
    while True:
        try:
            text = get(key, rendezvous.PATIENCE)
        except jax.errors.JaxRuntimeError as error:
            raise RunError(
                f"process 0, through which the processes talk, has ended ({first_line(error)}):"
                " see what it printed; run again to go on from the newest checkpoint"
            ) from None
        if text is not None:
            return text
        if not said:
            print(f"jaxdp: waiting for {who} ...", file=sys.stderr, flush=True)
        said = True


@contextlib.contextmanager
def ending_together(links: rendezvous.Links) -> Iterator[None]:
    """Lets the end of this process end the others, wherever they wait for it, and vice versa.

    Args:
      links: what `connect` has returned; they are closed at the end.
    """
    if _client() is None:
        yield
        return
    over = threading.Event()
    watching = threading.Thread(target=_end_with_others, args=(links, over), daemon=True)
    watching.start()
    try:
        yield
    except Exception as error:
        over.set()
        _tell_failure(error)
        raise
    finally:
        over.set()
        watching.join(10)  # A thread that is still inside of JAX would abort Python's end.
        links.close()


def _tell_failure(error: Exception) -> None:
    status = WRONG_INPUT if isinstance(error, ConfigError) else 1
    known = isinstance(error, ConfigError | RunError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    _tell([distributed.global_state.process_id, status, " ".join(text.split())])


def _tell(failure: list) -> None:
    """Tells all processes the number of one that has failed, its status and why."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another process was first.
        _client().key_value_set(FAILED, json.dumps(failure))


def _end_with_others(links: rendezvous.Links, over: threading.Event) -> None:
    """Ends this process with a line when another one has failed, or has ended."""
    while not over.wait(LOOK):
        lost = links.lost()
        if lost and over.wait(LOOK):  # Others may say why it has ended.
            return
        if lost:
            _tell([lost[0], 1, "it has ended without a word; killed, or out of memory?"])
        try:
            told = _client().key_value_try_get(FAILED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                return  # Process 0 has ended.
        else:
            if not over.wait(LOOK):  # If this process fails for the same reason, it says so itself.
                process, status, text = json.loads(told)
                print(f"jaxdp: process {process} has failed: {text}", file=sys.stderr, flush=True)
                exit_after_failure(status)


def publish(text: str) -> None:
    """Publishes a text of this process to the others, in place of its last one."""
    key = f"jaxdp/told/{jax.process_index()}"
    _client().key_value_set(key, text, allow_overwrite=True)


def published() -> dict[int, str]:
    """Returns each process's last text of `publish`; waits until process 0, the store, answers."""
    found = _client().key_value_dir_get("jaxdp/told/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}


def set_once(key: str, text: str) -> None:
    """Sets a key of JAX's key-value store; raises JaxRuntimeError if a process has set it."""
    _client().key_value_set(key, text)


def get(key: str, seconds: float) -> str | None:
    """Returns the text of a key once a process has set it; None if none does in this time."""
    try:
        return _client().blocking_key_value_get(key, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def meet(name: str) -> None:
    """Waits until all processes have called this with the same name; no device takes part."""
    _client().wait_at_barrier(name, 1000 * LONG)


def exchange(name: str, text: str) -> list[str]:
    """Returns the texts that the processes have given for a name, once all have."""
    _client().key_value_set(f"{name}/{jax.process_index()}", text)
    meet(name)
    return [text for _, text in _client().key_value_dir_get(f"{name}/")]


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
