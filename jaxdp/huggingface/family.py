"""What a model family of Hugging Face's transformers is: names of settings and of tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Their names of `model.activation`: the first is written, all are read.
ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu_exact": ("gelu",),
    "relu2": ("relu2",),
    "swiglu": ("silu", "swish"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family, as a table.

    Attributes:
      architecture: the family's class in transformers.
      allowed: fields of `ModelConfig` that the family restricts, with the values it allows.
      keys: field of `ModelConfig` -> key of config.json. Of the fields in neither `allowed` nor
        `keys`, `num_kv_heads` equals `num_heads`, `head_dim` is `embed_dim / num_heads`, and `bias`
        is true.
      dropout: keys of config.json that hold `ModelConfig.dropout`.
      attention_dropout: keys of config.json that hold `ModelConfig.attention_dropout`.
      fixed: keys of config.json with the only supported value, which is also their default.
      defaults: defaults of other keys of config.json.
      base: the first part of most tensors' names; some folders leave it out.
      modules: their module name -> our path, outside of layers.
      layer: their module name -> our paths, within a layer; several of ours are concatenated.
      layers: their name of a layer, with {} for its number.
      head_bias: name of the output bias; "" if there is none.
      token_types: name of the table of segment embeddings; "" if there is none.
      skipping: key of config.json that lists the layers with rotary positions; "" if all have them.
    """

    architecture: str
    allowed: Mapping[str, tuple]
    keys: Mapping[str, str]
    dropout: tuple[str, ...]
    attention_dropout: tuple[str, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    base: str
    modules: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    layers: str
    head_bias: str = ""
    token_types: str = ""
    skipping: str = ""

    @property
    def has_biases(self) -> bool:
        """Whether all models of the family have biases."""
        return "bias" not in self.keys and "bias" not in self.allowed


# Options that no family has, with the values that turn them off; part of every `Family.allowed`.
OFF = {
    "logit_cap": (0.0,),
    "embed_residual": (False,),
    "value_embeddings": (False,),
    "mlp_lookback": (0,),
    "window": (0,),
    "window_skip": (0,),
}
# Keys of config.json that most families share.
WIDTHS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
}
