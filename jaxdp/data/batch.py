"""The schema of a batch: all its keys, with their shapes and dtypes.

Shapes: P sequences per process, b sequences per device, L sequence length.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

Batch = dict[str, Any]

# In every batch, [P, L]: input tokens, the tokens to predict, and their weights in the loss.
TOKENS: dict[str, type] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
# In batches that keep documents apart, [P, L]: the document of a token, and its position there.
DOCUMENTS: dict[str, type] = {"segments": np.int32, "positions": np.int32}
# In training batches, [P]: how many seconds this process spent on its last step.
PROCESS: dict[str, type] = {"busy": np.float32}
# In evaluation batches, [P]: the number of the batch, which seeds the masks of masked LM.
NUMBER: dict[str, type] = {"number": np.int32}


def token_keys(objective: str, packing: str) -> dict[str, type]:
    """Returns {key: dtype} of the token arrays [P, L] in a batch.

    Args:
      objective: "causal" or "masked".
      packing: "stream", "documents" or "padded".
    """
    if packing == "documents":
        return TOKENS | DOCUMENTS
    if packing == "padded" and objective == "masked":
        return TOKENS | {"segments": DOCUMENTS["segments"]}
    return dict(TOKENS)


def training_shapes(config: ConfigDict, steps: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one device's training batch for a round of steps.

    Args:
      config: a valid config.
      steps: optimizer steps in the round.
      rows: b, sequences per device and step.

    Returns:
      {key: shape}: [steps, b, L] for tokens, [steps, b] for `PROCESS`.
    """
    return _shapes(config, PROCESS, (steps, rows))


def evaluation_shapes(config: ConfigDict, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one device's evaluation batch: [b, L] for tokens, [b] for `NUMBER`.

    Args:
      config: a valid config.
      rows: b, sequences per device.
    """
    return _shapes(config, NUMBER, (rows,))


def _shapes(
    config: ConfigDict, others: Mapping[str, type], leading: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    keys = token_keys(config.objective, config.data.packing)
    tokens = {name: (dtype, (config.seq_len,)) for name, dtype in keys.items()}
    rest = {name: (dtype, ()) for name, dtype in others.items()}
    return {
        name: jax.ShapeDtypeStruct((*leading, *shape), dtype)
        for name, (dtype, shape) in (tokens | rest).items()
    }


def with_process(batch: Batch, busy: float) -> Batch:
    """Returns a training batch with this process's figures added, for the others; see `PROCESS`."""
    return batch | _filled(PROCESS, {"busy": busy}, len(batch["inputs"]))


def with_number(batch: Batch, number: int) -> Batch:
    """Returns an evaluation batch with its number added; see `NUMBER`."""
    return batch | _filled(NUMBER, {"number": number}, len(batch["inputs"]))


def tokens_of(batch: Batch) -> Batch:
    """Returns the keys of a batch that the loss is computed from."""
    return {name: batch[name] for name in TOKENS | DOCUMENTS if name in batch}


def documents_of(batch: Batch) -> Batch:
    """Returns the keys of a batch that keep documents apart; empty where they aren't kept apart."""
    return {name: batch[name] for name in DOCUMENTS if name in batch}


def _filled(keys: Mapping[str, type], values: Mapping[str, Any], rows: int) -> Batch:
    return {name: np.full(rows, values[name], dtype) for name, dtype in keys.items()}
