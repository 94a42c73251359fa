"""The model families of Hugging Face's transformers that `Transformer` can be.

Each is a table that pairs keys of config.json and names of modules with our names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdp.common.errors import ConfigError, shown
from jaxdp.model.transformer import ModelConfig

# Their names of `model.activation`: the first is written, all are read.
ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu_exact": ("gelu",),
    "swiglu": ("silu", "swish"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, as a table.

    Attributes:
      architecture: the family's class in transformers.
      is_: fields of `ModelConfig` that the family restricts, with the values it allows.
      keys: field of `ModelConfig` -> key of config.json. Of the fields in neither `is_` nor `keys`,
        `num_kv_heads` equals `num_heads` and `bias` is true.
      dropout: keys of config.json that hold `ModelConfig.dropout`.
      no_dropout: keys of config.json for kinds of dropout that `Transformer` lacks.
      fixed: keys of config.json with the only supported value, which is also their default.
      defaults: defaults of other keys of config.json.
      base: the first part of most tensors' names; some folders leave it out.
      modules: their module name -> our path, outside of layers.
      layer: their module name -> our paths, within a layer; several of ours are concatenated.
      layers: their name of a layer, with {} for its number.
      head_bias: name of the output bias; "" if there is none.
      token_types: name of the table of segment embeddings; "" if there is none.
    """

    architecture: str
    is_: Mapping[str, tuple]
    keys: Mapping[str, str]
    dropout: tuple[str, ...]
    no_dropout: tuple[str, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    base: str
    modules: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    layers: str
    head_bias: str = ""
    token_types: str = ""


_QUERY_KEY_VALUE = tuple(f"attention/{name}" for name in ("query", "key", "value"))
_WIDTHS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
}

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    is_={
        "causal": (True,),
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_position": ("pre",),
        "head_transform": (False,),
        "activation": ("gelu", "gelu_exact"),
    },
    keys={
        "vocab_size": "vocab_size",
        "tied_head": "tie_word_embeddings",
        "seq_len": "n_positions",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "embed_dim": "n_embd",
        "mlp_dim": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
    },
    dropout=("embd_pdrop", "resid_pdrop"),
    no_dropout=("attn_pdrop",),
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    base="transformer",
    modules={
        "transformer.wte": "embed",
        "transformer.wpe": "position_embed",
        "transformer.ln_f": "final_norm",
        "lm_head": "head",
    },
    layers="transformer.h.{}",
    layer={
        "ln_1": ("attention_norm",),
        "attn.c_attn": _QUERY_KEY_VALUE,
        "attn.c_proj": ("attention/out",),
        "ln_2": ("mlp_norm",),
        "mlp.c_fc": ("mlp/up",),
        "mlp.c_proj": ("mlp/down",),
    },
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    is_={
        "causal": (True,),
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "norm_position": ("pre",),
        "head_transform": (False,),
        "activation": ("swiglu",),
    },
    keys=_WIDTHS
    | {
        "tied_head": "tie_word_embeddings",
        "seq_len": "max_position_embeddings",
        "num_kv_heads": "num_key_value_heads",
        "norm_epsilon": "rms_norm_eps",
        "bias": "attention_bias",
        "rotary_base": "rope_theta",
    },
    dropout=(),
    no_dropout=("attention_dropout",),
    fixed={},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    base="model",
    modules={
        "model.embed_tokens": "embed",
        "model.norm": "final_norm",
        "lm_head": "head",
    },
    layers="model.layers.{}",
    layer={
        "input_layernorm": ("attention_norm",),
        "self_attn.q_proj": ("attention/query",),
        "self_attn.k_proj": ("attention/key",),
        "self_attn.v_proj": ("attention/value",),
        "self_attn.o_proj": ("attention/out",),
        "post_attention_layernorm": ("mlp_norm",),
        "mlp.gate_proj": ("mlp/gate",),
        "mlp.up_proj": ("mlp/up",),
        "mlp.down_proj": ("mlp/down",),
    },
)

# Llama with an MLP without gate.
ARCEE = dataclasses.replace(
    LLAMA,
    architecture="ArceeForCausalLM",
    is_={**LLAMA.is_, "activation": ("gelu", "gelu_exact")},
    defaults={**LLAMA.defaults, "hidden_act": "relu2", "rms_norm_eps": 1e-5},
    layer={name: ours for name, ours in LLAMA.layer.items() if "gate" not in name},
)

