"""What a batch holds: all its keys, with their shapes and dtypes.

Shapes: P sequences of a process, b sequences of a device, L length.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

Batch = dict[str, Any]

# Every batch, [P, L]: tokens, the tokens to predict, and what each counts in the loss.
TOKENS: dict[str, type] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
# Batches that keep documents apart, [P, L]: a token's document, and its place in it.
DOCUMENTS: dict[str, type] = {"segments": np.int32, "positions": np.int32}
# Training batches, [P]: whether this process was asked to stop, and how many seconds it was last
# busy with a step.
PROCESS: dict[str, type] = {"stop": np.float32, "busy": np.float32}
# Evaluation batches, [P]: the batch's number in the evaluation, which seeds masked-LM's masks.
NUMBER: dict[str, type] = {"number": np.int32}


def token_keys(objective: str, packing: str) -> dict[str, type]:
    """The keys [P, L] of a config's batches, and their dtypes."""
    if packing == "documents":
        return TOKENS | DOCUMENTS
    if packing == "padded" and objective == "masked":
        return TOKENS | {"segments": DOCUMENTS["segments"]}
    return dict(TOKENS)


def training_shapes(config: ConfigDict, steps: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a device gets for `steps` optimizer steps of `rows` sequences: [steps, rows, L] or less.

    Args:
      config: a valid config.
      steps: of a round.
      rows: b.
    """
    keys = token_keys(config.objective, config.data.packing)
    tokens = {name: (dtype, (config.seq_len,)) for name, dtype in keys.items()}
    process = {name: (dtype, ()) for name, dtype in PROCESS.items()}
    return {
        name: jax.ShapeDtypeStruct((steps, rows, *rest), dtype)
        for name, (dtype, rest) in (tokens | process).items()
    }


def with_process(batch: Batch, *, stop: bool, busy: float) -> Batch:
    """A training batch, with what this process tells the others; see `PROCESS`."""
    values = {"stop": stop, "busy": busy}
    return batch | _filled(PROCESS, values, len(batch["inputs"]))


def with_number(batch: Batch, number: int) -> Batch:
    """An evaluation batch, with its number; see `NUMBER`."""
    return batch | _filled(NUMBER, {"number": number}, len(batch["inputs"]))


def tokens_of(batch: Batch) -> Batch:
    """The part of a batch that the loss is computed from."""
    return {name: batch[name] for name in TOKENS | DOCUMENTS if name in batch}


def documents_of(batch: Batch) -> Batch:
    """The part of a batch that keeps its documents apart; empty where they aren't."""
    return {name: batch[name] for name in DOCUMENTS if name in batch}


def _filled(keys: Mapping[str, type], values: Mapping[str, Any], rows: int) -> Batch:
    return {name: np.full(rows, values[name], dtype) for name, dtype in keys.items()}
