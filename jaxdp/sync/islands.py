"""Islands: groups of neighbouring devices that communicate with each other more than with others.

Devices are numbered island by island: of N devices in K islands of s = N / K, island k holds the
numbers k s to k s + s - 1. What crosses between islands is cut into s slices. The devices with the
same place in their islands exchange one slice, so each byte leaves an island once, and each slice
is summed in one place, which makes the sums equal on all devices to the bit.

The functions are for use under an axis of N devices. Shapes: S numbers in a slice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.sync.buckets import BUCKET_BYTES, by_buckets

Tree = Any
Groups = list[list[int]] | None  # As `axis_index_groups`; None: all devices.


class Islands(NamedTuple):
    """Devices in equal groups.

    Attributes:
      devices: N.
      islands: K, their number; divides N.
    """

    devices: int
    islands: int

    @property
    def size(self) -> int:
        """Devices of an island."""
        return self.devices // self.islands

    @property
    def inside(self) -> Groups:
        """The devices of each island; None if all are in one."""
        numbers = np.arange(self.devices).reshape(self.islands, self.size)
        return None if self.islands == 1 else numbers.tolist()

    @property
    def between(self) -> Groups:
        """The devices that have the same place in their islands; None if each is an island."""
        numbers = np.arange(self.devices).reshape(self.islands, self.size)
        return None if self.size == 1 else numbers.T.tolist()

    def sum_inside(self, tree: Tree, axis: str) -> Tree:
        """Sums over the devices of this device's island."""
        return tree if self.size == 1 else lax.psum(tree, axis, axis_index_groups=self.inside)

    def sum_between(self, tree: Tree, axis: str) -> Tree:
        """Sums what is equal within each island over the islands."""
        if self.size == 1:
            return lax.psum(tree, axis)
        total = lax.psum(self.own_slice(tree, axis), axis, axis_index_groups=self.between)
        return self.join(total, tree, axis)

    def sum_small(self, tree: Tree, axis: str) -> Tree:
        """Computes `sum_between` of small trees, which every device sends whole."""
        return lax.psum(tree, axis, axis_index_groups=self.between)

    def number(self, axis: str) -> jax.Array:
        """Returns the number of this device's island."""
        return lax.axis_index(axis) // self.size

    def own_slice(self, tree: Tree, axis: str) -> Tree:
        """Returns the slice [S] of each leaf that this device exchanges with other islands."""
        if self.size == 1:
            return jax.tree.map(jnp.ravel, tree)
        place = lax.axis_index(axis) % self.size
        return jax.tree.map(lambda x: x[place], slices(tree, self.size))

    def join(self, own: Tree, like: Tree, axis: str) -> Tree:
        """Puts the slices of an island's devices together; like: the shapes of the whole."""
        if self.size == 1:
            return unslice(own, like)

        def send(x):
            return lax.all_gather(x, axis, axis_index_groups=self.inside)

        return unslice(by_buckets(send, own, limit=BUCKET_BYTES // self.size), like)


def slices(tree: Tree, count: int) -> Tree:
    """Flattens each leaf, pads it with zeros and cuts it into equal slices: [...] -> [count, S]."""

    def cut(x):
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        return pad(x.reshape(-1), (0, -x.size % count)).reshape(count, -1)

    return jax.tree.map(cut, tree)


def slice_shapes(tree: Tree, count: int) -> Tree:
    """Returns the shapes of one of a tree's `slices`: [S] float32 for each leaf."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((-(-x.size // count),), jnp.float32), tree)


def unslice(parts: Tree, like: Tree) -> Tree:
    """Undoes `slices`; like: the shapes before. A scalar copied to all devices comes as [count]."""
    return jax.tree.map(
        lambda x, shape: x.reshape(-1)[: shape.size].reshape(shape.shape), parts, like
    )
