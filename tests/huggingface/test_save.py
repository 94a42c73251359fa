"""Exporting runs as Hugging Face folders."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, models, processors

from jaxdp.common.errors import ConfigError
from jaxdp.data import special_tokens, tokenizer
from jaxdp.huggingface import save
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer
from jaxdp.workdir import finished
from jaxdp.workdir.finished import Trained
from support.bad_input import contents, train
from support.runs import opened


def test_a_model_begun_with_transformers_weights_is_exported_as_it_was(short, tmp_path):
    """To the bit, with a learning rate of 0; and resuming doesn't need the folder."""
    short.tokenizer, short.optimizer.learning_rate, short.model.bias = "byte", 0.0, True
    train(short, tmp_path / "first")
    first, _ = opened(tmp_path / "first", tmp_path)
    short.init_from, short.seed = f"hf:{first}", 1
    train(short, tmp_path / "second")
    (tmp_path / "again").mkdir()
    second, _ = opened(tmp_path / "second", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    assert f"| initial weights | hf:{first} |" in (second / "README.md").read_text()
    # The same tokenizer can be loaded from the folder.
    assert tokenizer.digest(tokenizer.get_tokenizer(f"hf:{first}", "causal", None)) == (
        tokenizer.digest(finished.open_workdir(tmp_path / "second").words)
    )
    first.rename(tmp_path / "moved")
    short.num_train_steps = 3
    assert train(short, tmp_path / "second").step == 3
    with pytest.raises(ConfigError, match="can't be loaded"):
        train(short, tmp_path / "third")


@pytest.mark.parametrize(("which", "step"), [("newest", 4), ("best", 4), ("2", 2)])
def test_the_checkpoint_that_was_asked_for_and_what_is_known_of_it(workdir, tmp_path, which, step):
    before = contents(workdir)
    folder, run = opened(workdir, tmp_path, which)
    assert contents(workdir) == before
    params, _ = run.params(str(step), print)
    table = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert (table == np.asarray(params["embed"]["embedding"])).all()
    card = (folder / "README.md").read_text()
    assert f"| steps | {step}, of 4 sequences x 16 tokens |" in card
    loss = re.search(r"\| validation loss \| (.*) \|", card)[1]
    [logged] = [r for r in save.read_jsonl(workdir) if "eval/loss" in r]
    assert loss == (
        f"{logged['eval/loss']:.4f} nats per token" if step == 4 else "not evaluated at this step"
    )
    assert "Licence: not stated" in card
    assert json.loads(card.partition("```json")[2].partition("```")[0])["seq_len"] == 16


SPECIAL = {
    "bert": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "masked",
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        | {"eos": "[SEP]"},
    ),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "masked",
        {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
        | {"eos": "</s>"},
    ),
    "llama": (
        ["<unk>", "<s>", "</s>"],
        "causal",
        {"bos": "</s>", "eos": "</s>", "unk": "<unk>"},
    ),
    "gpt2": (["<|endoftext|>"], "causal", {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    "none": ([], "causal", {}),
}


@pytest.mark.parametrize("title", SPECIAL)
def test_special_tokens_are_those_of_the_tokenizer(config, title, tmp_path):
    names, config.objective, expected = SPECIAL[title]
    # "<s>" is also an ordinary token, which makes it not special.
    vocabulary = {c: i for i, c in enumerate(["<", "s", ">", "<s", "<s>"])}
    words = Tokenizer(models.BPE(vocabulary, [("<", "s"), ("<s", ">")]))
    words.add_special_tokens([AddedToken(name, special=True) for name in names if name != "<s>"])
    if "<s>" in names:
        words.add_special_tokens([AddedToken("<s>", special=True)])
    model = Transformer(ModelConfig.from_config(config, tokenizer.vocab_size(words)))
    found = save.token_roles(Trained(tmp_path, config, words, model))
    assert found == {f"{role}_token": name for role, name in expected.items()}


@pytest.mark.parametrize(("objective", "ids"), [("causal", [1, 2]), ("masked", [1, 2, 3])])
def test_an_exported_tokenizer_puts_first_what_training_has_put_first(
    objective, ids, config, tmp_path
):
    """In training nothing precedes a text, unless the run's tokenizer.json says so (data.bos)."""
    words = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "a": 2, "</s>": 3}, unk_token="?"))
    words.add_special_tokens(["<s>", "</s>"])
    model = ModelConfig.from_config(config, 4)
    model = Transformer(dataclasses.replace(model, causal=objective == "causal"))
    for bos, expected in (("<s>", ids), ("", [2])):
        special_tokens.choose(words, {}, bos, "auto")
        run = Trained(tmp_path, config, words, model)
        assert save.exported_tokenizer(run).encode("a").ids == expected
    words.post_processor = processors.ByteLevel()
    assert save.exported_tokenizer(run).encode("a").ids == [2]
    assert ("bos_token" in save.token_roles(run)) == (objective == "causal")
    config.data.packing = "padded"
    assert "bos_token" not in save.token_roles(run)


