"""Attention within packed documents on NVIDIA GPUs: FlashAttention (Dao 2023) in Pallas.

A kernel goes through the sequence block by block. No [L, L] array is stored, and a block that
belongs to other documents is neither read nor computed. Documents may be of any number and lengths.

Shapes: B batch, L length, H heads, G key/value heads, K head width; a program computes results for
N tokens and reads others M at a time.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

# JAX has announced the end of Pallas' Triton backend; pyproject.toml bounds the version of JAX.
from jax.experimental.pallas import triton


class Tiles(NamedTuple):
    """How a kernel is cut: N, M, warps of 32 threads, and steps in flight (others are loading)."""

    own: int
    step: int
    warps: int
    stages: int


# The fastest of those tried on an H100, for heads of 64.
FORWARD = Tiles(own=128, step=64, warps=4, stages=3)
BACKWARD = Tiles(own=64, step=64, warps=4, stages=2)


def packed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Computes scaled dot-product attention within each document.

    Args:
      query: [B, L, H, K], 16-bit.
      key: [B, L, G, K], G dividing H.
      value: [B, L, G, K].
      segments: [B, L] int32. A document is a run of equal numbers.
      causal: whether queries attend to no later keys.
      interpret: whether to run the kernels as JAX operations, on any device.

    Returns:
      [B, L, H, K] in the dtype of value.
    """
    length, _, width = query.shape[1:]
    more = -length % max(FORWARD.own, BACKWARD.own)
    # Triton multiplies matrices whose sizes are powers of two, from 16 on.
    wider = max(pl.next_power_of_2(width), 16) - width
    arrays = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, wider))) for x in (query, key, value))
    # The padding is a document of its own.
    segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)
    out = _attend((width**-0.5, interpret), *arrays, *_spans(segments, causal))
    return out[:, :length, :, :width]


