"""Rotary positions (Su et al. 2021), and their scaling to long contexts as in Llama 3.1.

Shapes: B batch, L length, H heads, K head width.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotary(NamedTuple):
    """The angles by which positions rotate queries and keys; "rope_parameters" in transformers.

    With a `factor` above 1, wavelengths longer than context / low become factor times as long,
    those shorter than context / high stay, and those in between are interpolated (Llama 3.1).

    Attributes:
      base: base of the wavelengths; the longest is nearly 2 pi * base. 10,000 in the paper.
      factor: see above; 1: no scaling.
      low: see above.
      high: see above; more than low.
      context: tokens of the context that the model was first trained with.
    """

    base: float
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def frequencies(self, width: int) -> jax.Array:
        """Returns radians per position, [K / 2] float32; width: K, even."""
        half = width // 2
        plain = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.factor == 1:
            return plain
        turns = plain * self.context / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
    """Applies rotary position embedding, rotating halves as Llama does.

    Args:
      x: [B, L, H, K], K even.
      positions: [B, L] int32.
      rotary: the angles.

    Returns:
      [B, L, H, K] in the dtype of x; the angles are computed in float32.
    """
    frequencies = rotary.frequencies(x.shape[-1])
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def rotated_layers(num_layers: int, skip: int) -> list[int]:
    """Returns 1 for each layer with rotary positions, 0 for each without.

    Examples:
      >>> rotated_layers(5, skip=4), rotated_layers(3, skip=0)
      ([1, 1, 1, 0, 1], [1, 1, 1])
    """
    return [int(not skip or i % skip > 0) for i in range(1, num_layers + 1)]
