"""Sums over devices that send only a few bits of each number, with error feedback.

A sum takes two exchanges, as a reduce-scatter and an all-gather do. In the first, each device sends
every other device that one's slice of its numbers, rounded to 8 bits or fewer; the receiver sums
what comes. In the second, it sends the sum, rounded again, to all. What rounding loses in either
exchange is kept on the device, the residual, and added to the numbers of the next sum (Seide et al.
2014; Karimireddy et al. 2019; for both exchanges Tang et al. 2019, DoubleSqueeze). So errors don't
add up over steps. All devices decode the same bytes, so their results are equal to the bit.

Shapes: n devices that exchange, S numbers in a slice of a leaf.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.sync.buckets import BUCKET_BYTES, Buckets
from jaxdp.sync.encoding import decode, encode, num_encoded_bytes
from jaxdp.sync.islands import Groups, Islands, slice_shapes, slices, unslice
from jaxdp.sync.traffic import Collective

Tree = Any


def traffic(
    tree: Tree, levels: int, count: int, steps: float = 1, bucket_bytes: int = BUCKET_BYTES
) -> list[Collective]:
    """Returns the collectives of a sum; joined ones count as one.

    Args:
      tree: what a device sums, or its shapes.
      levels: see `encode`.
      count: n.
      steps: optimizer steps from one sum to the next.
      bucket_bytes: see `Exchange`.
    """
    sizes = Buckets(slice_shapes(tree, count), bucket_bytes // count).sizes
    sent = count * sum(num_encoded_bytes(size, levels) for size in sizes)
    return [Collective(kind, sent, steps, count) for kind in ("all-to-all", "all-gather")]


def empty_residual(tree: Tree, count: int) -> dict[str, Tree]:
    """Returns the residual of `compressed_sum` over `count` devices before the first sum: zeros.

    Args:
      tree: what a device sums, or its shapes.
      count: n.

    Returns:
      "sent": what the first exchange lost, [n, S] per leaf; "summed": the second's, [S].
    """
    shapes = slice_shapes(tree, count)
    return {
        "sent": jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes),
        "summed": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    }


class Exchange(NamedTuple):
    """The two exchanges of a sum, cut in halves: other work may go on while one is under way.

    Attributes:
      axis: name of the device axis.
      levels: see `encode`.
      devices: n.
      groups: groups of n devices that sum among each other; all by default.
      bucket_bytes: bytes of the numbers that are sent at a time, about.
    """

    axis: str
    levels: int
    devices: int
    groups: Groups = None
    bucket_bytes: int = BUCKET_BYTES

    def send_slices(self, cut: Tree, residual: Tree) -> tuple[list[jax.Array], Tree]:
        """Begins the first exchange.

        Args:
          cut: slices for all devices, leaves [n, S] float32.
          residual: what earlier such exchanges have lost, [n, S] per leaf.

        Returns:
          What is received, for `sum_slices`, and the new residual.
        """
        buckets = self._buckets(jax.tree.map(lambda x: x[0], cut))
        sent, lost = self._rounded(cut, residual, buckets)
        groups = self.groups
        received = [
            lax.all_to_all(x, self.axis, 0, 0, axis_index_groups=groups, tiled=True) for x in sent
        ]
        return received, lost

    def sum_slices(self, received: list[jax.Array], like: Tree) -> Tree:
        """Ends the first exchange: returns this device's slices of the sums, [S] as in `like`."""
        buckets = self._buckets(like)
        return buckets.split([x.sum(0) for x in self._decoded(received, buckets)])

    def send_sums(self, parts: Tree, residual: Tree) -> tuple[list[jax.Array], Tree]:
        """Begins the second exchange.

        Args:
          parts: this device's slices of the sums, leaves [S] float32.
          residual: what earlier such exchanges have lost, [S] per leaf.

        Returns:
          What is received, for `whole_sums`, and the new residual.
        """
        sent, lost = self._rounded(parts, residual, self._buckets(parts))
        return [lax.all_gather(x, self.axis, axis_index_groups=self.groups) for x in sent], lost

    def whole_sums(self, received: list[jax.Array], like: Tree) -> Tree:
        """Ends the second exchange: returns all devices' slices of the sums, [n, S]; like: [S]."""
        buckets = self._buckets(like)
        return buckets.split(self._decoded(received, buckets))

    def _buckets(self, like: Tree) -> Buckets:
        return Buckets(like, self.bucket_bytes // self.devices)

    def _decoded(self, received: list[jax.Array], buckets: Buckets) -> list[jax.Array]:
        sizes = zip(received, buckets.sizes, strict=True)
        return [decode(x, size, self.levels) for x, size in sizes]

    def _rounded(
        self, tree: Tree, residual: Tree, buckets: Buckets
    ) -> tuple[list[jax.Array], Tree]:
        """Returns what to send of a tree, by bucket, and what rounding has lost of it."""
        joined = zip(buckets.join(tree), buckets.join(residual), strict=True)
        numbers = [x + lost for x, lost in joined]
        sent = [encode(x, self.levels) for x in numbers]
        read = [decode(x, y.shape[-1], self.levels) for x, y in zip(sent, numbers, strict=True)]
        return sent, buckets.split([x - y for x, y in zip(numbers, read, strict=True)])


def compressed_sum(
    tree: Tree, residual: dict[str, Tree], axis: str, levels: int, count: int
) -> tuple[Tree, dict[str, Tree]]:
    """Sums a tree over all devices.

    Args:
      tree: float32 leaves of this device.
      residual: what earlier sums have lost; see `empty_residual`.
      axis: name of the device axis.
      levels: see `encode`.
      count: n.

    Returns:
      The sums, equal on all devices, and the new residual.
    """
    parts, sent = scatter_sum(slices(tree, count), residual["sent"], axis, levels, count)
    whole, summed = gather(parts, residual["summed"], axis, levels, count)
    return unslice(whole, tree), {"sent": sent, "summed": summed}


def scatter_sum(cut: Tree, residual: Tree, axis: str, levels: int, count: int) -> tuple[Tree, Tree]:
    """Makes the first exchange: leaves [n, S] -> this device's slices of the sums [S].

    Also returns the new residual, [n, S] per leaf.
    """
    exchange = Exchange(axis, levels, count)
    received, residual = exchange.send_slices(cut, residual)
    return exchange.sum_slices(received, jax.tree.map(lambda x: x[0], cut)), residual


def gather(parts: Tree, residual: Tree, axis: str, levels: int, count: int) -> tuple[Tree, Tree]:
    """Makes the second exchange: leaves [S] -> all devices' slices [n, S], and the new residual."""
    exchange = Exchange(axis, levels, count)
    received, residual = exchange.send_sums(parts, residual)
    return exchange.whole_sums(received, parts), residual


def move_residual(
    saved: dict[str, Tree], like: Tree, old: Islands, new: Islands
) -> dict[str, Tree]:
    """Converts the residuals of a run's devices for a run on other devices or islands.

    What was to be sent is shared equally among the new islands.

    Args:
      saved: NumPy arrays [N, K, S] ("sent") and [N, S] ("summed") per leaf of N devices in K
        islands, of which K devices exchange each slice.
      like: parameters or their shapes.
      old: these devices.
      new: the devices to convert to.
    """
    if old == new:
        return saved
    return {
        "sent": jax.tree.map(
            lambda x, p: _cut_sent(_all_sent(x, p, old), new), saved["sent"], like
        ),
        "summed": jax.tree.map(
            lambda x, p: _cut_summed(_all_summed(x, p, old), new), saved["summed"], like
        ),
    }


def _all_sent(x: np.ndarray, like: Any, islands: Islands) -> np.ndarray:
    """Returns what all islands are still to send, summed, [like.size]."""
    return _join(x.reshape(islands.islands, islands.size, -1).sum(0), like)


def _cut_sent(total: np.ndarray, islands: Islands) -> np.ndarray:
    own = _cut(total / islands.islands, islands)
    return np.tile(own, (islands.islands, 1, 1))


def _all_summed(x: np.ndarray, like: Any, islands: Islands) -> np.ndarray:
    by_place = x.reshape(islands.islands, islands.size, -1).swapaxes(0, 1)
    return _join(by_place.reshape(islands.size, -1), like)


def _cut_summed(total: np.ndarray, islands: Islands) -> np.ndarray:
    return _cut(total, islands).swapaxes(0, 1).reshape(islands.devices, -1)


def _join(rows: np.ndarray, like: Any) -> np.ndarray:
    """Puts the slices of an island's devices, padded at their ends, together: -> [like.size]."""
    width = max(-(-like.size // len(rows)), 1)
    return rows[:, :width].reshape(-1)[: like.size]


def _cut(whole: np.ndarray, islands: Islands) -> np.ndarray:
    """Cuts numbers into slices by place in an island, and these by island: [s, K, S]."""
    return np.stack([slices(row, islands.islands) for row in slices(whole, islands.size)])
