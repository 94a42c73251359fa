"""The families of models that predict the next token: GPT-2, and Llama with its relatives."""

import dataclasses

from jaxdp.huggingface.family import OFF, WIDTHS, Family

_QUERY_KEY_VALUE = tuple(f"attention/{name}" for name in ("query", "key", "value"))

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    allowed=OFF
    | {
        "causal": (True,),
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_position": ("pre",),
        "head_transform": (False,),
        "qk_norm": (False,),
        "qkv_bias": (False,),
        "rotary_skip": (0,),
        "activation": ("gelu", "gelu_exact", "relu2"),
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
    attention_dropout=("attn_pdrop",),
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
    allowed=OFF
    | {
        "causal": (True,),
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "norm_position": ("pre",),
        "head_transform": (False,),
        "qk_norm": (False,),
        "qkv_bias": (False,),
        "rotary_skip": (0,),
        "activation": ("swiglu",),
    },
    keys=WIDTHS
    | {
        "tied_head": "tie_word_embeddings",
        "seq_len": "max_position_embeddings",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "norm_epsilon": "rms_norm_eps",
        "bias": "attention_bias",
        "rotary_base": "rope_theta",
    },
    dropout=(),
    attention_dropout=("attention_dropout",),
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
    allowed={**LLAMA.allowed, "activation": ("relu2", "gelu", "gelu_exact")},
    defaults={**LLAMA.defaults, "hidden_act": "relu2", "rms_norm_eps": 1e-5},
    layer={name: ours for name, ours in LLAMA.layer.items() if "gate" not in name},
)


def _llama_without(*fields: str) -> dict[str, str]:
    return {field: key for field, key in LLAMA.keys.items() if field not in fields}


# Llama without a choice of biases. Its sliding window, if it has one, is not supported.
MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    allowed={**LLAMA.allowed, "bias": (False,)},
    keys=_llama_without("bias"),
    fixed={"sliding_window": None},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
)

# Llama with biases of query, key and value.
QWEN2 = dataclasses.replace(
    MISTRAL,
    architecture="Qwen2ForCausalLM",
    allowed={**MISTRAL.allowed, "qkv_bias": (True,)},
    fixed={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
)

# Llama with norms of query and key.
QWEN3 = dataclasses.replace(
    MISTRAL,
    architecture="Qwen3ForCausalLM",
    allowed={**MISTRAL.allowed, "qk_norm": (True,)},
    fixed={"use_sliding_window": False, "attention_bias": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
    layer={
        **LLAMA.layer,
        "self_attn.q_norm": ("attention/query_norm",),
        "self_attn.k_norm": ("attention/key_norm",),
    },
)

# Llama without rotary positions in some of its layers.
SMOLLM3 = dataclasses.replace(
    LLAMA,
    architecture="SmolLM3ForCausalLM",
    allowed={k: v for k, v in LLAMA.allowed.items() if k != "rotary_skip"},
    fixed={"use_sliding_window": False},
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    skipping="no_rope_layers",
)
