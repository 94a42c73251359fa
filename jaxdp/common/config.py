"""Validation of a config, and the sizes that follow from it.

Everything a user can get wrong in a config is refused here, before anything is compiled, by a
`ConfigError` whose single line names the key, its value and the way out.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common.choices import ADDED, CHOICES, RANGES
from jaxdp.common.errors import ConfigError, check_text, shown
from jaxdp.common.files import write_whole
from jaxdp.configs import default

# A checkpoint is of no use to a run that differs in one of these.
IDENTITY = (
    "tokenizer",
    "objective",
    "seq_len",
    "seed",
    "init_from",
    "model",
    "optimizer.name",
)
# ... except in these, which change how the model is computed, not what it is.
NOT_IDENTITY = ("model.dropout", "model.dtype", "model.remat")


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, from all processes down to one forward pass."""

    global_: int
    per_host: int
    per_device: int
    micro: int


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {"group.key": value} of a nested config.

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


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without looking at the data or the devices.

    Raises:
      ConfigError: for an unknown or missing key, a wrong type, or an impossible value.
    """
    check_values(config)
    if not config.data.path:
        raise ConfigError(
            "data.path='' names no data: give --config.data.path=FILE.txt, text:GLOB or tfds:NAME"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_project={shown(config.wandb_project)} needs the package wandb: pip install "
            "'jaxdp[wandb]', or leave it empty"
        )
    if config.data.prompt_key and config.data.packing != "padded":
        raise ConfigError(
            f"data.prompt_key={shown(config.data.prompt_key)} has no meaning with data.packing="
            f"{config.data.packing!r}: use 'padded', or leave it empty"
        )
    if config.init_from and not config.init_from.startswith("hf:"):
        raise ConfigError(
            f"init_from={shown(config.init_from)} is unknown: write hf:FOLDER or hf:NAME"
        )
    profile = config.profile
    if profile.num_steps and profile.start_step + profile.num_steps > config.num_train_steps:
        raise ConfigError(
            f"profile.start_step={profile.start_step} and profile.num_steps={profile.num_steps} "
            f"reach beyond num_train_steps={config.num_train_steps}: make them smaller"
        )
    _check_model(config)
    _check_sync(config)
    optimizer = config.optimizer
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= config.num_train_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves no step to train: make it "
            f"smaller than num_train_steps={config.num_train_steps}"
        )


def check_values(config: ConfigDict) -> None:
    """Checks each key alone: that it is known, of the right type, and within its range.

    Raises:
      ConfigError: it isn't.
    """
    flat = flatten(config)
    check_known(flat)
    _check_values(flatten(default.get_config()), flat)


def check_known(flat: dict[str, Any]) -> None:
    """Raises ConfigError for a key that configs/default.py doesn't have.

    Args:
      flat: {"group.key": value}.
    """
    known = flatten(default.get_config())
    for key, value in flat.items():
        group = any(name.startswith(f"{key}.") for name in known)
        if group and isinstance(value, ConfigDict | dict):  # An empty one: its keys are missing.
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see configs/default.py for all keys"
            raise ConfigError(f"{key}={shown(value)} is no key of the config: {hint}")


def _check_values(known: dict[str, Any], flat: dict[str, Any]) -> None:
    """Checks those keys of `flat` that are in `known`, which has their defaults."""
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
        # An int serves as a float; a bool, though Python calls it an int, serves as neither.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (type(value) is float and not math.isfinite(value)):
            raise ConfigError(f"{key}={shown(value)} has the wrong type: give a {kind.__name__}")
        if kind is str:
            check_text(key, value)


def _check_model(config: ConfigDict) -> None:
    model = config.model
    if config.seq_len % config.loss_chunks:
        raise ConfigError(
            f"loss_chunks={config.loss_chunks} does not divide seq_len={config.seq_len}: choose a "
            "divisor, or 1"
        )
    if model.embed_dim % model.num_heads:
        raise ConfigError(
            f"model.embed_dim={model.embed_dim} is not divisible by model.num_heads="
            f"{model.num_heads}: make it a multiple"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads="
            f"{model.num_heads}: choose a divisor, or 0 for all"
        )
    if model.positions == "rotary" and model.embed_dim // model.num_heads % 2:
        raise ConfigError(
            f"model.positions='rotary' needs an even head width, not embed_dim / num_heads = "
            f"{model.embed_dim // model.num_heads}: change model.embed_dim or model.num_heads"
        )


def _check_sync(config: ConfigDict) -> None:
    c = config.sync
    if c.method == "sharded" and config.optimizer.name == "muon":
        raise ConfigError(
            "optimizer.name='muon' needs whole matrices, of which sync.method='sharded' gives each "
            "device a slice: use another of the two"
        )
    if c.dtype != "float32" and c.method not in ("gradient_mean", "sharded"):
        raise ConfigError(
            f"sync.dtype={c.dtype!r} is for gradients, and sync.method={c.method!r} sends "
            "float32: use sync.method='gradient_mean' or 'sharded'"
        )
    if c.method == "fixed_order":
        if c.virtual_replicas & (c.virtual_replicas - 1):
            raise ConfigError(
                f"sync.virtual_replicas={c.virtual_replicas} is no power of two: use 8, or another"
            )
        if config.grad_accum_steps != 1:
            raise ConfigError(
                f"grad_accum_steps={config.grad_accum_steps} has no meaning with "
                "sync.method='fixed_order': leave it at 1 and raise sync.virtual_replicas"
            )
    if c.method in ("parameter_mean", "diloco"):
        for key in ("eval_every", "checkpoint.every", "sync.after"):
            value = flatten(config)[key]
            if value % c.every:
                raise ConfigError(
                    f"{key}={value} is no multiple of sync.every={c.every}, and replicas agree "
                    f"only then: use {value // c.every * c.every + c.every}, or another sync.every"
                )
    if c.after and c.method != "parameter_mean":
        raise ConfigError(
            f"sync.after={c.after} has no meaning with sync.method={c.method!r}: set it to 0, or "
            "use 'parameter_mean'"
        )


def batch_sizes(config: ConfigDict, process_count: int, device_count: int) -> BatchSizes:
    """Splits the global batch equally; raises ConfigError where it can't be.

    Examples:
      >>> batch_sizes(default.get_config(), process_count=2, device_count=8)
      BatchSizes(global_=16, per_host=8, per_device=2, micro=2)

    Args:
      config: a valid config.
      process_count: processes in the run.
      device_count: devices of all processes together.
    """
    total, accum = config.global_batch_size, config.grad_accum_steps
    parts = device_count * accum
    if total % parts:
        below, above = total // parts * parts, -(-total // parts) * parts
        fix = f"{above}" if below == 0 else f"{below} or {above}"
        raise ConfigError(
            f"global_batch_size={total} can't be split equally over {device_count} devices x "
            f"grad_accum_steps={accum}: use {fix}, or another number of devices"
        )
    parts = config.sync.virtual_replicas
    if config.sync.method == "fixed_order" and (parts % device_count or total % parts):
        raise ConfigError(
            f"sync.virtual_replicas={parts} can't be split equally over {device_count} devices, or "
            f"global_batch_size={total} not over them: both have to be multiples"
        )
    per_device = total // device_count
    return BatchSizes(total, total // process_count, per_device, per_device // accum)


def check_same_run(config: ConfigDict, saved: ConfigDict) -> None:
    """Refuses to continue a run of which `saved` (its config.json) tells another story.

    Raises:
      ConfigError: names the keys that differ where they must not.
    """
    new, old = flatten(config), flatten(saved)
    differing = [
        f"{key}={new.get(key)!r} (was {shown(old.get(key))})"
        for key in sorted(_identity(new | old))
        if key not in NOT_IDENTITY and new.get(key) != old.get(key)
    ]
    # The other methods' states are the same; DiLoCo has an outer one, and moments per device.
    methods = [flat.get("sync.method", "gradient_mean") for flat in (new, old)]
    if methods[0] != methods[1] and "diloco" in methods:
        differing.append(f"sync.method={methods[0]!r} (was {methods[1]!r})")
    # An average has to begin with the run, and can't be forgotten by a part of it.
    decays = [flat.get("ema.decay", 0.0) for flat in (new, old)]
    if bool(decays[0]) != bool(decays[1]):
        differing.append(f"ema.decay={decays[0]!r} (was {shown(decays[1])})")
    if differing:
        raise ConfigError(
            f"this workdir holds a different run: {', '.join(differing)}; "
            "use the old values, or another --workdir"
        )


def save(config: ConfigDict, path: Path) -> None:
    """Writes the fully resolved config as JSON."""
    write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote.

    Raises:
      ConfigError: there is no such file, or it is no config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        _add_missing(values)
        config = ConfigDict(values)
        _check_saved(config)
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist: --workdir must be that of a training run"
        ) from None
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it from a copy") from None


def _add_missing(values: dict[str, Any]) -> None:
    """Completes the config of an older version; its model was as the defaults have it."""
    defaults = flatten(default.get_config())
    for key in ADDED:
        group, _, name = key.rpartition(".")
        inner = values.get(group) if group else values
        if isinstance(inner, dict):
            inner.setdefault(name, defaults[key])


def _check_saved(config: ConfigDict) -> None:
    """Of a saved config only what says which model it is, so that another version can read it."""
    flat, known = _identity(flatten(config)), _identity(flatten(default.get_config()))
    unknown = flat.keys() - known.keys()
    if unknown:
        raise ConfigError(f"{min(unknown)} is unknown to this version")
    _check_values(known, flat)
    _check_model(config)


def _identity(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
    }
