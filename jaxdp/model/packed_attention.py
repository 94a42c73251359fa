"""Attention within documents that are packed into sequences, for GPUs, block by block.

FlashAttention (Dao 2023) in Pallas' Triton: no [L, L] array is stored, and pairs of blocks that
share no document are neither read nor computed. Any number of documents, of any lengths, is exact.

Shapes: B batch, L length, H heads, G key/value heads, K head width, N length of a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton

# Lengths are padded to a multiple of this.
MULTIPLE = 128


class Tiles(NamedTuple):
    """How a kernel is cut: the block that stays, those it meets, warps, and pipeline stages."""

    stays: int
    meets: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """The tiles of the forward pass, of the queries' gradient, and of the keys' and values'."""

    forward: Tiles = Tiles(128, 64, 4, 3)
    d_query: Tiles = Tiles(64, 64, 4, 2)
    d_key: Tiles = Tiles(64, 64, 4, 2)
    split: bool = True


def packed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    kernels: Kernels = Kernels(),
    interpret: bool = False,
) -> jax.Array:
    """Computes scaled dot-product attention within each document.

    Args:
      query: [B, L, H, K], 16-bit.
      key: [B, L, G, K], G dividing H.
      value: [B, L, G, K].
      segments: [B, L] int32. A document is a run of equal numbers.
      causal: whether queries attend to no later keys.
      kernels: how the work is cut.
      interpret: whether to run the kernels in Python, as they can be on a CPU.

    Returns:
      [B, L, H, K] in the dtype of value.
    """
    length, heads, width = query.shape[1:]
    more = -length % MULTIPLE
    wider = max(pl.next_power_of_2(width), 16) - width
    if more:
        # The padding is a document of its own.
        segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)
    if more or wider:
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, wider))) for x in (query, key, value)
        )
    options = (width**-0.5, kernels, interpret)
    out = _attend(options, query, key, value, *_seen(segments, causal))
    return out[:, :length, :, :width]


