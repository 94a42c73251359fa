"""The log of a run: fetches the metrics of each round, checks them, and logs the steps due."""

from typing import Any

import jax

from jaxdp.common.terminal import Display
from jaxdp.run.divergence import Divergence
from jaxdp.run.figures import MeanLoss, Throughput, load_balance
from jaxdp.step.setup import Setup
from jaxdp.workdir.metrics import MetricsWriter


class StepLog:
    """Fetches the metrics of each round, looks for divergence, and logs the steps that are due.

    Attributes:
      loss: the mean loss since the last logged step.
      throughput: the speed since the last logged step.
      drift: distance of the replicas before they last synchronised, where they train
        independently, else None; see `reductions.drift`.
    """

    def __init__(
        self,
        setup: Setup,
        judge: Divergence,
        display: Display,
        writer: MetricsWriter,
        throughput: Throughput,
        loss: MeanLoss,
    ):
        """Starts with nothing logged."""
        self._setup, self._judge, self._display, self._writer = setup, judge, display, writer
        self.throughput, self.loss = throughput, loss
        self.drift: float | None = None
        # The arguments of `add` for the last round, until its metrics are read.
        self._last: tuple[int, dict[str, jax.Array], float] | None = None

    def read_later(self, before: int, on_devices: dict[str, jax.Array], waited: float) -> None:
        """Takes a round whose metrics `read` is to fetch, once the next round is dispatched."""
        self._last = before, on_devices, waited

    def read(self) -> None:
        """Fetches and logs the metrics of the last round, unless that has been done."""
        if self._last is not None:
            last, self._last = self._last, None
            self.add(*last)

    def forget(self) -> None:
        """Drops the metrics since the last logged step, for a roll-back."""
        self._last = None
        self.loss.clear()

    def add(self, before: int, on_devices: dict[str, jax.Array], waited: float) -> None:
        """Waits for the metrics of a round, checks them, and logs the steps that are due.

        Args:
          before: steps done before the round.
          on_devices: metrics of `train_step`, not fetched yet.
          waited: seconds that the round waited for its batch.
        """
        metrics, config = jax.device_get(on_devices), self._setup.config
        steps = len(metrics["loss"])
        self._look_for_trouble(before + steps, metrics)
        tokens = [float(x.sum()) for x in metrics["tokens"]]
        for i, count in enumerate(tokens):
            self.throughput.add(round(count), waited if i == 0 else 0.0)
        speed = None  # The steps of a round are one program, so they have one speed.
        for i, count in enumerate(tokens):
            done = before + i + 1
            self.loss.add(float(metrics["loss"][i]), count)
            if done % config.log_every == 0 or done == config.num_train_steps:
                speed = speed or self.throughput.read()
                self._log(done, i, metrics, speed)
        if "drift" in metrics:
            self.drift = float(metrics["drift"][-1])
        self._display.step(before + steps)

    def _look_for_trouble(self, done: int, metrics: dict[str, Any]) -> None:
        """Reports skipped updates, and checks whether the run diverges."""
        before = self._judge.skipped
        self._judge.add(done, metrics["loss"], metrics["skipped"])
        if self._judge.skipped > before:
            self._display.line(
                f"step {self._judge.last_skipped}: loss or gradient is not finite, the update is "
                f"skipped ({self._judge.skipped:,} so far)",
                "yellow",
            )

    def _log(self, done: int, i: int, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Logs step i of a round, counted from 0, after which `done` steps are done."""
        loss = self.loss.read()
        self._display.figures(done, loss, speed["tokens_per_second"])
        names = ("grad_norm", "learning_rate", "drift")
        values = {"train/loss": loss}
        values |= {f"train/{name}": float(metrics[name][i]) for name in names if name in metrics}
        values["train/skipped"] = self._judge.skipped
        positions = self._setup.sizes.per_device * self._setup.config.seq_len
        self._writer.write(done, values | load_balance(metrics, i, positions) | speed)
