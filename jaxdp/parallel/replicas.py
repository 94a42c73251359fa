"""The devices that train together; the only file that uses `jax.pmap`.

Shapes: N devices of this process, b sequences per device.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


class Replicas:
    """The devices of a run: each holds a copy of the state and gets a part of every batch.

    The state enters and leaves `pmap` as one replicated array per leaf (in_axes=None,
    out_axes=None). So it has no leading device axis, needs no replicate and unreplicate, and has
    the same shapes on any number of devices.

    Attributes:
      devices: this process's devices.
      device_count: number of devices over all processes.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Uses all devices by default; a single process may choose some."""
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
        """Splits the leaves [N * b, ...] of several steps' batches: [N, steps, b, ...]."""
        count = len(self.devices)

        def split(*xs):
            return np.stack([x.reshape(count, -1, *x.shape[1:]) for x in xs], axis=1)

        return self.put(jax.tree.map(split, *batches))

    def put(self, tree: Any) -> Any:
        """Puts leaves [N, ...] on the devices, an entry on each."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def shapes(self, tree: Any) -> Any:
        """Returns shapes [N, ...] for leaves [...] that each device has one of."""
        count = len(self.devices)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)

    def zeros(self, shapes: Any) -> Any:
        """Puts zeros of these shapes on each device, as arguments to compile for.

        With several processes `pmap` can't compile for shapes alone.
        """
        count = len(self.devices)
        return self.put(jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), shapes))

    def put_per_device(self, tree: Any) -> Any:
        """Puts leaves [device_count, ...], equal on all processes, on devices: an entry each."""
        first = jax.process_index() * len(self.devices)
        return self.put(jax.tree.map(lambda x: x[first : first + len(self.devices)], tree))

    def gather_per_device(self, tree: Any) -> Any:
        """Undoes `put_per_device`: returns NumPy arrays [device_count, ...] on every process."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)

    def global_shapes(self, tree: Any) -> Any:
        """Returns a pytree's shapes with the sharding that Orbax restores: over all processes."""
        mesh = self._mesh if jax.process_count() == 1 else _all_devices()
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def pmap(
        self,
        step: Callable,
        *,
        state_axes: Any = None,
        out_axes: Any = None,
        donate: bool = False,
    ) -> Any:
        """Maps step(state, batch) over the devices, with the axis name 'batch'.

        Args:
          step: a pure function of a state and the device's own batch [b, ...].
          state_axes: None where the state is equal on all devices, 0 where it is [N, ...].
          out_axes: None where results are equal on all devices, 0 where they are [N, ...].
          donate: whether results may take the state's memory, which deletes the state.
        """
        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(state_axes, 0),
            out_axes=out_axes,
            devices=self._pmap_devices,
            donate_argnums=(0,) if donate else (),
        )


def free(tree: Any) -> None:
    """Deletes the arrays of a pytree on their devices, whoever else refers to them."""
    for x in jax.tree.leaves(tree):
        x.delete()


def prefetch(items: Iterable[Any], put: Callable[[Any], Any], ahead: int = 2) -> Iterator[Any]:
    """Yields put(item); later items are copied to the devices while earlier ones are in use."""
    waiting = []
    for item in items:
        waiting.append(put(item))
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def row_numbers(per_device: int) -> jax.Array:
    """Returns this device's sequence numbers in the global batch, [b] int32; for use in pmap."""
    return lax.axis_index(AXIS) * per_device + lax.iota(np.int32, per_device)


def to_local(tree: Any) -> Any:
    """Converts global arrays, as Orbax needs them, to arrays local to this process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, _all_devices(), PartitionSpec())


def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), (AXIS,))


def device_memory() -> int:
    """Returns a device's memory in bytes; on backends that don't say, its share of the host's."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or host // jax.local_device_count()
