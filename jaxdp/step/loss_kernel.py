"""Cross-entropy and its gradient in one kernel, for NVIDIA GPUs.

For a large vocabulary the logits are the largest array of a step. XLA reads them for their maximum,
for the sum of exponentials and for the gradient, which it writes to an array of its own. Here a
program reads a row once from memory, and a second time from the cache, for the gradient that takes
the row's place (as in Liger Kernel, Hsu et al. 2024).

Shapes: T tokens, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 4096  # Logits that a program works on at a time.
LOG2_E = math.log2(math.e)  # For exp2, which takes fewer instructions than exp.


def loss_and_gradient(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Computes -log p(target) of each token, and the gradient of their weighted sum.

    Args:
      logits: [T, V] of any float dtype; the gradient takes their memory where they aren't used
        again.
      targets: [T] int32.
      weights: [T] float32.
      interpret: whether to run the kernel as JAX operations, on any device.

    Returns:
      [T] float32 in nats, and [T, V] in the dtype of the logits.
    """
    tokens, vocab = logits.shape
    block = min(BLOCK, pl.next_power_of_2(vocab))
    row, number = pl.BlockSpec((None, vocab), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    return pl.pallas_call(
        functools.partial(_kernel, block=block),
        out_shape=[
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
            jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        ],
        grid=(tokens,),
        in_specs=[row, number, number],
        out_specs=[number, row],
        input_output_aliases={0: 1},
        compiler_params=triton.CompilerParams(num_warps=16),
        interpret=interpret,
        name="cross_entropy",
    )(logits, targets, weights)


def _kernel(logits, target, weight, nll, gradient, *, block):
    vocab = logits.shape[0]
    blocks = pl.cdiv(vocab, block)
    of_target, factor = target[0], weight[0]
    # Read before the sums, at which the program's threads wait for each other: after them, another
    # thread may already have written the gradient here. NaN where the target is no token.
    known = (of_target >= 0) & (of_target < vocab)
    chosen = triton.load(logits.at[of_target], mask=known, other=jnp.nan).astype(jnp.float32)
    lanes = lax.iota(jnp.int32, block)

    def load(i):
        inside = lanes < vocab - i * block
        x = triton.load(logits.at[pl.ds(i * block, block)], mask=inside, other=-jnp.inf)
        return inside, x.astype(jnp.float32)

    def add(i, so_far):
        # Each lane keeps its maximum and its sum of exp(x - maximum) (Milakov, Gimelshein 2018).
        largest, total = so_far
        _, x = load(i)
        scale = jnp.exp2(-LOG2_E * jnp.abs(largest - x))
        total = jnp.where(x > largest, total * scale + 1, total + scale)
        return jnp.maximum(largest, x), total

    # A finite start, so that lanes outside of the vocabulary have a difference, not a NaN.
    start = jnp.full(block, -1e30, jnp.float32)
    largest, total = lax.fori_loop(0, blocks, add, (start, jnp.zeros(block, jnp.float32)))
    maximum = jnp.max(largest)
    log_sum = maximum + jnp.log(jnp.sum(total * jnp.exp(largest - maximum)))
    nll[0] = log_sum - chosen

    def write(i, _):
        inside, x = load(i)
        p = jnp.exp2(LOG2_E * (x - log_sum))
        found = factor * jnp.where(lanes == of_target - i * block, p - 1, p)
        here = gradient.at[pl.ds(i * block, block)]
        triton.store(here, found.astype(gradient.dtype), mask=inside)

    lax.fori_loop(0, blocks, write, None)
