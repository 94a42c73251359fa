"""Has a run stopped getting better? Early stopping by the validation loss."""

import math
from typing import Any

from ml_collections import ConfigDict


class Stopping:
    """Ends a run after stop.patience evaluations in a row without improvement.

    An improvement is a loss that is lower by at least stop.min_delta than that of the last one, as
    in Keras's EarlyStopping. It is judged by the evaluations alone, so that all processes, and a
    resumed run, end at the same step.

    Attributes:
      waited: evaluations since the last improvement.
      best: (step, loss in nats per token) of the lowest loss; None before there is a finite one.
    """

    def __init__(self, config: ConfigDict):
        """Takes a valid config; nothing has been evaluated yet."""
        self._config = config.stop
        self.waited = 0
        self.best: tuple[int, float] | None = None
        self._reference: float | None = None  # The loss of the last improvement.

    def add(self, step: int, loss: float) -> None:
        """Takes an evaluation; a loss that isn't finite is no improvement."""
        before = math.inf if self._reference is None else self._reference
        if loss < before and before - loss >= self._config.min_delta:
            self._reference, self.waited = loss, 0
        else:
            self.waited += 1
        if math.isfinite(loss) and (self.best is None or loss < self.best[1]):
            self.best = step, loss

    @property
    def over(self) -> bool:
        """Whether the run has to end."""
        return 0 < self._config.patience <= self.waited

    def reason(self) -> str:
        """Why it has to, and what was reached, in words."""
        least = f" by {self._config.min_delta:g}" if self._config.min_delta else ""
        best = f"{self.best[1]:.4f} at step {self.best[0]:,}" if self.best else "none was finite"
        return (
            f"the validation loss has not improved{least} in {self.waited} evaluations "
            f"(stop.patience={self._config.patience}); best: {best}"
        )

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint has to hold of this."""
        best = list(self.best) if self.best else None
        return {"reference": self._reference, "waited": self.waited, "best": best}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `to_json`; where nothing was saved, nothing has been evaluated."""
        self._reference, self.waited = saved.get("reference"), saved.get("waited", 0)
        best = saved.get("best")
        self.best = (best[0], best[1]) if best else None
