"""The sample of text that a run shows at its evaluations and at its end."""

from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.data import tokenizer
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
    [prompt] = tokenizer.encode(cache.tokenizer, [config.sample.prompt])
    [ids] = sampling.sample(
        setup.model,
        jax.device_get(params),
        [prompt],
        vocab_size=cache.vocab_size,
        num_tokens=config.sample.num_tokens,
        temperature=sampling.TEMPERATURE,
        seed=config.seed,
    )
    return cache.tokenizer.decode([*prompt, *ids], skip_special_tokens=False)
