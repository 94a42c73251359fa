"""DiLoCo that synchronises the model in parts, and late."""

import itertools

import jax
import numpy as np
import pytest

from jaxdp.sync.fragments import StreamingDiLoCo, cut, put
from jaxdp.sync.islands import Islands
from support.steps import assert_same_run, batches, bits, choose, start, train


def test_fragments_are_slices_of_each_leaf():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(5.0), "c": np.array(7.0)}
    parts = [cut(tree, 3, i) for i in range(3)]
    assert [p["a"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [p["b"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 0]]
    assert [p["c"].tolist() for p in parts] == [[7], [0], [0]]
    other = jax.tree.map(lambda x: -x, tree)
    for i, part in enumerate(parts):
        other = put(other, part, 3, i)
    assert jax.tree.map(np.shape, other) == jax.tree.map(np.shape, tree)
    assert all(np.array_equal(other[k], tree[k]) for k in tree)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_a_single_fragment_is_diloco_to_the_bit(config, dtype):
    """Where all devices see the same number of tokens, which are their weights in DiLoCo."""
    choose(config, "diloco", every=2, dtype=dtype)
    whole = train(config, 2, steps=4, uneven=False)
    program, replicas, state = start(config, 2, method=StreamingDiLoCo)
    assert isinstance(program.method, StreamingDiLoCo)
    waiting = batches(4, uneven=False)
    for done in (0, 2):
        part = list(itertools.islice(waiting, 2))
        state, _ = program(done, state, replicas.shard_steps(part))
    assert bits(whole[1]) == bits(jax.device_get(state.params))


@pytest.mark.parametrize(
    ("fragments", "delay", "model"),
    [(1, 1, {}), (2, 0, {"scan_layers": True}), (2, 1, {}), (3, 1, {"bias": True})],
)
def test_against_its_definition(config, fragments, delay, model):
    """Compared with two replicas trained one after the other on one device, and numpy."""
    every, devices, rounds = 2 * fragments, 2, fragments + 2
    config.optimizer.update({"name": "sgd", "b1": 0.9, "clip_norm": 0.0, "learning_rate": 0.1})
    config.model.update(model)
    choose(config, "diloco", every=every, fragments=fragments, delay=delay, outer_momentum=0.5)
    figures, got = train(config, devices, steps=2 * rounds, uneven=False)

    plain = config.copy_and_resolve_references()
    plain.sync.update({"method": "gradient_mean", "fragments": 1, "delay": 0})
    program, replicas, state = start(plain, 1)
    theta, moments = jax.device_get((state.params, state.opt_state))
    own, moments = [theta] * devices, [moments] * devices
    momentum = jax.tree.map(np.zeros_like, theta)
    data = list(batches(2 * rounds, uneven=False))

    def make_steps(i, first, last):
        nonlocal state
        state = state.replace(step=np.int32(first), params=own[i], opt_state=moments[i])
        state = replicas.replicate(state)
        for step in range(first, last):
            rows = {k: v[i * 4 : (i + 1) * 4] for k, v in data[step].items()}
            state, _ = program(step, state, replicas.shard_steps([rows]))
        own[i], moments[i] = jax.device_get((state.params, state.opt_state))

    def outer(number, theta, momentum, sent, now):
        """Replaces a fragment in the flat arrays of a leaf."""
        width = -(-theta.size // fragments)
        part = slice(number * width, (number + 1) * width)
        delta = theta[part] - np.mean([x[part] for x in sent], 0)
        momentum[part] = 0.5 * momentum[part] + delta
        theta[part] -= 0.7 * (delta + 0.5 * momentum[part])
        for then, x in zip(sent, now, strict=True):
            x[part] = theta[part] + (x[part] - then[part])

    for r in range(rounds):
        for i in range(devices):
            make_steps(i, 2 * r, 2 * r + 2 - delay)
        sent = [jax.tree.map(np.copy, x) for x in own]
        for i in range(devices):
            make_steps(i, 2 * r + 2 - delay, 2 * r + 2)
        own = [jax.tree.map(np.array, x) for x in own]
        theta, momentum = jax.tree.map(np.array, (theta, momentum))
        for leaf in zip(*map(jax.tree.leaves, (theta, momentum, *sent, *own)), strict=True):
            t, m, *rest = (x.reshape(-1) for x in leaf)  # Views: the trees change.
            outer(r % fragments, t, m, rest[:devices], rest[devices:])
    assert len(figures) == 2 * rounds and all(f["drift"] > 0 for f in figures)
    # The same float32 operations in other programs, over a few steps.
    for a, b in zip(*map(jax.tree.leaves, (got, theta)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_islands_train_as_single_devices_would(config):
    choose(config, "diloco", every=4, fragments=2, delay=1)
    single = train(config, 2, uneven=False)
    assert_same_run(single, train(choose(config, "diloco", islands=2), 4, uneven=False))


def test_the_last_round_may_be_shorter_than_the_delay(config):
    choose(config, "diloco", every=6, fragments=2, delay=2)
    figures, params = train(config, 2, steps=4)
    assert len(figures) == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_what_rounding_lost_of_each_fragment_goes_on_elsewhere(config):
    """What is kept, summed over devices, is the same for other devices and islands."""
    choose(config, "diloco", every=6, fragments=3, dtype="int4", islands=2)
    program, replicas, state = start(config, 4)
    waiting = batches(6)
    for done in range(0, 6, 2):
        part = list(itertools.islice(waiting, 2))
        state, _ = program(done, state, replicas.shard_steps(part))
    saved, like = jax.device_get((state.residual, state.params))
    assert all(x[:, i].any() for x in jax.tree.leaves(saved["sent"]["embed"]) for i in range(3))

    def total(kept, islands):
        one = program.method.load_residual(kept, like, islands, Islands(1, 1))
        return jax.tree.map(lambda x, y: x.squeeze(2) + y, one["sent"], one["summed"])

    wanted = total(saved, Islands(4, 2))
    for islands in (Islands(4, 4), Islands(8, 2), Islands(2, 2)):
        found = total(program.method.load_residual(saved, like, Islands(4, 2), islands), islands)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            # A few numbers below 1e-2 are added in another order.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
