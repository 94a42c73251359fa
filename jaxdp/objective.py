"""What is minimised: sums of losses over a batch's tokens, and their gradient.

Shapes: N devices, b sequences per device, A micro-batches, L length.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax.training.train_state import TrainState
from jax import lax
from ml_collections import ConfigDict

from jaxdp import parallel, sync, tokenizer
from jaxdp.data.cache import TokenCache
from jaxdp.losses import chunked_cross_entropy, mask_tokens

Batch = dict[str, jax.Array]
# Corrupts a batch for masked-LM training: (key, rows, batch) -> batch; the identity otherwise.
Transform = Callable[[jax.Array, jax.Array, Batch], Batch]
# Keeps the keys of masks apart from those of dropout.
MASK_STREAM, DROPOUT_STREAM = 0, 1
# Of a batch, what goes through the model as it is; only where documents are kept apart.
PACKING = ("segments", "positions")


def plain(key: jax.Array, rows: jax.Array, batch: Batch) -> Batch:
    """The transform that changes nothing."""
    del key, rows
    return batch


def get_transform(config: ConfigDict, cache: TokenCache) -> Transform:
    """The one that the objective asks for, with the tokenizer of the data."""
    if config.objective == "causal":
        return plain
    mask_id = tokenizer.mask_id(cache.tokenizer)
    assert mask_id is not None
    return functools.partial(mask_tokens, mask_id=mask_id, vocab_size=cache.vocab_size)


def gradient_sums(
    state: TrainState,
    batch: Batch,
    *,
    seed: int,
    transform: Transform = plain,
    loss_chunks: int = 1,
    accumulate: Callable,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Sums over this device's tokens; call it under the axis 'batch'.

    Args:
      state: see `step.train_step`.
      batch: inputs and targets [b, L] int32, weights [b, L] float32; maybe segments and positions.
      seed: of the run.
      transform: applied to each micro-batch.
      loss_chunks: see `losses.chunked_cross_entropy`.
      accumulate: (value_and_grad, params, batch) -> their sums over micro-batches.

    Returns:
      (loss_sum, weight_sum), [] float32 each, and the gradient of loss_sum, like state.params.
    """
    batch = _of_model(batch)
    batch["rows"] = parallel.rows(len(batch["inputs"]))
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params, micro):
        return _loss_sums(
            state.apply_fn, params, micro, step_key, transform, loss_chunks, train=True
        )

    return accumulate(jax.value_and_grad(loss_fn, has_aux=True), state.params, batch)


def gradients(
    state: TrainState,
    batch: Batch,
    *,
    grad_accum_steps: int = 1,
    seed: int,
    transform: Transform = plain,
    loss_chunks: int = 1,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the global batch by `sync.gradient_mean`; call it under the axis 'batch'.

    Args:
      state: see `step.train_step`.
      batch: that of `gradient_sums`.
      grad_accum_steps: A; divides b.
      seed: of the run.
      transform: applied to each micro-batch.
      loss_chunks: see `losses.chunked_cross_entropy`.

    Returns:
      The gradient, like state.params, and loss [] (summed, nats) and tokens [N].
    """
    add = functools.partial(sync.accumulate, count=grad_accum_steps)
    (loss, weight), sums = gradient_sums(
        state, batch, seed=seed, transform=transform, loss_chunks=loss_chunks, accumulate=add
    )
    figures = {"loss": loss, "tokens": sync.per_device(weight, parallel.AXIS)}
    return sync.gradient_mean(sums, figures, parallel.AXIS)


def eval_step(
    params: Any,
    batch: Batch,
    *,
    apply_fn: Callable,
    seed: int,
    transform: Transform = plain,
    loss_chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Sums of loss and weight over the batches of all devices; call it under the axis 'batch'.

    Args:
      params: equal on all devices.
      batch: that of `gradient_sums`, and number [b]
        int32, which batch of the evaluation it is: the masks of masked-LM depend on it.
      apply_fn: the model's.
      seed: of the run.
      transform: as in training.
      loss_chunks: likewise.

    Returns:
      loss_sum (nats) and weight_sum, [] float32 each.
    """
    number = batch["number"][0]
    micro = _of_model(batch)
    micro["rows"] = parallel.rows(len(batch["inputs"]))
    key = jax.random.fold_in(jax.random.key(seed), number)
    sums = _loss_sums(apply_fn, params, micro, key, transform, loss_chunks, train=False)
    return lax.psum(sums, parallel.AXIS)


def _of_model(batch: Batch) -> Batch:
    packing = [name for name in PACKING if name in batch]
    return {name: batch[name] for name in ("inputs", "targets", "weights", *packing)}


def _loss_sums(apply_fn, params, micro: Batch, key, transform: Transform, chunks, train: bool):
    micro = dict(micro)
    rows = micro.pop("rows")
    micro = transform(jax.random.fold_in(key, MASK_STREAM), rows, micro)
    dropout = {"rows": rows, "rngs": {"dropout": jax.random.fold_in(key, DROPOUT_STREAM)}}
    options = {name: micro[name] for name in PACKING if name in micro} | (dropout if train else {})
    of_model = functools.partial(apply_fn, {"params": params})
    hidden = of_model(micro["inputs"], method="hidden", **options)
    to_logits = functools.partial(of_model, method="logits")
    return chunked_cross_entropy(to_logits, hidden, micro["targets"], micro["weights"], chunks)
