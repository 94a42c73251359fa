"""Layers of the transformer: dense layers, activations, dropout."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdp.model.matmul import matmul
from jaxdp.model.target import target


class Dense(nn.Module):
    """A linear layer, with parameters as `nn.DenseGeneral` has them.

    Its bias's gradient is summed over the tokens in float32. `nn.DenseGeneral` sums it in the dtype
    of the result, where thousands of summands leave little of bfloat16's 8 bits.

    Attributes:
      features: O..., the dimensions of a token's result.
      bias: whether there is a bias.
      dtype: of the product; parameters are float32.
      kernel_init: initialiser of the kernel.
      contracted: number of the input's last dimensions, I..., that the layer sums over.
    """

    features: tuple[int, ...]
    bias: bool
    dtype: Any
    kernel_init: Callable
    contracted: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., I...] to [..., O...] in `dtype`."""
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype), self.contracted)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)


def activation(name: str) -> Callable[..., jax.Array]:
    """Returns the function of a model.activation: of one array, or of (gate, x) for "swiglu".

    On GPUs the backward pass computes it again from its input. Left to XLA, the forward pass writes
    intermediate results, as large as the input, for the backward pass to read.
    """
    functions: dict[str, Callable[..., jax.Array]] = {
        "gelu": functools.partial(nn.gelu, approximate=True),
        "gelu_exact": functools.partial(nn.gelu, approximate=False),
        "relu2": lambda x: jnp.square(nn.relu(x)),
        "swiglu": lambda gate, x: nn.silu(gate) * x,
    }
    found = functions[name]
    return jax.checkpoint(found) if target().platform == "gpu" else found


class Dropout(nn.Module):
    """Dropout whose mask for a row depends only on (rng, row).

    So a run with dropout is the same on any number of devices. `nn.Dropout` would draw one mask for
    the part of the batch that a device holds.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """Maps [B, ...] to [B, ...]; the identity if `rows`, [B] int32, is None."""
        if rows is None or self.rate == 0:
            return x
        rng = self.make_rng("dropout")
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)
        draw = functools.partial(jax.random.bernoulli, p=1 - self.rate, shape=x.shape[1:])
        return jnp.where(jax.vmap(draw)(keys), x / (1 - self.rate), 0)