def test_weights_in_bfloat16_are_those_in_float32_rounded(workdir, tmp_path):
    exact, _ = opened(workdir, tmp_path)
    save.export(workdir, tmp_path / "half", dtype="bfloat16")
    before, after = (load_file(x / "model.safetensors") for x in (exact, tmp_path / "half"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == "bfloat16"
        assert (after[name] == array.astype("bfloat16")).all()
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype='int8' is unknown: give float32 or bfloat16"),
        ({"dtype": "foo"}, "--dtype='foo' is unknown"),
        ({"which": "foo"}, "--step='foo' names no checkpoint"),
    ],
)
def test_what_can_not_be_exported_so_leaves_nothing(workdir, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        save.export(workdir, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(workdir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"--output='.*out' exists already: give another"):
        save.export(workdir, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_is_made_whole_or_not_at_all(workdir, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", full)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"can't be written \(No space left on device\)"):
        save.export(workdir, tmp_path / "new" / "out")
    assert contents(tmp_path).keys() - before.keys() == {"new"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, r"model.norm='rmsnorm' makes .* GPT2LMHeadModel, train with 'layern"),
        ({"positions": "rotary"}, r"model.norm='layernorm' .* ArceeForCausalLM, .* 'rmsnorm'"),
        ({"activation": "swiglu"}, r"model.activation='swiglu' .* with 'gelu' or 'gelu_exact' or"),
        ({"logit_cap": 15.0}, r"model.logit_cap=15.0 .* GPT2LMHeadModel, train with 0.0"),
        ({"window": 8}, r"model.window=8 .* GPT2LMHeadModel, train with 0"),
        ({"value_embeddings": True}, r"model.value_embeddings=True .* GPT2.* with False"),
        ({"mlp_lookback": 3}, r"model.mlp_lookback=3 .* GPT2LMHeadModel, train with 0"),
        ({"embed_residual": True}, r"model.embed_residual=True .* GPT2.* with False"),
        ({"num_kv_heads": 1, "num_heads": 2}, r"model.num_kv_heads=1 .* with 2"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_refused(workdir, tmp_path, changes, message):
    """Before its checkpoint is read: here it wouldn't fit the changed config."""
    config = json.loads((workdir / "config.json").read_text())
    config["model"] |= changes
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        save.export(workdir, tmp_path / "out")


def test_the_command(workdir, tmp_path, command, fresh_command):
    out = tmp_path / "out"
    process = fresh_command("export", f"--workdir={workdir}", f"--output={out}", "--step=best")
    assert process.stdout == f"{out}: the model after step 4\n"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for wrong in ((), ("--step=-1", "--out=x"), ("--dtype=int8", "--out=x"), (f"--out={out}",)):
        process = command("export", f"--workdir={workdir}", *wrong, check=2)
        assert process.stderr.startswith("jaxdp: --") and process.stderr.count("\n") == 1
