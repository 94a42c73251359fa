"""Collectives that send several arrays of a tree at a time."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Bytes that a collective sends, about; small models are sent by a single one.
BUCKET_BYTES = 2**24

Tree = Any


class Buckets:
    """Groups of a tree's leaves; a collective sends each group as one array.

    A collective for each leaf would take its latency each time; a single one could not start before
    the backward pass has ended (as in PyTorch's DDP, Li et al. 2020).

    Attributes:
      sizes: numbers along the last axis of each bucket.
    """

    def __init__(self, like: Tree, limit: int = BUCKET_BYTES):
        """Groups leaves by their order.

        Args:
          like: the tree, or its shapes.
          limit: bytes of the leaves from which on a bucket is full.
        """
        leaves, self._treedef = jax.tree.flatten(like)
        self._buckets: list[list[int]] = [[]]  # The last axis of each leaf.
        held = 0
        for leaf in leaves:
            if self._buckets[-1] and held >= limit:
                self._buckets.append([])
                held = 0
            self._buckets[-1].append(leaf.shape[-1])
            held += math.prod(leaf.shape) * leaf.dtype.itemsize
        self.sizes = [sum(bucket) for bucket in self._buckets]

    def join(self, tree: Tree) -> list[jax.Array]:
        """Joins the leaves of each bucket along their last axis."""
        leaves = iter(jax.tree.leaves(tree))
        return [
            jnp.concatenate(list(itertools.islice(leaves, len(bucket))), -1)
            for bucket in self._buckets
        ]

    def split(self, joined: Sequence[jax.Array]) -> Tree:
        """Undoes `join`, also for arrays with other axes before the last."""
        leaves = []
        for x, bucket in zip(joined, self._buckets, strict=True):
            leaves += jnp.split(x, list(itertools.accumulate(bucket))[:-1], -1)
        return jax.tree.unflatten(self._treedef, leaves)


def by_buckets(send: Callable, tree: Tree, limit: int = BUCKET_BYTES) -> Tree:
    """Maps a collective over the buckets of a tree.

    Args:
      send: maps an array, leaves joined along their last axis, to another with the same last axis.
      tree: arrays.
      limit: see `Buckets`.
    """
    buckets = Buckets(tree, limit)
    return buckets.split([send(x) for x in buckets.join(tree)])
