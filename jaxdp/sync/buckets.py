"""Collectives that send several arrays of a tree at a time."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Bytes that a collective sends, about; small models are sent by a single one.
BUCKET_BYTES = 2**24

Tree = Any


def by_buckets(send: Callable, *trees: Tree, limit: int = BUCKET_BYTES) -> Any:
    """Maps a collective over the leaves of trees, of which it takes several at a time.

    A collective for each leaf would take its latency each time; a single one could not start before
    the backward pass has ended (as in PyTorch's DDP, Li et al. 2020).

    Args:
      send: maps an array of each tree, leaves joined along their last axis, to its results: an
        array with the same last axis, or a tuple of such.
      *trees: trees of equal structure, with equal last axes.
      limit: bytes of the first tree's leaves from which on a bucket is full.

    Returns:
      A tree of results, or a tuple of such.
    """
    treedef = jax.tree.structure(trees[0])
    buckets: list[list[tuple]] = [[]]
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        if buckets[-1] and sum(x[0].nbytes for x in buckets[-1]) >= limit:
            buckets.append([])
        buckets[-1].append(leaves)
    found: list[Any] = []
    for bucket in buckets:
        joined = [jnp.concatenate(leaves, -1) for leaves in zip(*bucket, strict=True)]
        results = send(*joined)
        several = isinstance(results, tuple)
        ends = list(itertools.accumulate(leaves[0].shape[-1] for leaves in bucket))[:-1]
        cut = [jnp.split(x, ends, -1) for x in (results if several else (results,))]
        found += zip(*cut, strict=True)
    made = tuple(jax.tree.unflatten(treedef, x) for x in zip(*found, strict=True))
    return made if several else made[0]
