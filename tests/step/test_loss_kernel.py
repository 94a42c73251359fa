import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.step.loss_kernel import loss_and_gradient


@pytest.mark.parametrize(("vocab", "dtype"), [(50, "float32"), (5000, "bfloat16")])
def test_it_is_cross_entropy_and_its_gradient(vocab, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    logits = 5 * jax.random.normal(keys[0], (4, vocab))
    # Rows far from 0, and with one probability of nearly 1.
    logits = logits.at[1].add(300).at[2].multiply(20).astype(dtype)
    targets = jax.random.randint(keys[1], (4,), 0, vocab)
    weights = jnp.array([1.0, 0.5, 1.0, 0.0])

    def loss(logits):
        p = jax.nn.log_softmax(logits.astype("float32"))
        nll = -jnp.take_along_axis(p, targets[:, None], 1)[:, 0]
        return (nll * weights).sum(), nll

    (_, expected), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    nll, ours = loss_and_gradient(logits, targets, weights, interpret=True)
    # Logits near 300 have an error of 3e-5 in float32.
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=5e-5)
    assert ours.dtype == logits.dtype
    # Probabilities have the relative error of 3e-5 then; bfloat16 rounds to 2^-9.
    limit = 1e-4 if dtype == "float32" else 0.004
    assert jnp.linalg.norm((ours - gradient).astype("float32")) < limit


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_is_no_token_gives_nan(target):
    nll, _ = loss_and_gradient(
        jnp.zeros((2, 50)), jnp.array([target, 49]), jnp.ones(2), interpret=True
    )
    assert jnp.isnan(nll[0]) and jnp.isclose(nll[1], jnp.log(50))
