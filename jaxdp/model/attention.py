"""Scaled dot-product attention.

Shapes: B batch, L length, S length of keys, H heads, G key/value heads, K head width, R rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdp.model.packed_attention import packed_attention
from jaxdp.model.target import target

MAX_BLOCKS = 4
SMALLEST_BLOCK = 64


def kernel(
    dtype: jnp.dtype, width: int, masked: bool, dropout: bool = False, window: int = 0
) -> str:
    """Returns which implementation `attend` uses: "cudnn", "packed" or "xla".

    The first two (FlashAttention, Dao et al. 2022) store no [L, S] array. They need an NVIDIA GPU,
    Ampere or newer, a 16-bit dtype and a suitable head width. cuDNN's takes any number of documents
    only as an [L, S] array, so documents have a kernel of their own, `packed_attention`.

    Args:
      dtype: dtype of query, key and value.
      width: K.
      masked: whether documents or padding are kept apart by `segments`.
      dropout: whether weights are dropped, which only "xla" can.
      window: see `attend`; "packed" can't.
    """
    fits = jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128 and not dropout
    if not (fits and target().has_kernels):
        return "xla"
    if masked:
        return "xla" if window else "packed"
    return "cudnn"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int = 0,
    factors: jax.Array | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention (Vaswani et al. 2017), accumulated in float32.

    `kernel` chooses the implementation; with a mask it is "xla". That one is this file's, which
    differs from `jax.nn.dot_product_attention` in three ways. Causal attention goes through blocks
    of queries and skips the keys after each block. The backward pass computes the softmax's sum
    from the outputs, which are smaller than the weights (Dao et al. 2022, section B.2). The softmax
    multiplies by a reciprocal: XLA compiles a division differently for one device and for several,
    and sync.method="fixed_order" needs the same bits on both.

    Args:
      query: [B, L, H, K].
      key: [B, S, G, K], G dividing H.
      value: [B, S, G, K].
      mask: bool [B or 1, L, S], True where a query may attend to a key; None: everywhere.
      segments: [B, L] int32, in place of a mask: tokens attend only to tokens with their number.
        Equal numbers are next to each other; S is L.
      causal: whether queries attend to no later keys; S is L then.
      window: the number of latest keys, its own included, that a query may attend to (Beltagy et
        al. 2020), in causal attention; 0: all. The kernels skip keys before the windows.
      factors: [B, L, H, S], by which weights are multiplied: their dropout. None: all by 1.

    Returns:
      [B, L, H, K] in the dtype of value.
    """
    batch, length, heads, width = query.shape
    assert mask is None or segments is None
    dropout = factors is not None
    found = "xla"
    if mask is None:
        found = kernel(query.dtype, width, segments is not None, dropout, window)
    if found == "cudnn":
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )
    if segments is not None:
        if found == "packed":
            return packed_attention(query, key, value, segments, causal=causal)
        mask = segments[:, :, None] == segments[:, None, :]

    def rows(x):
        """Has queries of heads that share keys as rows of one matrix: [B, G, L * H / G, ...]."""
        x = x.reshape(batch, length, key.shape[2], -1, x.shape[-1])
        return x.transpose(0, 2, 1, 3, 4).reshape(batch, key.shape[2], -1, x.shape[-1])

    query, factors = rows(query * width**-0.5), None if factors is None else rows(factors)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    shape = Shape(causal, window, heads // key.shape[1])
    out = _attend(shape, query, key, value, mask, factors)
    out = out.reshape(batch, key.shape[1], length, -1, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, width)


class Shape(NamedTuple):
    """Which keys queries see: causal and window as in `attend`; heads: H / G."""

    causal: bool
    window: int
    heads: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape, query, key, value, mask, factors):
    """Attends from [B, G, L * heads, K] to [B, G, S, K]; shaped like query.

    mask is [B, L, S], factors [B, G, L * heads, S].
    """
    return _forward(shape, query, key, value, mask, factors)[0]


