import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.sync import reductions
from jaxdp.sync.islands import Islands, slices, unslice

RNG = np.random.default_rng(0)
SUMS = RNG.normal(size=(8, 5)).astype(np.float32)
WEIGHTS = np.array([1, 0, 7, 2, 0, 0, 30, 4], np.float32)
MEAN = SUMS.sum(0) / WEIGHTS.sum()
# Rounding of sums of eight float32 numbers, added in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


def on(devices, function, batch, own=False):
    """Runs function(this device's part of the batch) on some devices; own: results are [N, ...]."""
    replicas = Replicas(jax.local_devices()[:devices])
    step = replicas.pmap(lambda _, part: function(part), out_axes=0 if own else None)
    return jax.device_get(step(replicas.replicate(np.float32(0)), replicas.shard(batch)))


def figures(part):
    return {"tokens": reductions.per_device(part["weights"].sum(), AXIS)}


def mean_over(devices, sums=SUMS, weights=WEIGHTS, dtype="float32"):
    def mean(part):
        total = {"a": part["sums"].sum(0), "b": part["sums"].sum()}
        return reductions.gradient_mean(total, figures(part), AXIS, dtype)

    return on(devices, mean, {"sums": sums, "weights": weights})


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_gradient_mean_weighs_tokens_not_devices(devices):
    mean, said = mean_over(devices)
    np.testing.assert_allclose(said["tokens"], WEIGHTS.reshape(devices, -1).sum(1), rtol=1e-6)
    np.testing.assert_allclose(mean["a"], MEAN, **ROUNDING)
    np.testing.assert_allclose(mean["b"], MEAN.sum(), **ROUNDING)


def test_gradient_mean_of_no_tokens_is_zero():
    mean, said = mean_over(4, np.zeros((8, 5), np.float32), np.zeros(8, np.float32))
    assert (said["tokens"] == 0).all()
    assert (mean["a"] == 0).all()


def test_bfloat16_costs_what_its_rounding_says():
    """Each device's sum is rounded by at most 2^-9 of itself, and so is each partial sum of N.

    So the error against float32 is not 0, but at most (1 + N) 2^-9 times the absolute sum.
    """
    exact, _ = mean_over(8)
    rounded, _ = mean_over(8, dtype="bfloat16")
    error = np.abs(exact["a"] - rounded["a"])
    assert rounded["a"].dtype == np.float32
    assert error.max() > 1e-5
    assert (error <= 9 * 2**-9 * np.abs(SUMS).sum(0) / WEIGHTS.sum()).all()


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_parameter_mean_weighs_by_tokens(devices):
    """Counters are averaged, too; device 1 skipped 3 of 10 updates since synchronisation."""
    values = RNG.normal(size=(devices, 5)).astype(np.float32)
    tokens = np.arange(devices, dtype=np.float32)

    def mean(part):
        skipped = jnp.where(lax.axis_index(AXIS) == 1, 3, 0)
        start = 2**24 + 1  # float32 can't represent it.
        tree = {"x": part["x"][0], "all": jnp.int32(start + 10), "count": start + 10 - skipped}
        before = {"x": tree["x"], "all": jnp.int32(start), "count": jnp.int32(start)}
        tokens = lax.all_gather(part["tokens"][0], AXIS)
        islands = Islands(devices, devices)
        return reductions.parameter_mean(tree, before, tokens, AXIS, islands)

    got = on(devices, mean, {"x": values, "tokens": tokens})
    weights = tokens if devices > 1 else np.ones(1)  # Without any tokens: a plain mean.
    np.testing.assert_allclose(got["x"], np.average(values, 0, weights), **ROUNDING)
    assert got["all"] == 2**24 + 11
    # With 3 devices, device 1, which made 7 updates, has 1 of 1 + 2 tokens.
    assert got["count"] == 2**24 + 1 + {1: 10, 3: 9, 8: 10}[devices]


