"""Numbers as bytes: a few levels for each, and a scale for each block.

Our choices: blocks of 128 numbers share a scale in bfloat16. With 8 or 4 bits the largest number of
a block is the largest integer, and numbers are rounded to the nearest. That would make most numbers
zeros with fewer bits: with 2 they become -3/2, -1/2, 1/2 or 3/2 of the scale, with 1 their sign.
"ternary" is -1, 0 or 1 times the scale (as in TernGrad, Wen et al. 2017), five numbers in a byte.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128  # Numbers with a common scale.
# Distance of the levels, by their number, that loses the fewest squares of normally distributed
# numbers, in their root mean square (Max 1960, table II).
UNITS = {4: 0.9957, 3: 1.2240, 2: 1.5958}


def encode(x: jax.Array, levels: int) -> jax.Array:
    """Rounds numbers to a few levels, which are equally far apart in a block, as bytes.

    Args:
      x: [..., S] float32.
      levels: their number, as in `LEVELS`: 256, 16, 4, 3 or 2, for 1, 2, 4, 5 or 8 numbers a byte.

    Returns:
      [..., bytes] uint8: for each block of 128, its numbers, then the two bytes of their scale. A
      block with NaN or infinity decodes to NaN.
    """
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    blocks = blocks.reshape(*x.shape[:-1], -1, BLOCK)
    digits, scale = _by_largest(blocks, levels) if levels > 4 else _by_squares(blocks, levels)
    count = _num_in_byte(levels)
    digits = jnp.pad(digits, [(0, 0)] * (blocks.ndim - 1) + [(0, -BLOCK % count)])
    # A byte is a number of `count` digits to the base `levels`.
    powers = np.array([[levels**i] for i in range(count)], np.uint8)
    data = (digits.reshape(*digits.shape[:-1], count, -1) * powers).sum(-2, dtype=jnp.uint8)
    sent = jnp.concatenate([data, lax.bitcast_convert_type(scale[..., 0], jnp.uint8)], -1)
    return sent.reshape(*x.shape[:-1], -1)


def decode(sent: jax.Array, size: int, levels: int) -> jax.Array:
    """Returns the numbers that `encode` made bytes of, [..., size] float32."""
    data = sent.reshape(*sent.shape[:-1], -1, num_encoded_bytes(BLOCK, levels))
    scale = lax.bitcast_convert_type(data[..., -2:], jnp.bfloat16)
    data, digits = data[..., :-2], []
    for _ in range(_num_in_byte(levels) - 1):
        digits.append(data % levels)
        data = data // levels
    numbers = jnp.concatenate([*digits, data], -1)[..., :BLOCK].astype(jnp.float32)
    numbers -= _middle(levels)
    numbers *= scale.astype(jnp.float32)[..., None]
    return numbers.reshape(*sent.shape[:-1], -1)[..., :size]


def _by_largest(blocks: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Returns numbers of levels, the lowest is 0, and their distance: the largest number is one."""
    middle = _middle(levels)
    scale = (jnp.abs(blocks).max(-1, keepdims=True) / middle).astype(jnp.bfloat16)
    wide = scale.astype(jnp.float32)
    whole = jnp.round(blocks / jnp.where(wide > 0, wide, 1))
    whole = jnp.clip(jnp.where(wide > 0, whole, 0), -middle, middle)
    return (whole + middle).astype(jnp.uint8), scale


def _by_squares(blocks: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Returns numbers of levels, the lowest is 0, and the distance that is best for just these.

    They are the nearest ones at the distance that is best for normally distributed numbers.
    """
    middle = _middle(levels)
    unit = UNITS[levels] * jnp.sqrt(jnp.mean(blocks**2, -1, keepdims=True))
    digits = jnp.round(blocks / jnp.where(unit > 0, unit, 1) + middle).clip(0, levels - 1)
    number = digits - middle
    squares = (number * number).sum(-1, keepdims=True)
    scale = (blocks * number).sum(-1, keepdims=True) / jnp.maximum(squares, 1)
    return digits.astype(jnp.uint8), scale.astype(jnp.bfloat16)


def _middle(levels: int) -> float:
    """Returns where 0 is among the levels. Of 256 or 16, one isn't used, so that 0 is a level."""
    return levels // 2 - 1 if levels > 4 else (levels - 1) / 2


def _num_in_byte(levels: int) -> int:
    """Returns how many numbers a byte holds."""
    return next(n for n in (8, 5, 4, 2, 1) if levels**n <= 256)


def num_encoded_bytes(size: int, levels: int) -> int:
    """Returns the bytes that `encode` makes of this many numbers."""
    return -(-size // BLOCK) * (-(-BLOCK // _num_in_byte(levels)) + 2)
