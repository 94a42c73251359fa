"""The predicted efficiency on more devices."""

import pytest

from jaxdp.estimate import scaling
from jaxdp.sync.methods import METHODS
from jaxdp.sync.traffic import Collective

VOCAB = 20


def table(config, bandwidth=1e9, latency=1e-5):
    return scaling.efficiencies(config, VOCAB, 1, 1e12, bandwidth, latency)


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
    time = scaling.communication([Collective("all-reduce", 1_000_000, 5)], 4, 1e6, 0.25)
    assert time == pytest.approx((2 * 3 / 4 * 1 + 2 * 3 * 0.25) / 5)
