"""Scaled dot-product attention and rotary positions.

Shapes: B batch, L length, S length of keys, H heads, G key/value heads, K head width, R rows.
"""

import functools

import jax
import jax.numpy as jnp

ROTARY_BASE = 10_000.0
MAX_BLOCKS = 4
SMALLEST_BLOCK = 64


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017); products and softmax in float32.

    As `jax.nn.dot_product_attention`, but for three things. Causal attention goes through blocks of
    queries and leaves out the keys after each. The backward pass takes the softmax's sum from the
    results, which are smaller than the weights (Dao et al. 2022, FlashAttention, section B.2). And
    the softmax divides by multiplying, for a division is compiled differently for one device and
    for several, which `sync.fixed_order` must not be.

    Args:
      query: [B, L, H, K].
      key: [B, S, G, K], G dividing H.
      value: [B, S, G, K].
      mask: bool [B or 1, L, S]: whom a query may look at; None: everyone.
      causal: whether a query looks at no later key; S is L then.

    Returns:
      [B, L, H, K] in the dtype of value.
    """
    batch, length, heads, width = query.shape
    query = query * width**-0.5
    query = query.reshape(batch, length, key.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    out = _attend(causal, query, key, value, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, query, key, value, mask):
    """[B, G, H/G, L, K] of queries and [B, G, S, K] of keys and values -> as queries."""
    return _forward(causal, query, key, value, mask)[0]


def _forward(causal, query, key, value, mask):
    outs, saved = [], []
    for rows, seen in _blocks(causal, query.shape[3], key.shape[2]):
        scores = _product("rk,sk->rs", _merge(query, rows), key[:, :, seen])
        allowed = _allowed(causal, mask, rows, seen)
        if allowed is not None:
            allowed = jnp.tile(allowed, (query.shape[2], 1))[:, None]
            scores = jnp.where(allowed, scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights *= 1 / weights.sum(-1, keepdims=True)
        weights = weights.astype(value.dtype)
        outs.append(_split(_product("rs,sk->rk", weights, value[:, :, seen]), query))
        saved.append(weights)
    out = jnp.concatenate(outs, 3).astype(value.dtype)
    return out, (query, key, value, out, saved)


def _backward(causal, residuals, d_out):
    query, key, value, out, saved = residuals
    # The softmax's backward pass needs sum(weights * d_weights), which is this.
    sums = (out.astype(jnp.float32) * d_out).sum(-1, keepdims=True)
    d_queries, d_keys, d_values = [], [], []
    blocks = _blocks(causal, query.shape[3], key.shape[2])
    for (rows, seen), weights in zip(blocks, saved, strict=True):
        d_block = _merge(d_out, rows)
        d_weights = _product("rk,sk->rs", d_block, value[:, :, seen])
        d_scores = (weights * (d_weights - _merge(sums, rows))).astype(query.dtype)
        d_queries.append(_split(_product("rs,sk->rk", d_scores, key[:, :, seen]), query))
        d_keys.append(_product("rs,rk->sk", d_scores, _merge(query, rows)))
        d_values.append(_product("rs,rk->sk", weights, d_block))
    d_query = jnp.concatenate(d_queries, 3).astype(query.dtype)
    return d_query, _sum(d_keys).astype(key.dtype), _sum(d_values).astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _blocks(causal, length, keys):
    """The queries of each block, and the keys that they can see."""
    count = 1
    while causal and count < MAX_BLOCKS and length % (2 * count * SMALLEST_BLOCK) == 0:
        count *= 2
    size = length // count
    for start in range(0, length, size):
        yield slice(start, start + size), slice(0, start + size if causal else keys)


def _allowed(causal, mask, rows, seen):
    """Which keys the queries of a block look at, bool [B or 1, its queries, its keys], or None."""
    allowed = None if mask is None else mask[..., rows, seen]
    if causal:
        earlier = jnp.tri(rows.stop - rows.start, seen.stop, rows.start, dtype=bool)[None]
        allowed = earlier if allowed is None else allowed & earlier
    return allowed


def _merge(x, rows):
    """[B, G, H/G, L, K] -> [B, G, R, K], R = H/G * the block's queries: the rows of a matrix."""
    return x[..., rows, :].reshape(*x.shape[:2], -1, x.shape[-1])


def _split(x, like):
    """[B, G, R, K] -> [B, G, H/G, the block's queries, K]."""
    return x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[-1])


def _product(subscripts, first, second):
    """Of matrices [B, G, ·, ·], accumulated in float32."""
    subscripts = "bg" + subscripts.replace(",", ",bg").replace("->", "->bg")
    return jnp.einsum(subscripts, first, second, preferred_element_type=jnp.float32)


def _sum(terms):
    """The sum of what each block has for the keys that it sees, the last for all."""
    *rest, total = terms
    for term in reversed(rest):
        total = total.at[:, :, : term.shape[2]].add(term)
    return total


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves rotated as in Llama.

    Args:
      x: [B, L, H, K], K even.
      positions: [B, L] int32.

    Returns:
      [B, L, H, K] in the dtype of x; the angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