def _seen(segments, causal):
    """Returns which keys a query sees, and which queries see a key, as [first, end) for each.

    Args:
      segments: [B, L] int32.

    Returns:
      ([B, 2, L] for queries, [B, 2, L] for keys), int32; neither first nor end ever decreases.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = segments[:, 1:] != segments[:, :-1]
    first = jnp.where(jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True), index, 0)
    first = lax.cummax(first, axis=1)
    ends = jnp.pad(begins, ((0, 0), (0, 1)), constant_values=True)
    end = jnp.where(ends, index + 1, segments.shape[1])
    end = lax.cummin(end, axis=1, reverse=True)
    keys = jnp.stack([first, index + 1 if causal else end], 1)
    queries = jnp.stack([index if causal else first, end], 1)
    return keys, queries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query, key, value, keys, queries):
    return _forward(options, query, key, value, keys, queries)[0]


def _forward(options, query, key, value, keys, queries):
    scale, kernels, interpret = options
    batch, length, heads, _ = query.shape
    stays, whole, span = _specs(query, key, kernels.forward)
    out, log_sums = _call(
        functools.partial(_forward_kernel, scale, kernels),
        kernels.forward,
        interpret,
        query,
        in_specs=[stays(query), whole(key), whole(value), span],
        outs=[query, _like(query, (batch, heads, length), jnp.float32)],
        out_specs=[stays(query), stays(None)],
        operands=(query, key, value, keys),
    )
    return out, (query, key, value, keys, queries, out, log_sums)


def _backward(options, residuals, d_out):
    scale, kernels, interpret = options
    query, key, value, keys, queries, out, log_sums = residuals
    # Equal to sum(weights * d_weights), which the softmax's backward pass needs.
    sums = jnp.einsum("blhk,blhk->bhl", out, d_out, preferred_element_type=jnp.float32)
    stays, whole, span = _specs(query, key, kernels.d_query)
    (d_query,) = _call(
        functools.partial(_d_query_kernel, scale, kernels),
        kernels.d_query,
        interpret,
        query,
        in_specs=[stays(query), whole(key), whole(value), stays(query), stays(None)]
        + [stays(None), span],
        outs=[query],
        out_specs=[stays(query)],
        operands=(query, key, value, d_out, log_sums, sums, keys),
    )
    stays, whole, span = _specs(query, key, kernels.d_key)
    d_key, d_value = _call(
        functools.partial(_d_key_kernel, scale, kernels),
        kernels.d_key,
        interpret,
        query,
        in_specs=[whole(query), stays(key), stays(value), whole(query), whole(None)]
        + [whole(None), span],
        outs=[query, query],
        out_specs=[stays(query), stays(query)],
        operands=(query, key, value, d_out, log_sums, sums, queries),
    )
    return d_query, _shared(d_key, key), _shared(d_value, value), None, None


_attend.defvjp(_forward, _backward)


def _shared(gradient, like):
    """Sums the gradients [B, L, H, K] of the heads that share keys: [B, L, G, K]."""
    if gradient.shape == like.shape:
        return gradient
    batch, length, groups, width = like.shape
    gradient = gradient.reshape(batch, length, groups, -1, width)
    return gradient.sum(3, dtype=jnp.float32).astype(like.dtype)


def _specs(query, key, tiles):
    """Returns functions to the specs of a block and of a whole sequence, and the ranges' spec."""
    length, heads, width = query.shape[1:]

    def stays(x):
        if x is None:
            return pl.BlockSpec((None, None, tiles.stays), lambda i, h, b: (b, h, i))
        each = heads // x.shape[2]
        return pl.BlockSpec(
            (None, tiles.stays, None, width), lambda i, h, b: (b, i, h // each, 0)
        )

    def whole(x):
        if x is None:
            return pl.BlockSpec((None, None, length), lambda i, h, b: (b, h, 0))
        each = heads // x.shape[2]
        return pl.BlockSpec((None, length, None, width), lambda i, h, b: (b, 0, h // each, 0))

    return stays, whole, pl.BlockSpec((None, 2, tiles.stays), lambda i, h, b: (b, 0, i))


def _like(x, shape, dtype):
    """Returns a shape that varies over the same devices as x."""
    return jax.ShapeDtypeStruct.like(x).update(shape=shape, dtype=dtype, sharding=None)


def _call(kernel, tiles, interpret, query, *, in_specs, outs, out_specs, operands):
    batch, length, heads, _ = query.shape
    return pl.pallas_call(
        kernel,
        grid=(length // tiles.stays, heads, batch),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[_like(query, x.shape, x.dtype) for x in outs],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*operands)


def _forward_kernel(scale, kernels, query_ref, key_ref, value_ref, span_ref, out_ref, sums_ref):
    """Attends from a block of queries [N, K] to the keys that they see."""
    scale *= math.log2(math.e)
    query = query_ref[...]
    size = query.shape[0]

    def body(carry, at, allowed):
        total, top, out = carry
        scores = triton.dot(query, key_ref[at, :].T)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        shrink = jnp.exp2((top - new_top) * scale)
        value = value_ref[at, :]
        out = out * shrink[:, None] + triton.dot(weights.astype(value.dtype), value)
        return total * shrink + weights.sum(1), new_top, out

    # A finite start, so that a block whose keys are all hidden gives weights of 0, not NaN.
    start = (
        jnp.zeros(size, jnp.float32),
        jnp.full(size, -1e30, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    total, top, out = _meet(kernels, kernels.forward, span_ref, body, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    sums_ref[...] = top * scale + jnp.log2(total)


def _d_query_kernel(
    scale, kernels, query_ref, key_ref, value_ref, d_out_ref, log_sums_ref, sums_ref, span_ref,
    d_query_ref,
):  # fmt: skip
    """Computes the gradient of a block of queries [N, K] from the keys that they see."""
    query, d_out = query_ref[...], d_out_ref[...]
    log_sums, sums = log_sums_ref[...], sums_ref[...]
    base = scale * math.log2(math.e)

    def body(d_query, at, allowed):
        key = key_ref[at, :]
        scores = triton.dot(query, key.T)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        weights = jnp.exp2(scores * base - log_sums[:, None])
        d_weights = triton.dot(d_out, value_ref[at, :].T)
        d_scores = (weights * (d_weights - sums[:, None])).astype(key.dtype)
        return d_query + triton.dot(d_scores, key)

    d_query = _meet(
        kernels, kernels.d_query, span_ref, body, jnp.zeros(query.shape, jnp.float32)
    )
    d_query_ref[...] = (d_query * scale).astype(d_query_ref.dtype)


def _d_key_kernel(
    scale, kernels, query_ref, key_ref, value_ref, d_out_ref, log_sums_ref, sums_ref, span_ref,
    d_key_ref, d_value_ref,
):  # fmt: skip
    """Computes the gradients of a block of keys and values [N, K] from the queries that see it."""
    key, value = key_ref[...], value_ref[...]
    base = scale * math.log2(math.e)

    def body(carry, at, allowed):
        d_key, d_value = carry
        query, d_out = query_ref[at, :], d_out_ref[at, :]
        scores = triton.dot(key, query.T)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        weights = jnp.exp2(scores * base - log_sums_ref[at][None, :])
        d_value += triton.dot(weights.astype(d_out.dtype), d_out)
        d_weights = triton.dot(value, d_out.T)
        d_scores = (weights * (d_weights - sums_ref[at][None, :])).astype(query.dtype)
        return d_key + triton.dot(d_scores, query), d_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = _meet(kernels, kernels.d_key, span_ref, body, (zeros, zeros))
    d_key_ref[...] = (d_key * scale).astype(d_key_ref.dtype)
    d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def _meet(kernels, tiles, span_ref, body, carry):
    """Runs the body over the blocks that a block meets.

    Args:
      span_ref: [2, N], the first and the end of what each row sees; neither ever decreases.
      body: called with the carry, the slice of the block that is met, and [N, size] bool of what
        may be seen of it, None for all of it.
      carry: the body's first carry.

    Returns:
      The body's last carry.
    """
    size, rows = tiles.meets, tiles.stays
    firsts, ends = span_ref[0, :], span_ref[1, :]

    def masked(i, carry):
        index = i * size + jnp.arange(size, dtype=jnp.int32)[None, :]
        allowed = (index >= firsts[:, None]) & (index < ends[:, None])
        return body(carry, pl.ds(i * size, size), allowed)

    def full(i, carry):
        return body(carry, pl.ds(i * size, size), None)

    begin = lax.div(span_ref[0, 0], size)
    end = lax.div(span_ref[1, rows - 1] + size - 1, size)
    if not kernels.split:
        return lax.fori_loop(begin, end, masked, carry)
    # Blocks that every row sees as a whole need no mask.
    full_begin = jnp.minimum(lax.div(span_ref[0, rows - 1] + size - 1, size), end)
    full_end = jnp.maximum(lax.div(span_ref[1, 0], size), full_begin)
    carry = lax.fori_loop(begin, full_begin, masked, carry)
    carry = lax.fori_loop(full_begin, full_end, full, carry)
    return lax.fori_loop(full_end, end, masked, carry)
