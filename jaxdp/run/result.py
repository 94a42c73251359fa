"""What a call to `train` returns."""

import dataclasses
from typing import Any

from jaxdp.run.evaluation import Evaluation, Evaluations


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a call to `train`.

    Attributes:
      step: optimizer steps done, those of earlier calls included.
      finished: whether all steps are done and the last is evaluated, or early stopping ended the
        run. If False, it was asked to stop, and has saved a checkpoint.
      evaluations: by eval set, at the last step; empty if this call made none there.
      state: the final training state, on the devices.
    """

    step: int
    finished: bool
    evaluations: Evaluations
    state: Any

    @property
    def evaluation(self) -> Evaluation | None:
        """The validation split's result at the last step; None if this call made no evaluation."""
        return self.evaluations.get("")

    def __repr__(self) -> str:
        """Returns a line without the state, whose arrays would fill a notebook."""
        loss = f", validation_loss={self.evaluation.loss:.4f}" if self.evaluation else ""
        return f"Result(step={self.step}, finished={self.finished}{loss})"
