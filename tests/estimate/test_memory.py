import importlib

import pytest

from jaxdp.configs import quickstart
from jaxdp.estimate import memory, plan, scaling
from jaxdp.sync.methods import METHODS
from jaxdp.sync.traffic import Collective

VOCAB = 20
# What XLA stores is known by rules, not exactly; its own packing of buffers wastes some, too.
TOLERANCE = 10.0


def table(config, bandwidth=1e9, latency=1e-5):
    return scaling.efficiencies(config, VOCAB, 1, 1e12, bandwidth, latency)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_saves_memory_and_more_layers_need_more(config, scan_layers):
    config.model.scan_layers = scan_layers
    sizes = {}
    for layers in (2, 8):
        for remat in (False, True):
            config.model.num_layers, config.model.remat = layers, remat
            sizes[layers, remat] = memory.predict_memory(config, VOCAB, 1).activations
    assert sizes[2, False] < sizes[8, False]
    assert sizes[8, True] < sizes[8, False] / 2


def test_remat_saves_in_loops_and_else_where_xla_recomputes_late(config, monkeypatch):
    config.model.remat = True
    for late in (False, True):
        monkeypatch.setattr(memory, "recomputes_late", lambda late=late: late)
        config.model.scan_layers = False
        assert memory.remat_saves(config) == late
        config.model.scan_layers = True
        assert memory.remat_saves(config)
        config.model.remat = False
        assert not memory.remat_saves(config)
        config.model.remat = True


def test_sharded_optimizer_state_is_a_share_and_diloco_has_an_outer_one(config):
    def sizes(method):
        config.sync.method = method
        return memory.predict_memory(config, VOCAB, 4)

    whole, sharded, diloco = sizes("gradient_mean"), sizes("sharded"), sizes("diloco")
    # Slices are padded to equal lengths; there are counters besides the moments.
    assert sharded.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert diloco.optimizer == whole.optimizer + whole.parameters
    assert whole.parameters == sharded.parameters == diloco.parameters
    assert sharded.total < whole.total < diloco.total


def test_smaller_parts_of_a_batch_need_less(config):
    whole = memory.predict_memory(config, VOCAB, 1)
    config.grad_accum_steps = 4
    assert memory.predict_memory(config, VOCAB, 1).activations < whole.activations


def test_a_loss_in_chunks_needs_less(config):
    vocab = 5000  # Logits are the most of what is stored.
    whole = memory.predict_memory(config, vocab, 1)
    config.loss_chunks = 4
    chunked = memory.predict_memory(config, vocab, 1)
    assert chunked.activations < whole.activations / 2
    compiled = memory.compiled_memory(config, vocab, 1)
    assert chunked.total == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(("count", "accum"), [(1, 1), (2, 3)])
def test_the_largest_batch_fits_and_the_next_does_not(config, count, accum):
    limit, config.grad_accum_steps = 2_000_000, accum
    largest = memory.largest_batch(config, VOCAB, count, limit)

    def total(per_device):
        config.global_batch_size = per_device * count
        return memory.predict_memory(config, VOCAB, count).total

    assert largest % accum == 0
    assert total(largest) <= limit < total(largest + accum)


def test_no_batch_fits_where_the_parameters_do_not(config):
    assert memory.largest_batch(config, VOCAB, 1, 10_000) == 0


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


SHIPPED = {"quickstart": 4096, "shakespeare_char_cpu": 65, "shakespeare_char": 65}


def error(config, vocab, devices):
    """Percent, as --check prints it."""
    return float(plan.check_rows(config, vocab, devices)["error"].rstrip("%"))


@pytest.mark.parametrize(("devices", "remat"), [(1, False), (2, False), (2, True), (4, False)])
@pytest.mark.parametrize("name", SHIPPED)
def test_predicted_memory_is_near_xlas(name, devices, remat):
    config = importlib.import_module(f"jaxdp.configs.{name}").get_config()
    config.model.remat = remat
    assert abs(error(config, SHIPPED[name], devices)) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_predicted_memory_is_near_xlas_with_every_method(method):
    config = quickstart.get_config()
    config.sync.method = method
    assert abs(error(config, SHIPPED["quickstart"], 4)) < TOLERANCE


@pytest.mark.parametrize("method", ["gradient_mean", "sharded", "diloco"])
def test_predicted_memory_has_the_average_of_parameters(method):
    config = quickstart.get_config()
    config.ema.decay, config.sync.method = 0.999, method
    assert abs(error(config, SHIPPED["quickstart"], 4)) < 15
