import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp import losses
from jaxdp.model import ModelConfig, Transformer
from jaxdp.optimizer import get_optimizer, get_schedule
from jaxdp.parallel import Replicas
from jaxdp.step import create_state, eval_step, plain, train_step

VOCAB, ROWS, LENGTH = 20, 8, 16
# Losses are near 3 and sums of 128 float32 terms differ in their last bits with the order.
LOSS_TOLERANCE = 2e-6
# Adam divides by the gradient's own size, so a parameter with a tiny gradient shows its rounding.
PARAMETER_TOLERANCE = 2e-4


def batches(steps, uneven=True):
    """Batches whose rows hold very different numbers of tokens, as padded ones do."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
        lengths = rng.integers(1, LENGTH, ROWS) if uneven else np.full(ROWS, LENGTH)
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": (np.arange(LENGTH) < lengths[:, None]).astype(np.float32),
            "stop": np.zeros(ROWS, np.float32),
        }


def train(config, devices, accum=1, steps=4, transform=plain, **batch_options):
    """Losses of some steps, and the parameters after them."""
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    schedule = get_schedule(config)
    replicas = Replicas(jax.local_devices()[:devices])
    state = replicas.replicate(create_state(model, get_optimizer(config, schedule), config.seed))
    step = functools.partial(
        train_step, schedule=schedule, grad_accum_steps=accum, seed=config.seed, transform=transform
    )
    p_step, figures = replicas.pmap(step, donate=True), []
    for batch in batches(steps, **batch_options):
        state, metrics = p_step(state, replicas.shard(batch))
        figures.append(jax.device_get(metrics))
    return figures, jax.device_get(state.params)


def assert_same_run(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
        assert a["tokens"] == b["tokens"]
    for a, b in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=PARAMETER_TOLERANCE)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_is_the_same_run(config, devices):
    """Also with dropout, and with unequal numbers of tokens on the devices."""
    config.model.dropout = 0.3
    assert_same_run(train(config, 1), train(config, devices))


@pytest.mark.parametrize(("devices", "accum"), [(1, 8), (1, 2), (2, 2), (4, 2)])
def test_accumulation_is_the_big_batch(config, devices, accum):
    config.model.dropout = 0.3
    assert_same_run(train(config, 1), train(config, devices, accum))


def test_masked_language_model_is_the_same_run_on_any_number_of_devices(config):
    config.objective = "masked"
    mask = functools.partial(losses.mask_tokens, mask_id=VOCAB - 1, vocab_size=VOCAB)
    one = train(config, 1, transform=mask)
    assert_same_run(one, train(config, 4, transform=mask))
    assert_same_run(one, train(config, 2, accum=2, transform=mask))
    assert 0 < one[0][0]["tokens"] < sum(next(batches(1))["weights"].flat)


def test_a_mean_of_means_would_be_another_run(config):
    """So the tests above can fail: weights in these batches differ from device to device."""
    per_row = next(batches(1))["weights"].sum(1)
    assert len(set(per_row.reshape(4, 2).sum(1))) > 1


def test_gradient_is_that_of_the_mean_loss(config):
    """Against jax.grad of the loss over the whole batch, written down directly."""
    config.optimizer.update({"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "clip_norm": 0.0})
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 1.0})
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    state = create_state(model, get_optimizer(config, get_schedule(config)), config.seed)
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
        assert values["tokens"] == ROWS * LENGTH
        assert values["stop"] == 0
    # Untrained, the model knows nothing: log(20) = 2.996.
    np.testing.assert_allclose(figures[0]["loss"], np.log(VOCAB), atol=0.05)


def test_one_device_asked_to_stop_is_seen_by_all(config):
    batch = next(batches(1))
    batch["stop"][ROWS - 1] = 1
    replicas = Replicas(jax.local_devices()[:4])
    schedule = get_schedule(config)
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    state = replicas.replicate(create_state(model, get_optimizer(config, schedule), 0))
    step = functools.partial(train_step, schedule=schedule, grad_accum_steps=1, seed=0)
    _, metrics = replicas.pmap(step)(state, replicas.shard(batch))
    assert metrics["stop"] == 1


def test_dropout_is_drawn_anew_in_each_step(config):
    """With a learning rate of 0 and one batch, only dropout can change the loss."""
    config.model.dropout = 0.5
    config.optimizer.update({"learning_rate": 0.0, "weight_decay": 0.0})
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    replicas, schedule = Replicas(jax.local_devices()[:1]), get_schedule(config)
    state = replicas.replicate(create_state(model, get_optimizer(config, schedule), 0))
    step = functools.partial(train_step, schedule=schedule, grad_accum_steps=1, seed=0)
    p_step, batch = replicas.pmap(step), replicas.shard(next(batches(1)))
    state, first = p_step(state, batch)
    _, second = p_step(state, batch)
    assert first["loss"] != second["loss"]


def test_evaluation_sums_over_devices(config):
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    state = create_state(model, get_optimizer(config, get_schedule(config)), 0)
    batch = next(batches(1)) | {"number": np.zeros(ROWS, np.int32)}
    logits = model.apply({"params": state.params}, batch["inputs"])
    expected = losses.cross_entropy(logits, batch["targets"], batch["weights"])
    for devices in (1, 4):
        replicas = Replicas(jax.local_devices()[:devices])
        p_step = replicas.pmap(functools.partial(eval_step, seed=0))
        sums = p_step(replicas.replicate(state), replicas.shard(batch))
        np.testing.assert_allclose(sums, expected, rtol=1e-5)
