"""Reading the figures of rounds: are they sound, and which of them are logged?"""

from typing import Any

import jax

from jaxdp.common.terminal import Display
from jaxdp.run.divergence import Divergence
from jaxdp.run.figures import MeanLoss, Throughput, load_balance
from jaxdp.step.setup import Setup
from jaxdp.workdir.metrics import MetricsWriter


class StepLog:
    """Takes the figures of each round, judges them, and logs the steps that are due.

    Attributes:
      loss: the mean loss since the last logged step.
      throughput: the speed since then.
      drift: of the replicas before they agreed last, where they drift; see `reductions.drift`.
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
        """Has logged nothing yet."""
        self._setup, self._judge, self._display, self._writer = setup, judge, display, writer
        self.throughput, self.loss = throughput, loss
        self.drift: float | None = None

    def add(self, before: int, on_devices: dict[str, jax.Array], waited: float) -> bool:
        """Waits for the figures of a round and takes them.

        Args:
          before: steps done before the round.
          on_devices: metrics of `train_step`.
          waited: seconds that the round waited for its batch.

        Returns:
          Whether any process was asked to stop.
        """
        metrics, config = jax.device_get(on_devices), self._setup.config
        steps = len(metrics["loss"])
        self._look_for_trouble(before + steps, metrics)
        for i, tokens in enumerate(metrics["tokens"]):
            done = before + i + 1
            self.loss.add(float(metrics["loss"][i]), float(tokens.sum()))
            self.throughput.add(round(float(tokens.sum())), waited if i == 0 else 0.0)
            if done % config.log_every == 0 or done == config.num_train_steps:
                self._log(done, i, metrics)
        if "drift" in metrics:
            self.drift = float(metrics["drift"][-1])
        self._display.step(before + steps)
        return bool(metrics["stop"].max() > 0)

    def _look_for_trouble(self, done: int, metrics: dict[str, Any]) -> None:
        """Counts skipped updates, and sees whether the run diverges."""
        before = self._judge.skipped
        self._judge.add(done, metrics["loss"], metrics["skipped"])
        if self._judge.skipped > before:
            self._display.line(
                f"step {done}: loss or gradient is not finite, the update is skipped "
                f"({self._judge.skipped:,} so far)",
                "yellow",
            )

    def _log(self, done: int, i: int, metrics: dict[str, Any]) -> None:
        """Logs the i-th step of a round, after which `done` steps are done."""
        speed, loss = self.throughput.read(), self.loss.read()
        self._display.figures(done, loss, speed["tokens_per_second"])
        names = ("grad_norm", "learning_rate", "drift")
        values = {"train/loss": loss}
        values |= {f"train/{name}": float(metrics[name][i]) for name in names if name in metrics}
        values["train/skipped"] = self._judge.skipped
        positions = self._setup.sizes.per_device * self._setup.config.seq_len
        self._writer.write(done, values | load_balance(metrics, i, positions) | speed)
