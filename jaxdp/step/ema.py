"""An exponential moving average (EMA) of the parameters, for evaluation and sampling.

After each optimizer step t = 1, 2, ... the average moves towards the parameters θ:

    θ̄ = dₜ θ̄ + (1 - dₜ) θ,  dₜ = min(ema.decay, (1 + t) / (10 + t)).

The term (1 + t) / (10 + t), from TensorFlow's ExponentialMovingAverage, soon forgets the random
initial parameters. A step whose update is skipped counts as a step with unchanged parameters.

With parameter_mean and diloco, replicas train alone and share parameters only at the end of a
round. The average is then updated once per round, as if each step of the round had ended with those
parameters: dₜ is replaced by the product of the round's dₜ. Every device computes the same update,
so nothing has to be sent.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def keep(limit: float, step: jax.Array | int, steps: int) -> jax.Array:
    """Returns the product of dₜ over several steps: the share of the old average that is kept.

    Args:
      limit: ema.decay.
      step: [] int32, steps done before.
      steps: number of steps.

    Returns:
      [] float32.
    """
    t = (step + 1 + jnp.arange(steps)).astype(jnp.float32)
    return jnp.prod(jnp.minimum(limit, (1 + t) / (10 + t)))


def moved(ema: Any, params: Any, limit: float, step: jax.Array | int, steps: int) -> Any:
    """Returns the average after several steps with the same parameters; see `keep`."""
    return optax.incremental_update(params, ema, 1 - keep(limit, step, steps))