def _spans(segments, causal):
    """Finds the keys that each query attends to, and the queries that attend to each key.

    Both are consecutive, and given by the first and the one after the last. Neither number
    decreases from a token to the next, so the first and last token of a block bound all of it.

    Args:
      segments: [B, L] int32.
      causal: whether queries attend to no later keys.

    Returns:
      The spans of queries, and those of keys; [B, 2, L] int32 each.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    changes = segments[:, 1:] != segments[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = lax.cummax(jnp.where(starts, index, 0), axis=1)
    end = lax.cummin(jnp.where(ends, index + 1, segments.shape[1]), axis=1, reverse=True)
    of_queries = jnp.stack([start, index + 1 if causal else end], 1)
    of_keys = jnp.stack([index if causal else start, end], 1)
    return of_queries, of_keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query, key, value, of_queries, of_keys):
    return _forward(options, query, key, value, of_queries, of_keys)[0]


def _forward(options, query, key, value, of_queries, of_keys):
    batch, length, heads, _ = query.shape
    results = query, jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    out, log_sums = _call(
        options, _forward_kernel, FORWARD, (query,), (key, value), of_queries, results
    )
    return out, (query, key, value, of_queries, of_keys, out, log_sums)


def _backward(options, residuals, d_out):
    query, key, value, of_queries, of_keys, out, log_sums = residuals
    # Equal to sum(weights * d_weights), which the softmax's backward pass needs.
    sums = jnp.einsum("blhk,blhk->bhl", out, d_out, preferred_element_type=jnp.float32)
    queries, keys = (query, d_out, log_sums, sums), (key, value)
    (d_query,) = _call(options, _d_query_kernel, BACKWARD, queries, keys, of_queries, (query,))
    d_keys = _call(options, _d_key_kernel, BACKWARD, keys, queries, of_keys, (query, query))
    d_key, d_value = (_by_group(d, x) for d, x in zip(d_keys, keys, strict=True))
    return d_query, d_key, d_value, None, None


_attend.defvjp(_forward, _backward)


def _by_group(gradient, like):
    """Sums a gradient [B, L, H, K] over the heads that share keys: [B, L, G, K]."""
    if gradient.shape == like.shape:
        return gradient
    batch, length, groups, width = like.shape
    gradient = gradient.reshape(batch, length, groups, -1, width)
    return gradient.sum(3, dtype=jnp.float32).astype(like.dtype)


def _call(options, kernel, tiles, own, others, spans, results):
    """Runs a kernel for each block of N tokens, each head and each sequence.

    Args:
      options: the scale of scores; `interpret`.
      kernel: a function of the scale and of references: to N tokens of each of `own`, to all of
        `others`, to N of `spans` and of `results`.
      tiles: how it is cut.
      own: arrays [B, L, H or G, K] or [B, H, L].
      others: the same.
      spans: [B, 2, L] int32.
      results: arrays like the results, which have all H heads.
    """
    scale, interpret = options
    batch, length, heads, _ = results[0].shape

    def block(x, size, each):
        """Returns a spec: `size` tokens of x for program i, from token i * size * each on."""
        if x.ndim == 3:
            return pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, i * each))
        shape, share = (None, size, None, x.shape[3]), heads // x.shape[2]
        return pl.BlockSpec(shape, lambda i, h, b: (b, i * each, h // share, 0))

    return pl.pallas_call(
        functools.partial(kernel, scale),
        grid=(length // tiles.own, heads, batch),
        in_specs=[
            *(block(x, tiles.own, 1) for x in own),
            *(block(x, length, 0) for x in others),
            pl.BlockSpec((None, 2, tiles.own), lambda i, h, b: (b, 0, i)),
        ],
        out_specs=[block(x, tiles.own, 1) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=f"packed_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*own, *others, spans)


def _forward_kernel(scale, query_ref, key_ref, value_ref, spans, out_ref, log_sums_ref):
    """Computes attention of queries [N, K], and the logarithms of the softmax's sums [N]."""
    scale *= math.log2(math.e)  # Powers of 2 are faster than powers of e.
    query = query_ref[...]

    def body(carry, some, seen):
        total, top, out = carry
        scores = jnp.where(seen, triton.dot(query, key_ref[some, :].T), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        shrink = jnp.exp2((top - new_top) * scale)
        value = value_ref[some, :]
        out = out * shrink[:, None] + triton.dot(weights.astype(value.dtype), value)
        return total * shrink + weights.sum(1), new_top, out

    total = jnp.zeros(query.shape[0], jnp.float32)
    # Finite, so that a step whose keys are all hidden gives weights of 0, not NaN.
    top = jnp.full(query.shape[0], -1e30, jnp.float32)
    out = jnp.zeros(query.shape, jnp.float32)
    total, top, out = _through_spans(FORWARD, spans, body, (total, top, out))
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_sums_ref[...] = top * scale + jnp.log2(total)


def _d_query_kernel(
    scale, query_ref, d_out_ref, log_sums_ref, sums_ref, key_ref, value_ref, spans, d_query_ref
):
    """Computes the gradient of queries [N, K]."""
    query, d_out, log_sums, sums = (x[...] for x in (query_ref, d_out_ref, log_sums_ref, sums_ref))

    def body(d_query, some, seen):
        key = key_ref[some, :]
        scores = jnp.where(seen, triton.dot(query, key.T), -jnp.inf)
        weights = jnp.exp2(scores * (scale * math.log2(math.e)) - log_sums[:, None])
        d_weights = triton.dot(d_out, value_ref[some, :].T)
        d_scores = (weights * (d_weights - sums[:, None])).astype(key.dtype)
        return d_query + triton.dot(d_scores, key)

    d_query = _through_spans(BACKWARD, spans, body, jnp.zeros(query.shape, jnp.float32))
    d_query_ref[...] = (d_query * scale).astype(d_query_ref.dtype)


def _d_key_kernel(
    scale, key_ref, value_ref, query_ref, d_out_ref, log_sums_ref, sums_ref, spans, *results
):
    """Computes the gradients of keys and of values [N, K]."""
    key, value = key_ref[...], value_ref[...]

    def body(carry, some, seen):
        d_key, d_value = carry
        query, d_out = query_ref[some, :], d_out_ref[some, :]
        scores = jnp.where(seen, triton.dot(key, query.T), -jnp.inf)
        weights = jnp.exp2(scores * (scale * math.log2(math.e)) - log_sums_ref[some][None, :])
        d_value += triton.dot(weights.astype(d_out.dtype), d_out)
        d_weights = triton.dot(value, d_out.T)
        d_scores = (weights * (d_weights - sums_ref[some][None, :])).astype(query.dtype)
        return d_key + triton.dot(d_scores, query), d_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_key, d_value = _through_spans(BACKWARD, spans, body, (zeros, zeros))
    for result, found in zip(results, (d_key * scale, d_value), strict=True):
        result[...] = found.astype(result.dtype)


def _through_spans(tiles, spans, body, carry):
    """Goes through all tokens that are in the span of any of a program's own tokens.

    Args:
      tiles: how the kernel is cut.
      spans: reference to the spans of the own tokens, [2, N].
      body: maps the carry, a slice of M tokens, and [N, M] bool of which of them are in the span of
        which own token, to the next carry.
      carry: the first one.

    Returns:
      The last carry.
    """
    starts, ends = spans[0, :], spans[1, :]

    def step(i, carry):
        index = i * tiles.step + jnp.arange(tiles.step, dtype=jnp.int32)[None, :]
        seen = (index >= starts[:, None]) & (index < ends[:, None])
        return body(carry, pl.ds(i * tiles.step, tiles.step), seen)

    begin = lax.div(spans[0, 0], tiles.step)
    end = lax.div(spans[1, tiles.own - 1] + tiles.step - 1, tiles.step)
    return lax.fori_loop(begin, end, step, carry)
