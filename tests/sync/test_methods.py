"""Each choice of sync.method, compared with its definition."""

import jax
import numpy as np
import optax
import pytest

from jaxdp.parallel.replicas import AXIS
from jaxdp.sync import traffic
from jaxdp.sync.methods import METHODS
from support.steps import assert_same_run, batches, bits, choose, start, train


def sgd(config, momentum=0.9):
    config.optimizer.update({"name": "sgd", "b1": momentum, "clip_norm": 0.0, "learning_rate": 0.5})


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "muon"])
def test_sharded_is_gradient_mean(config, devices, optimizer):
    """Also with clipping by the global norm, which no device can compute alone."""
    config.optimizer.update({"name": optimizer, "clip_norm": 0.5, "learning_rate": 1e-3})
    config.model.dropout = 0.3
    config.model.scan_layers = devices == 8  # Of Muon, stacks of layers are dealt out, too.
    one = train(config, 1)
    assert one[0][0]["grad_norm"] > 0.5
    assert_same_run(one, train(choose(config, "sharded"), devices))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_holds_a_part_of_the_optimizers_state(config, optimizer):
    config.optimizer.name, config.model.num_layers = optimizer, 4
    _, _, whole = start(config, 4)
    _, _, parts = start(choose(config, "sharded"), 4)
    size = sum(x.size for x in jax.tree.leaves(whole.opt_state))
    on_each = [0] * 4
    for leaf in jax.tree.leaves(parts.opt_state):
        for i, shard in enumerate(leaf.addressable_shards):
            on_each[i] += shard.data.size
    assert all(n < 0.26 * size for n in on_each)


@pytest.mark.parametrize("devices", [2, 4])
def test_parameter_mean_after_every_step_of_sgd_is_gradient_mean(config, devices):
    """Also with momentum, and with different numbers of tokens on the devices."""
    sgd(config)
    one = train(config, devices)
    assert_same_run_but_norms(one, train(choose(config, "parameter_mean", every=1), devices))


def assert_same_run_but_norms(one, other):
    """Compares all but gradient norms: replicas that train alone have their own."""
    for a, b in zip(one[0], other[0], strict=True):
        b["grad_norm"] = a["grad_norm"]
    assert_same_run(one, other)


