"""The batches of a run that this process gets: what its config and tokens make of `pipeline`."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.data import mixture, pipeline, tokenizer
from jaxdp.data.cache import TokenCache
from jaxdp.data.sequences import Batch, Examples, Sequences, Windows
from jaxdp.data.sequences import keys as sequence_keys


class Feed:
    """Batches to train on, from any step, and for one exact pass over the validation split."""

    def __init__(self, config: ConfigDict, cache: TokenCache):
        """Takes a valid config with num_train_steps resolved."""
        self._config = config
        self._train, self._validation = (
            sequences(config, cache, split) for split in ("train", "validation")
        )
        self._common: dict[str, Any] = {
            "global_batch_size": config.global_batch_size,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def train(self, start: int) -> Iterator[Batch]:
        """See `pipeline.train_batches`."""
        return pipeline.train_batches(
            self._train,
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
        starts = pipeline.start_positions(numbers, self._train, c.seed).numpy()
        return self._train.begin(starts).tolist()

    def evaluation(self) -> Iterator[Batch]:
        """See `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self._validation, max_batches=self._config.eval_max_batches, **self._common
        )


def sequences(config: ConfigDict, cache: TokenCache, split: str) -> Sequences:
    """Those that a config makes of the "train" or "validation" tokens."""
    tokens, shape = getattr(cache, split), (config.seq_len, config.objective)
    mix: dict[str, Any] = {}
    if split == "train":
        shares = mixture.parse(config.data.path).values()
        mix = {"borders": cache.train_borders, "shares": tuple(shares)}
    if config.data.packing == "padded":
        return Examples(tokens, cache.examples[split], *shape, **mix)
    end = tokenizer.end_id(cache.tokenizer) if config.data.packing == "documents" else None
    return Windows(tokens, *shape, end, **mix)


def round_shapes(config: ConfigDict, steps: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a device gets for so many steps of so many rows each.

    Returns:
      Of the sequences' keys [steps, rows, L]; "stop" and "busy" [steps, rows], which a run adds.
    """
    keys = sequence_keys(config.objective, config.data.packing)
    told = jax.ShapeDtypeStruct((steps, rows), np.float32)
    return {
        name: jax.ShapeDtypeStruct((steps, rows, config.seq_len), dtype)
        for name, dtype in keys.items()
    } | {"stop": told, "busy": told}


def epoch_steps(config: ConfigDict, cache: TokenCache) -> int:
    """Optimizer steps that num_epochs take, the last batch filled up where it isn't full."""
    return pipeline.steps_in(
        config.num_epochs, sequences(config, cache, "train"), config.global_batch_size
    )
