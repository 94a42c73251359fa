"""A block of the transformer: attention and MLP.

Shapes: B batch, L length, D model width, H heads, G key/value heads, K head width, S context (the
KV cache's length).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdp.model.architecture import ModelConfig
from jaxdp.model.attention import attend
from jaxdp.model.layers import Dense, Dropout, activation
from jaxdp.model.norms import Norm
from jaxdp.model.rotary import rotate

# GPT-2's initialisation: 0.02, and less for layers that write to the residual stream.
INIT_STDDEV = 0.02


class Tokens(NamedTuple):
    """What all blocks know of a batch's tokens.

    Attributes:
      ids: [B, L] int32.
      embedded: [B, L, D], the input of the first block.
      positions: [B, L] int32.
      rows: [B] int32 or None; see `Transformer.hidden`.
      segments: [B, L] int32 or None; see `Transformer.hidden`.
    """

    ids: jax.Array
    embedded: jax.Array
    positions: jax.Array
    rows: jax.Array | None
    segments: jax.Array | None


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after.

    Attributes:
      config: the model's.
      window: the layer's sliding window; see `attention.attend`.
    """

    config: ModelConfig
    window: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens, decode: bool, rotated: jax.Array | int | None = None
    ) -> jax.Array:
        """Maps [B, L, D] to [B, L, D].

        Args:
          x: the residual stream.
          tokens: its tokens.
          decode: see `Transformer.hidden`.
          rotated: 0 in a layer without rotary positions, else 1 or None. A rotation by 0 is exact.
        """
        c = self.config
        attention, mlp = Attention(c, self.window, name="attention"), MLP(c, name="mlp")
        norms = norm(c, "attention_norm"), norm(c, "mlp_norm")

        def drop(y):
            return Dropout(c.dropout)(y, tokens.rows)

        if c.embed_residual:
            shares = self.param("residual_shares", lambda _: jnp.array([1.0, 0.0]))
            # Broadcast in float32: a share's gradient is a sum over all tokens, see `Dense`.
            wide = [jnp.broadcast_to(share, x.shape).astype(x.dtype) for share in shares]
            x = wide[0] * x + wide[1] * tokens.embedded
        if c.norm_position == "pre":
            x, *ys = norms[0](x, uses=3)
            x += drop(attention(ys, tokens, decode, rotated))
            x, y = norms[1](x)
            return x + drop(mlp(y, tokens, decode))
        x = norms[0](x + drop(attention([x] * 3, tokens, decode, rotated)))[1]
        return norms[1](x + drop(mlp(x, tokens, decode)))[1]


class Attention(nn.Module):
    """Multi-head (Vaswani et al. 2017) or grouped-query (Ainslie et al. 2023) attention.

    Attributes: see `Block`.
    """

    config: ModelConfig
    window: int

    @nn.compact
    def __call__(self, inputs, tokens, decode, rotated):
        """Maps [B, L, D] to [B, L, D].

        Args:
          inputs: the same [B, L, D] three times: for queries, for keys and for values.
          tokens: see `Block`.
          decode: see `Block`.
          rotated: see `Block`.
        """
        c = self.config
        bias = c.bias or c.qkv_bias
        query = dense(c, (c.num_heads, c.head_dim), "query", bias)(inputs[0])
        key = dense(c, (c.num_kv_heads, c.head_dim), "key", bias)(inputs[1])
        value = dense(c, (c.num_kv_heads, c.head_dim), "value", bias)(inputs[2])
        if c.value_embeddings:
            # As in `Transformer.hidden`: looked up in float32, for the gradient's sake.
            table = nn.Embed(
                c.vocab_size,
                c.num_kv_heads * c.head_dim,
                name="value_embed",
                embedding_init=nn.initializers.zeros,
            ).embedding
            value += jnp.take(table, tokens.ids, axis=0).reshape(value.shape).astype(c.dtype)
        if c.qk_norm:
            query, key = norm(c, "query_norm")(query)[1], norm(c, "key_norm")(key)[1]
        if c.positions == "rotary":
            angles = tokens.positions if rotated is None else tokens.positions * rotated
            query, key = (rotate(x, angles, c.rotary) for x in (query, key))
        if decode:
            key = _cached(self, "cached_key", key, tokens.positions, c.seq_len)
            value = _cached(self, "cached_value", value, tokens.positions, c.seq_len)
            distances = tokens.positions[:, :, None] - jnp.arange(c.seq_len)
            seen = (distances >= 0) & (distances < (self.window or c.seq_len))
            out = attend(query, key, value, seen)
        else:
            factors = self._dropout(query, key, tokens.rows)
            out = attend(
                query,
                key,
                value,
                segments=tokens.segments,
                causal=c.causal,
                window=self.window,
                factors=factors,
            )
        return dense(c, (c.embed_dim,), "out", kernel_init=_residual_init(c), contracted=2)(out)

    def _dropout(self, query, key, rows):
        """Returns [B, L, H, S], 0 or 1 / (1 - rate) for each weight; None where none is dropped."""
        rate = self.config.attention_dropout
        if rows is None or rate == 0:
            return None
        ones = jnp.ones((*query.shape[:3], key.shape[1]), query.dtype)
        return Dropout(rate)(ones, rows)


