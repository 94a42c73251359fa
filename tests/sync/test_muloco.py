"""DiLoCo with Muon, where what isn't a hidden matrix is updated with the round's mean gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.model.matrices import is_hidden
from jaxdp.model.transformer import initial_params
from jaxdp.step.losses import cross_entropy
from jaxdp.step.setup import make_setup
from jaxdp.sync.islands import Islands
from jaxdp.sync.methods import class_of
from jaxdp.sync.muloco import MuLoCo
from support.steps import VOCAB, assert_same_run, batches, bits, choose, start, train


@pytest.fixture
def muon(config):
    config.optimizer.name = "muon"
    return choose(config, "diloco", every=2)


def others(params):
    """The parameters that aren't hidden matrices, by path."""
    leaves = jax.tree.leaves_with_path(params)
    hidden = jax.tree.leaves(is_hidden(params))
    found = {
        jax.tree_util.keystr(p): x for (p, x), one in zip(leaves, hidden, strict=True) if not one
    }
    assert 0 < len(found) < len(hidden)
    return found


def gradient_of(model):
    @jax.jit
    def gradient(params, batch):
        def loss(params):
            logits = model.apply({"params": params}, batch["inputs"])
            total, weight = cross_entropy(logits, batch["targets"], batch["weights"])
            return total / weight

        return jax.grad(loss)(params)

    return gradient


