"""Checks the keys of a run's config, and writes and reads its config.json.

A wrong key is refused before anything is compiled, by a `ConfigError` whose single line names the
key, its value and the way out. `step.setup` checks keys against each other.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common.choices import CHOICES, NEW_KEYS, RANGES
from jaxdp.common.errors import ConfigError, check_text, shown
from jaxdp.common.files import write_atomically
from jaxdp.configs import default

# A run can't use the checkpoints of another one that differs in one of these keys.
IDENTITY = (
    "tokenizer",
    "objective",
    "seq_len",
    "seed",
    "init_from",
    "model",
    "optimizer.name",
)
# Exceptions to IDENTITY: they change how the model is computed, not its parameters.
NOT_IDENTITY = ("model.dropout", "model.attention_dropout", "model.dtype", "model.remat")


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config into {"group.key": value}.

    Examples:
      >>> flatten({"seed": 0, "model": {"num_layers": 4}})
      {'seed': 0, 'model.num_layers': 4}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_value(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """Returns a copy of a config with another value for a key such as "model.remat"."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict({key: value})
    return config


def check_values(config: ConfigDict) -> None:
    """Checks each key of a config by itself.

    Raises:
      ConfigError: a key is unknown or missing, of the wrong type, or out of range, or
        `config` is no ConfigDict.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"the config is of type {type(config).__name__}: give a ConfigDict, as get_config() of "
            "configs/default.py returns"
        )
    flat = flatten(config)
    check_known(flat)
    _check_values(flatten(default.get_config()), flat)


def check_known(flat: dict[str, Any]) -> None:
    """Raises ConfigError for a key that configs/default.py doesn't have.

    Args:
      flat: a config as {"group.key": value}.
    """
    known = flatten(default.get_config())
    for key, value in flat.items():
        group = any(name.startswith(f"{key}.") for name in known)
        if group and isinstance(value, ConfigDict | dict):  # An empty group; reported as missing.
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see configs/default.py for all keys"
            raise ConfigError(f"{key}={shown(value)} is no key of the config: {hint}")


def _check_values(known: dict[str, Any], flat: dict[str, Any]) -> None:
    """Checks the keys of a flat config against the `known` keys with their default values."""
    _check_types(known, flat)
    for key in [key for key in CHOICES if key in known]:
        if flat[key] not in CHOICES[key]:
            raise ConfigError(
                f"{key}={shown(flat[key])} is unknown: choose one of {', '.join(CHOICES[key])}"
            )
    for key in [key for key in RANGES if key in known]:
        low, high = RANGES[key]
        if not low <= flat[key] <= high:
            raise ConfigError(
                f"{key}={shown(flat[key])} is out of range: give a value from {low} to {high}"
            )


def _check_types(known: dict[str, Any], flat: dict[str, Any]) -> None:
    for key, standard in known.items():
        if key not in flat:
            raise ConfigError(f"{key} is missing: start from configs/default.py, which sets it")
        value, kind = flat[key], type(standard)
        # An int is accepted as a float; a bool, which Python counts as an int, as neither.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (type(value) is float and not math.isfinite(value)):
            raise ConfigError(f"{key}={shown(value)} has the wrong type: give a {kind.__name__}")
        if kind is str:
            check_text(key, value)


def check_model(config: ConfigDict) -> None:
    """Checks that the model's sizes fit together; raises ConfigError where they don't."""
    model = config.model
    if config.seq_len % config.loss_chunks:
        raise ConfigError(
            f"loss_chunks={config.loss_chunks} does not divide seq_len={config.seq_len}: choose a "
            "divisor, or 1"
        )
    if model.embed_dim % model.num_heads and not model.head_dim:
        raise ConfigError(
            f"model.embed_dim={model.embed_dim} is not divisible by model.num_heads="
            f"{model.num_heads}: make it a multiple, or set model.head_dim"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads="
            f"{model.num_heads}: choose a divisor, or 0 for all"
        )
    if model.bias and model.qkv_bias:
        raise ConfigError(
            "model.qkv_bias=True has no meaning with model.bias=True, which adds these biases too: "
            "set one of them to False"
        )
    if model.head_transform and model.activation == "swiglu":
        raise ConfigError(
            "model.head_transform=True does not go with model.activation='swiglu', which needs two "
            "inputs: set it to False, or choose another activation"
        )
    _check_rotary(model)
    _check_one_sided(config)
    _check_window(config.model)


def _check_one_sided(config: ConfigDict) -> None:
    for key in ("window", "mlp_lookback"):
        if config.model[key] and config.objective != "causal":
            raise ConfigError(
                f"model.{key}={config.model[key]} has no meaning with objective="
                f"{config.objective!r}, where tokens see both sides: use 0"
            )


def _check_window(model: ConfigDict) -> None:
    window, skip = model.window, model.window_skip
    if skip and not window:
        raise ConfigError(
            f"model.window_skip={skip} has no meaning with model.window=0: give a window, or use 0"
        )
    if skip and model.scan_layers:
        raise ConfigError(
            f"model.window_skip={skip} needs layers that differ, which model.scan_layers=True "
            "can't have: set one of them to 0 or False"
        )


def _check_rotary(model: ConfigDict) -> None:
    width = model.head_dim or model.embed_dim // model.num_heads
    if model.positions == "rotary" and width % 2:
        fix = "make it even" if model.head_dim else "change model.embed_dim or model.num_heads"
        found = "model.head_dim" if model.head_dim else "embed_dim / num_heads"
        raise ConfigError(
            f"model.positions='rotary' needs an even head width, not {found} = {width}: {fix}"
        )
    if model.positions != "rotary" and (model.rotary_factor != 1 or model.rotary_skip):
        key = "rotary_skip" if model.rotary_skip else "rotary_factor"
        raise ConfigError(
            f"model.{key}={model[key]} has no meaning with model.positions={model.positions!r}: "
            "use 'rotary'"
        )
    if model.rotary_factor != 1 and model.rotary_low >= model.rotary_high:
        raise ConfigError(
            f"model.rotary_low={model.rotary_low} is not below model.rotary_high="
            f"{model.rotary_high}: choose a smaller value; Llama 3 has 1 and 4"
        )


def save(config: ConfigDict, path: Path) -> None:
    """Writes a fully resolved config as JSON."""
    write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads a config.json that `save` wrote.

    Raises:
      ConfigError: there is no such file, or it is no config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        defaults = flatten(default.get_config())
        _add_missing(values, defaults)
        config = ConfigDict(values)
        _check_saved(config, defaults)
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist: --workdir must be the folder of a training run"
        ) from None
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it from a copy") from None


def _add_missing(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Adds keys that an older version's config lacks; it behaved as their defaults.

    Raises:
      TypeError: a group holds no keys.
    """
    for key, value in defaults.items():
        group, _, name = key.rpartition(".")
        inner = values.get(group, {}) if group else values
        if not isinstance(inner, dict):
            raise TypeError(f"{group} holds no keys")
        if key in NEW_KEYS:
            inner.setdefault(name, value)


def _check_saved(config: ConfigDict, defaults: dict[str, Any]) -> None:
    """Checks only the IDENTITY keys of a saved config, so that other versions can read it."""
    flat, known = identity(flatten(config)), identity(defaults)
    unknown = flat.keys() - known.keys()
    if unknown:
        raise ConfigError(f"{min(unknown)} is unknown to this version")
    _check_values(known, flat)
    check_model(config)


def identity(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the IDENTITY keys of a flat config; runs that share checkpoints agree in them."""
    return {
        key: value
        for key, value in flat.items()
        if any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
    }
