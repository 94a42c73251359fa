"""The transformer, in Flax linen; nothing in it depends on devices.

Shapes: B batch, L length, D model width, G key/value heads, K head width, V vocabulary, S context
(the KV cache's length).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.model.attention import attend
from jaxdp.model.layers import Dense, Dropout, activation
from jaxdp.model.norms import Norm
from jaxdp.model.rotary import Rotary, rotate, rotated_layers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model; configs/default.py explains the fields."""

    vocab_size: int
    seq_len: int
    causal: bool
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    positions: str
    rotary_base: float
    rotary_factor: float
    rotary_low: float
    rotary_high: float
    rotary_context: int
    rotary_skip: int
    norm: str
    norm_position: str
    norm_epsilon: float
    activation: str
    head_transform: bool
    tied_head: bool
    qk_norm: bool
    bias: bool
    qkv_bias: bool
    dropout: float
    dtype: Any
    remat: bool
    scan_layers: bool

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> "ModelConfig":
        """Fills in what the config leaves open; vocab_size: size of the tokenizer's vocabulary."""
        fields = config.model.to_dict()
        multiple = fields.pop("vocab_multiple")
        return cls(
            **fields
            | {
                "vocab_size": -(-vocab_size // multiple) * multiple,
                "seq_len": config.seq_len,
                "causal": config.objective == "causal",
                "num_kv_heads": config.model.num_kv_heads or config.model.num_heads,
                "head_dim": config.model.head_dim
                or config.model.embed_dim // config.model.num_heads,
                "mlp_dim": config.model.mlp_dim or 4 * config.model.embed_dim,
                "dtype": jnp.dtype(config.model.dtype),
            }
        )

    @property
    def rotary(self) -> Rotary:
        """The rotary positions."""
        scaling = self.rotary_low, self.rotary_high, self.rotary_context
        return Rotary(self.rotary_base, self.rotary_factor, *scaling)


# GPT-2's initialisation: 0.02, and less for layers that write to the residual stream.
INIT_STDDEV = 0.02


class Transformer(nn.Module):
    """A transformer with a language-model head: by default GPT-2 (Radford et al. 2019).

    Options make it Llama (Touvron et al. 2023), Qwen or SmolLM3: rotary positions, RMSNorm, SwiGLU,
    grouped-query attention, an untied head. Others make it BERT (Devlin et al. 2019): norms after
    residual sums and after the embeddings, exact GELU, a dense layer before the head.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Creates the embedding, which `hidden` and `logits` share, and the layers of `logits`."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.embed_dim, dtype=c.dtype, embedding_init=_init())
        if c.head_transform:
            self.head_transform = _dense(c, (c.embed_dim,))
            self.head_norm = _norm(c)
        if not c.tied_head:
            self.head = _dense(c, (c.vocab_size,), bias=False)
        if c.head_transform and c.bias:
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (c.vocab_size,))

    def __call__(self, inputs: jax.Array, **options: Any) -> jax.Array:
        """Maps tokens [B, L] to logits [B, L, V]; options: see `hidden`."""
        return self.logits(self.hidden(inputs, **options))

    @nn.compact
    def hidden(
        self,
        inputs: jax.Array,
        *,
        rows: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        decode: bool = False,
    ) -> jax.Array:
        """Maps tokens to the last hidden states, the input of `logits`.

        Args:
          inputs: [B, L] int32 token ids.
          rows: [B] int32, each sequence's number in the global batch. Turns dropout on, with the
            'dropout' rng: a row's masks depend on its number, not on the device it is on.
          positions: [B, L] int32; 0, 1, 2, ... if None.
          segments: [B, L] int32; tokens attend only to tokens with their number, which are next to
            each other. None: to all.
          decode: whether to write keys and values to the 'cache' collection at `positions`; each
            token attends to cached tokens up to its own position.

        Returns:
          [B, L, D] in config.dtype.
        """
        c = self.config
        if counted := positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        # In float32 up to their sum: rows of the tables' gradients are sums over many tokens, which
        # in bfloat16 would be wrong by 10% and more.
        x = jnp.take(self.embed.embedding, inputs, axis=0)
        if c.positions == "learned":
            table = nn.Embed(c.seq_len, c.embed_dim, embedding_init=_init(), name="position_embed")
            x = x + (table.embedding[: inputs.shape[1]] if counted else table(positions))
        x = x.astype(c.dtype)
        if c.norm_position == "post":
            x = _norm(c, "embed_norm")(x)[1]
        x = Dropout(c.dropout)(x, rows)
        x = self._layers(x, rows, positions, decode, segments)
        return _norm(c, "final_norm")(x)[1] if c.norm_position == "pre" else x

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states [..., D] to logits [..., V] in config.dtype."""
        c = self.config
        if c.head_transform:
            x = self.head_norm(activation(c.activation)(self.head_transform(x)))[1]
        x = self.embed.attend(x) if c.tied_head else self.head(x)
        if c.head_transform and c.bias:
            x += jnp.broadcast_to(self.head_bias, x.shape).astype(c.dtype)
        return x

    def _layers(self, x, rows, positions, decode, segments):
        c = self.config
        block = Block
        if c.remat:
            # Inside a scan, the loop already keeps XLA from removing the recomputation (CSE).
            block = nn.remat(Block, static_argnums=(4,), prevent_cse=not c.scan_layers)
        flags = rotated_layers(c.num_layers, c.rotary_skip) if c.rotary_skip else None
        if not c.scan_layers:
            for i, flag in enumerate(flags or [None] * c.num_layers):
                x = block(c, name=f"layer_{i}")(x, rows, positions, decode, segments, flag)
            return x

        def body(layer, carry, rotated):
            return layer(carry, rows, positions, decode, segments, rotated), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers,
        )
        return scan(block(c, name="layers"), x, flags and jnp.array(flags))[0]


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, rows, positions, decode, segments, rotated=None):
        """Maps [B, L, D] to [B, L, D]; other arguments: see `Transformer.hidden`.

        rotated: 0 in a layer without rotary positions, else 1 or None. A rotation by 0 is exact.
        """
        c = self.config
        attention, mlp = Attention(c, name="attention"), MLP(c, name="mlp")
        norms = _norm(c, "attention_norm"), _norm(c, "mlp_norm")

        def drop(y):
            return Dropout(c.dropout)(y, rows)

        if c.norm_position == "pre":
            x, y = norms[0](x)
            x += drop(attention(y, positions, decode, segments, rotated))
            x, y = norms[1](x)
            return x + drop(mlp(y))
        x = norms[0](x + drop(attention(x, positions, decode, segments, rotated)))[1]
        return norms[1](x + drop(mlp(x)))[1]


