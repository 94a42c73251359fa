"""Early stopping by the validation loss."""

import math
from typing import Any

from ml_collections import ConfigDict


class Stopping:
    """Ends a run after stop.patience evaluations in a row without improvement.

    An improvement is a loss at least stop.min_delta below the loss of the last improvement, as in
    Keras's EarlyStopping. Only evaluations count, so that all processes, and a resumed run, end at
    the same step.

    Attributes:
      waited: evaluations since the last improvement.
      best: (step, loss in nats per token) of the best evaluation; None before a finite loss.
    """

    def __init__(self, config: ConfigDict):
        """Takes a valid config; nothing has been evaluated yet."""
        self._config = config.stop
        self.waited = 0
        self.best: tuple[int, float] | None = None
        self._reference: float | None = None  # The loss of the last improvement.

    def add(self, step: int, loss: float) -> None:
        """Adds an evaluation; a loss that isn't finite is no improvement."""
        before = math.inf if self._reference is None else self._reference
        if loss < before and before - loss >= self._config.min_delta:
            self._reference, self.waited = loss, 0
        else:
            self.waited += 1
        if math.isfinite(loss) and (self.best is None or loss < self.best[1]):
            self.best = step, loss

    @property
    def over(self) -> bool:
        """Whether the run must end."""
        return 0 < self._config.patience <= self.waited

    def reason(self) -> str:
        """Says why the run ends, and which evaluation was the best."""
        least = f" by {self._config.min_delta:g}" if self._config.min_delta else ""
        best = f"{self.best[1]:.4f} at step {self.best[0]:,}" if self.best else "none was finite"
        return (
            f"the validation loss has not improved{least} in {self.waited} evaluations "
            f"(stop.patience={self._config.patience}); best: {best}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint must save of this object."""
        best = list(self.best) if self.best else None
        return {"reference": self._reference, "waited": self.waited, "best": best}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `to_json` returned; an empty dict means that nothing was evaluated."""
        self._reference, self.waited = saved.get("reference"), saved.get("waited", 0)
        best = saved.get("best")
        self.best = (best[0], best[1]) if best else None
