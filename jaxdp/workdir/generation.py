"""Text generation: continues prompts with a checkpoint of a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxdp.common.choices import TEMPERATURE, check_options
from jaxdp.common.errors import ConfigError, check_text
from jaxdp.data import encoding, special_tokens, tokenizer
from jaxdp.model import sampling
from jaxdp.workdir import finished
from jaxdp.workdir.finished import Trained


def generate(
    workdir: str | Path,
    prompts: list[str],
    *,
    which: str = "newest",
    num_tokens: int = 200,
    temperature: float = TEMPERATURE,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Continues prompts with a checkpoint of a run.

    Args:
      workdir: the folder of the run.
      prompts: texts of at least one token each, with the token that begins a document, if any.
      which: "newest", "best" (by validation loss), or a number of steps such as "1000".
      num_tokens: number of tokens to add to each.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_k: draw only from the k likeliest tokens; 0: from all.
      top_p: draw only from the likeliest tokens whose probabilities add up to p.
      seed: random seed; the same seed gives the same text.
      report: called with a line of text about a damaged checkpoint.

    Returns:
      Each prompt with its continuation, up to an end-of-text token if one is drawn.

    Raises:
      ConfigError: there is no trained causal model, no such checkpoint, or a prompt or a number
        can't be used.
      RunError: the checkpoint, or all of them, are damaged.
    """
    check_options(
        num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    run = open_causal(workdir)
    words = run.words
    for prompt in prompts:
        check_text("--prompt", prompt)
    special = run.config.data.get("special_tokens", False)
    ids = encoding.encode_prompts(words, prompts, special=special)
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) == 0:
            raise ConfigError(f"--prompt={prompt!r} is empty: give at least one character")
    params, _ = run.params(which, report)
    drawn = sampling.sample(
        run.model,
        params,
        ids,
        vocab_size=tokenizer.vocab_size(words),
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    end = special_tokens.end_id(words)
    return [
        continued(words, prompt, encoding.without_begin(words, known), _until(list(tokens), end))
        for prompt, known, tokens in zip(prompts, ids, drawn, strict=True)
    ]


def open_causal(workdir: str | Path) -> Trained:
    """Opens the workdir of a model that can continue text; raises ConfigError if it can't."""
    run = finished.open_workdir(workdir)
    if run.config.objective != "causal":
        raise ConfigError(
            f"objective={run.config.objective!r} can't continue text: use a model trained with "
            "'causal'"
        )
    return run


def continued(words: Tokenizer, prompt: str, known: np.ndarray, drawn: list[int]) -> str:
    """Returns a prompt with its continuation, decoded together.

    Alone, the continuation could lose its first space. The prompt stays as it was given, unless
    the tokens drawn change how its last ones are decoded.

    Args:
      words: the tokenizer.
      prompt: the prompt.
      known: its tokens, [n] integers, without one that only begins the document.
      drawn: the tokens that continue it.
    """
    before = words.decode(known.tolist(), skip_special_tokens=False)
    text = words.decode([*known.tolist(), *drawn], skip_special_tokens=False)
    return prompt + text[len(before) :] if text.startswith(before) else text


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
