"""Metrics of a logged step: the mean loss, the speed, and the load balance."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxdp.estimate.gpus import peak_flops


class MeanLoss:
    """The mean loss per token since the last logged step, in nats.

    A step whose loss isn't finite is left out. Checkpoints save an unfinished mean, so that a
    resumed run logs the same values.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.clear()

    def clear(self) -> None:
        """Starts over."""
        self._mean, self._tokens = 0.0, 0.0

    def add(self, loss: float, tokens: float) -> None:
        """Adds a step: its mean loss, and the number of tokens in that mean."""
        if math.isfinite(loss) and tokens:
            self._tokens += tokens
            self._mean += (loss - self._mean) * (tokens / self._tokens)

    def read(self) -> float:
        """Returns the mean, NaN if there was no token, and starts over."""
        mean = self._mean if self._tokens else math.nan
        self.clear()
        return mean

    def to_json(self) -> dict[str, float]:
        """Returns what a checkpoint must save of this object."""
        return {"mean": self._mean, "tokens": self._tokens}

    def load(self, saved: Mapping[str, float]) -> None:
        """Restores what `to_json` returned; older checkpoints have nothing, and it starts empty."""
        self._mean, self._tokens = saved.get("mean", 0.0), saved.get("tokens", 0.0)


def load_balance(metrics: Mapping[str, Any], index: int, positions: int) -> dict[str, float]:
    """Returns metrics of how evenly a step's work was spread over devices and processes.

    Args:
      metrics: metrics of `train_step.train_step`, fetched to the host.
      index: which step of the round, counted from 0.
      positions: tokens that fit in a device's batch.

    Returns:
      Tokens that count in the loss, on the devices with the fewest and the most; the share of
      positions that don't count; and the process that was busy longest between two steps (fetching
      data, not waiting for devices), with its time in ms.
    """
    tokens, busy = metrics["tokens"][index], metrics["busy"][index]
    per_process = len(busy) // jax.process_count()
    return {
        "balance/tokens_min": round(float(tokens.min())),
        "balance/tokens_max": round(float(tokens.max())),
        "balance/padding": 1 - float(tokens.sum()) / (positions * len(tokens)),
        "balance/slowest_process": int(busy.argmax()) // per_process,
        "balance/slowest_ms": 1e3 * float(busy.max()),
    }


class Throughput:
    """Training speed since it was last read, in wall-clock time.

    Waiting for data and for checkpoints counts; seconds given to `pause` don't.
    """

    def __init__(self, flops_per_token: int, device_count: int):
        """Takes the model's FLOPs per token, and the number of devices that share the work."""
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(jax.local_devices()[0]) * device_count
        self.start()

    def start(self, steps: int = 0) -> None:
        """Starts to measure; the next -`steps` steps were dispatched before and don't count."""
        self._since = time.perf_counter()
        self._steps, self._tokens, self._data_wait = steps, 0, 0.0

    def add(self, tokens: int, data_wait: float) -> None:
        """Counts a step: its tokens, and the seconds it waited for its batch."""
        self._steps += 1
        if self._steps > 0:
            self._tokens += tokens
            self._data_wait += data_wait

    def pause(self, seconds: float) -> None:
        """Excludes seconds spent on something other than training."""
        self._since += seconds

    def read(self) -> dict[str, float | None]:
        """Returns the speed over the steps since the last call.

        All values are None if there was no step; mfu is None on unknown hardware.
        """
        if self._steps <= 0:
            return dict.fromkeys(("tokens_per_second", "step_time_ms", "data_wait_ms", "mfu"))
        seconds = time.perf_counter() - self._since
        rate = self._tokens / seconds
        figures = {
            "tokens_per_second": rate,
            "step_time_ms": 1e3 * seconds / self._steps,
            "data_wait_ms": 1e3 * self._data_wait / self._steps,
            "mfu": rate * self._flops_per_token / self._peak if self._peak else None,
        }
        self.start()
        return figures
