"""Small models of every kind."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxdp.huggingface import families, tensors
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=11,
    seq_len=8,
    causal=True,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    embed_dim=16,
    mlp_dim=32,
    positions="learned",
    rotary_base=10_000.0,
    rotary_factor=1.0,
    rotary_low=1.0,
    rotary_high=4.0,
    rotary_context=8192,
    rotary_skip=0,
    norm="layernorm",
    norm_position="pre",
    norm_epsilon=1e-5,
    activation="gelu",
    head_transform=False,
    tied_head=True,
    qk_norm=False,
    zero_init=False,
    logit_cap=0.0,
    embed_residual=False,
    value_embeddings=False,
    mlp_lookback=0,
    bias=False,
    qkv_bias=False,
    window=0,
    window_skip=0,
    dropout=0.0,
    attention_dropout=0.0,
    dtype=jnp.dtype("float32"),
    remat=False,
    scan_layers=False,
)
LLAMA = dataclasses.replace(
    SMALL,
    positions="rotary",
    norm="rmsnorm",
    activation="swiglu",
    tied_head=False,
    num_kv_heads=2,
)
# All that modded-nanogpt adds to a Llama; initial zeros would hide it from the tests.
MODDED = dataclasses.replace(
    LLAMA,
    activation="relu2",
    qk_norm=True,
    logit_cap=2.0,
    embed_residual=True,
    value_embeddings=True,
    mlp_lookback=2,
    window=3,
)
VARIANTS = {
    "gpt2": SMALL,
    "gpt2 with biases": dataclasses.replace(SMALL, bias=True),
    "llama": LLAMA,
    "post-norm": dataclasses.replace(
        SMALL, norm_position="post", activation="gelu_exact", head_transform=True, bias=True
    ),
    "scanned": dataclasses.replace(SMALL, scan_layers=True),
    "scanned llama, remat": dataclasses.replace(LLAMA, scan_layers=True, remat=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, qkv_bias=True, head_dim=8),
    "modded": MODDED,
    "modded, a layer without window": dataclasses.replace(MODDED, window_skip=2),
    "scanned modded, remat": dataclasses.replace(MODDED, scan_layers=True, remat=True),
    "scanned smollm3, remat": dataclasses.replace(
        LLAMA, rotary_skip=2, rotary_factor=4.0, rotary_context=16, scan_layers=True, remat=True
    ),
}
INPUTS = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8], [8, 1, 6, 10, 2, 3, 0, 9]])


@functools.cache
def initialised(config):
    model = Transformer(config)

    @jax.jit  # Operation by operation, JAX would compile dozens of programs.
    def init():
        params = model.init(jax.random.key(0), INPUTS)["params"]
        # Larger than the initial ones, so that every part of the model shows in the logits.
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, [p + n for p, n in zip(leaves, noise, strict=True)])

    return model, init()


def apply(model, params, tokens, **packing):
    """Logits, on the host, where slicing and comparing them compiles nothing."""
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens, **packing))


def difference(one, other):
    """The largest, for logits of size 1."""
    return np.abs(one - other).max() / np.abs(other).max()


# Two layers and a head, each a sum of 16 to 32 products that are rounded to 6e-8, through norms and
# a softmax that may multiply an error by a few: 1e-5 of the largest logit.
TOLERANCE = 1e-5
GPT2 = dataclasses.replace(SMALL, bias=True, norm_epsilon=1e-3, attention_dropout=0.1)
BERT = dataclasses.replace(
    SMALL,
    causal=False,
    bias=True,
    norm_position="post",
    norm_epsilon=1e-12,
    activation="gelu_exact",
    head_transform=True,
)
MODELS = {
    "gpt2": GPT2,
    "gpt2 without biases": SMALL,
    "gpt2, untied, exact gelu": dataclasses.replace(GPT2, activation="gelu_exact", tied_head=False),
    "llama": dataclasses.replace(LLAMA, norm_epsilon=1e-6),
    "llama, tied, biases, base": dataclasses.replace(
        LLAMA, tied_head=True, bias=True, rotary_base=5e5
    ),
    "llama, scanned": dataclasses.replace(LLAMA, scan_layers=True),
    "llama, scaled rotary, wide heads": dataclasses.replace(
        LLAMA, rotary_factor=8.0, rotary_low=0.5, rotary_high=2.0, rotary_context=32, head_dim=12
    ),
    "mistral": dataclasses.replace(LLAMA, embed_dim=18, head_dim=8),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_epsilon=1e-6, tied_head=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=8, rotary_base=1e6),
    "smollm3": dataclasses.replace(LLAMA, rotary_skip=2, tied_head=True),
    "arcee": dataclasses.replace(LLAMA, activation="gelu"),
    "arcee as published": dataclasses.replace(LLAMA, activation="relu2"),
    "bert": BERT,
    "bert, tanh gelu, no biases": dataclasses.replace(BERT, activation="gelu", bias=False),
    "roberta": dataclasses.replace(BERT, norm_epsilon=1e-5),
}
TOKENS = np.array([[3, 4, 5, 6, 7, 8, 9, 10], [8, 3, 6, 10, 2, 3, 4, 9]])
PAD = 1  # RoBERTa counts positions from the one after it, and it isn't among the tokens.


def name_of(title):
    return "roberta" if title == "roberta" else families.family_of(MODELS[title])


def written(title, params, folder):
    """A folder as transformers wants it."""
    model, name = MODELS[title], name_of(title)
    weights = tensors.to_tensors(params, model, name, PAD)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = families.to_json(model, name, PAD) | {"pad_token_id": PAD}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def our_logits(model, params):
    return apply(Transformer(model), params, TOKENS)
