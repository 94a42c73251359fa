"""The families of models that predict masked tokens: BERT and RoBERTa."""

import dataclasses

from jaxdp.huggingface.family import OFF, WIDTHS, Family

BERT = Family(
    architecture="BertForMaskedLM",
    allowed=OFF
    | {
        "causal": (False,),
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_position": ("post",),
        "head_transform": (True,),
        "qk_norm": (False,),
        "qkv_bias": (False,),
        "rotary_skip": (0,),
        "tied_head": (True,),
        "activation": ("gelu_exact", "gelu"),
    },
    keys=WIDTHS | {"seq_len": "max_position_embeddings", "norm_epsilon": "layer_norm_eps"},
    dropout=("hidden_dropout_prob",),
    attention_dropout=("attention_probs_dropout_prob",),
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
