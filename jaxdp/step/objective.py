"""The training objective: the loss summed over a batch's tokens, and its gradient.

Shapes: N devices, b sequences per device, A micro-batches, L length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax.training.train_state import TrainState
from jax import lax
from ml_collections import ConfigDict

from jaxdp.data.batch import Batch, documents_of, tokens_of
from jaxdp.parallel.replicas import AXIS, row_numbers
from jaxdp.step.losses import chunked_cross_entropy, mask_tokens
from jaxdp.sync import reductions

# (key, rows, batch) -> batch: hides tokens for masked-LM training, and is `plain` otherwise.
Transform = Callable[[jax.Array, jax.Array, Batch], Batch]
# Folded into the PRNG key, so that masks and dropout are drawn independently.
MASK_STREAM, DROPOUT_STREAM = 0, 1


def plain(key: jax.Array, rows: jax.Array, batch: Batch) -> Batch:
    """Returns the batch unchanged."""
    del key, rows
    return batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run. Call its methods inside of pmap, under the axis 'batch'.

    Attributes:
      seed: the run's seed, for masks and dropout.
      transform: changes each micro-batch before the model sees it.
      loss_chunks: number of chunks of a sequence; see `losses.chunked_cross_entropy`.
    """

    seed: int
    transform: Transform = plain
    loss_chunks: int = 1

    def gradient_sums(
        self, state: TrainState, batch: Batch, accumulate: Callable
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Computes loss, weight and gradient, summed over this device's tokens.

        Args:
          state: see `train_step.train_step`.
          batch: inputs and targets [b, L] int32, weights [b, L] float32; segments and positions
            [b, L] int32 where documents are kept apart.
          accumulate: (value_and_grad, params, batch) -> results summed over micro-batches.

        Returns:
          (loss_sum, weight_sum), [] float32 each, and the gradient of loss_sum, like state.params.
        """
        batch = _with_rows(batch)

        def loss_fn(params, micro):
            return self._loss_sums(state.apply_fn, params, micro, state.step, train=True)

        return accumulate(jax.value_and_grad(loss_fn, has_aux=True), state.params, batch)

    def gradients(
        self, state: TrainState, batch: Batch, *, grad_accum_steps: int = 1
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Computes the gradient of the global batch's mean loss; see `reductions.gradient_mean`.

        Args:
          state: see `train_step.train_step`.
          batch: as in `gradient_sums`.
          grad_accum_steps: A, the number of micro-batches; divides b.

        Returns:
          The gradient, like state.params, and a dict of loss [] (a sum, nats) and tokens [N].
        """
        add = functools.partial(reductions.accumulate, count=grad_accum_steps)
        (loss, weight), sums = self.gradient_sums(state, batch, add)
        figures = {"loss": loss, "tokens": reductions.per_device(weight, AXIS)}
        return reductions.gradient_mean(sums, figures, AXIS)

    def eval_step(
        self, params: Any, batch: Batch, *, apply_fn: Callable, micro_batches: int = 1
    ) -> tuple[jax.Array, jax.Array]:
        """Computes loss and weight, summed over all devices' tokens.

        One micro-batch after another, so that evaluation needs no more memory than training.

        Args:
          params: equal on all devices.
          batch: as in `gradient_sums`, and number [b] int32: the batch's index in the evaluation,
            which seeds the masks of masked-LM.
          apply_fn: the model's apply function.
          micro_batches: number of parts that the device's sequences are cut into; divides b.

        Returns:
          loss_sum (nats) and weight_sum, [] float32 each.
        """
        number = batch["number"][0]

        def sums(params, micro):
            return self._loss_sums(apply_fn, params, micro, number, train=False)

        found = reductions.accumulate(sums, params, _with_rows(batch), micro_batches)
        return lax.psum(found, AXIS)

    def _loss_sums(self, apply_fn, params, micro: Batch, number, train: bool):
        micro = dict(micro)
        rows = micro.pop("rows")
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        micro = self.transform(jax.random.fold_in(key, MASK_STREAM), rows, micro)
        dropout = {"rows": rows, "rngs": {"dropout": jax.random.fold_in(key, DROPOUT_STREAM)}}
        of_model = functools.partial(apply_fn, {"params": params})
        options = documents_of(micro) | (dropout if train else {})
        hidden = of_model(micro["inputs"], method="hidden", **options)
        to_logits = functools.partial(of_model, method="logits")
        targets, weights = micro["targets"], micro["weights"]
        return chunked_cross_entropy(to_logits, hidden, targets, weights, self.loss_chunks)


def get_objective(config: ConfigDict, vocab_size: int, mask_id: int | None) -> Objective:
    """Returns the objective that a config asks for.

    Args:
      config: with the keys of configs/default.py.
      vocab_size: V.
      mask_id: id of the mask token; may be None where the objective is causal.
    """
    transform = plain
    if config.objective == "masked":
        assert mask_id is not None
        transform = functools.partial(mask_tokens, mask_id=mask_id, vocab_size=vocab_size)
    return Objective(config.seed, transform, config.loss_chunks)


def _with_rows(batch: Batch) -> Batch:
    """Returns a batch's token arrays, and its sequences' numbers in the global batch as rows."""
    return tokens_of(batch) | {"rows": row_numbers(len(batch["inputs"]))}
