"""The sample of text that a run shows at its evaluations and at its end."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.data import encoding, special_tokens
from jaxdp.data.cache import TokenCache
from jaxdp.model import sampling
from jaxdp.step.setup import Setup


def is_wanted(config: ConfigDict) -> bool:
    """Returns whether a config asks for samples, which only a causal model can make."""
    return config.objective == "causal" and config.sample.num_tokens > 0


def sample(setup: Setup, params: Any) -> str:
    """Returns the configured prompt with the model's continuation of it.

    Args:
      setup: the run's setup.
      params: parameters in the model's shapes, on the devices.
    """
    config, cache = setup.config, setup.feed.cache
    prompt = prompt_tokens(config, cache)
    [ids] = sampling.sample(
        setup.model,
        jax.device_get(params),
        [prompt],
        vocab_size=cache.vocab_size,
        num_tokens=config.sample.num_tokens,
        temperature=sampling.TEMPERATURE,
        seed=config.seed,
    )
    shown = encoding.without_begin(cache.tokenizer, prompt)
    return cache.tokenizer.decode([*shown, *ids], skip_special_tokens=False)


def prompt_tokens(config: ConfigDict, cache: TokenCache) -> np.ndarray:
    """Returns the tokens of the configured prompt, [n] int64, at least one.

    A tokenizer may drop all of it, as BERT's drops line breaks. Then a sample begins as a document
    does after another, or, if no token ends a document, with the first token of the text.

    Raises:
      ConfigError: the prompt can't be tokenised.
    """
    special = config.data.special_tokens
    [ids] = encoding.encode_prompts(cache.tokenizer, [config.sample.prompt], special=special)
    if len(ids):
        return ids
    end = special_tokens.end_id(cache.tokenizer)
    return np.array([cache.train[0] if end is None else end], np.int64)
