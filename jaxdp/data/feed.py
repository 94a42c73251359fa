"""A config's data: its token cache, and the batches that this process gets of it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.data import mixture, pipeline, tokenizer
from jaxdp.data.batch import Batch
from jaxdp.data.cache import TokenCache
from jaxdp.data.sequences import Examples, Sequences, Windows


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches to train on, from any step, and for one exact pass over the validation split.

    Attributes:
      config: a valid config, with num_train_steps resolved before batches are asked for.
      cache: the tokens of its data.
    """

    config: ConfigDict
    cache: TokenCache

    def __repr__(self) -> str:
        """A line, not the whole config."""
        return f"Feed({self.config.data.path!r}, {self.cache!r})"

    @functools.cached_property
    def shares(self) -> dict[str, int]:
        """The sources that data.path names, each with its turns in a cycle of the mixture."""
        return mixture.parse(self.config.data.path)

    @functools.cached_property
    def training(self) -> Sequences:
        """The sequences of the training split."""
        shares = tuple(self.shares.values())
        return self._sequences("train", borders=self.cache.train_borders, shares=shares)

    @functools.cached_property
    def validation(self) -> Sequences:
        """The sequences of the validation split."""
        return self._sequences("validation")

    def train(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from `start` on; see `pipeline.train_batches`."""
        return pipeline.train_batches(
            self.training,
            seed=self.config.seed,
            start_step=start,
            num_steps=self.config.num_train_steps,
            num_epochs=self.config.num_epochs,
            **self._split_of_batch(),
        )

    def evaluation(self) -> Iterator[Batch]:
        """One pass over the validation split; see `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self.validation, max_batches=self.config.eval_max_batches, **self._split_of_batch()
        )

    def positions(self, step: int) -> list[int]:
        """Where in the training split the sequences of a step's whole global batch begin."""
        c = self.config
        numbers = step * c.global_batch_size + np.arange(c.global_batch_size, dtype=np.int64)
        starts = pipeline.start_positions(numbers, self.training, c.seed).numpy()
        return self.training.begin(starts).tolist()

    def epoch_steps(self) -> int:
        """Optimizer steps that num_epochs take, the last batch filled up where it isn't full."""
        c = self.config
        return pipeline.steps_in(c.num_epochs, self.training, c.global_batch_size)

    def _sequences(self, split: str, **mix: Any) -> Sequences:
        c, tokens = self.config, getattr(self.cache, split)
        if c.data.packing == "padded":
            return Examples(tokens, self.cache.examples[split], c.seq_len, c.objective, **mix)
        apart = c.data.packing == "documents"
        end = tokenizer.end_id(self.cache.tokenizer) if apart else None
        return Windows(tokens, c.seq_len, c.objective, end, **mix)

    def _split_of_batch(self) -> dict[str, int]:
        return {
            "global_batch_size": self.config.global_batch_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
