"""A trained model in the workdir of its run: what describes it there is written and opened."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common import config as configs
from jaxdp.common import paths
from jaxdp.common.files import write_atomically
from jaxdp.data import tokenizer
from jaxdp.data.cache import TokenCache
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer, parameter_shapes
from jaxdp.workdir import parameters


@dataclasses.dataclass(frozen=True)
class Trained:
    """The contents of a workdir, without the parameters.

    Attributes:
      workdir: the folder of the run.
      config: the config of the run.
      words: the tokenizer of the run.
      model: the model that the run trains.
    """

    workdir: Path
    config: ConfigDict = dataclasses.field(repr=False)
    words: Tokenizer = dataclasses.field(repr=False)
    model: Transformer = dataclasses.field(repr=False)

    @property
    def chat_template(self) -> str:
        """The template of the chats that the run was trained on; "" where it was not."""
        return tokenizer.chat_template(str(self.workdir / "tokenizer.json"))

    def params(self, which: str, report: Callable[[str], None]) -> tuple[Any, int]:
        """Reads a checkpoint's parameters; also returns its step. See `parameters.load_params`."""
        expected = {"tokenizer": tokenizer.digest(self.words)}
        shapes = parameter_shapes(self.model)
        return parameters.load_params(self.workdir, shapes, expected, report, which=which)


def describe(workdir: Path, config: ConfigDict, cache: TokenCache) -> None:
    """Writes what `open_workdir` reads: the config, the tokenizer, and the template of chats.

    Raises:
      ConfigError: a file can't be written.
    """
    configs.save(config, workdir / "config.json")
    write_atomically(workdir / "tokenizer.json", cache.tokenizer.to_str(pretty=True))
    if cache.chat_template:
        write_atomically(workdir / tokenizer.TEMPLATE, cache.chat_template)


def open_workdir(workdir: str | Path) -> Trained:
    """Reads the config and the tokenizer of a run, but none of its checkpoints.

    Raises:
      ConfigError: a file is missing or damaged.
    """
    workdir = paths.local("--workdir", workdir)
    config = configs.load(workdir / "config.json")
    words = tokenizer.load_file(workdir / "tokenizer.json", "restore it from a copy")
    model = Transformer(ModelConfig.from_config(config, tokenizer.vocab_size(words)))
    return Trained(workdir, config, words, model)
