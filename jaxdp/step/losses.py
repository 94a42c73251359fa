"""Losses, each as a sum over tokens and the weight by which to divide the sum.

The division comes last, after the sums over micro-batches and devices: a mean of means is wrong
as soon as the parts hold different numbers of tokens.

Shapes: B batch, L length, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxdp.model.target import target
from jaxdp.step.loss_kernel import loss_and_gradient

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
    if target().has_kernels:
        return _by_kernel(logits, targets, weights), jnp.sum(weights)
    return jnp.sum(_nll(logits, targets) * weights), jnp.sum(weights)


@jax.custom_vjp
def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target), [B, L] float32, for logits [B, L, V].

    The gradient of the logits is computed in one pass, from logits in their own dtype to a gradient
    in the same dtype. Derived by JAX, it would be a scatter into a float32 array [B, L, V].
    """
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    log_sum = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return log_sum - chosen.astype(jnp.float32), (logits, targets, log_sum)


def _backward(residuals, d_nll):
    logits, targets, log_sum = residuals
    p = jnp.exp(logits.astype(jnp.float32) - log_sum[..., None])
    is_target = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return ((p - is_target) * d_nll[..., None]).astype(logits.dtype), None


_nll.defvjp(_forward, _backward)


@jax.custom_vjp
def _by_kernel(logits, targets, weights):
    """Computes the loss sum; its gradient comes with it, from one kernel (see `loss_kernel`)."""
    return jnp.sum(_nll(logits, targets) * weights)


def _kernel_forward(logits, targets, weights):
    nll, gradient = loss_and_gradient(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    )
    return jnp.sum(nll * weights.reshape(-1)), gradient.reshape(logits.shape)


def _kernel_backward(gradient, d_loss):
    return (gradient * d_loss).astype(gradient.dtype), None, None


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


def chunked_cross_entropy(
    to_logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes `cross_entropy` of to_logits(hidden), with one chunk of logits in memory at a time.

    The gradient of a chunk is computed right after its loss, so no logits are computed twice; the
    backward pass only scales it (as in Liger Kernel, Hsu et al. 2024).

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

    hidden = cut(hidden)
    to_logits, params = jax.closure_convert(to_logits, hidden[0])
    return _sum_of_chunks(to_logits, params, hidden, cut(targets), cut(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(to_logits, params, hidden, targets, weights):
    """Sums `cross_entropy` over chunks [chunks, B, L / chunks, ...]; params: to_logits' own."""
    params = _rounded(params, hidden.dtype)

    def sums(part):
        hidden, targets, weights = part
        return cross_entropy(to_logits(hidden, *params), targets, weights)

    return jax.tree.map(jnp.sum, lax.map(sums, (hidden, targets, weights)))


def _rounded(params, dtype):
    """Rounds matrices to the dtype of their products: once, rather than in each chunk."""
    return [x.astype(dtype) if x.ndim > 1 else x for x in params]


def _chunks_forward(to_logits, params, hidden, targets, weights):
    def loss(params, hidden, targets, weights):
        return cross_entropy(to_logits(hidden, *params), targets, weights)

    def add(total, part):
        sums, (d_params, d_hidden) = jax.value_and_grad(loss, (0, 1), has_aux=True)(rounded, *part)
        return jax.tree.map(jnp.add, total, d_params), (sums, d_hidden)

    rounded, zeros = _rounded(params, hidden.dtype), jax.tree.map(jnp.zeros_like, params)
    d_params, (sums, d_hidden) = lax.scan(add, zeros, (hidden, targets, weights))
    return jax.tree.map(jnp.sum, sums), (d_params, d_hidden)


def _chunks_backward(to_logits, gradients, d_sums):
    del to_logits
    scaled = jax.tree.map(lambda g: (g * d_sums[0]).astype(g.dtype), gradients)
    return *scaled, None, None


_sum_of_chunks.defvjp(_chunks_forward, _chunks_backward)


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

    def corrupt(row, tokens, weights):
        chosen_key, fate_key, random_key = jax.random.split(jax.random.fold_in(key, row), 3)
        chosen = jax.random.bernoulli(chosen_key, MASK_SHARE, tokens.shape) & (weights > 0)
        fate = jax.random.uniform(fate_key, tokens.shape)
        random = jax.random.randint(random_key, tokens.shape, 0, vocab_size, tokens.dtype)
        replaced = jnp.where(fate < 0.8, mask_id, jnp.where(fate < 0.9, random, tokens))
        return jnp.where(chosen, replaced, tokens), chosen

    inputs, chosen = jax.vmap(corrupt)(rows, batch["inputs"], batch["weights"])
    return batch | {"inputs": inputs, "weights": batch["weights"] * chosen}
