import json
import math
import re
import runpy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import ADDED, CHOICES, RANGES
from jaxdp.common.errors import ConfigError
from jaxdp.configs import default
from jaxdp.run import preflight
from jaxdp.step import setup
from support.bad_input import KEYS
from support.texts import REPOSITORY

SOURCE = (REPOSITORY / "configs" / "default.py").read_text()


def changed(config, **changes) -> ConfigDict:
    """A copy with other values, of any type, or new keys; a__b stands for a.b."""
    values = config.to_dict()
    for name, value in changes.items():
        *groups, key = name.split("__")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[key] = value
    return ConfigDict(values)


def with_key(config, key: str, value) -> ConfigDict:
    return changed(config, **{key.replace(".", "__"): value})


def refusal(config) -> str:
    with pytest.raises(ConfigError) as error:
        setup.validate(config)
    message = str(error.value)
    assert "\n" not in message
    assert ": " in message, "after the colon comes the way out"
    return message


def in_range(config) -> bool:
    """Whether no key is out of range; two keys may still disagree."""
    try:
        setup.validate(config)
    except ConfigError as error:
        return "out of range" not in str(error)
    return True


def comment(key: str) -> str:
    """The comment behind a key of default.py, or else the lines of comment above it."""
    above = r"((?: *#.*\n)*)"
    match = re.search(rf"{above} *c\.{re.escape(key)} = (?:\"[^\"]*\"|[^\"#\n])*(#.*)?\n", SOURCE)
    assert match, f"default.py doesn't set {key}"
    return match[2] or match[1]


def test_the_test_config_is_valid(config):
    setup.validate(config)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", -1, "from 0 to"),
        ("num_train_steps", 0, "from 1 to"),
        ("seq_len", 1, "from 2 to"),
        ("seq_len", "16", "give a int"),
        ("data.path", "", "data.path=FILE.txt"),
        ("data.eval_fraction", 1.0, "to 0.99"),
        ("objective", "seq2seq", "causal, masked"),
        ("init_from", "gpt2", "hf:FOLDER or hf:NAME"),
        ("model.positions", "alibi", "learned, rotary"),
        ("model.dtype", "float16", "float32, bfloat16"),
        ("model.tied_head", 1, "give a bool"),
        ("model.num_layers", True, "give a int"),
        ("model.num_layers", 2.0, "give a int"),
        ("model.num_heads", 3, "embed_dim=16"),
        ("loss_chunks", 3, "does not divide seq_len="),
        ("model.num_kv_heads", 4, "choose a divisor"),
        ("model.dropout", 1.0, "from 0 to 0.99"),
        ("model.dropout", False, "give a float"),
        ("optimizer.name", "adam", "adamw, lion, sgd, muon"),
        ("optimizer.learning_rate", math.nan, "give a float"),
        ("optimizer.learning_rate", math.inf, "give a float"),
        ("optimizer.warmup_steps", 6, "num_train_steps=6"),
        ("optimizer.b2", 1.0, "0.999999"),
        ("num_trainsteps", 5, "num_train_steps"),
        ("xyzzy", 5, "configs/default.py"),
        ("model", None, "did you mean"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_way_out(config, key, value, says):
    message = refusal(with_key(config, key, value))
    assert key in message
    assert repr(value) in message
    assert says in message


def test_an_odd_head_width_is_refused_for_rotary_positions(config):
    odd = changed(config, model__positions="rotary", model__embed_dim=6, model__num_heads=2)
    assert "model.num_heads" in refusal(odd)
    setup.validate(with_key(odd, "model.positions", "learned"))


@pytest.mark.parametrize("key", RANGES)
def test_a_range_is_closed_at_both_ends(config, key):
    whole = type(KEYS[key]) is int
    for border, beyond in zip(RANGES[key], (-math.inf, math.inf), strict=True):
        if border == math.inf:
            continue
        outside = border + (1 if beyond > 0 else -1) if whole else math.nextafter(border, beyond)
        message = refusal(with_key(config, key, outside))
        assert message.startswith(f"{key}={outside} is out of range")
        assert str(border) in message
        assert in_range(with_key(config, key, border if whole else float(border)))


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_accepted_and_named_in_the_default_config(config, key):
    for choice in CHOICES[key]:
        setup.validate(with_key(config, key, choice))
        assert f'"{choice}"' in comment(key)


@pytest.mark.parametrize("key", KEYS)
def test_no_key_takes_a_value_of_another_type(config, key):
    message = refusal(with_key(config, key, None))
    assert message.startswith(f"{key}=None ")
    assert type(KEYS[key]).__name__ in message


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(config, key):
    values = config.to_dict()
    *group, name = key.split(".")
    del (values[group[0]] if group else values)[name]
    assert refusal(ConfigDict(values)).startswith(f"{key} is missing")


@pytest.mark.parametrize("key", [key for key, value in KEYS.items() if type(value) is float])
def test_an_int_serves_as_a_float(config, key):
    low, high = RANGES[key]
    whole = math.ceil(low)
    if whole <= high:
        setup.validate(with_key(config, key, whole))


def test_every_number_has_a_range():
    numbers = {key for key, value in KEYS.items() if type(value) in (int, float)}
    assert numbers == set(RANGES)


def test_every_check_is_of_a_key_that_exists():
    assert set(CHOICES) | set(RANGES) | set(configs.NOT_IDENTITY) | set(ADDED) <= set(KEYS)
    groups = {key.split(".")[0] for key in KEYS}
    assert set(configs.IDENTITY) <= set(KEYS) | groups


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_default_config_has_a_comment(key):
    assert comment(key)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.py")), ids=lambda p: p.stem
)
def test_every_config_file_is_valid_once_it_has_data(path, text_file):
    config = runpy.run_path(str(path))["get_config"]()
    config.data.path = config.data.path or str(text_file)
    setup.validate(config)
    assert setup.batch_sizes(config, 1, 1).global_ == config.global_batch_size