@pytest.mark.parametrize("model", [{}, {"scan_layers": True, "tied_head": False, "bias": True}])
def test_against_its_definition(muon, model):
    """Two replicas with different numbers of tokens, computed here one after the other."""
    muon.model.update(model)
    muon.optimizer.clip_norm = 0.0
    every, rounds, devices = 3, 2, 2
    choose(muon, "diloco", every=every)
    _, got = train(muon, devices, steps=every * rounds)

    setup = make_setup(muon, VOCAB, devices, mask_id=0)
    assert isinstance(setup.method, MuLoCo)
    theta, gradient = initial_params(setup.model, muon.seed), gradient_of(setup.model)
    update, first = jax.jit(setup.optimizer.update), setup.optimizer.init(theta)
    c, hidden = muon.sync, is_hidden(theta)
    outer = optax.sgd(c.outer_learning_rate, c.outer_momentum, nesterov=True)
    momentum, adam, own = (
        outer.init(theta),
        first.inner_states["adam"],
        [first.inner_states["muon"]] * devices,
    )
    data = list(batches(every * rounds))

    def state(muon, adam):
        return type(first)({"muon": muon, "adam": adam})

    for _ in range(rounds):
        delta = average = jax.tree.map(jnp.zeros_like, theta)
        steps = [{k: np.split(v, devices) for k, v in batch.items()} for batch in data[:every]]
        del data[:every]
        tokens = np.sum([[x.sum() for x in batch["weights"]] for batch in steps], 0)
        for i, weight in enumerate(tokens / tokens.sum()):
            params, moments = theta, state(own[i], adam)
            for batch in steps:
                found = gradient(params, {k: v[i] for k, v in batch.items()})
                average = optax.tree.add_scale(average, weight / every, found)
                updates, moments = update(found, moments, params)
                params = optax.apply_updates(params, updates)
            own[i] = moments.inner_states["muon"]
            delta = optax.tree.add_scale(delta, weight, optax.tree.sub(theta, params))
        moved, momentum = outer.update(delta, momentum, theta)
        matrices, others = optax.apply_updates(theta, moved), theta
        for _ in range(every):
            updates, moments = update(average, state(own[0], adam), others)
            adam = moments.inner_states["adam"]
            others = jax.tree.map(lambda x, u: x + u / np.sqrt(every), others, updates)
        theta = jax.tree.map(lambda a, b, one: a if one else b, matrices, others, hidden)
    # As in other tests of Adam's first steps: it divides by the gradient's own size.
    for a, b in zip(*map(jax.tree.leaves, (got, theta)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


def test_after_every_step_the_others_are_trained_as_by_gradient_mean(muon):
    """Hidden matrices are not: each replica has orthogonalised its own gradient."""
    muon.optimizer.clip_norm = 0.0  # Each replica clips by the norm of its own gradient.
    one = train(choose(muon, "gradient_mean"), 1, steps=1)[1]
    four = train(choose(muon, "diloco", every=1), 4, steps=1)[1]
    for name, x in others(one).items():
        np.testing.assert_allclose(x, others(four)[name], rtol=0, atol=2e-4)
    assert not np.allclose(
        one["layer_0"]["mlp"]["up"]["kernel"], four["layer_0"]["mlp"]["up"]["kernel"], atol=2e-4
    )


def test_on_one_device_and_after_every_step_it_is_gradient_mean(muon):
    """With an outer step that takes over the device's parameters."""
    one = train(choose(muon, "gradient_mean"), 1)
    keys = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    assert_same_run(one, train(choose(muon, "diloco", every=1, **keys), 1))


def test_an_island_trains_as_a_single_device_would(muon):
    single = train(muon, 2)
    assert_same_run(single, train(choose(muon, "diloco", islands=2), 4))


@pytest.mark.parametrize("dtype", ["float32", "int1"])
def test_devices_agree_to_the_bit_and_sums_end_with_their_round(muon, dtype):
    choose(muon, "diloco", dtype=dtype)
    program, replicas, state = start(muon, 4)
    waiting = batches(4)
    for done in (0, 2):
        part = [next(waiting), next(waiting)]
        state, _ = program(done, state, replicas.shard_steps(part))
    for x in jax.tree.leaves((state.params, state.outer)):
        copies = [bits(s.data) for s in x.addressable_shards]
        assert copies == copies[:1] * 4
    sums = others(jax.device_get(optax.tree.get(state.outer, "trace")))
    assert not any(x.any() for x in sums.values())
    # All devices have made the same updates of the others, so their moments are equal.
    moments = jax.device_get(state.opt_state.inner_states["adam"])
    for x in jax.tree.leaves(moments):
        assert all(bits(y) == bits(x[0]) for y in x)
    counts = [x for x in jax.tree.leaves(moments) if x.dtype == np.int32]
    assert counts and all((x == 4).all() for x in counts)


def test_a_round_that_is_cut_short_makes_as_many_updates_as_it_has_steps(muon):
    muon.num_train_steps = 4
    program, replicas, state = start(choose(muon, "diloco", every=3), 2)
    waiting = batches(4)
    for done, count in ((0, 3), (3, 1)):
        part = list(itertools.islice(waiting, count))
        state, _ = program(done, state, replicas.shard_steps(part))
    moments = jax.device_get(state.opt_state.inner_states["adam"])
    counts = [x for x in jax.tree.leaves(moments) if x.dtype == np.int32]
    assert counts and all((x == 4).all() for x in counts)


@pytest.mark.parametrize(
    ("keys", "name"),
    [({}, "MuLoCo"), ({"fragments": 2}, "StreamingDiLoCo"), ({"delay": 1}, "StreamingDiLoCo")],
)
def test_fragments_and_delay_keep_an_adamw_on_each_replica(muon, keys, name):
    assert class_of(choose(muon, "diloco", **keys)).__name__ == name
    muon.optimizer.name = "adamw"
    assert class_of(choose(muon, "diloco", fragments=1, delay=0)).__name__ == "DiLoCo"


def test_moments_that_replicas_had_for_themselves_become_the_first_ones(muon):
    """Devices that updated an embedding with other moments would no longer hold one model."""
    program, _, state = start(choose(muon, "diloco", fragments=2, every=2), 4)
    other, _, _ = start(choose(muon, "diloco", fragments=1), 4)
    rng = np.random.default_rng(0)
    saved = jax.tree.map(lambda x: rng.random(x.shape, np.float32).astype(x.dtype), state.opt_state)
    here = Islands(4, 4)
    loaded = other.method.load(saved, state.params, here, here)
    for x in jax.tree.leaves(loaded.inner_states["adam"]):
        assert (x == x[0]).all()
    assert bits(loaded.inner_states["muon"]) == bits(saved.inner_states["muon"])
    assert program.method.load(saved, state.params, here, here) is saved
