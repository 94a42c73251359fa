"""One optimizer step and one evaluation step, as pure functions of what a device holds.

Shapes: b sequences per device, A micro-batches, B = b / A sequences per micro-batch, L length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import lax

from jaxdp import parallel, sync
from jaxdp.losses import cross_entropy

Batch = dict[str, jax.Array]
# Corrupts a batch for masked-LM training: (key, rows, batch) -> batch; the identity otherwise.
Transform = Callable[[jax.Array, jax.Array, Batch], Batch]
# Keeps the keys of masks apart from those of dropout.
MASK_STREAM, DROPOUT_STREAM = 0, 1


def plain(key: jax.Array, rows: jax.Array, batch: Batch) -> Batch:
    """The transform that changes nothing."""
    del key, rows
    return batch


def create_state(model: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Draws the initial parameters and makes the optimizer's state for them."""

    def init() -> TrainState:
        inputs = jnp.zeros((1, model.config.seq_len), jnp.int32)
        params = model.init(jax.random.key(seed), inputs)["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
        return state.replace(step=jnp.zeros((), jnp.int32))

    return jax.jit(init)()


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    schedule: optax.Schedule,
    grad_accum_steps: int,
    seed: int,
    transform: Transform = plain,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; call it under an axis named 'batch'.

    Args:
      state: equal on all devices.
      batch: that of `gradients`, and stop [b] float32: whether this process was asked to stop.
      schedule: step -> learning rate, for the metrics only.
      grad_accum_steps: A; divides b.
      seed: of the run.
      transform: applied to each micro-batch.

    Returns:
      The new state, and the metrics of `gradients` with two more, [] float32 each: learning_rate,
      stop (any process's).
    """
    stop = lax.pmax(jnp.max(batch["stop"]), parallel.AXIS)
    grads, metrics = gradients(
        state, batch, grad_accum_steps=grad_accum_steps, seed=seed, transform=transform
    )
    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    metrics |= {"learning_rate": learning_rate, "stop": stop}
    return state.apply_gradients(grads=grads), metrics


def gradients(
    state: TrainState,
    batch: Batch,
    *,
    grad_accum_steps: int,
    seed: int,
    transform: Transform = plain,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the global batch, equal on all devices; call it under the axis 'batch'.

    Loss and gradient are means over the weights of all tokens in the global batch, however many
    devices and micro-batches it is spread over. Random numbers depend on (seed, step, number of
    the sequence in the global batch), so they don't depend on that either.

    Args:
      state: equal on all devices.
      batch: this device's inputs and targets [b, L] int32, weights [b, L] float32.
      grad_accum_steps: A; divides b.
      seed: of the run.
      transform: applied to each micro-batch.

    Returns:
      The gradient, a pytree like state.params, and metrics, [] float32 each: loss (nats per
      token), grad_norm (before clipping), tokens (weight of the global batch).
    """
    batch = {name: batch[name] for name in ("inputs", "targets", "weights")}
    batch["rows"] = parallel.rows(len(batch["inputs"]))
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params, micro):
        logits, micro = _forward(state.apply_fn, params, micro, step_key, transform, train=True)
        return cross_entropy(logits, micro["targets"], micro["weights"])

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss_sum, weight_sum), grads = _accumulate(
        value_and_grad, state.params, batch, grad_accum_steps
    )
    (loss, grads), tokens = sync.gradient_mean((loss_sum, grads), weight_sum, parallel.AXIS)
    return grads, {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": tokens}


def eval_step(
    state: TrainState, batch: Batch, *, seed: int, transform: Transform = plain
) -> tuple[jax.Array, jax.Array]:
    """Sums of loss and weight over the batches of all devices; call it under the axis 'batch'.

    Args:
      state: see `train_step`; only its parameters are used.
      batch: this device's inputs and targets [b, L] int32, weights [b, L] float32, and number [b]
        int32, which batch of the evaluation it is: the masks of masked-LM depend on it.
      seed: of the run.
      transform: as in training.

    Returns:
      loss_sum (nats) and weight_sum, [] float32 each.
    """
    number = batch["number"][0]
    micro = {name: batch[name] for name in ("inputs", "targets", "weights")}
    micro["rows"] = parallel.rows(len(batch["inputs"]))
    key = jax.random.fold_in(jax.random.key(seed), number)
    logits, micro = _forward(state.apply_fn, state.params, micro, key, transform, train=False)
    sums = cross_entropy(logits, micro["targets"], micro["weights"])
    return lax.psum(sums, parallel.AXIS)


def _forward(apply_fn, params, micro: Batch, key, transform: Transform, train: bool):
    micro = dict(micro)
    rows = micro.pop("rows")
    micro = transform(jax.random.fold_in(key, MASK_STREAM), rows, micro)
    dropout = {"rows": rows, "rngs": {"dropout": jax.random.fold_in(key, DROPOUT_STREAM)}}
    return apply_fn({"params": params}, micro["inputs"], **(dropout if train else {})), micro


def _accumulate(value_and_grad: Callable, params: Any, batch: Batch, count: int):
    """Sums of ((loss_sum, weight_sum), gradients) over `count` micro-batches, one at a time."""
    if count == 1:
        return value_and_grad(params, batch)
    micros = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro)), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add, zero, micros)[0]
