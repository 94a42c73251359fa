"""Exports a trained model as a folder that Hugging Face's transformers opens."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxdp.common import files, paths
from jaxdp.common.choices import CHOICES
from jaxdp.common.errors import ConfigError, check_text, shown
from jaxdp.common.terminal import quantity
from jaxdp.data import special_tokens, tokenizer
from jaxdp.huggingface import families, load, tensors
from jaxdp.model import sampling
from jaxdp.model.transformer import num_parameters
from jaxdp.workdir import finished
from jaxdp.workdir.finished import Trained
from jaxdp.workdir.metrics import read_jsonl

# Special tokens of well-known tokenizers, the likeliest first.
NAMES = {
    "unk_token": ("[UNK]", "<unk>", "<|unk|>"),
    "pad_token": ("[PAD]", "<pad>", "<|pad|>"),
}
MASKED_NAMES = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": special_tokens.MASK_NAMES,
}


def export(
    workdir: str | Path,
    output: str | Path,
    which: str = "newest",
    report: Callable[[str], None] = print,
    dtype: str = "float32",
) -> int:
    """Writes a checkpoint as a folder for transformers, completely or not at all.

    Args:
      workdir: the run's folder.
      output: the folder to write; must not exist.
      which: "newest", "best" or a number of steps.
      report: called with a line of text on each damaged checkpoint.
      dtype: of the weights, "float32" or "bfloat16".

    Returns:
      The step of the checkpoint.

    Raises:
      ConfigError: the dtype or the checkpoint is unknown, transformers has no such model, or the
        folder exists or can't be written.
      RunError: the checkpoint is damaged.
    """
    if dtype not in CHOICES["model.dtype"]:
        raise ConfigError(
            f"--dtype={shown(dtype)} is unknown: give {' or '.join(CHOICES['model.dtype'])}"
        )
    workdir, output = Path(workdir), paths.local("output", output)
    _check_absent(output)
    run = finished.open_workdir(workdir)
    family, special = families.family_of(run.model.config), token_roles(run)
    pad_id = _id(run.words, special.get("pad_token"))
    if family == "bert" and special.get("mask_token") == "<mask>" and pad_id is not None:
        family = "roberta"  # Only the tokenizer tells it from BERT.
    params, step = run.params(which, report)
    texts: dict[str, Any] = {
        "config.json": families.to_json(run.model.config, family, pad_id) | _ids(run, special),
        "tokenizer_config.json": tokenizer_config(run, special),
        "tokenizer.json": exported_tokenizer(run).to_str(pretty=True),
        "README.md": card(run, family, step, num_parameters(params)),
    }
    if run.model.config.causal:
        texts["generation_config.json"] = generation_config(run, special)
    if run.chat_template:
        texts[tokenizer.TEMPLATE] = run.chat_template
    weights = tensors.to_tensors(params, run.model.config, family, pad_id)
    texts["config.json"]["dtype"] = dtype
    _write(output, {name: array.astype(dtype) for name, array in weights.items()}, texts)
    return step


def token_roles(run: Trained) -> dict[str, str]:
    """Returns a tokenizer's special tokens, by their names in transformers."""
    special = special_tokens.names(run.words)
    names = NAMES | ({} if run.model.config.causal else MASKED_NAMES)
    found = {
        role: next((name for name in candidates if name in special), None)
        for role, candidates in names.items()
    }
    # The model was trained with these, even if the tokenizer doesn't call them special.
    end, begin = special_tokens.end_id(run.words), special_tokens.begin_id(run.words)
    if begin is None and run.model.config.causal and run.config.data.packing == "stream":
        begin = end  # A document follows the end of another, as in GPT-2.
    found |= {"eos_token": _token(run.words, end), "bos_token": _token(run.words, begin)}
    if not run.model.config.causal:
        found["mask_token"] = _token(run.words, special_tokens.mask_id(run.words))
    return {role: name for role, name in found.items() if name is not None}


