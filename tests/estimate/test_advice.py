"""Which way to synchronise is advised."""

import re

import pytest

from jaxdp.common import config as configs
from jaxdp.estimate import advice, scaling
from jaxdp.estimate.advice import ENOUGH, WAYS, best, ways
from jaxdp.estimate.plan import plan
from jaxdp.estimate.scaling import Network
from jaxdp.step.setup import validate

VOCAB = 20


def found(config, bandwidth, devices=8, hosts=1, inside=0.0):
    network = Network(bandwidth, 0, inside, devices // hosts)
    return ways(config, VOCAB, devices, hosts, 1e9, network)


def test_the_slower_the_links_the_larger_the_change(config):
    """From the mean gradient on links without limit to the last way, and then to none."""
    chosen = [best(found(config, 10.0**n)) for n in range(12, 0, -1)]
    places = [WAYS.index(x.keys) if x else len(WAYS) for x in chosen]
    assert places[0] == 0 and places[-1] == len(WAYS)
    assert places == sorted(places) and len(set(places)) > 3
    for way in chosen:
        assert way is None or way.efficiency >= ENOUGH


def test_the_efficiency_is_that_of_the_methods(config):
    """The first and the fourth way are in the table of `efficiencies`, too, but for the bits."""
    network = Network(1e6, 1e-4)
    first = ways(config, VOCAB, 4, 1, 1e9, network)[0]
    table = scaling.efficiencies(config, VOCAB, 4, 1e9, network)
    assert first.efficiency == pytest.approx(table["gradient_mean"][4])


def test_machines_of_several_devices_are_islands(config):
    """Of two machines of four, a device sends an eighth of what it does as an island of its own."""
    islands, single = found(config, 1e6, hosts=2, inside=1e12), found(config, 1e6)
    assert [x.keys.get("islands") for x in islands] == [None, None, None, 2, 2, 2, 2]
    assert not any("islands" in x.keys for x in [*single, *found(config, 1e6, hosts=8)])
    # 2 (N-1)/N of a quarter of the bytes, N = 2; and of all of them, N = 8; to whole blocks.
    assert islands[3].sent / single[3].sent == pytest.approx(1 / 4 / (7 / 4), rel=0.2)


def test_ways_are_the_same_whatever_the_config_has(config):
    """And a run with its flags is valid."""
    before = found(config, 1e6)
    config.update({"eval_every": 500, "log_every": 10})
    config.checkpoint.every = 500
    config.sync.update(
        {"method": "diloco", "every": 100, "fragments": 20, "delay": 4, "islands": 2}
    )
    after = found(config, 1e6)
    assert [x[:1] + x[2:] for x in after] == [x[:1] + x[2:] for x in before]
    for way in after:
        other = config.copy_and_resolve_references()
        flags = re.findall(r"--config\.(\S+)=(\S+)", way.flags)
        assert "sync.fragments" in dict(flags)
        with other.ignore_type():
            for key, text in flags:
                kind = type(configs.flatten(config)[key])
                other.update_from_flattened_dict({key: kind(text)})
        validate(other)
        assert other.sync.islands == 0 and other.eval_every % way.keys.get("every", 1) == 0


def test_a_plan_of_several_devices_ends_with_advice(config):
    def shown(**options):
        return repr(plan(config, tflops=1e-4, memory_gib=1e-6, report=lambda line: None, **options))

    fast, slow = (shown(devices=4, bandwidth_gbps=x) for x in (1e4, 1e-6))
    assert (
        "advice" in fast
        and "--config.sync.method=gradient_mean --config.sync.dtype=float32 (" in fast
    )
    assert "none reaches 90%" in slow and "diloco, every 6, ternary" in slow
    assert "advice" not in shown(devices=1)
    assert advice.rows([])["advice"].startswith("none reaches")
