"""An exponential moving average (EMA) of the parameters, to evaluate and to sample with.

After each optimizer step t = 1, 2, ... the average moves towards the parameters θ:

    θ̄ = dₜ θ̄ + (1 - dₜ) θ,  dₜ = min(ema.decay, (1 + t) / (10 + t)),

where the second term, from TensorFlow's ExponentialMovingAverage, soon forgets the first, random
parameters. A step whose update is skipped counts, with the parameters as they are.

Where replicas train alone (parameter_mean, diloco), there are no parameters of all of them until
they agree. Those that they agree on count for each step of the round: one update, with the product
of the round's dₜ. All devices make the same one, so that nothing has to be sent; in rounds of one
step it is the rule above.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def keep(limit: float, step: jax.Array | int, steps: int) -> jax.Array:
    """What of the average stays over some steps, [] float32.

    Args:
      limit: ema.decay.
      step: [] int32, steps done before them.
      steps: how many they are.
    """
    t = (step + 1 + jnp.arange(steps)).astype(jnp.float32)
    return jnp.prod(jnp.minimum(limit, (1 + t) / (10 + t)))


def moved(ema: Any, params: Any, limit: float, step: jax.Array | int, steps: int) -> Any:
    """The average after some steps; see `keep`."""
    return optax.incremental_update(params, ema, 1 - keep(limit, step, steps))
