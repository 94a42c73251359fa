"""Loading and exporting, compared with transformers, with small models of random weights."""

import dataclasses
import json
import runpy

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdp.data import encoding
from jaxdp.huggingface import families, load, tensors
from jaxdp.huggingface.families import FAMILIES
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer, num_parameters, parameter_shapes
from jaxdp.workdir.generation import generate
from support.bad_input import train
from support.models import (
    MODELS,
    PAD,
    TOKENS,
    TOLERANCE,
    apply,
    difference,
    initialised,
    name_of,
    our_logits,
    written,
)
from support.runs import opened
from support.texts import REPOSITORY

WHY = "the comparison needs transformers, which .[compare] installs"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

TEXT = "17 is odd, its square is 289.\n"
every_model = pytest.mark.parametrize("title", MODELS)


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


def assert_close(title, one, other):
    """Checks that logits are the same up to rounding; prints the difference."""
    found = difference(one, other)
    print(f"{title}: {found:.1e} of the largest logit, {np.abs(other).max():.1f}")
    assert found < TOLERANCE


def random_model(name, **changes):
    """Creates a model by transformers with its own config class; returns our config, too."""
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


def saved(name, tmp_path):
    """Saves a model by transformers; returns "hf:FOLDER" and our config."""
    theirs, model = random_model(name)
    theirs.save_pretrained(tmp_path)
    return f"hf:{tmp_path}", model


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
    shorter = np.asarray(apply(Transformer(half), params, TOKENS[:, :4]))
    if model.causal:
        assert difference(shorter, logits) < TOLERANCE
    else:
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS[:, :4])).logits.numpy()
        assert difference(shorter, expected) < TOLERANCE


def llama(config):
    config.tokenizer = "train:bpe:270"
    config.model.positions, config.model.norm = "rotary", "rmsnorm"
    config.model.activation, config.model.num_kv_heads = "swiglu", 1
    config.model.vocab_multiple = 32


def bert(config):
    config.tokenizer, config.objective = "byte", "masked"
    config.model.norm_position, config.model.head_transform = "post", True
    config.model.bias, config.model.activation = True, "gelu_exact"


def test_a_character_model_is_opened_and_continues_text_alike(workdir, tmp_path):
    """Greedily, so that texts differ only where two logits are nearly equal."""
    folder, _ = opened(workdir, tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False}
    [found] = transformers.pipeline("text-generation", str(folder))("1 is", **options)
    assert found["generated_text"] == generate(workdir, ["1 is"], num_tokens=12, temperature=0)[0]
    # By default it samples, and stops at the end of the context.
    [found] = transformers.pipeline("text-generation", str(folder))("1 is")
    assert found["generated_text"].startswith("1 is") and len(found["generated_text"]) <= 16


@pytest.mark.parametrize("change", [llama, bert])
def test_text_gives_the_same_tokens_and_logits(short, change, tmp_path):
    change(short)
    train(short, tmp_path / "run")
    folder, run = opened(tmp_path / "run", tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    kind = "CausalLM" if short.objective == "causal" else "MaskedLM"
    [ids] = encoding.encode(run.words, [TEXT[:16]])
    assert words(TEXT[:16])["input_ids"] == list(ids)
    assert words.decode(ids) == TEXT[:16]
    with torch.no_grad():
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
        theirs = model(torch.tensor(ids[None])).logits.numpy()
    params, _ = run.params("newest", print)
    ours = np.asarray(apply(run.model, params, ids[None]))
    assert difference(theirs, ours) < TOLERANCE
    if change is bert:
        assert words.mask_token == "<|mask|>" and words.mask_token_id == 257
        [filled, *_] = transformers.pipeline("fill-mask", str(folder))("17 is <|mask|>dd,")
        assert filled["sequence"].endswith("dd,")
    else:
        assert words.eos_token == words.bos_token == "<|endoftext|>"
        # Ids that pad the vocabulary are never drawn.
        config = transformers.GenerationConfig.from_pretrained(folder)
        assert config.suppress_tokens == list(range(270, 288)) and config.eos_token_id == 0
