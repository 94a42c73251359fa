"""DiLoCo with Muon, where what isn't a hidden matrix is updated with the round's mean gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdp.model.matrices import is_hidden
from jaxdp.step.losses import cross_entropy
from jaxdp.step.setup import make_setup
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


@pytest.mark.parametrize("model", [{}, {"scan_layers": True, "tied_head": False, "bias": True}])
def test_against_its_definition(muon, model):
    """Two replicas with different numbers of tokens, computed here one after the other."""
    muon.model.update(model)
    muon.optimizer.clip_norm = 0.0
    every, rounds, devices = 3, 2, 2
    choose(muon, "diloco", every=every)
    _, got = train(muon, devices, steps=every * rounds)

    setup = make_setup(muon, VOCAB, devices, mask_id=0)
    program, _, state = start(muon, devices)
    assert isinstance(program.method, MuLoCo)
    theta, tx, c = jax.device_get(state.params), setup.optimizer, muon.sync
    outer = optax.sgd(c.outer_learning_rate, c.outer_momentum, nesterov=True)
    momentum, data = outer.init(theta), list(batches(every * rounds))
    hidden, common, own = is_hidden(theta), tx.init(theta), [tx.init(theta)] * devices

    @jax.jit
    def gradient(params, rows):
        def loss(params):
            logits = setup.model.apply({"params": params}, rows["inputs"])
            total, weight = cross_entropy(logits, rows["targets"], rows["weights"])
            return total / weight

        return jax.grad(loss)(params)

    def pick(one, other):
        return jax.tree.map(lambda x, y, is_one: x if is_one else y, one, other, hidden)

    update = jax.jit(tx.update)
    for r in range(rounds):
        ends, sums, tokens = [], [], []
        for i in range(devices):
            params, total = theta, jax.tree.map(jnp.zeros_like, theta)
            for step in range(r * every, (r + 1) * every):
                rows = {k: v[i * 4 : (i + 1) * 4] for k, v in data[step].items()}
                found = gradient(params, rows)
                updates, own[i] = update(found, own[i], params)
                params = pick(optax.apply_updates(params, updates), theta)
                total = jax.tree.map(jnp.add, total, found)
            ends.append(params)
            sums.append(total)
            tokens.append(
                sum(
                    data[s]["weights"][i * 4 : (i + 1) * 4].sum()
                    for s in range(r * every, (r + 1) * every)
                )
            )
        weights = np.array(tokens) / sum(tokens)

        def mean(trees, weights=weights):
            return jax.tree.map(
                lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *trees
            )

        delta = jax.tree.map(jnp.subtract, theta, mean(ends))
        moved, momentum = outer.update(delta, momentum, theta)
        average = jax.tree.map(lambda x: x / every, mean(sums))
        changed = theta
        for _ in range(every):
            updates, common = update(average, common, changed)
            changed = optax.apply_updates(changed, updates)
        theta = pick(optax.apply_updates(theta, moved), changed)
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
    figures, params = train(choose(muon, "diloco", every=3), 2, steps=4)
    assert len(figures) == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("keys", "name"),
    [({}, "MuLoCo"), ({"fragments": 2}, "StreamingDiLoCo"), ({"delay": 1}, "StreamingDiLoCo")],
)
def test_fragments_and_delay_keep_an_adamw_on_each_replica(muon, keys, name):
    assert class_of(choose(muon, "diloco", **keys)).__name__ == name
    muon.optimizer.name = "adamw"
    assert class_of(choose(muon, "diloco", fragments=1, delay=0)).__name__ == "DiLoCo"
