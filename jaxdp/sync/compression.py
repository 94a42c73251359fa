"""Sums over devices of which only small integers cross the network, with error feedback.

A sum takes two exchanges, as a reduce-scatter and an all-gather do. In the first, each device sends
every other device that one's slice of its numbers, rounded to 8 or 4 bits; the receiver sums what
comes. In the second, it sends the sum, rounded again, to all. What rounding loses in either
exchange is kept on the device, the residual, and added to the numbers of the next sum (Seide et al.
2014; Karimireddy et al. 2019; for both exchanges Tang et al. 2019, DoubleSqueeze). So errors don't
add up over steps. All devices decode the same bytes, so their results are equal to the bit.

Our choices: blocks of 128 numbers share a scale in bfloat16, the largest number of the block is the
largest integer, and numbers are rounded to the nearest.

Shapes: n devices that exchange, S numbers in a slice of a leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.sync.buckets import BUCKET_BYTES, by_buckets
from jaxdp.sync.islands import Groups, Islands, slice_shapes, slices, unslice
from jaxdp.sync.traffic import Collective

BITS = {"int8": 8, "int4": 4}  # The values of sync.dtype that compress.
BLOCK = 128  # Numbers with a common scale.

Tree = Any


def encode(x: jax.Array, bits: int) -> jax.Array:
    """Rounds numbers to integers with a scale per block, as bytes.

    Args:
      x: [..., S] float32.
      bits: 8 or 4.

    Returns:
      [..., bytes] uint8: for each block of 128, their integers (two in a byte with 4 bits), then
      the two bytes of their scale. A block with NaN or infinity decodes to NaN.
    """
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    blocks = blocks.reshape(*x.shape[:-1], -1, BLOCK)
    limit = 2 ** (bits - 1) - 1
    scale = (jnp.abs(blocks).max(-1, keepdims=True) / limit).astype(jnp.bfloat16)
    wide = scale.astype(jnp.float32)
    whole = jnp.round(blocks / jnp.where(wide > 0, wide, 1))
    whole = jnp.clip(jnp.where(wide > 0, whole, 0), -limit, limit).astype(jnp.int8)
    data = lax.bitcast_convert_type(whole, jnp.uint8)
    if bits == 4:
        data = (data[..., BLOCK // 2 :] << 4) | (data[..., : BLOCK // 2] & 15)
    sent = jnp.concatenate([data, lax.bitcast_convert_type(scale[..., 0], jnp.uint8)], -1)
    return sent.reshape(*x.shape[:-1], -1)


def decode(sent: jax.Array, size: int, bits: int) -> jax.Array:
    """Returns the numbers that `encode` made bytes of, [..., size] float32."""
    data = sent.reshape(*sent.shape[:-1], -1, BLOCK * bits // 8 + 2)
    scale = lax.bitcast_convert_type(data[..., -2:], jnp.bfloat16)
    data = data[..., :-2]
    if bits == 4:
        data = jnp.concatenate([data << 4, data & 0xF0], -1)
    whole = lax.bitcast_convert_type(data, jnp.int8)
    whole = whole >> 4 if bits == 4 else whole  # Keeps the sign.
    numbers = whole.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return numbers.reshape(*sent.shape[:-1], -1)[..., :size]


def num_encoded_bytes(size: int, bits: int) -> int:
    """Returns the bytes that `encode` makes of this many numbers."""
    return -(-size // BLOCK) * (BLOCK * bits // 8 + 2)


def traffic(tree: Tree, bits: int, count: int, steps: float = 1) -> list[Collective]:
    """Returns the collectives of `compressed_sum`.

    Args:
      tree: what a device sums, or its shapes.
      bits: 8 or 4.
      count: n.
      steps: optimizer steps from one sum to the next.
    """
    size = sum(x.size for x in jax.tree.leaves(slice_shapes(tree, count)))
    sent = count * num_encoded_bytes(size, bits)
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


def compressed_sum(
    tree: Tree, residual: dict[str, Tree], axis: str, bits: int, count: int, groups: Groups = None
) -> tuple[Tree, dict[str, Tree]]:
    """Sums a tree over devices.

    Args:
      tree: float32 leaves of this device.
      residual: what earlier sums have lost; see `empty_residual`.
      axis: name of the device axis.
      bits: 8 or 4.
      count: n.
      groups: groups of n devices that sum among each other; all by default.

    Returns:
      The sums, equal on all n devices, and the new residual.
    """
    parts, sent = scatter_sum(slices(tree, count), residual["sent"], axis, bits, groups)
    whole, summed = gather(parts, residual["summed"], axis, bits, count, groups)
    return unslice(whole, tree), {"sent": sent, "summed": summed}


def _rounded(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns what is sent for some numbers, and what rounding has lost of them."""
    sent = encode(x, bits)
    return sent, x - decode(sent, x.shape[-1], bits)


def scatter_sum(
    cut: Tree, residual: Tree, axis: str, bits: int, groups: Groups = None
) -> tuple[Tree, Tree]:
    """Makes the first exchange: leaves [n, S] -> this device's slices of the sums [S].

    Also returns the new residual, [n, S] per leaf.
    """

    def send(numbers, lost):
        sent, lost = _rounded(numbers + lost, bits)
        got = lax.all_to_all(sent, axis, 0, 0, axis_index_groups=groups, tiled=True)
        return decode(got, numbers.shape[-1], bits).sum(0), lost

    return by_buckets(send, cut, residual)


def gather(
    parts: Tree, residual: Tree, axis: str, bits: int, count: int, groups: Groups = None
) -> tuple[Tree, Tree]:
    """Makes the second exchange: leaves [S] -> all devices' slices [n, S], and the new residual."""

    def send(numbers, lost):
        sent, lost = _rounded(numbers + lost, bits)
        every = lax.all_gather(sent, axis, axis_index_groups=groups)
        return decode(every, numbers.size, bits), lost

    return by_buckets(send, parts, residual, limit=BUCKET_BYTES // count)


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