def _forward(shape, query, key, value, mask, factors):
    outs, saved = [], []
    for tokens, rows, seen in _blocks(shape, query):
        scores = _product("rk,sk->rs", query[:, :, rows], key[:, :, seen])
        allowed = _allowed(shape, mask, tokens, seen)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights *= 1 / weights.sum(-1, keepdims=True)
        weights = weights.astype(value.dtype)
        outs.append(_product("rs,sk->rk", _times(weights, factors, rows, seen), value[:, :, seen]))
        saved.append(weights)
    out = jnp.concatenate(outs, 2).astype(value.dtype)
    return out, (query, key, value, out, saved, factors)


def _backward(shape, residuals, d_out):
    query, key, value, out, saved, factors = residuals
    # Equal to sum(weights * d_weights), which the softmax's backward pass needs, also with dropout.
    sums = (out.astype(jnp.float32) * d_out).sum(-1, keepdims=True)
    d_query, d_key, d_value = [], [], []
    blocks = list(_blocks(shape, query))
    for (_, rows, seen), weights in zip(blocks, saved, strict=True):
        d_weights = _product("rk,sk->rs", d_out[:, :, rows], value[:, :, seen])
        d_weights = _times(d_weights, factors, rows, seen)
        d_scores = (weights * (d_weights - sums[:, :, rows])).astype(query.dtype)
        d_query.append(_product("rs,sk->rk", d_scores, key[:, :, seen]))
        d_key.append(_product("rs,rk->sk", d_scores, query[:, :, rows]))
        dropped = _times(weights, factors, rows, seen)
        d_value.append(_product("rs,rk->sk", dropped, d_out[:, :, rows]))
    seen = [block[2] for block in blocks]
    totals = jnp.concatenate(d_query, 2), _sum(d_key, seen), _sum(d_value, seen)
    return *(t.astype(x.dtype) for t, x in zip(totals, residuals, strict=False)), None, None


_attend.defvjp(_forward, _backward)


def _times(weights, factors, rows, seen):
    """Multiplies a block's weights by their factors of dropout, if there are any."""
    return weights if factors is None else weights * factors[:, :, rows, seen].astype(weights.dtype)


def _blocks(shape, query):
    """Yields the tokens of each block, their rows among the queries, and the keys they may see."""
    causal, window, heads = shape
    length, count = query.shape[2] // heads, 1
    most = MAX_BLOCKS if target().platform == "cpu" else 1  # More takes a GPU long to compile.
    while causal and count < most and length % (2 * count * SMALLEST_BLOCK) == 0:
        count *= 2
    size = length // count
    for start in range(0, length, size):
        end = start + size
        first = max(start + 1 - window, 0) if window else 0
        keys = slice(first, end) if causal else slice(None)
        yield slice(start, end), slice(heads * start, heads * end), keys


def _allowed(shape, mask, tokens, seen):
    """Returns a block's mask, bool [B or 1, 1, R, keys]; None: rows attend to all keys."""
    allowed = None if mask is None else mask[:, tokens, seen]
    if shape.causal:
        sizes = tokens.stop - tokens.start, seen.stop - seen.start
        offset = tokens.start - seen.start
        earlier = jnp.tri(*sizes, offset, dtype=bool)[None]
        if shape.window:
            earlier &= ~jnp.tri(*sizes, offset - shape.window, dtype=bool)[None]
        allowed = earlier if allowed is None else allowed & earlier
    return None if allowed is None else jnp.repeat(allowed, shape.heads, 1)[:, None]


def _product(subscripts, first, second):
    """Multiplies [B, G, ., .] by einsum, with subscripts of the matrices only, in float32."""
    subscripts = "bg" + subscripts.replace(",", ",bg").replace("->", "->bg")
    return jnp.einsum(subscripts, first, second, preferred_element_type=jnp.float32)


def _sum(terms, seen):
    """Sums the blocks' gradients by key; no block sees later keys than the last one."""
    *rest, last = zip(terms, seen, strict=True)
    total, keys = last
    if keys.start:
        total = jnp.pad(total, ((0, 0), (0, 0), (keys.start, 0), (0, 0)))
    for term, keys in reversed(rest):
        total = total.at[:, :, keys].add(term)
    return total
