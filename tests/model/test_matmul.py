import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.model.matmul import matmul

# Shapes of kernels in the model: [D, F], [D, H, K] and [H, K, D].
KERNELS = [((16,), (24,)), ((16,), (2, 8)), ((2, 8), (16,))]


def results(inputs, outputs, dtype):
    """Returns (product, gradients of its weighted sum): ours, and NumPy's in float64."""
    x, kernel, weights = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate([(2, 3, *inputs), (*inputs, *outputs), (2, 3, *outputs)])
    )
    count = len(inputs)

    def loss(x, kernel):
        out = matmul(x, kernel, count)
        return (out * weights).sum().astype(jnp.float32), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    return (out, *grads), (
        np.tensordot(x, kernel, count),
        np.tensordot(weights, kernel, (range(2, 2 + len(outputs)), range(count, kernel.ndim))),
        np.tensordot(x, weights, ((0, 1), (0, 1))),
    )


@pytest.mark.parametrize(("inputs", "outputs"), KERNELS)
def test_it_is_the_product_and_so_are_its_gradients(inputs, outputs):
    for ours, exact in zip(*results(inputs, outputs, "float32"), strict=True):
        # Sums of at most 24 products of size 1, each rounded to 6e-8.
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), KERNELS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(inputs, outputs):
    for ours, exact in zip(*results(inputs, outputs, "bfloat16"), strict=True):
        assert ours.dtype == jnp.bfloat16
        # A sum's float32 error may round it to the neighbouring bfloat16, 2^-8 away.
        np.testing.assert_allclose(ours.astype("float32"), exact, rtol=2**-8, atol=1e-4)
