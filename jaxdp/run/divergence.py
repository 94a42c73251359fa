"""Divergence of a run: skipped updates, loss spikes, and a diagnosis of the cause."""

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdp.parallel.replicas import Replicas
from jaxdp.step.objective import Batch, Objective
from jaxdp.step.setup import Setup
from jaxdp.step.state import FIELDS, State

WINDOW = 100  # Number of losses that a spike is compared with.
# Standard deviation / median absolute deviation, of a normal distribution.
MAD_TO_DEVIATION = 1.4826


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Why a run must not go on like this.

    Attributes:
      step: the step that shows it.
      end: steps done after the round of that step.
      reason: what is wrong.
    """

    step: int
    end: int
    reason: str


class Divergence:
    """Detects divergence from metrics alone, so that all processes and resumed runs agree.

    Attributes:
      skipped: updates skipped in all, because loss or gradient wasn't finite.
      last_skipped: the step of the last one; 0 before.
      in_a_row: updates skipped since the last one that was applied.
      rollbacks: how often the run went back to a checkpoint.
      trouble: what is wrong since the last round; None while all is well.
    """

    def __init__(self, config: ConfigDict):
        """Takes a valid config; starts with nothing observed."""
        self._config = config.divergence
        self.skipped, self.in_a_row, self.rollbacks = 0, 0, 0
        self.last_skipped = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.trouble: Trouble | None = None

    def add(self, end: int, losses: Sequence[float], skipped: Sequence[float]) -> None:
        """Adds the steps of a round; sets `trouble` if the run diverges.

        Args:
          end: steps done after the round.
          losses: the loss of each step, in nats per token.
          skipped: for each step, not 0 if its update was skipped on any device.
        """
        for step, (loss, skip) in enumerate(
            zip(losses, skipped, strict=True), end + 1 - len(losses)
        ):
            self.skipped += bool(skip)
            self.last_skipped = step if skip else self.last_skipped
            self.in_a_row = self.in_a_row + 1 if skip else 0
            reason = None if skip else self._spike(step, loss)
            if self.in_a_row >= self._config.max_bad_steps:
                last = f"{self.in_a_row} steps in a row" if self.in_a_row > 1 else "a step"
                reason = f"no finite loss or gradient in {last}"
            if reason:
                self.trouble = Trouble(step, end, reason)
                return
            if not skip:
                self._losses.append(float(loss))

    def _spike(self, step: int, loss: float) -> str | None:
        threshold = self._config.spike_threshold
        if not threshold or len(self._losses) < WINDOW:
            return None
        median = np.median(self._losses)
        deviation = MAD_TO_DEVIATION * np.median(np.abs(np.asarray(self._losses) - median))
        if loss <= median + threshold * deviation:
            return None
        return (
            f"the loss {loss:.4f} of step {step} is more than {threshold:g} robust deviations of "
            f"{deviation:.2g} above {median:.4f}, the median of the {WINDOW} before"
        )

    def roll_back(self) -> None:
        """Counts a roll-back to a checkpoint, and forgets the losses before it."""
        self.rollbacks += 1
        self.in_a_row, self.trouble = 0, None
        self._losses.clear()

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint must save of this object."""
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "rollbacks")}
        return counts | {"losses": list(self._losses)}

    def load(self, saved: dict[str, Any]) -> None:
        """Restores what `to_json` returned."""
        self.skipped, self.in_a_row = saved["skipped"], saved["in_a_row"]
        self.rollbacks = saved["rollbacks"]
        self._losses.extend(saved["losses"])


def diagnose(setup: Setup, replicas: Replicas, trouble: Trouble, state: State) -> dict[str, Any]:
    """Gathers what is known about the step at which a run got into trouble.

    Args:
      setup: the setup of the run.
      replicas: the devices.
      trouble: what is wrong.
      state: the present state, some steps later: the one before that step is gone.

    Returns:
      step, reason, loss (nats per token), sequences_begin_at_tokens (where each sequence of the
      global batch begins, in tokens of the training split), and norms {layer: {"parameters": norm,
      "gradient": norm}}.
    """
    step = trouble.step - 1  # Counted from 0, as the state and the data count.
    of_batch = functools.partial(
        norms, objective=setup.objective, grad_accum_steps=setup.config.grad_accum_steps
    )
    batch = replicas.shard(next(setup.feed.train(step)))
    unread: dict[str, Any] = dict.fromkeys(set(FIELDS) - {"step", "params"}, ())
    bare = replicas.replicate(state.replace(step=np.int32(step), **unread))
    found = jax.device_get(replicas.pmap(of_batch)(bare, batch))
    return {
        "step": trouble.step,
        "reason": trouble.reason,
        "loss": found["loss"].item(),
        "sequences_begin_at_tokens": setup.feed.first_tokens(step),
        "norms": by_layer(found),
    }


def norms(
    state: State, batch: Batch, *, objective: Objective, grad_accum_steps: int
) -> dict[str, Any]:
    """Computes norms of the parameters and of a batch's gradient, under the pmap axis 'batch'.

    Args:
      state: the state at the batch's step; its opt_state isn't read.
      batch: a batch as in `Objective.gradients`.
      objective: the objective of the run.
      grad_accum_steps: A; divides the batch size per device.

    Returns:
      "parameters" and "gradient": {layer: norm}, [] float32, or [layers] if layers are scanned;
      and "loss", [] float32, in nats per token.
    """
    grads, figures = objective.gradients(state, batch, grad_accum_steps=grad_accum_steps)
    return {
        "loss": figures["loss"] / figures["tokens"].sum(),
        "parameters": _layer_norms(state.params),
        "gradient": _layer_norms(grads),
    }


def _layer_norms(tree: Any) -> dict[str, jax.Array]:
    def squares(name, x):
        return jnp.square(x).sum(axis=tuple(range(int(name == "layers"), x.ndim)))

    return {
        name: jnp.sqrt(sum(squares(name, x) for x in jax.tree.leaves(part)))
        for name, part in tree.items()
    }


def by_layer(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Sorts the result of `norms` by layer: {layer: {"parameters": norm, "gradient": norm}}."""
    rows: dict[str, dict[str, float]] = {}
    for kind in ("parameters", "gradient"):
        for name, values in found[kind].items():
            many = [f"layer_{i}" for i in range(values.size)] if values.ndim else [name]
            for layer, value in zip(many, values.reshape(-1), strict=True):
                rows.setdefault(layer, {})[kind] = float(value)
    return dict(sorted(rows.items(), key=lambda row: _place(row[0])))


def _place(name: str) -> tuple[int, int]:
    if name.startswith("layer_"):
        return 1, int(name.removeprefix("layer_"))
    return (0 if "embed" in name else 2), 0
