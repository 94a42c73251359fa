"""The devices that train together: the only file that knows of `jax.pmap`.

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

    def global_shapes(self, tree: Any) -> Any:
        """The shapes of a pytree, as Orbax restores it: arrays that all processes hold together."""
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


def row_numbers(per_device: int) -> jax.Array:
    """The numbers of this device's sequences in the global batch, [b] int32, inside of pmap."""
    return lax.axis_index(AXIS) * per_device + lax.iota(np.int32, per_device)


def to_local(tree: Any) -> Any:
    """Makes arrays of all processes, which Orbax insists on, this process's own."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, _all_devices(), PartitionSpec())


def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), (AXIS,))


def device_memory() -> int:
    """Bytes of a device; where the backend doesn't tell, its share of the host's."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or host // jax.local_device_count()
