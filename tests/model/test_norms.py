import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.model.norms import fused, plain, tiling

KINDS = [("layer norm", True, False), ("with a bias", True, True), ("RMS norm", False, False)]


def results(norm, centred, bias, dtype, width):
    """Returns the normalised x, and gradients of a weighted sum of x and the normalised x.

    It is returned for two uses, one of its even and one of its odd channels.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    x, d_x, d_y = (3 + jax.random.normal(k, (2, 16, width)).astype(dtype) for k in keys[:3])
    scale = 1 + 0.1 * jax.random.normal(keys[3], (width,))
    vectors = [scale, jax.random.normal(keys[4], (width,)) if bias else None]
    function = functools.partial(norm, centred, 1e-5, jnp.dtype(dtype))
    (_, y, same), pull = jax.vjp(function, x, *vectors)
    assert (y == same).all()
    even = d_y * (jnp.arange(width) % 2 == 0)
    return [np.asarray(a, np.float32) for a in jax.tree.leaves((y, pull((d_x, even, d_y - even))))]


def twice(*arguments):
    """The plain norm, with the interface of the fused one."""
    return arguments[3], *[plain(*arguments)] * 2


@pytest.mark.parametrize(("centred", "bias"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 48), ("bfloat16", 64)])
def test_the_kernel_is_the_norm_and_so_are_its_gradients(centred, bias, dtype, width):
    ours = results(functools.partial(fused, uses=2, interpret=True), centred, bias, dtype, width)
    for one, other in zip(ours, results(twice, centred, bias, dtype, width), strict=True):
        # Sums of up to 64 terms in float32; bfloat16 rounds the results once, to 2^-9.
        limit = 1e-5 if dtype == "float32" else 0.004
        assert np.linalg.norm(one - other) < limit * np.linalg.norm(other)


def test_tiles_are_powers_of_two_and_fill_the_array():
    for width in (64, 384, 768, 1600, 5120):
        rows, piece = tiling((32, 1024, width))
        assert width % piece == 0 and 32 * 1024 % rows == 0
        assert rows & (rows - 1) == piece & (piece - 1) == 0
    assert tiling((2, 3, 99)) is None  # 99 pieces of one element.
    assert tiling((7, 3, 64)) == (1, 64)
