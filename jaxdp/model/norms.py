"""Layer norm (Ba et al. 2016) and RMS norm (Zhang and Sennrich 2019).

On NVIDIA GPUs both passes are kernels written in Pallas. What XLA makes of a norm there reads its
input several times, and a norm does nothing but read and write.

Shapes: B batch, L length, D width, T tokens, R rows of a tile.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxdp.model.target import target

TILE = 4096  # Elements that a program works on at a time: 32 for each of its 128 threads.
PROGRAMS = 1024  # Of the backward pass, at most: each writes a partial sum of the scale's gradient.
MAX_PIECES = 32


class Norm(nn.Module):
    """A norm with a learned scale, and a learned bias if it has one.

    Attributes:
      centred: whether to subtract the mean, as layer norm does and RMS norm does not.
      bias: whether there is a bias.
      epsilon: added to the variance.
      dtype: of the result; statistics are computed in float32.
    """

    centred: bool
    bias: bool
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, uses: int = 1) -> tuple[jax.Array, ...]:
        """Normalises x over D.

        Args:
          x: [..., D].
          uses: for how many uses to return the normalised x.

        Returns:
          x itself, and the normalised x in `dtype`, once for each use. What else is done with x
          should use this x: then all these gradients are summed by the norm's own backward pass.
        """
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]) if self.bias else None
        options = (self.centred, self.epsilon, jnp.dtype(self.dtype))
        if target().has_kernels and tiling(x.shape):
            return fused(*options, x, scale, bias, uses)
        return x, *[plain(*options, x, scale, bias)] * uses


def plain(centred, epsilon, dtype, x, scale, bias):
    """Normalises x [..., D] over D, for XLA to compile; arguments as for `fused`."""
    exact = x.astype(jnp.float32)
    variance = jnp.mean(lax.square(exact), -1, keepdims=True)
    if centred:
        mean = jnp.mean(exact, -1, keepdims=True)
        exact = exact - mean
        variance = jnp.maximum(0.0, variance - lax.square(mean))
    y = exact * (lax.rsqrt(variance + epsilon) * scale)
    return (y if bias is None else y + bias).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 6, 7))
def fused(centred, epsilon, dtype, x, scale, bias, uses=1, interpret=False):
    """Computes (x, plain(x), ...); both passes are kernels that read each array once.

    Args:
      centred: see `Norm`.
      epsilon: see `Norm`.
      dtype: see `Norm`.
      x: [..., D] whose shape has a `tiling`.
      scale: [D] float32.
      bias: [D] float32, or None.
      uses: how many times to return plain(x).
      interpret: whether to run the kernels as JAX operations, on any device.
    """
    return _forward(centred, epsilon, dtype, x, scale, bias, uses, interpret)[0]


def _forward(centred, epsilon, dtype, x, scale, bias, uses, interpret):
    rows, piece = _tiling(x)
    vectors = [v for v in (scale, bias) if v is not None]
    flat = x.reshape(-1, x.shape[-1])
    y = pl.pallas_call(
        functools.partial(_forward_kernel, centred=centred, epsilon=epsilon, piece=piece),
        out_shape=jax.ShapeDtypeStruct(flat.shape, dtype),
        grid=(len(flat) // rows,),
        in_specs=[_tile(rows, flat), *map(_whole, vectors)],
        out_specs=_tile(rows, flat),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="norm_forward",
    )(flat, *vectors)
    return (x, *[y.reshape(x.shape)] * uses), (x, scale, bias)


def _backward(centred, epsilon, dtype, uses, interpret, residuals, gradients):
    x, scale, bias = residuals
    rows, piece = _tiling(x)
    flat, d_x, *d_ys = (g.reshape(-1, x.shape[-1]) for g in (x, *gradients))
    programs = min(PROGRAMS, len(flat) // rows)
    while len(flat) // rows % programs:
        programs -= 1
    partial = jax.ShapeDtypeStruct((programs, x.shape[-1]), jnp.float32)
    share = len(flat) // programs
    vectors = 1 if bias is None else 2
    d_flat, *sums = pl.pallas_call(
        functools.partial(
            _backward_kernel, centred=centred, epsilon=epsilon, uses=uses, piece=piece, rows=rows
        ),
        out_shape=[jax.ShapeDtypeStruct(flat.shape, x.dtype), *[partial] * vectors],
        grid=(programs,),
        in_specs=[*[_tile(share, flat)] * (2 + uses), _whole(scale)],
        out_specs=[_tile(share, flat), *[_tile(1, flat)] * vectors],
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="norm_backward",
    )(flat, d_x, *d_ys, scale)
    d_scale, *d_bias = (jnp.sum(s, 0) for s in sums)
    return d_flat.reshape(x.shape), d_scale, d_bias[0] if d_bias else None


fused.defvjp(_forward, _backward)


def tiling(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the rows of a tile, and the width of the pieces in which a row is loaded.

    Triton computes on arrays whose sizes are powers of two. None if no such tiling fits.
    """
    width = shape[-1]
    piece = width & -width
    tokens = math.prod(shape[:-1])
    rows = max(1, TILE // width)
    rows = min(1 << rows.bit_length() - 1, tokens & -tokens)
    return (rows, piece) if width <= MAX_PIECES * piece and width <= 4 * TILE else None


def _tiling(x):
    found = tiling(x.shape)
    assert found is not None
    return found


def _tile(rows, array):
    return pl.BlockSpec((rows, array.shape[1]), lambda i: (i, 0))


def _whole(vector):
    return pl.BlockSpec(vector.shape, lambda i: (0,))


def _pieces(width, piece):
    return [pl.ds(start, piece) for start in range(0, width, piece)]


def _normalised(x, width, centred, epsilon):
    """Returns rows normalised to mean 0 and variance 1, and 1 / their standard deviation.

    Args:
      x: pieces of the rows, a list of [R, piece] float32.
      width: D.
      centred: whether to subtract the mean.
      epsilon: added to the variance.
    """
    if centred:
        mean = sum(jnp.sum(p, 1, keepdims=True) for p in x) / width
        x = [p - mean for p in x]
    variance = sum(jnp.sum(p * p, 1, keepdims=True) for p in x) / width
    inverse = lax.rsqrt(variance + epsilon)
    return [p * inverse for p in x], inverse


def _forward_kernel(x, scale, *rest, centred, epsilon, piece):
    *bias, y = rest
    pieces = _pieces(x.shape[1], piece)
    rows = [x[:, p].astype(jnp.float32) for p in pieces]
    normalised, _ = _normalised(rows, x.shape[1], centred, epsilon)
    for p, n in zip(pieces, normalised, strict=True):
        out = n * scale[p][None]
        y[:, p] = (out + bias[0][p][None] if bias else out).astype(y.dtype)


def _backward_kernel(x, d_x, *rest, centred, epsilon, uses, piece, rows):
    d_ys, (scale, d_out, *sums) = rest[:uses], rest[uses:]
    width = x.shape[1]
    pieces = _pieces(width, piece)

    def tile(i, totals):
        here = pl.ds(i * rows, rows)

        def load(array):
            return [array[here, p].astype(jnp.float32) for p in pieces]

        normalised, inverse = _normalised(load(x), width, centred, epsilon)
        g = [sum(parts) for parts in zip(*map(load, d_ys), strict=True)]
        scaled = [a * scale[p][None] for a, p in zip(g, pieces, strict=True)]
        along = sum(
            jnp.sum(a * n, 1, keepdims=True) for a, n in zip(scaled, normalised, strict=True)
        )
        mean = sum(jnp.sum(a, 1, keepdims=True) for a in scaled) / width if centred else 0.0
        for p, a, n, other in zip(pieces, scaled, normalised, load(d_x), strict=True):
            gradient = (a - n * (along / width) - mean) * inverse + other
            d_out[here, p] = gradient.astype(d_out.dtype)
        found = [[a * n for a, n in zip(g, normalised, strict=True)], g][: len(sums)]
        return jax.tree.map(jnp.add, totals, found)

    zeros = [[jnp.zeros((rows, piece), jnp.float32) for _ in pieces] for _ in sums]
    totals = lax.fori_loop(0, x.shape[0] // rows, tile, zeros)
    for total, out in zip(totals, sums, strict=True):
        for p, t in zip(pieces, total, strict=True):
            out[:, p] = jnp.sum(t, 0, keepdims=True)
