"""One exact pass over a validation split."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxdp.parallel import Replicas, prefetch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of a pass.

    Attributes:
      loss: mean over tokens, nats.
      tokens: how many there were.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """The loss in bits per byte of text, comparable between tokenizers."""
        return self.loss / math.log(2) * tokens_per_byte


def evaluate(
    p_eval_step: Callable, params: Any, batches: Iterable[dict[str, np.ndarray]], replicas: Replicas
) -> Evaluation:
    """Sums losses and weights over all batches and divides once.

    Args:
      p_eval_step: the pmapped `step.eval_step`.
      params: replicated.
      batches: this process's part; equally many on every process.
      replicas: the devices.
    """
    # The sums of one batch are read after the next is dispatched: the devices never wait, and
    # never more than two steps are in flight (more can deadlock on CPU devices).
    total = np.zeros(2)
    previous = (0.0, 0.0)
    for batch in prefetch(_numbered(batches), replicas.shard):
        sums = p_eval_step(params, batch)
        total += jax.device_get(previous)
        previous = sums
    loss_sum, weight_sum = total + jax.device_get(previous)
    return Evaluation(float(loss_sum / max(weight_sum, 1)), round(weight_sum))


def _numbered(batches: Iterable[dict[str, np.ndarray]]) -> Iterable[dict[str, np.ndarray]]:
    for number, batch in enumerate(batches):
        yield batch | {"number": np.full(len(batch["inputs"]), number, np.int32)}
