"""The predicted efficiency on more devices."""

import pytest

from jaxdp.estimate import scaling
from jaxdp.estimate.scaling import Network
from jaxdp.sync.methods import METHODS
from jaxdp.sync.traffic import Collective

VOCAB = 20


def table(config, bandwidth=1e9, latency=1e-5):
    return scaling.efficiencies(config, VOCAB, 1, 1e12, Network(bandwidth, latency))


def test_efficiency_is_1_on_one_device_and_falls(config):
    for method, by_count in table(config).items():
        values = list(by_count.values())
        assert values[0] == 1, method
        assert values == sorted(values, reverse=True), method
        assert len(set(values)) == len(values), method


def test_fewer_synchronisations_and_more_bandwidth_are_more_efficient(config):
    slow, fast = table(config, 1e8), table(config, 1e10)
    assert set(slow) == set(METHODS)
    for method in METHODS:
        assert slow[method][8] < fast[method][8]
    assert slow["gradient_mean"][8] < slow["diloco"][8]
    assert max(slow["fixed_order"]) == config.sync.virtual_replicas


def test_communication_is_the_rings_formula():
    time = scaling.communication([Collective("all-reduce", 1_000_000, 5)], 4, Network(1e6, 0.25))
    assert time == pytest.approx((2 * 3 / 4 * 1 + 2 * 3 * 0.25) / 5)


def test_islands_send_less_over_the_slow_link(config):
    """Two machines of 4 devices each: between them, a device sends a quarter of the parameters."""
    config.sync.update({"every": 10, "islands": -1})
    network = Network(1e8, 0, inside=1e12, per_host=4)
    found = scaling.efficiencies(config, VOCAB, 1, 1e12, network)
    config.sync.islands = 0
    single = scaling.efficiencies(config, VOCAB, 1, 1e12, network)
    assert found["gradient_mean"] == single["gradient_mean"]
    assert found["diloco"][1] == 1
    cost = {n: 1 / found["diloco"][n] - 1 for n in (4, 8)}
    # Of 8 devices in one ring each sends 7/4 of the parameters, of two islands a quarter.
    assert cost[8] == pytest.approx((1 / single["diloco"][8] - 1) / 7, rel=0.1)
    assert cost[4] < 0.05 * cost[8]
