"""How replicas agree: pure functions over a pytree and an axis name."""

from typing import Any

import jax
from jax import lax


def gradient_mean(sums: Any, weight_sum: jax.Array, axis_name: str) -> tuple[Any, jax.Array]:
    """The mean over all tokens of all devices, from each device's sums.

    Sums and weights are averaged by `lax.pmean` and then divided, once: that is exact also where
    devices hold different numbers of tokens, where a mean of means is not.

    Args:
      sums: a pytree of this device's sums over its tokens.
      weight_sum: [] float32, what its tokens weigh.
      axis_name: of the devices.

    Returns:
      sums / weights over all devices, and the weight of all together.
    """
    sums, weight = lax.pmean((sums, weight_sum), axis_name)
    # A batch without a single target, possible in masked-LM training, is no step: 0 / 1.
    divisor = jax.numpy.where(weight > 0, weight, 1)
    return jax.tree.map(lambda x: x / divisor, sums), weight * lax.psum(1, axis_name)
