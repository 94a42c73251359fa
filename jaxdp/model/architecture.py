"""The sizes and options of a model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.model.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model; configs/default.py explains the fields."""

    vocab_size: int
    seq_len: int
    causal: bool
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    positions: str
    rotary_base: float
    rotary_factor: float
    rotary_low: float
    rotary_high: float
    rotary_context: int
    rotary_skip: int
    norm: str
    norm_position: str
    norm_epsilon: float
    activation: str
    head_transform: bool
    tied_head: bool
    qk_norm: bool
    zero_init: bool
    logit_cap: float
    embed_residual: bool
    value_embeddings: bool
    mlp_lookback: int
    bias: bool
    qkv_bias: bool
    window: int
    window_skip: int
    dropout: float
    attention_dropout: float
    dtype: Any
    remat: bool
    scan_layers: bool

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> "ModelConfig":
        """Fills in what the config leaves open; vocab_size: size of the tokenizer's vocabulary."""
        fields = config.model.to_dict()
        multiple = fields.pop("vocab_multiple")
        return cls(
            **fields
            | {
                "vocab_size": -(-vocab_size // multiple) * multiple,
                "seq_len": config.seq_len,
                "causal": config.objective == "causal",
                "num_kv_heads": config.model.num_kv_heads or config.model.num_heads,
                "head_dim": config.model.head_dim
                or config.model.embed_dim // config.model.num_heads,
                "mlp_dim": config.model.mlp_dim or 4 * config.model.embed_dim,
                "dtype": jnp.dtype(config.model.dtype),
            }
        )

    @property
    def windows(self) -> list[int]:
        """The sliding window of each layer; 0: none."""
        layers = range(1, self.num_layers + 1)
        return [
            0 if self.window_skip and i % self.window_skip == 0 else self.window for i in layers
        ]

    @property
    def rotary(self) -> Rotary:
        """The rotary positions."""
        scaling = self.rotary_low, self.rotary_high, self.rotary_context
        return Rotary(self.rotary_base, self.rotary_factor, *scaling)
