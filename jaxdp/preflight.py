"""What can be found wrong before anything is compiled, beyond the config itself."""

import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from jaxdp import tokenizer
from jaxdp.config import ConfigError
from jaxdp.data.cache import TokenCache


def check_data(config: ConfigDict, cache: TokenCache) -> None:
    """Refuses splits that hold not even one sequence, and a sample prompt that can't be read."""
    for split, tokens in (("training", cache.train), ("validation", cache.validation)):
        if len(tokens) <= config.seq_len:
            raise ConfigError(
                f"data.path={config.data.path!r} gives {len(tokens)} {split} tokens, too few for "
                f"one sequence of seq_len={config.seq_len} and a next token: give more text, or a "
                "smaller seq_len"
            )
    if config.objective == "causal" and config.sample.num_tokens:
        [prompt] = tokenizer.encode(cache.tokenizer, [config.sample.prompt])
        if len(prompt) == 0:
            raise ConfigError(
                f"sample.prompt={config.sample.prompt!r} is empty: give at least one character, or "
                "sample.num_tokens=0"
            )


def check_same_tokens(config: ConfigDict, cache: TokenCache, digest: str) -> None:
    """Refuses other data than that of a checkpoint, of which `digest` is the token cache's."""
    if cache.digest != digest:
        raise ConfigError(
            f"data.path={config.data.path!r} no longer gives the tokens that this workdir was "
            "trained on: restore the data, or use another --workdir"
        )


def create_workdir(workdir: Path) -> None:
    """Makes the workdir where there is none yet, and makes sure that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} can't be written ({error.strerror}): choose another folder"
        ) from None
