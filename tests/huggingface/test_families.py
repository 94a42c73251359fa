"""config.json of published models, and the models that it makes; nothing is compiled."""

import dataclasses

import pytest

from jaxdp.huggingface import families
from jaxdp.model.flops import flops_per_token
from jaxdp.model.transformer import Transformer, num_parameters, parameter_shapes
from support.models import SMALL

# What their config.json has on the hub, without keys that no model here depends on.
PUBLISHED = {
    "Llama 3.2 1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Mistral 7B v0.3": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "Qwen2.5 0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "Qwen3 0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_theta": 1000000,
    },
    "SmolLM3 3B": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 65536,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rope_theta": 5000000.0,
    },
}
PARAMETERS = {
    "Llama 3.2 1B": 1_235_814_400,
    "Mistral 7B v0.3": 7_248_023_552,
    "Qwen2.5 0.5B": 494_032_768,
    "Qwen3 0.6B": 596_049_920,
    "SmolLM3 3B": 3_075_098_624,
}


def model_of(title):
    name, fields = families.from_json(PUBLISHED[title])
    return name, dataclasses.replace(SMALL, **fields, scan_layers=True)


@pytest.mark.parametrize("title", PUBLISHED)
def test_published_models_have_their_number_of_parameters(title):
    name, model = model_of(title)
    assert num_parameters(parameter_shapes(Transformer(model))) == PARAMETERS[title]
    # What is written of it is read as the same model; Mistral without a window is a Llama.
    assert families.family_of(model) == name.replace("mistral", "llama")
    again = families.from_json(families.to_json(model, name, None))[1]
    assert dataclasses.replace(SMALL, **again, scan_layers=True) == model


def test_attention_is_as_wide_as_its_heads():
    """In Qwen3 0.6B, twice as wide as the model."""
    _, model = model_of("Qwen3 0.6B")
    found = flops_per_token(model, PARAMETERS["Qwen3 0.6B"])
    assert found == 6 * PARAMETERS["Qwen3 0.6B"] + 12 * 28 * 2048 * 40960
