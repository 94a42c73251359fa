"""Checkpoints of a small state."""

import jax
import jax.numpy as jnp
import optax

from jaxdp.parallel.replicas import Replicas
from jaxdp.step.setup import make_setup
from jaxdp.step.state import State
from jaxdp.workdir.checkpoints import Checkpoints
from support.steps import VOCAB


def state_of(step, value=0.0, devices=1):
    params = {"a": jnp.arange(6.0).reshape(2, 3) + value, "b": {"c": jnp.full((4,), value)}}
    state = State.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    grads = jax.tree.map(jnp.ones_like, params)
    state = state.apply_gradients(grads=grads).replace(step=jnp.array(step, jnp.int32))
    return Replicas(jax.local_devices()[:devices]).replicate(state)


def open_checkpoints(workdir, config, devices=1, report=print):
    replicas = Replicas(jax.local_devices()[:devices])
    return Checkpoints(workdir, make_setup(config, VOCAB, devices), replicas, report)


def save_and_evaluate(checkpoints, losses):
    """Saves a step for each of {step: validation loss, or None if it isn't evaluated}."""
    for step, loss in losses.items():
        checkpoints.save(step, state_of(step, value=float(step)), {})
        if loss is not None:
            checkpoints.evaluated(step, loss)


def two_checkpoints(workdir, config):
    """Of steps 3 and 5."""
    with open_checkpoints(workdir, config) as checkpoints:
        save_and_evaluate(checkpoints, {3: 2.0, 5: 1.0})
