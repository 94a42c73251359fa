"""Devices and processes: the only file that knows of `jax.pmap`.

Shapes: N devices of this process, b sequences per device.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import distributed  # For its client, which has no public name; Orbax uses it, too.
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdp.config import ConfigError, RunError

AXIS = "batch"
WAITING = 20.0  # Seconds in which processes that were started together usually find each other.
LATE = (
    "jaxdp: still waiting for the other processes: check that every one was started and can reach "
    "process 0; JAX ends this one when 300 s have passed"
)


class Replicas:
    """The devices that hold one copy of the state each and share every batch.

    The state crosses `pmap` as one replicated array per leaf (in_axes=None, out_axes=None): no
    leading device axis, no replicate and unreplicate, and on one device the same shapes as on
    eight.

    Attributes:
      devices: those of this process.
      device_count: of all processes.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Takes all devices, or in a single process some of them."""
        assert devices is None or jax.process_count() == 1
        self.devices = list(devices or jax.local_devices())
        self.device_count = len(self.devices) if devices else jax.device_count()
        self._pmap_devices = devices
        self._mesh = Mesh(np.array(self.devices), (AXIS,))

    def replicate(self, tree: Any) -> Any:
        """Copies a pytree of arrays to every device."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def shard(self, batch: Any) -> Any:
        """Splits leaves [N * b, ...] over the devices: [N, b, ...]."""
        return self.put(
            jax.tree.map(lambda x: x.reshape(len(self.devices), -1, *x.shape[1:]), batch)
        )

    def shard_steps(self, batches: Sequence[Any]) -> Any:
        """Splits batches of several steps, leaves [N * b, ...], likewise: [N, steps, b, ...]."""
        count = len(self.devices)

        def split(*xs):
            return np.stack([x.reshape(count, -1, *x.shape[1:]) for x in xs], axis=1)

        return self.put(jax.tree.map(split, *batches))

    def put(self, tree: Any) -> Any:
        """Gives each device its part of leaves [N, ...]."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def zeros(self, shapes: Any) -> Any:
        """What `put` makes of zeros of these shapes on each device: to compile for.

        Among several processes `pmap` compiles for arrays only, not for their shapes.
        """
        count = len(self.devices)
        return self.put(jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), shapes))

    def put_own(self, tree: Any) -> Any:
        """Gives each device its part of leaves [device_count, ...], the same on all processes."""
        first = jax.process_index() * len(self.devices)
        return self.put(jax.tree.map(lambda x: x[first : first + len(self.devices)], tree))

    def gather_own(self, tree: Any) -> Any:
        """The inverse of `put_own`, as NumPy arrays on every process."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)

    def pmap(
        self,
        step: Callable,
        *,
        state_axes: Any = None,
        out_axes: Any = None,
        donate: bool = False,
    ) -> Any:
        """Runs step(state, batch) on every device, over the axis 'batch'.

        Args:
          step: a pure function of a state and the device's own batch [b, ...].
          state_axes: None where the state is equal on all devices, 0 where it is [N, ...].
          out_axes: likewise, of the results.
          donate: the state's memory is used for the results, and the state is lost.
        """
        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(state_axes, 0),
            out_axes=out_axes,
            devices=self._pmap_devices,
            donate_argnums=(0,) if donate else (),
        )


def prefetch(items: Iterable[Any], put: Callable[[Any], Any], ahead: int = 2) -> Iterator[Any]:
    """Yields put(item), copied to the devices while those before are worked on."""
    waiting = []
    for item in items:
        waiting.append(put(item))
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def rows(per_device: int) -> jax.Array:
    """The numbers of this device's sequences in the global batch, [b] int32, inside of pmap."""
    return lax.axis_index(AXIS) * per_device + lax.iota(np.int32, per_device)


def initialize(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of a run by `jax.distributed`, where there are several.

    With no argument given it asks the environment (SLURM, Open MPI, Kubernetes, TPU pods); a
    single process then stays alone.

    Raises:
      ConfigError: the arguments don't go together, or the others can't be reached.
    """
    given = [coordinator_address, num_processes, process_id]
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ConfigError(
            f"--coordinator_address={coordinator_address} --num_processes={num_processes} "
            f"--process_id={process_id} are incomplete: give all three, or none under a scheduler"
        )
    if num_processes is None and not _scheduled():
        return
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise ConfigError(
            f"--process_id={process_id} is out of range: number the processes from 0 to "
            f"num_processes - 1 = {(num_processes or 0) - 1}"
        )
    # JAX waits for 300 s, and then aborts with a stack of its own.
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


def _scheduled() -> bool:
    """Whether a launcher started this process as one of several; jax.distributed finds the rest."""
    environ = os.environ
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(environ.get(name, "1")) > 1 for name in counts)
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or "JOB_COMPLETION_INDEX" in environ  # A Kubernetes indexed job, or a JobSet of them.
        or "JAX_COORDINATOR_ADDRESS" in environ
    )


def is_main() -> bool:
    """Whether this is process 0, the one that writes logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def tell(text: str) -> None:
    """Shows the other processes a text of this one, in place of the one before."""
    key = f"jaxdp/told/{jax.process_index()}"
    _client().key_value_set(key, text, allow_overwrite=True)


def told() -> dict[int, str]:
    """What each process told last; waits while process 0, which keeps it, does not answer."""
    found = _client().key_value_dir_get("jaxdp/told/")
    return {int(key.rsplit("/", 1)[1]): text for key, text in found}


def _client() -> Any:
    return distributed.global_state.client  # None in a process that is alone.


@contextlib.contextmanager
def others_needed() -> Iterator[None]:
    """Makes a line of the error that a collective raises when another process has died.

    Raises:
      RunError: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        # On GPUs it is NCCL's; that of JAX's coordination service can be first.
        if jax.process_count() == 1 or not re.search("gloo|nccl|coordination", reason, re.I):
            raise
        raise RunError(
            f"another process of the run has ended or can't be reached ({reason[:200]}): see what "
            "it printed; run again to go on from the newest checkpoint"
        ) from error


def end(status: int, seconds: float = 5.0) -> None:
    """Ends a process that has failed, where it is one of several; else returns.

    An ordinary exit would wait for the others, and these for it.

    Args:
      status: of the exit.
      seconds: the others have to come here, too, if they have failed alike.
    """
    if _client() is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("jaxdp/end", round(1000 * seconds))
    if distributed.global_state.process_id == 0:
        time.sleep(1)  # Its end kills the others, who may still be printing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def from_main(text: str) -> str:
    """The text of process 0, up to its first 1,000 bytes, on all processes; all have to call it."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8)
    data = np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)
    return data.tobytes().rstrip(b"\0").decode(errors="ignore")


def on_main(action: Callable[[], None]) -> None:
    """Runs something on process 0; a ConfigError there is raised in all processes."""
    problem = ""
    if is_main():
        try:
            action()
        except ConfigError as error:
            problem = str(error)
    problem = from_main(problem)
    if problem:
        raise ConfigError(problem)


def to_global(tree: Any) -> Any:
    """Makes replicated arrays of this process global ones, which Orbax insists on."""
    if jax.process_count() == 1:
        return tree
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())


def to_local(tree: Any) -> Any:
    """The inverse of `to_global`."""
    if jax.process_count() == 1:
        return tree
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    return multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec())


def device_memory() -> int:
    """Bytes of a device; where the backend doesn't tell, its share of the host's."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or host // jax.local_device_count()