class MLP(nn.Module):
    """A feed-forward layer, with one of the activations of `layers.activation`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, tokens, decode):
        """Maps [B, L, D] to [B, L, D]; other arguments: see `Block`."""
        c = self.config
        if c.mlp_lookback:
            x = Lookback(c.mlp_lookback, c.seq_len, name="lookback")(x, tokens, decode)
        y = dense(c, (c.mlp_dim,), "up")(x)
        gate = [dense(c, (c.mlp_dim,), "gate")(x)] if c.activation == "swiglu" else []
        y = activation(c.activation)(*gate, y)
        return dense(c, (c.embed_dim,), "down", kernel_init=_residual_init(c))(y)


class Lookback(nn.Module):
    """Adds to each token those before it, with a learnt factor for each channel, at first 0.

    It is a causal convolution of each channel by itself, as in the Canon layers (Allen-Zhu 2025).

    Attributes:
      count: how many tokens before.
      context: S.
    """

    count: int
    context: int

    @nn.compact
    def __call__(self, x, tokens, decode):
        """Maps [B, L, D] to [B, L, D]; other arguments: see `Block`."""
        factors = self.param("factors", nn.initializers.zeros, (self.count, x.shape[-1]))
        if decode:
            whole = _cached(self, "cached_input", x, tokens.positions, self.context)
        total = x
        for back in range(1, self.count + 1):
            if decode:
                places = (tokens.positions - back)[..., None]
                found = jnp.take_along_axis(whole, places, axis=1, mode="clip")
                before = jnp.where(places < 0, 0, found)
            else:
                before = _shifted(x, back)
                if tokens.segments is not None:
                    same = _shifted(tokens.segments, back) == tokens.segments
                    before = jnp.where(same[..., None], before, 0)
            # Broadcast in float32: a factor's gradient is a sum over all tokens, see `Dense`.
            total += jnp.broadcast_to(factors[back - 1], x.shape).astype(x.dtype) * before
        return total


def _shifted(x: jax.Array, back: int) -> jax.Array:
    """Returns [B, L, ...] `back` places later, zeros before."""
    return jnp.pad(x, [(0, 0), (back, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]


def _cached(
    module: nn.Module, name: str, new: jax.Array, positions: jax.Array, context: int
) -> jax.Array:
    """Writes [B, L, ...] at `positions` of a module's cache, and returns the cache, [B, S, ...]."""
    shape = (new.shape[0], context, *new.shape[2:])
    cache = module.variable("cache", name, jnp.zeros, shape, new.dtype)
    cache.value = cache.value.at[jnp.arange(len(new))[:, None], positions].set(new)
    return cache.value


def init() -> nn.initializers.Initializer:
    """Returns the initialiser of embeddings, and of matrices that don't write to the residuals."""
    return nn.initializers.normal(INIT_STDDEV)


def _residual_init(c: ModelConfig):
    if c.zero_init:
        return nn.initializers.zeros
    return nn.initializers.normal(INIT_STDDEV / (2 * c.num_layers) ** 0.5)


def dense(c: ModelConfig, features, name=None, bias=None, kernel_init=None, contracted=1) -> Dense:
    """Returns a linear layer of a model; bias: None for the model's choice."""
    bias = c.bias if bias is None else bias
    return Dense((*features,), bias, c.dtype, kernel_init or init(), contracted, name=name)


def norm(c: ModelConfig, name=None) -> Norm:
    """Returns a norm of a model."""
    centred = c.norm == "layernorm"
    return Norm(centred, centred and c.bias, c.norm_epsilon, c.dtype, name=name)
