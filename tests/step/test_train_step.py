import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.step import losses
from jaxdp.step.optimizer import get_schedule
from jaxdp.step.train_step import clip
from support.steps import LENGTH, ROWS, VOCAB, assert_same_run, batches, start, train


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_is_the_same_run(config, devices):
    """Also with dropout, and with different numbers of tokens on the devices."""
    config.model.dropout = 0.3
    assert_same_run(train(config, 1), train(config, devices))


@pytest.mark.parametrize(("devices", "accum"), [(1, 8), (1, 2), (2, 4), (4, 2)])
def test_accumulation_is_the_big_batch(config, devices, accum):
    config.model.dropout = 0.3
    assert_same_run(train(config, 1), train(config, devices, accum))


def test_masked_language_model_is_the_same_run_on_any_number_of_devices(config):
    config.objective = "masked"
    mask = functools.partial(losses.mask_tokens, mask_id=VOCAB - 1, vocab_size=VOCAB)
    one = train(config, 1, transform=mask)
    assert_same_run(one, train(config, 4, transform=mask))
    assert_same_run(one, train(config, 2, accum=2, transform=mask))
    assert 0 < one[0][0]["tokens"].sum() < sum(next(batches(1))["weights"].flat)


def test_a_mean_of_means_would_be_another_run(config):
    """Shows that the tests above can fail: devices have different numbers of tokens."""
    per_row = next(batches(1))["weights"].sum(1)
    assert len(set(per_row.reshape(4, 2).sum(1))) > 1


def test_gradient_is_that_of_the_mean_loss(config):
    """Compared with jax.grad of the whole batch's loss, written out here."""
    config.optimizer.update({"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 1.0})
    _, _, state = start(config, 1)
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    batch = next(batches(1))

    @jax.jit
    @jax.grad
    def gradient(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, batch["inputs"]))
        picked = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["weights"]) / batch["weights"].sum()

    expected = jax.tree.map(lambda p, g: p - g, state.params, gradient(state.params))
    _, params = train(config, 4, steps=1)
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_metrics(config):
    figures, _ = train(config, 2, uneven=False)
    schedule = get_schedule(config)
    for step, values in enumerate(figures):
        np.testing.assert_allclose(values["learning_rate"], schedule(step), rtol=1e-6)
        assert (values["tokens"] == ROWS * LENGTH // 2).all() and len(values["tokens"]) == 2
    # An untrained model predicts nearly uniformly: its loss is log(20) = 2.996.
    np.testing.assert_allclose(figures[0]["loss"], np.log(VOCAB), atol=0.05)


def test_dropout_is_drawn_anew_in_each_step(config):
    """With a learning rate of 0 and the same batch, only dropout can change the loss."""
    config.model.dropout = 0.5
    config.optimizer.update({"learning_rate": 0.0, "weight_decay": 0.0})
    program, replicas, state = start(config, 1)
    batch = replicas.shard_steps([next(batches(1))])
    state, first = program(0, state, batch)
    _, second = program(1, state, batch)
    assert first["loss"] != second["loss"]


@pytest.mark.parametrize("norm", [2.0, 0.25])
def test_clip(norm):
    grads = {"a": jnp.array([3.0, 4.0]) * norm / 5}
    clipped = clip(grads, jnp.float32(norm), 0.5)
    np.testing.assert_allclose(optax.tree.norm(clipped), min(norm, 0.5), rtol=1e-6)
    np.testing.assert_allclose(clipped["a"][1] / clipped["a"][0], 4 / 3, rtol=1e-6)


def test_the_step_clips(config):
    """With SGD, a learning rate of 1 and no decay, the first update is the clipped gradient."""
    config.optimizer.update({"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "clip_norm": 0.1})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 1.0})
    _, _, state = start(config, 1)
    before = jax.device_get(state.params)
    figures, params = train(config, 2, steps=1)
    change = jax.tree.map(np.subtract, params, before)
    assert figures[0]["grad_norm"] > 0.1
    np.testing.assert_allclose(optax.tree.norm(change), 0.1, rtol=1e-4)
