"""Against transformers itself, with small models of random weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_model import LLAMA, SMALL, initialised

from jaxdp import families, huggingface
from jaxdp.config import ConfigError
from jaxdp.families import FAMILIES
from jaxdp.model import Transformer

GPT2 = dataclasses.replace(SMALL, bias=True, norm_epsilon=1e-3)
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
    "arcee": dataclasses.replace(LLAMA, activation="gelu"),
    "bert": BERT,
    "bert, tanh gelu, no biases": dataclasses.replace(BERT, activation="gelu", bias=False),
    "roberta": dataclasses.replace(BERT, norm_epsilon=1e-5),
}
every_model = pytest.mark.parametrize("title", MODELS)
TOKENS = np.array([[3, 4, 5, 6, 7, 8, 9, 10], [8, 3, 6, 10, 2, 3, 4, 9]])
PAD = 1  # RoBERTa counts positions from the one after it, and it isn't among the tokens.


def name_of(title):
    return "roberta" if title == "roberta" else families.family_of(MODELS[title])


def written(title, params, folder):
    """A folder as transformers wants it."""
    model, name = MODELS[title], name_of(title)
    tensors = huggingface.to_tensors(params, model, name, PAD)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = families.to_json(model, name, PAD) | {"pad_token_id": PAD}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def loaded(name, folder):
    """By transformers, which must find each of its weights there, and no other."""
    model, info = getattr(transformers, FAMILIES[name].architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(model, params):
    return np.asarray(jax.jit(Transformer(model).apply)({"params": params}, TOKENS))


def difference(one, other):
    """The largest, for logits of size 1."""
    return np.abs(one - other).max() / np.abs(other).max()


def random_model(name, **changes):
    """Of transformers, from a config of its own."""
    config_class = getattr(transformers, FAMILIES[name].architecture).config_class
    model, values = MODELS[name], families.to_json(MODELS[name], name, PAD)
    torch.manual_seed(0)
    config = config_class(**values | {"pad_token_id": PAD} | changes)
    built = getattr(transformers, FAMILIES[name].architecture)(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            # Larger than the initial ones, so that every part shows in the logits.
            parameter += 0.3 * torch.randn(parameter.shape)
    return built, model


# Two layers and a head, each a sum of 16 to 32 products that are rounded to 6e-8, through norms and
# a softmax that may multiply an error by a few: 1e-5 of the largest logit.
TOLERANCE = 1e-5


@every_model
def test_logits_of_an_exported_model_are_the_same(title, tmp_path):
    transformer, params = initialised(MODELS[title])
    theirs = loaded(name_of(title), written(title, params, tmp_path))
    assert difference(their_logits(theirs), our_logits(transformer.config, params)) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_model_of_transformers_are_the_same(name, tmp_path):
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    folder = huggingface.open_folder(f"hf:{tmp_path}")
    folder.check(model)
    params = folder.read(model)
    assert difference(our_logits(model, params), their_logits(theirs)) < TOLERANCE


@every_model
def test_there_and_back_is_the_same_to_the_bit(title, tmp_path):
    _, params = initialised(MODELS[title])
    folder = huggingface.open_folder(f"hf:{written(title, params, tmp_path)}")
    assert folder.name == name_of(title)
    always = "bias" not in FAMILIES[folder.name].keys
    model = dataclasses.replace(MODELS[title], bias=MODELS[title].bias or always)
    folder.check(model)
    again = folder.read(model)
    if MODELS[title].bias or not always:
        assert jax.tree.structure(again) == jax.tree.structure(params)
    for path, array in jax.tree.leaves_with_path(params):
        found = again
        for key in path:
            found = found[key.key]
        assert found.tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_back_and_there_is_the_same_to_the_bit(name, tmp_path):
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    params = huggingface.open_folder(f"hf:{tmp_path}").read(model)
    again = huggingface.to_tensors(params, model, name, PAD)
    before = load_file(tmp_path / "model.safetensors")
    assert again.keys() == before.keys()
    for key, array in before.items():
        if "position_embeddings" in key:  # Its rows, and the first segment's.
            first = before[FAMILIES[name].token_types][0]
            skipped = families.offset(name, PAD)
            assert (again[key][skipped:] == array[skipped:] + first).all()
            assert not again[key][:skipped].any()
        elif "token_type" in key:
            assert not again[key].any()
        else:
            assert again[key].tobytes() == array.tobytes(), key