@pytest.mark.parametrize("method", ["parameter_mean", "diloco"])
@pytest.mark.parametrize("every", [1, 3])
def test_local_methods_against_their_definition(config, method, every):
    """Compared with two replicas trained one after the other on one device, then averaged here."""
    config.optimizer.clip_norm = 0.0
    choose(config, method, every=every)
    rounds, devices = 2, 2
    _, got = train(config, devices, steps=every * rounds, uneven=False)

    plain = config.copy_and_resolve_references()
    plain.sync.method = "gradient_mean"
    program, replicas, state = start(plain, 1)
    theta, moments = jax.device_get((state.params, state.opt_state))
    own = [moments] * devices
    outer = optax.sgd(config.sync.outer_learning_rate, config.sync.outer_momentum, nesterov=True)
    outer_state = outer.init(theta)
    data = list(batches(every * rounds, uneven=False))
    for r in range(rounds):
        ends = []
        for i in range(devices):
            state = state.replace(
                step=np.int32(r * every), params=theta, opt_state=own[i], outer=()
            )
            state = replicas.replicate(state)
            for step in range(r * every, (r + 1) * every):
                rows = {k: v[i * 4 : (i + 1) * 4] for k, v in data[step].items()}
                state, _ = program(step, state, replicas.shard_steps([rows]))
            ends.append(jax.device_get(state))
        mean = jax.tree.map(lambda *x: np.mean(x, 0), *[e.params for e in ends])
        own = [e.opt_state for e in ends]
        if method == "parameter_mean":
            theta = mean
            average = jax.tree.map(lambda *x: np.mean(x, 0).astype(x[0].dtype), *own)
            own = [average] * devices
        else:
            delta = jax.tree.map(np.subtract, theta, mean)
            updates, outer_state = outer.update(delta, outer_state, theta)
            theta = jax.device_get(optax.apply_updates(theta, updates))
    for a, b in zip(*map(jax.tree.leaves, (got, theta)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


def test_post_local_sgd_begins_with_gradient_mean(config):
    sgd(config)
    one = train(config, 4, steps=4)
    figures, _ = train(choose(config, "parameter_mean", every=2, after=4), 4, steps=8)
    np.testing.assert_allclose(
        [f["loss"] for f in figures[:4]], [f["loss"] for f in one[0]], rtol=2e-6
    )
    assert ["drift" in f for f in figures] == [False] * 4 + [True] * 4
    assert all(f["drift"] > 0 for f in figures[4:])


def test_a_run_may_end_within_a_round(config):
    figures, _ = train(choose(config, "parameter_mean", every=3), 2, steps=5)
    assert len(figures) == 5 and figures[0]["drift"] != figures[4]["drift"]


MODELS = [
    {},
    {"dropout": 0.2, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu"},
    {"bias": True, "tied_head": False, "num_kv_heads": 1, "remat": True},
    {"scan_layers": True, "bias": True, "dropout": 0.1},
]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: "-".join(m) or "plain")
def test_fixed_order_is_the_same_to_the_bit_on_any_number_of_devices(config, model):
    """25 steps of AdamW, with clipping and different numbers of tokens per sequence.

    Of the eight parts of a batch, a device has all or one with each model, and 4 or 2 with the
    plain one: these are summed in the same way.
    """
    config.model.update(model)
    config.optimizer.clip_norm = 0.5
    choose(config, "fixed_order")
    runs = [train(config, devices, steps=25) for devices in ((1, 8) if model else (1, 2, 4, 8))]
    assert len({bits(params) for _, params in runs}) == 1
    assert len({bits([f["loss"] for f in figures]) for figures, _ in runs}) == 1


@pytest.mark.parametrize("optimizer", ["lion", "sgd", "muon"])
def test_fixed_order_is_the_same_to_the_bit_with_every_optimizer(config, optimizer):
    """A matrix of Muon's must not be summed in an order that depends on the program around it."""
    config.optimizer.update({"name": optimizer, "clip_norm": 0.5})
    config.model.embed_dim = 32  # With half of it XLA sums optax's transposed matrices alike.
    choose(config, "fixed_order")
    one, other = (train(config, devices, steps=5)[1] for devices in (1, 8))
    assert bits(one) == bits(other)


def test_fixed_order_is_gradient_mean(config):
    assert_same_run(train(config, 1), train(choose(config, "fixed_order"), 4))


def test_gradient_mean_is_not_the_same_to_the_bit(config):
    """Shows that the test of fixed_order's bits can fail."""
    config.optimizer.clip_norm = 0.5
    runs = [train(config, devices, steps=8)[1] for devices in (1, 4)]
    assert bits(runs[0]) != bits(runs[1])


@pytest.mark.parametrize(
    ("method", "keys", "small"),
    [
        ("gradient_mean", {}, 0),
        ("gradient_mean", {"dtype": "int4"}, 1),
        ("sharded", {}, 2),
        ("sharded", {"dtype": "int8"}, 2),
        ("sharded, of whole matrices", {}, 2),
        ("fixed_order", {}, 1),
        ("parameter_mean", {}, 2),
        ("parameter_mean", {"islands": 2}, 2),
        ("diloco", {}, 2),
        ("diloco", {"dtype": "int2"}, 2),
        ("diloco", {"islands": 2, "dtype": "int4"}, 2),
        ("diloco, of whole matrices", {}, 2),
        ("diloco, of whole matrices", {"dtype": "int2"}, 2),
        ("diloco", {"fragments": 2}, 1),
        ("diloco", {"fragments": 2, "dtype": "int8"}, 1),
        ("diloco", {"delay": 1}, 1),
    ],
)
def test_the_price_is_what_the_compiled_program_moves(config, method, keys, small):
    """Except for a few small collectives: figures, a norm, the drift."""
    config.num_train_steps = 8
    method, whole_matrices, _ = method.partition(", of whole matrices")
    config.optimizer.name = "muon" if whole_matrices else "adamw"
    program, replicas, state = start(choose(config, method, every=2, **keys), 4)
    part = list(batches(program.round_length(0)))
    expected = program.traffic()
    state, _ = program(0, state, replicas.shard_steps(part))
    found = program.collectives.values()
    large = [c for c in found if c.bytes > 1000]
    assert sorted(c.kind for c in large) == sorted(c.kind for c in expected)
    assert len(found) == len(large) + small
    figures_bytes = 300
    total = sum(c.bytes for c in expected)
    assert total <= sum(c.bytes for c in large) <= total + figures_bytes


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_one_synchronisation_per_step_however_many_micro_batches(config, accum):
    config.grad_accum_steps = accum
    program, replicas, state = start(config, 2)
    program(0, state, replicas.shard_steps(list(batches(1))))
    assert [c.kind for c in program.collectives.values()] == ["all-reduce"]


def test_reduced_precision_is_close_and_not_equal(config):
    """bfloat16 rounds to 8 bits: sums of a few such numbers are exact to about 1%."""
    exact, _ = train(config, 4, steps=1)
    rounded, params = train(choose(config, "gradient_mean", dtype="bfloat16"), 4, steps=1)
    a, b = exact[0]["grad_norm"], rounded[0]["grad_norm"]
    assert 0 < abs(a - b) / a < 1e-2
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


def test_traffic_needs_no_arrays(config):
    shapes = {"a": jax.ShapeDtypeStruct((3, 5), "float32")}
    for name, expected in (("gradient_mean", 60), ("sharded", 64), ("diloco", 60)):
        choose(config, name)
        method = METHODS[name](config, AXIS)
        assert method.traffic(shapes, (), 4)[0].bytes == expected
    assert traffic.Collective("all-reduce", 100).sent(4) == 150
