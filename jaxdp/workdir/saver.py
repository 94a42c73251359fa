"""Saving in the background, by Orbax, on a disk that may be full."""

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable
from logging import ERROR, Formatter, LogRecord, getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxdp.common import files
from jaxdp.parallel import processes
from jaxdp.workdir.integrity import METRIC

LEFTOVERS = "*.orbax-checkpoint-tmp*"


class Saver:
    """Writes checkpoints, each whole or not at all; one that fails costs no run and no old one.

    Process 0 alone writes: all that is saved is on each of them, and where nobody waits for
    another, a disk that is full for one can't hold up the rest. The other processes only read.

    Attributes:
      manager: Orbax's, of this process alone; another one after a failure.
      failure: why the newest state could not be saved; empty where it could, or is being saved.
    """

    def __init__(self, folder: Path, config: ConfigDict, report: Callable[[str], None]):
        """Opens a folder, which exists, and removes what a save that was cut off has left there."""
        self._folder, self._config, self._report = folder, config, report
        quieten()
        self.failure, self._step, self._under_way = "", 0, False
        self._error: Exception | None = None
        self.manager = self._open()

    def start(self, step: int, tree: Any, extra: dict, eval_loss: float | None) -> None:
        """Starts to save, on process 0; a failure is for `check` and `settle` to find."""
        self.settle()
        self._step, self.failure, self._under_way = step, "", True
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))
        # An infinite loss is the worst: such a checkpoint is kept only while it is new.
        finite = eval_loss is not None and math.isfinite(eval_loss)
        metrics = {METRIC: eval_loss if finite else math.inf}
        try:
            files.require(self._folder, files.num_bytes(tree))
            self.manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as error:  # Orbax and TensorStore raise whatever they like.
            self._error = error

    def check(self) -> None:
        """Reports, without waiting, a save that has failed."""
        if self._under_way and (self._error or not self.manager.is_saving_in_progress()):
            self.settle()

    def settle(self, then: str | None = None) -> None:
        """Waits for a save to end; if it failed, removes its parts and says so.

        Args:
          then: what comes next: another step by default; nothing is said where it is empty.
        """
        if not processes.is_main():
            return
        self._under_way = False
        try:
            if self._error:
                raise self._error
            self.manager.wait_until_finished()
        except Exception as error:
            self._error, self.failure = None, files.reason(error)
            if then is None:
                every, total = self._config.checkpoint.every, self._config.num_train_steps
                following = min(self._step // every * every + every, total)
                then = f"training goes on; the next try is at step {following}"
            if then:
                failed = f"Checkpoint {self._step} could not be saved ({self.failure})"
                self._report(f"{failed}: {then}.")
            # After a failure, Orbax has forgotten checkpoints that it would have removed.
            self._close()
            self.manager = self._open()

    def close(self) -> None:
        """Waits, and frees threads."""
        self.settle("the run ends without it")
        self._close()

    def _open(self) -> ocp.CheckpointManager:
        if processes.is_main():
            self._sweep()
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=_policy(self._config),
            best_fn=_loss,  # Without it, metrics are not written to disk.
            best_mode="min",
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=str(process),
            ),
            # In the background, a folder that can't be made would be waited for in vain.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _sweep(self) -> None:
        """Removes parts of saves; writes that are still under way can bring them back at first."""
        for _ in range(10):
            parts = list(self._folder.glob(LEFTOVERS))
            if not parts:
                break
            for path in parts:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.2)

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # Those of saving have been reported.
            self.manager.close()


@functools.cache
def quieten() -> None:
    """A failed save is told in one line, by `report`, not in hundreds of tracebacks.

    The first array's failure ends the event loop to which TensorStore reports the others'.
    """

    def wanted(record: LogRecord) -> bool:
        # Of a task that nobody awaited, only the traceback may say whose it was.
        told = record.pathname + Formatter().format(record) if record.levelno >= ERROR else ""
        return not any(mark in told for mark in ("/orbax/checkpoint/", "orbax-checkpoint-tmp"))

    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # The latter where Python has ended before.
        if str(unraisable.exc_value) not in ("Event loop is closed", "'__import__'"):
            before(unraisable)

    logging.get_absl_logger().addFilter(wanted)
    getLogger("asyncio").addFilter(wanted)
    sys.unraisablehook = hook


def _loss(metrics: dict) -> float:
    return metrics[METRIC]


def _policy(config: ConfigDict) -> preservation_policy.PreservationPolicy:
    c = config.checkpoint
    best = preservation_policy.BestN(
        get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    policies = [preservation_policy.LatestN(c.keep_last), best, _LatestScheduled(c.every)]
    if c.keep_every:
        policies.append(preservation_policy.EveryNSteps(c.keep_every))
    return preservation_policy.AnyPreservationPolicy(policies)


@dataclasses.dataclass
class _LatestScheduled(preservation_policy.PreservationPolicy):
    """Preserves the newest checkpoint that isn't due to an interruption."""

    every: int

    def should_preserve(self, checkpoints, *, context):
        del context
        scheduled = [c.step for c in checkpoints if c.step % self.every == 0]
        return [c.step == max(scheduled, default=None) for c in checkpoints]
