import json
import math
import re
import runpy

import pytest
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import CHOICES, NEW_KEYS, RANGES
from jaxdp.common.errors import ConfigError
from jaxdp.run import same_run
from jaxdp.step import setup
from support.bad_input import KEYS
from support.configs import changed, with_key
from support.texts import REPOSITORY

SOURCE = (REPOSITORY / "configs" / "default.py").read_text()


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
    assert "model.head_dim = 7: make it even" in refusal(with_key(odd, "model.head_dim", 7))
    setup.validate(with_key(odd, "model.head_dim", 8))


def test_keys_of_the_model_that_do_not_go_together_are_refused(config):
    assert refusal(changed(config, model__bias=True, model__qkv_bias=True)).startswith(
        "model.qkv_bias=True has no meaning with model.bias=True"
    )
    for key, value in (("rotary_factor", 8.0), ("rotary_skip", 4)):
        learned = with_key(config, f"model.{key}", value)
        assert f"model.{key}={value} has no meaning with model.positions='learned'" in (
            refusal(learned)
        )
        rotary = with_key(learned, "model.positions", "rotary")
        setup.validate(rotary)
    bad = changed(rotary, model__rotary_factor=8.0, model__rotary_low=4.0)
    assert "model.rotary_low=4.0 is not below model.rotary_high=4.0" in refusal(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "masked", "model__window": 8}, "model.window=8 has no meaning with obj"),
        ({"objective": "masked", "model__mlp_lookback": 3}, "model.mlp_lookback=3 has no meaning"),
        ({"model__window_skip": 2}, "model.window_skip=2 has no meaning with model.window=0"),
        (
            {"model__window": 8, "model__window_skip": 2, "model__scan_layers": True},
            "model.window_skip=2 needs layers that differ",
        ),
        (
            {"model__head_transform": True, "model__activation": "swiglu"},
            "model.head_transform=True does not go with model.activation='swiglu'",
        ),
    ],
)
def test_models_that_can_not_be_are_refused(config, changes, message):
    assert refusal(changed(config, **changes)).startswith(message)


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
    assert set(CHOICES) | set(RANGES) | set(configs.NOT_IDENTITY) | set(NEW_KEYS) <= set(KEYS)
    groups = {key.split(".")[0] for key in KEYS}
    assert set(configs.IDENTITY) <= set(KEYS) | groups


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_default_config_has_a_comment(key):
    assert comment(key)


@pytest.mark.parametrize(
    "path",  # But finetune.py, which needs a model: see tests/huggingface/test_load.py.
    sorted({*(REPOSITORY / "configs").glob("*.py")} - {REPOSITORY / "configs" / "finetune.py"}),
    ids=lambda p: p.stem,
)
def test_every_config_file_is_valid_once_it_has_data(path, text_file):
    config = runpy.run_path(str(path))["get_config"]()
    config.data.path = config.data.path or str(text_file)
    setup.validate(config)
    assert setup.batch_sizes(config, 1, 1).global_ == config.global_batch_size


def test_a_saved_config_is_loaded_as_it_was(config, tmp_path):
    config.optimizer.learning_rate = 0.1 + 0.2  # Not a short decimal.
    config.sample.prompt = 'Ünïcode\n"quoted"'
    configs.save(config, tmp_path / "config.json")
    loaded = configs.load(tmp_path / "config.json")
    assert configs.flatten(loaded) == configs.flatten(config)
    setup.validate(loaded)
    same_run.check(loaded, config)


def test_a_config_of_before_keys_were_added_has_their_defaults(config, tmp_path):
    values = config.to_dict()
    for key in NEW_KEYS:
        group, _, name = key.rpartition(".")
        del (values[group] if group else values)[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = configs.load(tmp_path / "config.json")
    assert configs.flatten(loaded) == configs.flatten(config)
    with pytest.raises(ConfigError, match=r"model\.norm_position='post' \(was 'pre'\)"):
        same_run.check(with_key(config, "model.norm_position", "post"), loaded)


def test_saving_replaces_the_file_and_leaves_no_other(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("x" * 100_000)
    configs.save(config, path)
    assert json.loads(path.read_text())["seq_len"] == config.seq_len
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "\xff", '{"model": {"a.b": 1}}', '{"data": 3}']
)
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