def test_batch_sizes_go_down_to_one_forward_pass(config):
    config.global_batch_size, config.grad_accum_steps = 96, 3
    sizes = setup.batch_sizes(config, process_count=2, device_count=8)
    assert sizes == setup.BatchSizes(global_=96, per_host=48, per_device=12, micro=4)


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
        preflight.check_same_run(with_key(config, key, value), config)
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
    preflight.check_same_run(with_key(config, key, value), config)


def test_all_keys_that_differ_are_named_at_once(config):
    with pytest.raises(ConfigError, match=r"model\.norm=.*seed=1"):
        preflight.check_same_run(changed(config, seed=1, model__norm="rmsnorm"), config)


def test_a_model_key_that_the_saved_config_lacks_counts_as_a_difference(config):
    saved = config.to_dict()
    del saved["model"]["bias"]
    with pytest.raises(ConfigError, match=r"model\.bias=False \(was None\)"):
        preflight.check_same_run(config, ConfigDict(saved))


def test_a_saved_config_is_loaded_as_it_was(config, tmp_path):
    config.optimizer.learning_rate = 0.1 + 0.2  # Not a short decimal.
    config.sample.prompt = 'Ünïcode\n"quoted"'
    configs.save(config, tmp_path / "config.json")
    loaded = configs.load(tmp_path / "config.json")
    assert configs.flatten(loaded) == configs.flatten(config)
    setup.validate(loaded)
    preflight.check_same_run(loaded, config)


def test_a_config_of_before_keys_were_added_has_their_defaults(config, tmp_path):
    values = config.to_dict()
    for key in ADDED:
        group, _, name = key.rpartition(".")
        del (values[group] if group else values)[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = configs.load(tmp_path / "config.json")
    assert configs.flatten(loaded) == configs.flatten(config)
    with pytest.raises(ConfigError, match=r"model\.norm_position='post' \(was 'pre'\)"):
        preflight.check_same_run(with_key(config, "model.norm_position", "post"), loaded)


def test_saving_replaces_the_file_and_leaves_no_other(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("x" * 100_000)
    configs.save(config, path)
    assert json.loads(path.read_text())["seq_len"] == config.seq_len
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff", '{"model": {"a.b": 1}}'])
def test_a_damaged_config_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"\A{path} is damaged \(.+\): restore .*\Z"):
        configs.load(path)


@pytest.mark.parametrize("name", ["config.json", "file/config.json"])
def test_a_missing_config_points_to_the_workdir(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"does not exist: --workdir"):
        configs.load(tmp_path / name)


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
            {"sync__method": "sharded", "optimizer__name": "muon"},
            "optimizer.name='muon' needs whole matrices, of which sync.method='sharded'",
        ),
        (
            {"sync__method": "diloco", "sync__dtype": "bfloat16"},
            "sync.dtype='bfloat16' is for gradients, and sync.method='diloco' sends float32",
        ),
        (
            {"sync__method": "fixed_order", "sync__virtual_replicas": 12},
            "sync.virtual_replicas=12 is no power of two",
        ),
        (
            {"sync__method": "fixed_order", "grad_accum_steps": 2},
            "grad_accum_steps=2 has no meaning with sync.method='fixed_order': leave it at 1",
        ),
        (
            {"sync__method": "parameter_mean", "sync__every": 2},
            "eval_every=3 is no multiple of sync.every=2, and replicas agree only then: use 4",
        ),
        (
            {"sync__method": "diloco", "sync__every": 3, "checkpoint__every": 10},
            "checkpoint.every=10 is no multiple of sync.every=3, and replicas agree only then: "
            "use 12",
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
    with pytest.raises(ConfigError, match=r"sync\.virtual_replicas=8 can't be split equally"):
        setup.batch_sizes(changed(config, **changes), 1, devices)


@pytest.mark.parametrize("method", ["sharded", "fixed_order", "parameter_mean"])
def test_a_run_may_go_on_with_a_method_of_the_same_state(config, method):
    preflight.check_same_run(changed(config, sync__method=method), config)


def test_an_average_begins_with_the_run_but_may_decay_otherwise(config):
    old = config.copy_and_resolve_references()
    old.ema.decay = 0.99
    with pytest.raises(ConfigError, match=r"different run: ema\.decay=0\.0 \(was 0\.99\)"):
        preflight.check_same_run(config, old)
    with pytest.raises(ConfigError, match=r"different run: ema\.decay=0\.99 \(was 0\.0\)"):
        preflight.check_same_run(old, config)
    other = old.copy_and_resolve_references()
    other.ema.decay = 0.9
    preflight.check_same_run(other, old)
    del old.ema  # As a version without the key saved it.
    preflight.check_same_run(config, old)


@pytest.mark.parametrize("methods", [("diloco", "sharded"), ("gradient_mean", "diloco")])
def test_a_run_may_not_change_to_or_from_diloco(config, methods):
    new, old = (changed(config, sync__method=method) for method in methods)
    with pytest.raises(ConfigError, match=rf"sync\.method='{methods[0]}' \(was '{methods[1]}'\)"):
        preflight.check_same_run(new, old)
