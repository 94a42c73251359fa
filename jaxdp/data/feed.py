"""The batches of a run that this process gets: what its config and tokens make of `pipeline`."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.data import pipeline
from jaxdp.data.cache import TokenCache
from jaxdp.data.pipeline import Batch


class Feed:
    """Batches to train on, from any step, and for one exact pass over the validation split."""

    def __init__(self, config: ConfigDict, cache: TokenCache):
        """Takes a valid config with num_train_steps resolved."""
        self._config, self._cache = config, cache
        self._common: dict[str, Any] = {
            "objective": config.objective,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def train(self, start: int) -> Iterator[Batch]:
        """See `pipeline.train_batches`."""
        return pipeline.train_batches(
            self._cache.train,
            seed=self._config.seed,
            start_step=start,
            num_steps=self._config.num_train_steps,
            num_epochs=self._config.num_epochs,
            **self._common,
        )

    def positions(self, step: int) -> list[int]:
        """Where in the training split the sequences of a step's whole global batch begin."""
        c = self._config
        numbers = step * c.global_batch_size + np.arange(c.global_batch_size, dtype=np.int64)
        tokens = len(self._cache.train)
        return pipeline.start_positions(numbers, tokens, c.seq_len, c.seed).numpy().tolist()

    def evaluation(self) -> Iterator[Batch]:
        """See `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self._cache.validation, max_batches=self._config.eval_max_batches, **self._common
        )
