"""Losses, each as a sum over tokens and the weight by which to divide the sum.

The division comes last, after the sums over micro-batches and devices: a mean of means is wrong
as soon as the parts hold different numbers of tokens.

Shapes: B batch, L length, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

MASK_SHARE = 0.15


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of -log p(target) over tokens, in nats.

    Examples:
      >>> logits, targets = jnp.zeros([1, 2, 4]), jnp.array([[3, 1]])
      >>> loss, weight = cross_entropy(logits, targets, weights=jnp.array([[1.0, 0.0]]))
      >>> round(float(loss), 4), float(weight)
      (1.3863, 1.0)

    Args:
      logits: [B, L, V] of any float dtype; converted to float32.
      targets: [B, L] int32.
      weights: [B, L] float32.

    Returns:
      loss_sum and weight_sum, [] float32 each.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


def chunked_cross_entropy(
    to_logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes `cross_entropy` of to_logits(hidden), with one chunk of logits in memory at a time.

    The backward pass recomputes each chunk's logits (Chen et al. 2016, Sublinear memory cost).

    Args:
      to_logits: [B, L / chunks, D] -> [B, L / chunks, V].
      hidden: [B, L, D].
      targets: [B, L] int32.
      weights: [B, L] float32.
      chunks: number of chunks that each sequence is cut into; divides L.
    """
    if chunks == 1:
        return cross_entropy(to_logits(hidden), targets, weights)

    def cut(x):
        return jnp.moveaxis(x.reshape(len(x), chunks, -1, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def sums(part):
        hidden, targets, weights = part
        return cross_entropy(to_logits(hidden), targets, weights)

    parts = jax.lax.map(sums, (cut(hidden), cut(targets), cut(weights)))
    return jax.tree.map(jnp.sum, parts)


def mask_tokens(
    key: jax.Array, rows: jax.Array, batch: dict[str, jax.Array], mask_id: int, vocab_size: int
) -> dict[str, jax.Array]:
    """Turns a batch into BERT's masked-LM task (Devlin et al. 2019).

    15% of the tokens with a weight become targets. 80% of the targets are replaced by the mask
    token, 10% by a random token, and 10% stay. A sequence's masks depend only on (key, row).

    Args:
      key: a PRNG key.
      rows: [B] int32, each sequence's number in the global batch.
      batch: inputs and targets [B, L] int32, weights [B, L] float32.
      mask_id: id of the mask token.
      vocab_size: random tokens have ids below this.

    Returns:
      The batch with corrupted inputs, and weights 0 except at targets.
    """

    def corrupt(row, tokens):
        chosen_key, fate_key, random_key = jax.random.split(jax.random.fold_in(key, row), 3)
        chosen = jax.random.bernoulli(chosen_key, MASK_SHARE, tokens.shape)
        fate = jax.random.uniform(fate_key, tokens.shape)
        random = jax.random.randint(random_key, tokens.shape, 0, vocab_size, tokens.dtype)
        replaced = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random, tokens))
        return jnp.where(chosen, replaced, tokens), chosen

    inputs, chosen = jax.vmap(corrupt)(rows, batch["inputs"])
    return batch | {"inputs": inputs, "weights": batch["weights"] * chosen}
