"""Islands of devices that train as one replica."""

import jax
import numpy as np
import pytest

from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.sync.islands import Islands
from support.steps import assert_same_run, choose, train


@pytest.mark.parametrize(
    ("count", "inside", "between"),
    [
        (1, None, [[0], [1], [2], [3]]),
        (2, [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        (4, [[0], [1], [2], [3]], None),
    ],
)
def test_groups(count, inside, between):
    islands = Islands(4, count)
    assert (islands.size, islands.inside, islands.between) == (4 // count, inside, between)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sums_are_those_of_the_islands_and_equal_to_the_bit(count):
    """Also of leaves whose size no number of devices divides."""
    islands, rng = Islands(4, count), np.random.default_rng(0)
    replicas = Replicas(jax.local_devices()[:4])
    by_island = {"a": rng.normal(size=(count, 3, 5)), "b": rng.normal(size=count)}
    by_island = jax.tree.map(np.float32, by_island)
    of_devices = jax.tree.map(lambda x: np.repeat(x, islands.size, 0), by_island)

    def step(_, tree):
        tree = jax.tree.map(lambda x: x[0], tree)
        return islands.sum_between(tree, AXIS)

    found = replicas.pmap(step, out_axes=0)(np.zeros(()), replicas.shard(of_devices))
    for sums, one in zip(*map(jax.tree.leaves, (found, by_island)), strict=True):
        sums = np.asarray(sums)
        assert all(x.tobytes() == sums[0].tobytes() for x in sums)
        # Sums of up to four numbers near 1.
        np.testing.assert_allclose(sums[0], one.sum(0), atol=1e-6)


@pytest.mark.parametrize("method", ["parameter_mean", "diloco"])
def test_an_island_trains_as_a_single_device_would(config, method):
    """Two islands of two devices each are two devices, with different numbers of tokens."""
    choose(config, method, every=2)
    single = train(config, 2)
    assert_same_run(single, train(choose(config, method, islands=2), 4))


@pytest.mark.parametrize(
    ("method", "keys"),
    [("parameter_mean", {}), ("diloco", {"outer_learning_rate": 1.0, "outer_momentum": 0.0})],
)
def test_one_island_is_gradient_mean(config, method, keys):
    """DiLoCo's outer step then takes over the island's parameters."""
    one = train(choose(config, "gradient_mean"), 4)
    assert_same_run(one, train(choose(config, method, every=2, islands=1, **keys), 4))


def test_islands_that_are_devices_change_no_bit(config):
    runs = [train(choose(config, "diloco", every=2, islands=n), 4)[1] for n in (0, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, runs), strict=True))