class Attention(nn.Module):
    """Multi-head (Vaswani et al. 2017) or grouped-query (Ainslie et al. 2023) attention."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions, decode, segments, rotated):
        """Maps [B, L, D] to [B, L, D]; rotated: see `Block`; others: see `Transformer.hidden`."""
        c = self.config
        bias = c.bias or c.qkv_bias
        query = _dense(c, (c.num_heads, c.head_dim), "query", bias)(x)
        key = _dense(c, (c.num_kv_heads, c.head_dim), "key", bias)(x)
        value = _dense(c, (c.num_kv_heads, c.head_dim), "value", bias)(x)
        if c.qk_norm:
            query, key = _norm(c, "query_norm")(query)[1], _norm(c, "key_norm")(key)[1]
        if c.positions == "rotary":
            angles = positions if rotated is None else positions * rotated
            query, key = (rotate(x, angles, c.rotary) for x in (query, key))
        if decode:
            key, value = self._cached(key, value, positions)
            out = attend(query, key, value, jnp.arange(c.seq_len) <= positions[:, :, None])
        else:
            out = attend(query, key, value, segments=segments, causal=c.causal)
        out_dense = _dense(c, (c.embed_dim,), "out", kernel_init=_residual_init(c), contracted=2)
        return out_dense(out)

    def _cached(self, key, value, positions):
        """Writes keys and values [B, L, G, K] to the cache; returns the caches, [B, S, G, K]."""
        shape = (key.shape[0], self.config.seq_len, *key.shape[2:])
        batch = jnp.arange(key.shape[0])[:, None]
        caches = []
        for name, new in (("cached_key", key), ("cached_value", value)):
            cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
            cache.value = cache.value.at[batch, positions].set(new)
            caches.append(cache.value)
        return caches


class MLP(nn.Module):
    """GELU (Hendrycks and Gimpel 2016) or SwiGLU (Shazeer 2020) feed-forward layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        """Maps [B, L, D] to [B, L, D]."""
        c = self.config
        y = _dense(c, (c.mlp_dim,), "up")(x)
        gate = [_dense(c, (c.mlp_dim,), "gate")(x)] if c.activation == "swiglu" else []
        y = activation(c.activation)(*gate, y)
        return _dense(c, (c.embed_dim,), "down", kernel_init=_residual_init(c))(y)


@functools.partial(jax.jit, static_argnums=0)
def initial_params(model: Transformer, seed: int) -> Any:
    """Draws the initial parameters; compiled once per model."""
    inputs = jnp.zeros((1, model.config.seq_len), jnp.int32)
    return model.init(jax.random.key(seed), inputs)["params"]


def parameter_shapes(model: Transformer) -> Any:
    """Returns the parameters' shapes and dtypes; nothing is computed."""
    return initial_params.eval_shape(model, 0)


def num_parameters(params) -> int:
    """Returns the number of elements in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _init():
    return nn.initializers.normal(INIT_STDDEV)


def _residual_init(c: ModelConfig):
    return nn.initializers.normal(INIT_STDDEV / (2 * c.num_layers) ** 0.5)


def _dense(c: ModelConfig, features, name=None, bias=None, kernel_init=None, contracted=1):
    bias = c.bias if bias is None else bias
    return Dense((*features,), bias, c.dtype, kernel_init or _init(), contracted, name=name)


def _norm(c: ModelConfig, name=None):
    return Norm(
        c.norm == "layernorm", c.norm == "layernorm" and c.bias, c.norm_epsilon, c.dtype, name=name
    )
