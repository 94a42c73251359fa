"""Which runs may go on in a workdir."""

import pytest
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError
from jaxdp.run import same_run
from support.configs import changed, with_key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "byte"),
        ("objective", "masked"),
        ("seq_len", 32),
        ("seed", 1),
        ("model.num_layers", 3),
        ("model.tied_head", False),
        ("optimizer.name", "lion"),
    ],
)
def test_a_workdir_of_another_model_is_refused(config, key, value):
    with pytest.raises(ConfigError) as error:
        same_run.check(with_key(config, key, value), config)
    old = configs.flatten(config)[key]
    assert f"{key}={value!r} (was {old!r})" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_steps", 100),
        ("global_batch_size", 16),
        ("grad_accum_steps", 2),
        ("data.path", "moved.txt"),
        ("model.dropout", 0.5),
        ("model.dtype", "bfloat16"),
        ("model.remat", True),
        ("optimizer.learning_rate", 1.0),
        ("optimizer.schedule", "linear"),
        ("checkpoint.every", 7),
    ],
)
def test_a_run_may_go_on_with_another_length_batch_or_schedule(config, key, value):
    same_run.check(with_key(config, key, value), config)


def test_all_keys_that_differ_are_named_at_once(config):
    with pytest.raises(ConfigError, match=r"model\.norm=.*seed=1"):
        same_run.check(changed(config, seed=1, model__norm="rmsnorm"), config)


def test_a_model_key_that_the_saved_config_lacks_counts_as_a_difference(config):
    saved = config.to_dict()
    del saved["model"]["bias"]
    with pytest.raises(ConfigError, match=r"model\.bias=False \(was None\)"):
        same_run.check(config, ConfigDict(saved))


@pytest.mark.parametrize("method", ["sharded", "fixed_order", "parameter_mean"])
def test_a_run_may_go_on_with_a_method_of_the_same_state(config, method):
    same_run.check(changed(config, sync__method=method), config)


def test_an_average_begins_with_the_run_but_may_decay_otherwise(config):
    old = config.copy_and_resolve_references()
    old.ema.decay = 0.99
    with pytest.raises(ConfigError, match=r"different run: ema\.decay=0\.0 \(was 0\.99\)"):
        same_run.check(config, old)
    with pytest.raises(ConfigError, match=r"different run: ema\.decay=0\.99 \(was 0\.0\)"):
        same_run.check(old, config)
    other = old.copy_and_resolve_references()
    other.ema.decay = 0.9
    same_run.check(other, old)
    del old.ema  # As a version without the key saved it.
    same_run.check(config, old)


@pytest.mark.parametrize("methods", [("diloco", "sharded"), ("gradient_mean", "diloco")])
def test_a_run_may_not_change_to_or_from_diloco(config, methods):
    new, old = (changed(config, sync__method=method) for method in methods)
    with pytest.raises(ConfigError, match=rf"sync\.method='{methods[0]}' \(was '{methods[1]}'\)"):
        same_run.check(new, old)


@pytest.mark.parametrize("key", ["fragments", "delay"])
def test_fragments_stay_what_they_are(config, key):
    """Only with them, or with a delay, do devices have parameters of their own."""
    old = changed(config, sync__method="diloco")
    new = with_key(old, f"sync.{key}", 2)
    for a, b in ((new, old), (old, new)):
        values = rf"sync\.{key}={a.sync[key]} \(was {b.sync[key]}\)"
        with pytest.raises(ConfigError, match=values):
            same_run.check(a, b)
    same_run.check(with_key(new, "sync.delay", 1), with_key(new, "sync.delay", 3))
    del old.sync.fragments, old.sync.delay  # As a version without the keys saved it.
    same_run.check(changed(config, sync__method="diloco"), old)


def test_the_momentum_of_sgd_is_a_state_or_none(config):
    """AdamW has one whatever its rate."""
    old = changed(config, optimizer__name="sgd")
    with pytest.raises(ConfigError, match=r"different run: optimizer\.b1=0\.0 \(was 0\.9\)"):
        same_run.check(with_key(old, "optimizer.b1", 0.0), old)
    same_run.check(with_key(old, "optimizer.b1", 0.5), old)
    same_run.check(with_key(config, "optimizer.b1", 0.0), config)
