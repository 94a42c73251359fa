import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.step.losses import chunked_cross_entropy, cross_entropy, mask_tokens

MASK, VOCAB = 99, 50


def test_cross_entropy_is_a_sum_of_negative_log_probabilities():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[0, 1, 2], [3, 4, 0]])
    weights = jnp.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = sum(
        -np.log(p[i, j, targets[i, j]]) * weights[i, j] for i in range(2) for j in range(3)
    )
    loss_sum, weight_sum = cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-5)
    assert weight_sum == 3.5


def test_cross_entropy_of_bfloat16_logits_is_float32():
    loss_sum, weight_sum = cross_entropy(
        jnp.zeros((1, 1, 7), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    )
    assert loss_sum.dtype == weight_sum.dtype == jnp.float32
    np.testing.assert_allclose(loss_sum, np.log(7), rtol=1e-6)


def test_chunks_sum_up_to_the_whole():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (2, 6, 8)), jax.random.normal(keys[1], (8, 5))
    targets = jax.random.randint(keys[2], (2, 6), 0, 5)
    weights = jax.random.uniform(keys[3], (2, 6))

    def loss(kernel, hidden, chunks):
        return chunked_cross_entropy(lambda x: x @ kernel, hidden, targets, weights, chunks)

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    whole, *others = (both(kernel, hidden, chunks) for chunks in (1, 2, 6))
    for other in others:
        for a, b in zip(*map(jax.tree.leaves, (whole, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def masked(rows, tokens):
    batch = {"inputs": tokens, "targets": tokens, "weights": jnp.ones(tokens.shape)}
    return mask_tokens(jax.random.key(0), rows, batch, MASK, VOCAB)


def test_masks_have_berts_shares():
    tokens = jnp.full((100, 1000), 7)
    batch = masked(jnp.arange(100), tokens)
    chosen = batch["weights"] == 1
    # 100,000 draws, 15,000 of them chosen: 5 standard deviations are under 0.006 and 0.017.
    assert abs(chosen.mean() - 0.15) < 0.006
    fate = batch["inputs"][chosen]
    assert abs((fate == MASK).mean() - 0.8) < 0.017
    # 1 of 50 random tokens equals the one it replaces.
    assert abs((fate == 7).mean() - (0.1 + 0.1 / VOCAB)) < 0.017
    others = fate[(fate != MASK) & (fate != 7)]
    assert others.min() >= 0 and others.max() < VOCAB
    assert (batch["inputs"][~chosen] == 7).all()
    assert (batch["targets"] == 7).all()


def test_masks_of_a_row_depend_on_its_number_only():
    tokens = jnp.arange(4 * 64).reshape(4, 64) % VOCAB
    whole = masked(jnp.arange(4), tokens)
    part = masked(jnp.array([2]), tokens[2:3])
    for name in ("inputs", "weights"):
        assert (whole[name][2] == part[name][0]).all()
    assert (whole["weights"][0] != whole["weights"][1]).any()


def test_padding_and_prompts_are_no_targets_and_stay_as_they_are():
    tokens = jnp.full((8, 64), 7)
    batch = {"inputs": tokens, "targets": tokens, "weights": jnp.ones(tokens.shape)}
    batch["weights"] = batch["weights"].at[:, :32].set(0)
    found = mask_tokens(jax.random.key(0), jnp.arange(8), batch, MASK, VOCAB)
    assert found["weights"][:, :32].sum() == 0 and (found["inputs"][:, :32] == 7).all()
    whole = masked(jnp.arange(8), tokens)  # The others are masked as they would be without.
    for name in ("inputs", "weights"):
        assert (found[name][:, 32:] == whole[name][:, 32:]).all() and found[name][:, 32:].any()
