"""Checks that all devices still hold the same state: finds silent corruption of a replica."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.common.errors import RunError
from jaxdp.parallel.replicas import AXIS, Replicas

# Any odd multiplier would do; this one is Knuth's.
MULTIPLIER = 2654435761


class ReplicaCheck:
    """Compares fingerprints of a replicated pytree over all devices of all processes."""

    def __init__(self, replicas: Replicas):
        """Prepares the check; the first call compiles it."""
        self._p_fingerprints = replicas.pmap(
            lambda tree, _: lax.all_gather(fingerprints(tree), AXIS)
        )
        self._unused = replicas.shard(np.zeros(len(replicas.devices)))

    def __call__(self, tree: Any, step: int) -> None:
        """Compares the fingerprints of all devices.

        Args:
          tree: replicated arrays.
          step: steps done, for the message.

        Raises:
          RunError: on every process, if they differ; names the devices in the minority and the
            first leaf that differs.
        """
        found = np.asarray(self._p_fingerprints(tree, self._unused))
        # If two devices differ, either may be right; the first is assumed to be.
        common, _ = Counter(row.tobytes() for row in found).most_common(1)[0]
        differs = found != np.frombuffer(common, found.dtype)
        if differs.any():
            paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
            first = jax.tree_util.keystr(paths[differs.any(0).argmax()], simple=True, separator="/")
            devices = ", ".join(str(i) for i in np.flatnonzero(differs.any(1)))
            raise RunError(
                f"after step {step} device {devices} of 0..{len(found) - 1} holds another state "
                f"than most, first in {first}: this state was not saved; check that device, and "
                "run again to go on from the newest checkpoint"
            )


def fingerprints(tree: Any) -> jax.Array:
    """Computes a number for each leaf that depends on every bit of it and on each bit's place.

    It is the sum, modulo 2^32, of a hash of each element's bits and index. Integer sums are exact,
    so equal leaves have equal fingerprints on every device, in whatever order they are added.

    Args:
      tree: arrays with at most 32 bits per element.

    Returns:
      [leaves] uint32.
    """

    def fingerprint(x):
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = lax.bitcast_convert_type(x.reshape(-1), kind).astype(jnp.uint32)
        mixed = (bits ^ lax.iota(jnp.uint32, x.size)) * jnp.uint32(MULTIPLIER)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(MULTIPLIER)
        return (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)

    return jnp.stack([fingerprint(x) for x in jax.tree.leaves(tree)])
