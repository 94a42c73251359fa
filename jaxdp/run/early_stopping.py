"""Early stopping by the validation loss."""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


class EarlyStopping:
    """Ends a run after stop.patience evaluations in a row without improvement.

    An improvement is a loss at least stop.min_delta below the loss of the last improvement, as in
    Keras's EarlyStopping. Only evaluations count, so that all processes, and a resumed run, end at
    the same step. Losses over different text can't be compared: where an evaluation is of another
    number of tokens than the last, it counts as the first.

    Attributes:
      waited: evaluations since the last improvement.
      best: (step, loss in nats per token) of the best evaluation, of equal ones the last, as
        checkpoints are chosen; None before a finite loss.
    """

    def __init__(self, config: ConfigDict, is_saved: Callable[[int], bool] = lambda step: True):
        """Nothing has been evaluated yet.

        Args:
          config: a valid config.
          is_saved: says whether a step has a checkpoint.
        """
        self._config, self._is_saved = config.stop, is_saved
        self.waited = 0
        self.best: tuple[int, float] | None = None
        self._reference: float | None = None  # The loss of the last improvement.
        self._tokens: int | None = None  # Of each evaluation; None: not known.

    def add(self, step: int, loss: float, tokens: int | None = None) -> None:
        """Adds an evaluation; a loss that isn't finite is no improvement.

        Args:
          step: steps done.
          loss: nats per token.
          tokens: how many it is the mean of; None: not known, as in older versions.
        """
        self._forget_other_text(tokens)
        before = math.inf if self._reference is None else self._reference
        if loss < before and before - loss >= self._config.min_delta:
            self._reference, self.waited = loss, 0
        else:
            self.waited += 1
        if math.isfinite(loss):
            self._compare(step, loss)

    def _forget_other_text(self, tokens: int | None) -> None:
        """Forgets evaluations if they were of another number of tokens."""
        if None not in (tokens, self._tokens) and tokens != self._tokens:
            self._reference, self.best, self.waited = None, None, 0
        self._tokens = self._tokens if tokens is None else tokens

    def _compare(self, step: int, loss: float) -> None:
        found = [(step, loss), *([self.best] if self.best else [])]
        self.best = min(found, key=lambda one: (one[1], -one[0]))

    @property
    def over(self) -> bool:
        """Whether the run must end."""
        return 0 < self._config.patience <= self.waited

    def reason(self) -> str:
        """Says why the run ends, which evaluation was the best, and if that step isn't saved."""
        least = f" by {self._config.min_delta:g}" if self._config.min_delta else ""
        best = f"{self.best[1]:.4f} at step {self.best[0]:,}" if self.best else "none was finite"
        if self.best and not self._is_saved(self.best[0]):
            best += " (not saved)"
        return (
            f"the validation loss has not improved{least} in {self.waited} evaluations "
            f"(stop.patience={self._config.patience}); best: {best}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint must save of this object."""
        best = list(self.best) if self.best else None
        return {
            "reference": self._reference,
            "waited": self.waited,
            "best": best,
            "tokens": self._tokens,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `to_json` returned; an empty dict means that nothing was evaluated.

        A better evaluation that is known here stays the best: a run that goes back to a checkpoint
        keeps the best one.
        """
        self._forget_other_text(saved.get("tokens"))
        self._reference, self.waited = saved.get("reference"), saved.get("waited", 0)
        if best := saved.get("best"):
            self._compare(best[0], best[1])
