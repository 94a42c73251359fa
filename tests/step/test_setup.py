"""The setup of a run: which keys of a config go together, and what is built from them."""

import importlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdp.common.choices import CHOICES
from jaxdp.common.errors import ConfigError
from jaxdp.configs import default
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.step import setup
from jaxdp.step.optimizer import get_schedule
from jaxdp.sync.methods import METHODS
from support.configs import changed
from support.texts import REPOSITORY

CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
CONFIGS.remove("finetune")  # It needs a model: see tests/huggingface/test_load.py.


@pytest.mark.parametrize("key", ["sync.method", "sync.dtype"])
def test_the_choices_of_a_method_are_what_the_methods_say(key):
    dtypes = {dtype for method in METHODS.values() for dtype in method.dtypes}
    known = {"sync.method": set(METHODS), "sync.dtype": dtypes}
    assert set(CHOICES[key]) == known[key]


@pytest.mark.parametrize("steps", [1, 9, 20, 100])
def test_a_warm_up_longer_than_the_run_is_a_tenth_of_it(config, steps):
    config.num_train_steps, config.optimizer.warmup_steps = steps, 100
    said = []
    setup.resolve_steps(config, Feed(config, None), said.append)
    assert config.optimizer.warmup_steps == steps // 10
    assert f"The warm-up of 100 steps is shortened to {steps // 10}" in said[0]
    setup.resolve_steps(config, Feed(config, None), said.append)
    assert len(said) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_short_run_of_every_config_is_valid(name):
    config = importlib.import_module(f"jaxdp.configs.{name}").get_config()
    config.data.path = config.data.path or "reference.txt"
    config.num_train_steps = 20
    setup.validate(config)
    setup.resolve_steps(config, Feed(config, None), lambda line: None)
    rates = [float(get_schedule(config)(step)) for step in range(20)]
    assert max(rates) == pytest.approx(config.optimizer.learning_rate)


def test_num_epochs_are_counted_in_steps(config):
    config.num_epochs, config.optimizer.warmup_steps = 2, 2
    feed = Feed(config, open_cache(config))
    setup.resolve_steps(config, feed, pytest.fail)
    assert config.num_train_steps == feed.epoch_steps() > 0


def test_a_setup_is_shown_in_a_line(config):
    text = repr(setup.make_setup(config, 20, 4))
    assert "4 devices" in text and len(text) < 100


def test_batch_sizes_go_down_to_one_forward_pass(config):
    config.global_batch_size, config.grad_accum_steps = 96, 3
    sizes = setup.batch_sizes(config, process_count=2, device_count=8)
    assert sizes == setup.BatchSizes(global_=96, per_host=48, per_device=12, micro=4)
    config.update({"grad_accum_steps": 1})
    config.sync.update({"method": "fixed_order", "virtual_replicas": 32})
    assert setup.batch_sizes(config, process_count=2, device_count=8).micro == 3


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))
@settings(deadline=None)
def test_a_batch_splits_equally_or_the_nearest_that_do_are_named(total, accum, processes, local):
    config = default.get_config()
    config.global_batch_size, config.grad_accum_steps = total, accum
    devices = processes * local
    try:
        sizes = setup.batch_sizes(config, processes, devices)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(f"global_batch_size={total} ")
        assert f"grad_accum_steps={accum}" in message
        suggested = [int(n) for n in re.findall(r"\d+", message.partition(": use ")[2])]
        fits = [n for n in range(1, 2 * total + devices * accum) if n % (devices * accum) == 0]
        below, above = [n for n in fits if n < total], [n for n in fits if n > total]
        assert suggested == [*below[-1:], above[0]]
    else:
        assert sizes.micro * accum * devices == sizes.per_device * devices == total
        assert sizes.per_host * processes == sizes.global_ == total


def test_wandb_is_refused_where_it_is_not_installed(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config.wandb_project = "mine"
    with pytest.raises(ConfigError, match="wandb_project='mine' needs the package wandb"):
        setup.validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sync__method": "allreduce"}, "sync.method='allreduce' is unknown: choose one of"),
        ({"sync__dtype": "float16"}, "sync.dtype='float16' is unknown"),
        (
            {"sync__method": "sharded", "sync__dtype": "int4", "optimizer__name": "muon"},
            "sync.dtype='int4' does not go with sync.method='sharded' and optimizer.name='muon'",
        ),
        (
            {"sync__method": "diloco", "sync__dtype": "bfloat16"},
            "sync.dtype='bfloat16' is nothing that sync.method='diloco' sends, which is float32 or",
        ),
        (
            {"sync__method": "sharded", "sync__islands": 2},
            "sync.islands=2 has no meaning with sync.method='sharded': set it to 0, or use",
        ),
        (
            {"sync__method": "fixed_order", "sync__virtual_replicas": 12},
            "sync.virtual_replicas=12 is not a power of two",
        ),
        (
            {"sync__method": "fixed_order", "grad_accum_steps": 2},
            "grad_accum_steps=2 has no meaning with sync.method='fixed_order': leave it at 1",
        ),
        (
            {"sync__method": "parameter_mean", "sync__every": 2},
            "eval_every=3 is not a multiple of sync.every=2, the steps between synchronisations: "
            "use 4",
        ),
        (
            {"sync__method": "diloco", "sync__every": 3, "checkpoint__every": 10},
            "checkpoint.every=10 is not a multiple of sync.every=3, the steps between "
            "synchronisations: use 12",
        ),
        (
            {"sync__method": "diloco", "sync__every": 10, "sync__fragments": 4},
            "sync.every=10 is not a multiple of sync.fragments=4, of which one is sent every "
            "sync.every / sync.fragments steps: use sync.every=12",
        ),
        (
            {"sync__method": "diloco", "sync__every": 12, "sync__fragments": 4, "sync__delay": 3},
            "sync.delay=3 is too long: with sync.every=12 and sync.fragments=4 the next exchange "
            "comes 3 steps later: use at most 2",
        ),
        (
            {"sync__method": "diloco", "sync__every": 8, "sync__fragments": 4},
            "eval_every=3 is not a multiple of sync.every / sync.fragments=2, the steps between "
            "synchronisations: use 4",
        ),
        (
            {"sync__method": "parameter_mean", "sync__fragments": 3},
            "sync.fragments=3 has no meaning with sync.method='parameter_mean': set it to 1, or "
            "use 'diloco'",
        ),
        (
            {"sync__method": "gradient_mean", "sync__delay": 1},
            "sync.delay=1 has no meaning with sync.method='gradient_mean': set it to 0, or use "
            "'diloco'",
        ),
        (
            {"sync__method": "sharded", "sync__after": 3},
            "sync.after=3 has no meaning with sync.method='sharded'",
        ),
    ],
)
def test_what_does_not_go_together_in_sync_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        setup.validate(changed(config, **changes))


@pytest.mark.parametrize(("devices", "batch"), [(3, 24), (16, 16), (4, 12)])
def test_virtual_replicas_have_to_be_split_equally(config, devices, batch):
    changes = {"sync__method": "fixed_order", "global_batch_size": batch}
    with pytest.raises(ConfigError, match=r"sync\.virtual_replicas=8 has to be a multiple of"):
        setup.batch_sizes(changed(config, **changes), 1, devices)