BERT = Family(
    architecture="BertForMaskedLM",
    is_={
        "causal": (False,),
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_position": ("post",),
        "head_transform": (True,),
        "tied_head": (True,),
        "activation": ("gelu_exact", "gelu"),
    },
    keys=_WIDTHS | {"seq_len": "max_position_embeddings", "norm_epsilon": "layer_norm_eps"},
    dropout=("hidden_dropout_prob",),
    no_dropout=("attention_probs_dropout_prob",),
    fixed={
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
    base="bert",
    modules={
        "bert.embeddings.word_embeddings": "embed",
        "bert.embeddings.position_embeddings": "position_embed",
        "bert.embeddings.LayerNorm": "embed_norm",
        "cls.predictions.transform.dense": "head_transform",
        "cls.predictions.transform.LayerNorm": "head_norm",
    },
    head_bias="cls.predictions.bias",
    token_types="bert.embeddings.token_type_embeddings.weight",
    layers="bert.encoder.layer.{}",
    layer={
        "attention.self.query": ("attention/query",),
        "attention.self.key": ("attention/key",),
        "attention.self.value": ("attention/value",),
        "attention.output.dense": ("attention/out",),
        "attention.output.LayerNorm": ("attention_norm",),
        "intermediate.dense": ("mlp/up",),
        "output.dense": ("mlp/down",),
        "output.LayerNorm": ("mlp_norm",),
    },
)

# BERT with positions counted from the padding token's id + 1, and other names for the head.
ROBERTA = dataclasses.replace(
    BERT,
    architecture="RobertaForMaskedLM",
    base="roberta",
    modules={
        **{
            name.replace("bert", "roberta", 1): ours
            for name, ours in BERT.modules.items()
            if name.startswith("bert.")
        },
        "lm_head.dense": "head_transform",
        "lm_head.layer_norm": "head_norm",
    },
    head_bias="lm_head.bias",
    token_types="roberta.embeddings.token_type_embeddings.weight",
    layers="roberta.encoder.layer.{}",
)

# By "model_type" of config.json.
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "arcee": ARCEE, "bert": BERT, "roberta": ROBERTA}


def family_of(model: ModelConfig) -> str:
    """Returns the name of a model's family; RoBERTa counts as "bert", the same model here.

    Raises:
      ConfigError: there is none; names a key to change.
    """
    if not model.causal:
        name = "bert"
    elif model.positions == "learned":
        name = "gpt2"
    else:
        name = "llama" if model.activation == "swiglu" else "arcee"
    family = FAMILIES[name]
    needed = dict(family.is_)
    if "num_kv_heads" not in family.keys:
        needed["num_kv_heads"] = (model.num_heads,)
    for field, values in needed.items():
        value = getattr(model, field)
        if value not in values:
            raise ConfigError(
                f"model.{field}={value!r} makes a model that transformers doesn't have: for the "
                f"nearest, {family.architecture}, train with {' or '.join(map(repr, values))}"
            )
    return name


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
    found |= dict.fromkeys(family.no_dropout, 0.0)
    if "bias" in family.keys:
        found["mlp_bias"] = model.bias
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
        raise ConfigError(f"model_type={shown(name)} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    values = dict(values)
    _flatten_rope(values)
    for key, value in family.fixed.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{key}={shown(values[key])} is not supported, only {value!r}")
    for key, default in family.defaults.items():
        values.setdefault(key, default)
    fields: dict[str, Any] = {"bias": True}
    fields |= {field: allowed[0] for field, allowed in family.is_.items()}
    for field, key in family.keys.items():
        if key not in values and field not in ("num_kv_heads", "mlp_dim"):
            raise ConfigError(f"{key} is missing")
        fields[field] = values.get(key)
    fields["activation"] = _activation(family, fields["activation"])
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    fields["mlp_dim"] = fields["mlp_dim"] or 4 * fields["embed_dim"]
    fields["seq_len"] -= offset(name, values.get("pad_token_id", 1))
    if values.get("mlp_bias", fields["bias"]) != fields["bias"]:
        raise ConfigError(f"mlp_bias={values['mlp_bias']} is not supported without attention_bias")
    width = fields["embed_dim"] // fields["num_heads"]
    if (values.get("head_dim") or width) != width:
        raise ConfigError(f"head_dim={values['head_dim']} is not supported, only {width}")
    return name, fields


def _activation(family: Family, theirs: Any) -> str:
    for ours in family.is_["activation"]:
        if theirs in ACTIVATIONS[ours]:
            return ours
    key = family.keys["activation"]
    raise ConfigError(f"{key}={shown(theirs)} is not supported")


def _flatten_rope(values: dict[str, Any]) -> None:
    """Moves rope_theta to the top level, where transformers 4 writes it."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise TypeError("rope_parameters is not a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if kind != "default" or share != 1.0:
        raise ConfigError(f"rope_parameters={shown(rope)} is not supported, only 'default'")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
