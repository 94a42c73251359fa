"""Scaled dot-product attention.

Shapes: B batch, L length, S length of keys, H heads, G key/value heads, K head width, R rows.
"""

import functools

import jax
import jax.numpy as jnp

from jaxdp.model.packed_attention import packed_attention
from jaxdp.model.target import target

MAX_BLOCKS = 4
SMALLEST_BLOCK = 64


def kernel(dtype: jnp.dtype, width: int, masked: bool) -> str:
    """Returns which implementation `attend` uses: "cudnn", "packed" or "xla".

    The first two (FlashAttention, Dao et al. 2022) store no [L, S] array. They need an NVIDIA GPU,
    Ampere or newer, a 16-bit dtype and a suitable head width. cuDNN's takes any number of documents
    only as an [L, S] array, so documents have a kernel of their own, `packed_attention`.

    Args:
      dtype: dtype of query, key and value.
      width: K.
      masked: whether documents or padding are kept apart by `segments`.
    """
    fits = jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128
    if not (fits and target().has_kernels):
        return "xla"
    return "packed" if masked else "cudnn"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    causal: bool = False,
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

    Returns:
      [B, L, H, K] in the dtype of value.
    """
    batch, length, heads, width = query.shape
    assert mask is None or segments is None
    found = kernel(query.dtype, width, segments is not None) if mask is None else "xla"
    if found == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation="cudnn"
        )
    if segments is not None:
        if found == "packed":
            return packed_attention(query, key, value, segments, causal=causal)
        mask = segments[:, :, None] == segments[:, None, :]
    query = query * width**-0.5
    # Queries of heads that share keys become rows of one matrix.
    query = query.reshape(batch, length, key.shape[2], -1, width)
    query = query.transpose(0, 2, 1, 3, 4).reshape(batch, key.shape[2], -1, width)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    out = _attend(causal, heads // key.shape[1], query, key, value, mask)
    out = out.reshape(batch, key.shape[1], length, -1, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal, heads, query, key, value, mask):
    """Attends from [B, G, L * heads, K] to [B, G, S, K], mask [B, L, S]; shaped like query."""
    return _forward(causal, heads, query, key, value, mask)[0]


def _forward(causal, heads, query, key, value, mask):
    outs, saved = [], []
    for tokens, rows, seen in _blocks(causal, heads, query):
        scores = _product("rk,sk->rs", query[:, :, rows], key[:, :, seen])
        allowed = _allowed(causal, heads, mask, tokens, seen)
        if allowed is not None:
            scores = jnp.where(allowed, scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights *= 1 / weights.sum(-1, keepdims=True)
        weights = weights.astype(value.dtype)
        outs.append(_product("rs,sk->rk", weights, value[:, :, seen]))
        saved.append(weights)
    out = jnp.concatenate(outs, 2).astype(value.dtype)
    return out, (query, key, value, out, saved)


def _backward(causal, heads, residuals, d_out):
    query, key, value, out, saved = residuals
    # Equal to sum(weights * d_weights), which the softmax's backward pass needs.
    sums = (out.astype(jnp.float32) * d_out).sum(-1, keepdims=True)
    d_query, d_key, d_value = [], [], []
    blocks = _blocks(causal, heads, query)
    for (_, rows, seen), weights in zip(blocks, saved, strict=True):
        d_weights = _product("rk,sk->rs", d_out[:, :, rows], value[:, :, seen])
        d_scores = (weights * (d_weights - sums[:, :, rows])).astype(query.dtype)
        d_query.append(_product("rs,sk->rk", d_scores, key[:, :, seen]))
        d_key.append(_product("rs,rk->sk", d_scores, query[:, :, rows]))
        d_value.append(_product("rs,rk->sk", weights, d_out[:, :, rows]))
    totals = jnp.concatenate(d_query, 2), _sum(d_key), _sum(d_value)
    return *(t.astype(x.dtype) for t, x in zip(totals, residuals, strict=False)), None


_attend.defvjp(_forward, _backward)


def _blocks(causal, heads, query):
    """Yields the tokens of each block, their rows among the queries, and the keys they may see."""
    length, count = query.shape[2] // heads, 1
    most = MAX_BLOCKS if target().platform == "cpu" else 1  # More takes a GPU long to compile.
    while causal and count < most and length % (2 * count * SMALLEST_BLOCK) == 0:
        count *= 2
    size = length // count
    for start in range(0, length, size):
        end = start + size
        yield slice(start, end), slice(heads * start, heads * end), slice(end if causal else None)


def _allowed(causal, heads, mask, tokens, seen):
    """Returns a block's mask, bool [B or 1, 1, R, keys]; None: rows attend to all keys."""
    allowed = None if mask is None else mask[:, tokens, seen]
    if causal:
        earlier = jnp.tri(tokens.stop - tokens.start, seen.stop, tokens.start, dtype=bool)[None]
        allowed = earlier if allowed is None else allowed & earlier
    return None if allowed is None else jnp.repeat(allowed, heads, 1)[:, None]


def _product(subscripts, first, second):
    """Multiplies [B, G, ., .] by einsum, with subscripts of the matrices only, in float32."""
    subscripts = "bg" + subscripts.replace(",", ",bg").replace("->", "->bg")
    return jnp.einsum(subscripts, first, second, preferred_element_type=jnp.float32)


def _sum(terms):
    """Sums the blocks' gradients by key: each block has the first keys, the last block all."""
    *rest, total = terms
    for term in reversed(rest):
        total = total.at[:, :, : term.shape[2]].add(term)
    return total
