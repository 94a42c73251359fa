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

from jaxdp.configs import default

CHOICES = {
    "objective": ("causal", "masked"),
    "model.positions": ("learned", "rotary"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "swiglu"),
    "model.dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "lion", "sgd", "muon"),
    "optimizer.schedule": ("cosine", "linear", "wsd", "constant"),
    "sync.method": ("gradient_mean", "parameter_mean", "diloco", "sharded", "fixed_order"),
    "sync.dtype": ("float32", "bfloat16"),
}

# Key -> (lowest, highest) value allowed, both included.
RANGES = {
    "seed": (0, 2**31 - 1),
    "num_train_steps": (1, 2**31 - 1),
    "num_epochs": (0, math.inf),
    "global_batch_size": (1, math.inf),
    "grad_accum_steps": (1, math.inf),
    "seq_len": (2, math.inf),
    "log_every": (1, math.inf),
    "eval_every": (1, math.inf),
    "eval_max_batches": (0, math.inf),
    "hang_seconds": (0, math.inf),
    "data.eval_fraction": (1e-6, 0.99),
    "model.num_layers": (1, math.inf),
    "model.num_heads": (1, math.inf),
    "model.num_kv_heads": (0, math.inf),
    "model.embed_dim": (1, math.inf),
    "model.mlp_dim": (0, math.inf),
    "model.dropout": (0, 0.99),
    "model.vocab_multiple": (1, math.inf),
    "optimizer.learning_rate": (0, 1e6),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.final_fraction": (0, 1),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999),
    "optimizer.clip_norm": (0, 1e30),
    "sync.every": (1, math.inf),
    "sync.after": (0, math.inf),
    "sync.outer_learning_rate": (0, 1e6),
    "sync.outer_momentum": (0, 0.999999),
    "sync.virtual_replicas": (1, math.inf),
    "sync.check_every": (0, math.inf),
    "divergence.max_bad_steps": (1, math.inf),
    "divergence.spike_threshold": (0, math.inf),
    "divergence.max_rollbacks": (0, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep_last": (1, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "sample.num_tokens": (0, math.inf),
}

# A checkpoint is of no use to a run that differs in one of these.
IDENTITY = ("tokenizer", "objective", "seq_len", "seed", "model", "optimizer.name")
# ... except in these, which change how the model is computed, not what it is.
NOT_IDENTITY = ("model.dropout", "model.dtype", "model.remat")


class ConfigError(ValueError):
    """The user asked for something impossible; the message is one line that says what to do."""


class RunError(RuntimeError):
    """A run can't go on, by no mistake of the user's; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, from all processes down to one forward pass."""

    global_: int
    per_host: int
    per_device: int
    micro: int


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Returns {"group.key": value} of a nested config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without looking at the data or the devices.

    Raises:
      ConfigError: for an unknown or missing key, a wrong type, or an impossible value.
    """
    flat = flatten(config)
    check_known(flat)
    _check_types(flat)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise ConfigError(f"{key}={flat[key]!r} is unknown: choose one of {', '.join(choices)}")
    for key, (low, high) in RANGES.items():
        if not low <= flat[key] <= high:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{key}={flat[key]} is out of range: give a value {limit}")
    if not config.data.path:
        raise ConfigError(
            "data.path='' names no data: give --config.data.path=FILE.txt, text:GLOB or tfds:NAME"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_project={config.wandb_project!r} needs the package wandb: pip install "
            "'jaxdp[wandb]', or leave it empty"
        )
    _check_model(config)
    _check_sync(config)
    optimizer = config.optimizer
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= config.num_train_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves no step to train: make it "
            f"smaller than num_train_steps={config.num_train_steps}"
        )


def check_known(flat: dict[str, Any]) -> None:
    """Raises ConfigError for a key that configs/default.py doesn't have.

    Args:
      flat: {"group.key": value}.
    """
    known = flatten(default.get_config())
    for key, value in flat.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see configs/default.py for all keys"
            raise ConfigError(f"{key}={value!r} is no key of the config: {hint}")


def _check_types(flat: dict[str, Any]) -> None:
    known = flatten(default.get_config())
    for key, standard in known.items():
        if key not in flat:
            raise ConfigError(f"{key} is missing: start from configs/default.py, which sets it")
        value, kind = flat[key], type(standard)
        # An int serves as a float; a bool, though Python calls it an int, serves as neither.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is float and not math.isfinite(value)):
            raise ConfigError(f"{key}={value!r} has the wrong type: give a {kind.__name__}")


def _check_model(config: ConfigDict) -> None:
    model = config.model
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
        f"{key}={new.get(key)!r} (was {old.get(key)!r})"
        for key in sorted(new.keys() | old.keys())
        if any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
        and key not in NOT_IDENTITY
        and new.get(key) != old.get(key)
    ]
    # The other methods' states are the same; DiLoCo has an outer one, and moments per device.
    methods = [flat.get("sync.method", "gradient_mean") for flat in (new, old)]
    if methods[0] != methods[1] and "diloco" in methods:
        differing.append(f"sync.method={methods[0]!r} (was {methods[1]!r})")
    if differing:
        raise ConfigError(
            f"this workdir holds a different run: {', '.join(differing)}; "
            "use the old values, or another --workdir"
        )


def save(config: ConfigDict, path: Path) -> None:
    """Writes the fully resolved config as JSON."""
    write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces a file; whoever reads it sees the old text or the new, never a part.

    Raises:
      ConfigError: the disk is full, say; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} can't be written ({error.strerror}): make room, or use another --workdir"
        ) from None


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote.

    Raises:
      ConfigError: there is no such file, or it is no config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        return ConfigDict(values)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path} does not exist: --workdir must be that of a training run"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it from a copy") from None
