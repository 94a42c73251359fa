"""The data of a run: its token cache, and this process's batches from it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.data import mixture, pipeline, special_tokens
from jaxdp.data.batch import Batch
from jaxdp.data.cache import TokenCache
from jaxdp.data.sequences import Examples, Sequences, Windows


@dataclasses.dataclass(frozen=True)
class Feed:
    """Training batches from any step on, and batches of one exact pass over the validation split.

    Attributes:
      config: a valid config; num_train_steps must be resolved before the first training batch.
      cache: the token cache of the config's data.
      origin: where this start of the run begins; before, its batches or weights may have differed.
    """

    config: ConfigDict
    cache: TokenCache
    origin: pipeline.Position = dataclasses.field(default_factory=pipeline.Position)

    def __repr__(self) -> str:
        """Shows the data's path and the cache in a line, without the config."""
        return f"Feed({self.config.data.path!r}, {self.cache!r})"

    @functools.cached_property
    def shares(self) -> dict[str, int]:
        """{source: turns in a cycle of the mixture} for the sources that data.path names."""
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

    @property
    def tokens_per_byte(self) -> float | None:
        """The cache's; None also of masked tokens, whose loss is no code length of the text."""
        return self.cache.tokens_per_byte if self.config.objective == "causal" else None

    def train(self, start: int) -> Iterator[Batch]:
        """Yields the batches of the steps from `start`, at or after the origin, to the end."""
        return pipeline.train_batches(
            self.training,
            seed=self.config.seed,
            start_step=start,
            num_steps=self.config.num_train_steps,
            num_epochs=self.config.num_epochs,
            origin=self.origin,
            **self._split_of_batch(),
        )

    def evaluation(self) -> Iterator[Batch]:
        """Yields one pass over the validation split; see `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self.validation, max_batches=self.config.eval_max_batches, **self._split_of_batch()
        )

    def position(self, step: int) -> pipeline.Position:
        """Returns how far the run has come after `step` steps, at or after the origin.

        Padding, with which the last batch of num_epochs is filled up, isn't taken.
        """
        c, turns, before = self.config, self._turns, self.origin.total
        end = c.num_epochs * pipeline.epoch_length(self.training)
        after = before + (step - self.origin.step) * c.global_batch_size
        if c.num_epochs:
            after = min(after, max(end, before))
        taken = turns.taken(after) + self.origin.ahead(turns)
        return pipeline.Position(step, tuple(taken.tolist()), self.origin.shuffle)

    def first_tokens(self, step: int) -> list[int]:
        """Returns the training tokens at which the sequences of a step's global batch begin."""
        c = self.config
        first = self.origin.total + (step - self.origin.step) * c.global_batch_size
        numbers = first + np.arange(c.global_batch_size, dtype=np.int64)
        starts = pipeline.start_positions(numbers, self.training, c.seed, self.origin).numpy()
        return self.training.begin(starts).tolist()

    def epoch_steps(self) -> int:
        """Returns the number of the step with which num_epochs end; its batch may be padded."""
        c = self.config
        return pipeline.steps_in(c.num_epochs, self.training, c.global_batch_size, self.origin)

    @functools.cached_property
    def _turns(self) -> mixture.Cycle:
        return mixture.cycle(tuple(self.shares.values()))

    def _sequences(self, split: str, **mix: Any) -> Sequences:
        c, tokens = self.config, getattr(self.cache, split)
        marks = self.cache.marks.get(split)
        if c.data.packing == "padded":
            index = self.cache.examples[split]
            return Examples(tokens, index, c.seq_len, c.objective, marks=marks, **mix)
        apart = c.data.packing == "documents"
        end = special_tokens.end_id(self.cache.tokenizer) if apart else None
        return Windows(tokens, c.seq_len, c.objective, end, marks=marks, **mix)

    def _split_of_batch(self) -> dict[str, int]:
        return {
            "global_batch_size": self.config.global_batch_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
