import jax
import numpy as np

from jaxdp import sync
from jaxdp.parallel import AXIS, Replicas


def mean_over(devices, sums, weights):
    def step(_, part):
        return sync.gradient_mean(
            {"a": part["sums"].sum(0), "b": part["sums"].sum()}, part["weights"].sum(), AXIS
        )

    replicas = Replicas(jax.local_devices()[:devices])
    batch = replicas.shard({"sums": sums, "weights": weights})
    return replicas.pmap(step)(replicas.replicate(np.float32(0)), batch)


def test_gradient_mean_weighs_tokens_not_devices():
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(8, 5)).astype(np.float32)
    weights = np.array([1, 0, 7, 2, 0, 0, 30, 4], np.float32)
    for devices in (1, 2, 4, 8):
        mean, weight = mean_over(devices, sums, weights)
        assert weight == weights.sum()
        # Sums of eight float32 numbers in another order.
        np.testing.assert_allclose(mean["a"], sums.sum(0) / weights.sum(), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(mean["b"], sums.sum() / weights.sum(), rtol=1e-5, atol=1e-7)


def test_gradient_mean_of_no_tokens_is_zero():
    mean, weight = mean_over(4, np.zeros((8, 5), np.float32), np.zeros(8, np.float32))
    assert weight == 0
    assert (mean["a"] == 0).all()
