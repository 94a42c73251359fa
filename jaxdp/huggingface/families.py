"""The model families of transformers that `Transformer` can be, and their config.json."""

from collections.abc import Mapping
from typing import Any

from jaxdp.common.errors import ConfigError, shown
from jaxdp.huggingface.causal import ARCEE, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from jaxdp.huggingface.family import ACTIVATIONS, Family
from jaxdp.huggingface.masked import BERT, ROBERTA
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.rotary import rotated_layers

# By "model_type" of config.json.
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "arcee": ARCEE,
    "bert": BERT,
    "roberta": ROBERTA,
}
# Keys of "rope_parameters" of the type "llama3".
SCALING = {
    "rotary_factor": "factor",
    "rotary_low": "low_freq_factor",
    "rotary_high": "high_freq_factor",
    "rotary_context": "original_max_position_embeddings",
}


def family_of(model: ModelConfig) -> str:
    """Returns the name of a model's family; RoBERTa counts as "bert", the same model here.

    Raises:
      ConfigError: there is none; names a key to change.
    """
    name = _nearest(model)
    family = FAMILIES[name]
    needed = dict(family.allowed)
    if "num_kv_heads" not in family.keys:
        needed["num_kv_heads"] = (model.num_heads,)
    if "head_dim" not in family.keys:
        needed["head_dim"] = (model.embed_dim // model.num_heads,)
    for field, values in needed.items():
        value = getattr(model, field)
        if value not in values:
            raise ConfigError(
                f"model.{field}={value!r} makes a model that transformers doesn't have: for the "
                f"nearest, {family.architecture}, train with {' or '.join(map(repr, values))}"
            )
    if model.embed_dim % model.num_heads and name not in ("mistral", "qwen2", "qwen3", "smollm3"):
        raise ConfigError(
            f"model.embed_dim={model.embed_dim} makes a model that transformers doesn't have: for "
            f"the nearest, {family.architecture}, train with a multiple of model.num_heads="
            f"{model.num_heads}"
        )
    return name


def _nearest(model: ModelConfig) -> str:
    if not model.causal:
        return "bert"
    if model.positions == "learned":
        return "gpt2"
    if model.activation != "swiglu":
        return "arcee"
    if model.rotary_skip:
        return "smollm3"
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    # The same model without biases, but transformers' Llama refuses widths that don't divide.
    return "mistral" if model.embed_dim % model.num_heads and not model.bias else "llama"


def to_json(model: ModelConfig, name: str, pad_id: int | None) -> dict[str, Any]:
    """Returns the content of a model's config.json.

    Args:
      model: the model's config.
      name: the family's name.
      pad_id: id of the padding token, if there is one; "roberta" needs one.
    """
    family = FAMILIES[name]
    found = {key: getattr(model, field) for field, key in family.keys.items()}
    found[family.keys["activation"]] = ACTIVATIONS[model.activation][0]
    found[family.keys["seq_len"]] += offset(name, pad_id)
    found |= dict.fromkeys(family.dropout, model.dropout)
    found |= dict.fromkeys(family.attention_dropout, model.attention_dropout)
    if "bias" in family.keys:
        found["mlp_bias"] = model.bias
    if model.rotary_factor != 1:
        scaling = {key: getattr(model, field) for field, key in SCALING.items()}
        found["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if family.skipping:
        found[family.skipping] = rotated_layers(model.num_layers, model.rotary_skip)
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "dtype": "float32",
        **found,
        **family.fixed,
    }


def offset(name: str, pad_id: int | None) -> int:
    """Returns the number of unused rows at the start of the table of position embeddings."""
    if name != "roberta":
        return 0
    if pad_id is None:
        raise ConfigError("pad_token_id=null is not supported, as positions are counted from it")
    return pad_id + 1


def from_json(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Reads a config.json.

    Returns:
      The family's name, and the fields of `ModelConfig` with their values.

    Raises:
      ConfigError: its family is unknown, or a setting is not supported.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        experts = any("expert" in key for key in values)
        kind = ", a mixture of experts (MoE)," if experts else ""
        raise ConfigError(f"model_type={shown(name)}{kind} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    values = {**family.defaults, **values}
    _check_settings(family, values)
    fields: dict[str, Any] = {"bias": True, "rotary_skip": 0}
    fields |= {field: allowed[0] for field, allowed in family.allowed.items()}
    if "rotary_base" in family.keys:
        fields |= _rotary(values)
    for field, key in family.keys.items():
        if key not in values and field not in ("num_kv_heads", "mlp_dim", "head_dim"):
            raise ConfigError(f"{key} is missing")
        fields[field] = values.get(key)
    fields["activation"] = _activation(family, fields["activation"])
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["embed_dim"] // fields["num_heads"]
    fields["mlp_dim"] = fields["mlp_dim"] or 4 * fields["embed_dim"]
    fields["seq_len"] -= offset(name, values.get("pad_token_id", 1))
    if family.skipping:
        fields["rotary_skip"] = _skip(values, family.skipping, fields["num_layers"])
    return name, fields


def _check_settings(family: Family, values: Mapping[str, Any]) -> None:
    """Refuses settings of a config.json, with the family's defaults, that aren't computed here."""
    if "quantization_config" in values:
        kind = dict(values["quantization_config"]).get("quant_method", "unknown method")
        raise ConfigError(
            f"quantization_config={shown(kind)}: its weights are quantised, and only those in "
            "float32, float16 and bfloat16 are read"
        )
    for key, value in family.fixed.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{key}={shown(values[key])} is not supported, only {value!r}")
    kinds = set(values.get("layer_types") or []) - {"full_attention"}
    if kinds:
        raise ConfigError(f"layer_types={shown(min(kinds))} is not supported, only full_attention")
    if "bias" in family.keys:
        key = family.keys["bias"]
        attention, mlp = bool(values[key]), bool(values.get("mlp_bias", False))
        if attention != mlp:
            raise ConfigError(
                f"{key}={attention} with mlp_bias={mlp} is not supported: either all linear "
                "layers have biases, or none"
            )


def _activation(family: Family, theirs: Any) -> str:
    for ours in family.allowed["activation"]:
        if theirs in ACTIVATIONS[ours]:
            return ours
    key = family.keys["activation"]
    raise ConfigError(f"{key}={shown(theirs)} is not supported")


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of scaled rotary positions; moves rope_theta to values' top level."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise TypeError("rope_parameters is not a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or share != 1.0:
        raise ConfigError(
            f"rope_parameters={shown(rope)} is not supported, only the types default and llama3"
        )
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if kind == "default":
        return {"rotary_factor": 1.0}
    rope = {SCALING["rotary_context"]: values.get("max_position_embeddings"), **rope}
    missing = [key for key in SCALING.values() if rope.get(key) is None]
    if missing:
        raise ConfigError(f"rope_parameters={shown(rope)} has no {missing[0]}")
    return {field: rope[key] for field, key in SCALING.items()}


def _skip(values: Mapping[str, Any], key: str, num_layers: int) -> int:
    """Returns the rotary_skip that gives the layers listed in a config.json."""
    listed = values.get(key)
    if listed is None:  # transformers' default.
        listed = rotated_layers(num_layers, values.get("no_rope_layer_interval", 4))
    listed = listed[:num_layers]
    skip = listed.index(0) + 1 if 0 in listed else 0
    if listed != rotated_layers(num_layers, skip):
        raise ConfigError(f"{key}={shown(listed)} is not supported, only zeros at equal distances")
    return skip
