"""Loading Hugging Face folders, and refusing those that don't fit."""

import dataclasses
import json

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdp.common.errors import ConfigError
from jaxdp.configs import finetune
from jaxdp.huggingface import load
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.architecture import ModelConfig
from jaxdp.run import preflight, same_run
from jaxdp.step.setup import validate
from support.models import (
    MODELS,
    initialised,
    name_of,
    written,
)

every_model = pytest.mark.parametrize("title", MODELS)


@every_model
def test_there_and_back_is_the_same_to_the_bit(title, tmp_path):
    _, params = initialised(MODELS[title])
    folder = load.open_folder(f"hf:{written(title, params, tmp_path)}")
    assert folder.name == name_of(title)
    always = FAMILIES[folder.name].has_biases
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


def saved(name, tmp_path):
    """Writes a folder of a family; returns "hf:FOLDER" and the model's config."""
    model, params = initialised(MODELS[name])
    return f"hf:{written(name, params, tmp_path)}", model.config


def test_all_keys_that_differ_are_named_with_what_the_folder_has(tmp_path):
    spec, model = saved("gpt2", tmp_path)
    other = dataclasses.replace(model, num_layers=3, causal=False, seq_len=16, bias=False)
    with pytest.raises(ConfigError) as error:
        load.open_folder(spec).check(other)
    assert str(error.value).startswith(f"init_from={spec!r} is another model: ")
    for part in (
        "model.num_layers=3 (there 2)",
        "objective='masked' (there 'causal')",
        "seq_len=16 (there at most 8)",
        "model.bias=False (there True)",
    ):
        assert part in str(error.value)
    assert str(error.value).count("there") == 4
    with pytest.raises(ConfigError, match=r"a vocabulary of 11 tokens, and .* give 12: use token"):
        load.open_folder(spec).check(dataclasses.replace(model, vocab_size=12))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "gpt_neo"}, "model_type='gpt_neo' is none of gpt2, llama"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ("gpt2", {"n_head": None}, "TypeError"),
        ("gpt2", {"n_head": 0}, "ZeroDivisionError"),
        ("gpt2", {"model_type": "mixtral", "num_local_experts": 8}, "'mixtral', a mixture of exp"),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, "'gptq': its weights are quan"),
        ("llama", {"mlp_bias": True}, "attention_bias=False with mlp_bias=True is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias=True with mlp_bias=False is not supp"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5}},
            "rope_parameters=.*yarn.* is not supported, only the types default and llama3",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_fact"),
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096 is not supported, only None"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention' is not supp"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("smollm3", {"no_rope_layers": [0, 1]}, r"no_rope_layers=\[0, 1\] is not supported, only"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported, only False"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
    ],
)
def test_settings_that_are_not_computed_here_are_refused(name, changes, message, tmp_path):
    spec, _ = saved(name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ConfigError, match=rf"init_from='hf:.*' can't be used \(.*{message}"):
        load.open_folder(spec)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    spec, model = saved("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)

    def refused(changed, message):
        save_file({k: v for k, v in (weights | changed).items() if v is not None}, path)
        with pytest.raises(ConfigError, match=rf"can't be used \(.*{message}"):
            load.open_folder(spec).check(model)

    wte = "transformer.wte.weight"
    refused({wte: None}, f"{wte} is missing")
    refused({wte: weights[wte][:-1].copy()}, rf"{wte} has the shape \(10, 16\), not \(11, 16\)")
    refused({wte: weights[wte].astype(np.int8)}, f"{wte} has the dtype I8, not one of F32")
    refused({"h.0.crossattention.c_attn.weight": weights[wte]}, "crossattention.* does not belong")
    save_file(weights | {"lm_head.weight": weights[wte] + 1}, path)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not the embedding, though tie_"):
        load.read(spec, model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"can't be used \(SafetensorError: "):
        load.read(spec, model)
    prefixed = {f"_orig_mod.{name}": array for name, array in weights.items()}
    save_file(prefixed, path)
    with pytest.raises(ConfigError, match=rf"{wte} is called _orig_mod\..*: a wrapper .*take _ori"):
        load.read(spec, model)
    path.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ConfigError, match=r"index\.json is missing, which says what is in model-00"
    ):
        load.read(spec, model)
    files = {wte: "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (tmp_path / load.INDEX).write_text(json.dumps({"weight_map": files}))
    missing = (
        r"model-00002-of-00002\.safetensors is missing, one of 2 files .*: download or copy it"
    )
    with pytest.raises(ConfigError, match=missing):
        load.read(spec, model)
    for name in ("model-00001-of-00002.safetensors", load.INDEX):
        (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing; other formats than"):
        load.read(spec, model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"can't be used \(it has no config.json\): give a folder"
    ):
        load.open_folder(spec)


def test_rows_beyond_the_tokenizers_are_kept_and_their_number_is_said(tmp_path):
    spec, _ = saved("qwen3", tmp_path)
    config = finetune.get_config(spec.removeprefix("hf:"))
    said = []
    preflight.check_init(config, tmp_path, 9, said.append)
    assert ModelConfig.from_config(config, 9).vocab_size == 11
    assert said == [
        f"The weights of {spec} have 11 rows in their vocabulary, 2 more than the tokenizer has "
        "tokens: they are kept, and no text that is generated has them."
    ]
    # A run that resumes takes the number from its config.json.
    again = finetune.get_config(spec.removeprefix("hf:"))
    preflight.take_vocabulary(again, config)
    same_run.check(again, config)
    preflight.check_init(config, tmp_path, 11, said.append)
    assert len(said) == 1
    with pytest.raises(ConfigError, match=r"a vocabulary of 11 tokens, and .* use tokenizer="):
        preflight.check_init(config, tmp_path, 12, said.append)


@pytest.mark.parametrize("title", ["qwen2", "llama, scaled rotary, wide heads", "bert"])
def test_the_config_for_fine_tuning_has_the_models_keys(title, tmp_path):
    _, params = initialised(MODELS[title])
    config = finetune.get_config(str(written(title, params, tmp_path)))
    config.data.path = "FILE.txt"
    validate(config)
    expected = dataclasses.replace(MODELS[title], dropout=0.0)
    assert ModelConfig.from_config(config, MODELS[title].vocab_size) == expected
    assert config.tokenizer == config.init_from == f"hf:{tmp_path}"


def test_the_config_for_fine_tuning_needs_a_name():
    with pytest.raises(ConfigError, match=r"write --config=configs/finetune\.py:NAME"):
        finetune.get_config()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Turns off the hub's network and gives its client an empty cache; returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("spec", ["hf:no-such/model", "hf:", "hf:/no/such", f"hf:{'x' * 5000}"])
def test_what_is_no_folder_and_not_to_be_had_is_refused(offline, spec):
    with pytest.raises(ConfigError, match=r"init_from='hf:.*can't be loaded .*: give hf:FOLDER"):
        load.open_folder(spec)


def test_a_name_is_found_in_the_cache(offline):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--some--llama"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    spec, model = saved("llama", folder)
    for one, other in zip(
        jax.tree.leaves(load.read("hf:some/llama", model)),
        jax.tree.leaves(load.read(spec, model)),
        strict=True,
    ):
        assert (one == other).all()