def exported_tokenizer(run: Trained) -> Tokenizer:
    """Returns the tokenizer, which puts before and after a text what training has put there.

    A causal model is to continue a text, so nothing is put after it.
    """
    words = Tokenizer.from_str(run.words.to_str())
    begin, end = special_tokens.begin_id(words), special_tokens.end_id(words)
    # Without a token to begin with, BERT's training has put none after a text by itself, either.
    after = end if begin is not None and not run.model.config.causal else None
    words.post_processor = special_tokens.template(words, begin, after)
    return words


def tokenizer_config(run: Trained, special: dict[str, str]) -> dict[str, Any]:
    """Returns tokenizer_config.json: the special tokens and the longest text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.config.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def generation_config(run: Trained, special: dict[str, str]) -> dict[str, Any]:
    """Returns generation_config.json, with which transformers samples as `jaxdp.generate` does."""
    padding = range(tokenizer.vocab_size(run.words), run.model.config.vocab_size)
    return {
        "do_sample": True,
        "temperature": sampling.TEMPERATURE,
        "top_k": 0,
        "max_length": run.config.seq_len,
        **_ids(run, special),
        **({"suppress_tokens": list(padding)} if padding else {}),
    }


def card(run: Trained, family: str, step: int, parameters: int) -> str:
    """Returns README.md, the model card: only what is known of the model."""
    config, architecture = run.config, families.FAMILIES[family].architecture
    causal = run.model.config.causal
    task = "text-generation" if causal else "fill-mask"
    rows = {
        "architecture": f"{architecture}, {quantity(parameters)} parameters",
        "initial weights": config.init_from or "random",
        "steps": f"{step:,}, of {config.global_batch_size} sequences x {config.seq_len} tokens",
        "data": config.data.path,
        "tokenizer": f"{config.tokenizer}, {tokenizer.vocab_size(run.words):,} tokens",
        "validation loss": _eval_loss(run.workdir, step),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: {task}
---

# {architecture} trained by jaxdp

| | |
|---|---|
{table}

Licence: not stated. Whoever publishes these weights has to say it.

```python
from transformers import pipeline

print(pipeline("{task}", "FOLDER")("{"TEXT" if causal else "TEXT with the mask token"}"))
```

The config of the run:

```json
{json.dumps(config.to_dict(), indent=2)}
```
"""


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _eval_loss(workdir: Path, step: int) -> str:
    try:
        losses = [r.get("eval/loss") for r in read_jsonl(workdir) if r["step"] == step]
    except ConfigError:
        losses = []
    known = [loss for loss in losses if isinstance(loss, float)]
    return f"{known[-1]:.4f} nats per token" if known else "not evaluated at this step"


def _ids(run: Trained, special: dict[str, str]) -> dict[str, int | None]:
    roles = ("bos_token", "eos_token", "pad_token")
    return {f"{role}_id": _id(run.words, special.get(role)) for role in roles}


def _id(words: Tokenizer, token: str | None) -> int | None:
    return None if token is None else words.token_to_id(token)


def _token(words: Tokenizer, number: int | None) -> str | None:
    return None if number is None else words.id_to_token(number)


def _check_absent(output: Path) -> None:
    check_text("--output", str(output))
    if os.path.lexists(output):
        raise ConfigError(f"--output={shown(str(output))} exists already: give another folder")


def _write(output: Path, weights: dict[str, Any], texts: dict[str, Any]) -> None:
    """Writes the folder under another name, then renames it, so it is never seen half-written."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / load.WEIGHTS, {"format": "pt"})
        for name, content in texts.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        # safetensors creates a file that only its owner can read.
        shutil.copymode(temporary / "config.json", temporary / load.WEIGHTS)
        _check_absent(output)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--output={shown(str(output))} can't be written ({files.reason(error)}): "
            f"{files.way_out(files.reason(error))}, or give another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