def test_drift_is_relative_and_zero_for_equals():
    values = np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], np.float32)

    def drift(part):
        x = part[0]
        return reductions.drift({"x": x}, {"x": lax.pmean(x, AXIS)}, AXIS)

    # Two of four replicas are 5 away from a mean of length 5.
    np.testing.assert_allclose(on(4, drift, values), np.sqrt(2 * 25 / 4) / 5, rtol=1e-6)
    assert on(2, drift, values[:2]) == 0


def test_outer_step_is_nesterov_on_the_mean_change():
    """Compared with DiLoCo's formulas: v' = m v + Δ, θ' = θ - lr (Δ + m v')."""
    rate, momentum = 0.7, 0.9
    outer = optax.sgd(rate, momentum, nesterov=True)
    theta = {"x": jnp.array([1.0, 2.0])}
    state, velocity, expected = outer.init(theta), np.zeros(2), np.array([1.0, 2.0])
    for mean in ([0.5, 1.0], [2.0, 2.0], [0.0, 1.0]):
        delta = np.asarray(theta["x"]) - mean
        velocity = momentum * velocity + delta
        expected = expected - rate * (delta + momentum * velocity)
        change = {"x": jnp.asarray(delta, jnp.float32)}
        theta, state = reductions.outer_step(outer, theta, change, state)
        # Rounding of float32 numbers near 2, some of which cancel.
        np.testing.assert_allclose(theta["x"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_slices_and_back(count):
    tree = {"a": np.arange(10.0).reshape(2, 5), "b": np.arange(3.0)}
    cut = slices(tree, count)
    assert cut["a"].shape == (count, -(-10 // count))
    back = unslice(cut, tree)
    assert all((back[k] == tree[k]).all() and back[k].shape == tree[k].shape for k in tree)


@pytest.mark.parametrize(("devices", "limit"), [(1, 0), (2, 2**24), (4, 0), (4, 30), (8, 2**24)])
def test_scatter_and_gather_are_the_mean(devices, limit, monkeypatch):
    """With a bucket for each leaf, and one for all."""
    monkeypatch.setattr(reductions, "BUCKET_BYTES", limit)

    def there_and_back(part):
        sums = {"a": part["sums"].sum(0), "b": part["sums"].sum(0).reshape(5, 1)[:2]}
        mine, _ = reductions.scatter_mean(slices(sums, devices), figures(part), AXIS)
        assert mine["a"].shape == (-(-5 // devices),)
        return unslice(reductions.all_gather(mine, AXIS), sums)

    got = on(devices, there_and_back, {"sums": SUMS, "weights": WEIGHTS})
    np.testing.assert_allclose(got["a"], MEAN, **ROUNDING)
    np.testing.assert_allclose(got["b"], MEAN[:2, None], **ROUNDING)


def test_ordered_sums_are_the_same_bits_on_any_number_of_devices():
    """In another order the bits differ, as float32 addition is not associative."""
    values = (RNG.normal(size=(8, 1000)) * 10.0 ** RNG.integers(-6, 6, (8, 1000))).astype(
        np.float32
    )
    a, b, c, d, e, f, g, h = values
    tree = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for devices in (1, 2, 4, 8):
        got = on(
            devices,
            lambda x: reductions.doubling_sum(reductions.pairwise_sum(x), AXIS),
            values,
            own=True,
        )
        assert all(row.tobytes() == tree.tobytes() for row in got)
    assert (tree != values.sum(0)).any()


@pytest.mark.parametrize(
    "add",
    [
        reductions.accumulate,
        functools.partial(reductions.accumulate, last_apart=True),
        reductions.accumulate_in_order,
    ],
    ids=["in a loop", "last one apart", "in order"],
)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_accumulation_sums_over_micro_batches(add, count):
    def value_and_grad(params, batch):
        return (batch["x"].sum(), jnp.float32(len(batch["x"]))), {"g": params * batch["x"].sum(0)}

    (loss, weight), grads = jax.jit(
        lambda batch: add(value_and_grad, jnp.float32(2), batch, count)
    )({"x": SUMS})
    np.testing.assert_allclose(loss, SUMS.sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["g"], 2 * SUMS.sum(0), **ROUNDING)
    assert weight == 8
