"""The transformer, in Flax linen; nothing in it depends on devices.

Shapes: B batch, L length, D model width, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdp.model.architecture import ModelConfig
from jaxdp.model.block import Block, Tokens, dense, init, norm
from jaxdp.model.layers import Dropout, activation
from jaxdp.model.rotary import rotated_layers


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
        self.embed = nn.Embed(c.vocab_size, c.embed_dim, dtype=c.dtype, embedding_init=init())
        if c.head_transform:
            self.head_transform = dense(c, (c.embed_dim,))
            self.head_norm = norm(c)
        if not c.tied_head:
            self.head = dense(c, (c.vocab_size,), bias=False)
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
            table = nn.Embed(c.seq_len, c.embed_dim, embedding_init=init(), name="position_embed")
            x = x + (table.embedding[: inputs.shape[1]] if counted else table(positions))
        x = x.astype(c.dtype)
        if c.norm_position == "post":
            x = norm(c, "embed_norm")(x)[1]
        x = Dropout(c.dropout)(x, rows)
        x = self._layers(Tokens(inputs, x, positions, rows, segments), decode)
        return norm(c, "final_norm")(x)[1] if c.norm_position == "pre" else x

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states [..., D] to logits [..., V] in config.dtype."""
        c = self.config
        if c.head_transform:
            x = self.head_norm(activation(c.activation)(self.head_transform(x)))[1]
        x = self.embed.attend(x) if c.tied_head else self.head(x)
        if c.head_transform and c.bias:
            x += jnp.broadcast_to(self.head_bias, x.shape).astype(c.dtype)
        if c.logit_cap:
            x = (c.logit_cap * jnp.tanh(x.astype(jnp.float32) / c.logit_cap)).astype(c.dtype)
        return x

    def _layers(self, tokens, decode):
        c, x = self.config, tokens.embedded
        block = Block
        if c.remat:
            # Inside a scan, the loop already keeps XLA from removing the recomputation (CSE).
            block = nn.remat(Block, static_argnums=(3,), prevent_cse=not c.scan_layers)
        flags = rotated_layers(c.num_layers, c.rotary_skip) if c.rotary_skip else None
        if not c.scan_layers:
            for i, flag in enumerate(flags or [None] * c.num_layers):
                x = block(c, c.windows[i], name=f"layer_{i}")(x, tokens, decode, flag)
            return x

        def body(layer, carry, rotated):
            return layer(carry, tokens, decode, rotated), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers,
        )
        return scan(block(c, c.window, name="layers"), x, flags and jnp.array(flags))[0]


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
