"""Loading and converting, compared with transformers, with small models of random weights."""

import dataclasses
import json
import runpy

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxdp.common.errors import ConfigError
from jaxdp.huggingface import families, load, tensors
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.transformer import ModelConfig, Transformer, num_parameters, parameter_shapes
from support.models import LLAMA, SMALL, TOLERANCE, difference, initialised
from support.texts import REPOSITORY

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
PAD = 1  # RoBERTa counts positions from PAD + 1; PAD isn't among the tokens.


def name_of(title):
    return "roberta" if title == "roberta" else families.family_of(MODELS[title])


def written(title, params, folder):
    """Writes a folder as transformers reads it."""
    model, name = MODELS[title], name_of(title)
    weights = tensors.to_tensors(params, model, name, PAD)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = families.to_json(model, name, PAD) | {"pad_token_id": PAD}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def loaded(name, folder):
    """Loads a folder by transformers, which must find each of its weights and no others."""
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


def assert_close(title, one, other):
    """Checks that logits are the same up to rounding; prints the difference."""
    found = difference(one, other)
    print(f"{title}: {found:.1e} of the largest logit, {np.abs(other).max():.1f}")
    assert found < TOLERANCE


def random_model(name, **changes):
    """Creates a model by transformers with its own config class; returns ours, too."""
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


@every_model
def test_logits_of_an_exported_model_are_the_same(title, tmp_path):
    transformer, params = initialised(MODELS[title])
    theirs = loaded(name_of(title), written(title, params, tmp_path))
    assert_close(title, their_logits(theirs), our_logits(transformer.config, params))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_model_of_transformers_are_the_same(name, tmp_path):
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    folder = load.open_folder(f"hf:{tmp_path}")
    folder.check(model)
    params = folder.read(model)
    assert_close(f"{name}, from transformers", our_logits(model, params), their_logits(theirs))


@every_model
def test_there_and_back_is_the_same_to_the_bit(title, tmp_path):
    _, params = initialised(MODELS[title])
    folder = load.open_folder(f"hf:{written(title, params, tmp_path)}")
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
    params = load.open_folder(f"hf:{tmp_path}").read(model)
    again = tensors.to_tensors(params, model, name, PAD)
    before = load_file(tmp_path / "model.safetensors")
    assert again.keys() == before.keys()
    for key, array in before.items():
        if "position_embeddings" in key:  # Position embeddings, plus the first segment's.
            first = before[FAMILIES[name].token_types][0]
            skipped = families.offset(name, PAD)
            assert (again[key][skipped:] == array[skipped:] + first).all()
            assert not again[key][:skipped].any()
        elif "token_type" in key:
            assert not again[key].any()
        else:
            assert again[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize(
    ("file", "size", "vocab_size", "published"),
    [
        ("gpt2", "124M", 50257, 124_439_808),
        ("gpt2", "350M", 50257, 354_823_168),
        ("gpt2", "774M", 50257, 774_030_080),
        ("gpt2", "1558M", 50257, 1_557_611_200),
        ("finetune_gpt2", "124M", 50257, 124_439_808),
        ("llama_135m", "", 49152, 134_515_008),
        ("bert_base", "", 30522, 109_514_298),
    ],
)
def test_configs_have_as_many_parameters_as_the_models(file, size, vocab_size, published):
    get_config = runpy.run_path(str(REPOSITORY / "configs" / f"{file}.py"))["get_config"]
    config = get_config(size) if size else get_config()
    config.model.vocab_multiple = 1
    model = ModelConfig.from_config(config, vocab_size)
    name = families.family_of(model)
    segments = tensors.TOKEN_TYPES * model.embed_dim if FAMILIES[name].token_types else 0
    assert num_parameters(parameter_shapes(Transformer(model))) + segments == published
    architecture = getattr(transformers, FAMILIES[name].architecture)
    with torch.device("meta"):
        theirs = architecture(architecture.config_class(**families.to_json(model, name, None)))
    assert theirs.num_parameters() == published


def saved(name, tmp_path):
    """Saves a model by transformers; returns "hf:FOLDER" and its ModelConfig."""
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    return f"hf:{tmp_path}", model


def test_weights_in_several_files_and_in_bfloat16_are_read(tmp_path):
    theirs, model = random_model("llama")
    theirs.bfloat16().save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    params = load.read(f"hf:{tmp_path}", model)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    # Every bfloat16 is exact as a float32.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert difference(our_logits(model, params), their_logits(theirs)) < TOLERANCE


def test_names_of_old_folders_are_known(tmp_path):
    """The hub's GPT-2 lacks its base name and holds masks; its BERT has gamma and beta."""
    spec, model = saved("gpt2", tmp_path)
    expected = load.read(spec, model)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in weights.items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    save_file(old, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    kept = ("model_type", "n_embd", "n_head", "n_layer", "n_positions", "n_inner", "vocab_size")
    values = {key: values[key] for key in kept}
    (tmp_path / "config.json").write_text(json.dumps(values))
    folder = load.open_folder(spec)
    # Keys left out of config.json have GPT-2's values.
    original = dataclasses.replace(model, norm_epsilon=1e-5)
    folder.check(original)
    for one, other in zip(
        jax.tree.leaves(folder.read(model)), jax.tree.leaves(expected), strict=True
    ):
        assert (one == other).all()

    (tmp_path / "bert").mkdir()
    spec, model = saved("bert", tmp_path / "bert")
    expected = load.read(spec, model)
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    old = {}
    for name, array in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = array
    old["cls.seq_relationship.weight"] = np.ones((2, 16), np.float32)
    save_file(old, tmp_path / "bert" / "model.safetensors")
    for one, other in zip(
        jax.tree.leaves(load.read(spec, model)), jax.tree.leaves(expected), strict=True
    ):
        assert (one == other).all()


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_a_shorter_context_is_the_beginning_of_a_longer(name, tmp_path):
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    half = dataclasses.replace(model, seq_len=4)
    folder = load.open_folder(f"hf:{tmp_path}")
    folder.check(half)
    logits = our_logits(model, folder.read(model))[:, :4]
    params = folder.read(half)
    shorter = np.asarray(Transformer(half).apply({"params": params}, TOKENS[:, :4]))
    if model.causal:
        assert difference(shorter, logits) < TOLERANCE
    else:
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS[:, :4])).logits.numpy()
        assert difference(shorter, expected) < TOLERANCE


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
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported without attention_bias"),
        ("llama", {"head_dim": 8}, "head_dim=8 is not supported, only 4"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}},
            "rope_parameters=.*llama3.* is not supported, only 'default'",
        ),
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
    path.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing; other formats than"):
        load.read(spec, model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"can't be used \(it has no config.json\): give a folder"
    ):
        load.open_folder(spec)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Turns off the hub's network and gives its client an empty cache; returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("spec", ["hf:no-such/model", "hf:", "hf:/no/such", f"hf:{'x' * 5000}"])
def test_what_is_no_folder_and_not_to_be_had_is_refused(offline, spec):
    with pytest.raises(ConfigError, match=r"init_from='hf:.*can't be fetched .*: give hf:FOLDER"):
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
