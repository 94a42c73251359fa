"""A trained model, as its workdir has it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common import config as configs
from jaxdp.data import tokenizer
from jaxdp.model.transformer import ModelConfig, Transformer, parameter_shapes
from jaxdp.workdir import checkpoints


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a workdir has, but for the parameters.

    Attributes:
      workdir: of the run.
      config: of the run.
      words: its tokenizer.
      model: that it trains.
    """

    workdir: Path
    config: ConfigDict = dataclasses.field(repr=False)
    words: Tokenizer = dataclasses.field(repr=False)
    model: Transformer = dataclasses.field(repr=False)

    def params(self, which: str, report: Callable[[str], None]) -> tuple[Any, int]:
        """Reads the parameters of a checkpoint, and its step; see `checkpoints.load_params`."""
        said = {"tokenizer": tokenizer.digest(self.words)}
        shapes = parameter_shapes(self.model)
        return checkpoints.load_params(self.workdir, shapes, said, report, which=which)


def open_workdir(workdir: Path) -> Trained:
    """Reads what a run has left, but for its checkpoints.

    Raises:
      ConfigError: it has left nothing, or it is damaged.
    """
    config = configs.load(workdir / "config.json")
    words = tokenizer.load_file(workdir / "tokenizer.json", "restore it from a copy")
    model = Transformer(ModelConfig.from_config(config, tokenizer.vocab_size(words)))
    return Trained(workdir, config, words, model)
