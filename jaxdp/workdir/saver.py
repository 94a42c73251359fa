"""Saves checkpoints in the background with Orbax, on a disk that may be full."""

import contextlib
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable
from logging import ERROR, Formatter, LogRecord, getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxdp.common import files
from jaxdp.parallel import processes
from jaxdp.workdir import integrity

LEFTOVERS = "*.orbax-checkpoint-tmp*"


class Saver:
    """Writes checkpoints atomically; a failed save ends no run and harms no older checkpoint.

    Only process 0 writes, as every process has all that is saved. So no process waits for another,
    and a disk that is full for one can't hold up the rest. The other processes only read.

    A step is saved before it is evaluated, so that an evaluation that dies loses nothing. Its
    validation loss is recorded in its checkpoint as soon as both are there, and no later save
    begins before. So only the newest checkpoint can lack the loss of an evaluation that was due,
    and a run that resumes from it makes that evaluation.

    Attributes:
      manager: Orbax's manager, for this process alone; a new one after a failed save.
      failure: why the newest state could not be saved; empty if it was, or is being saved.
      eval_losses: {step: validation loss} that are not recorded yet.
    """

    def __init__(self, folder: Path, config: ConfigDict, report: Callable[[str], None]):
        """Opens an existing folder, and removes the leftovers of interrupted saves."""
        self._folder, self._config, self._report = folder, config, report
        quieten()
        self.failure, self._step, self._under_way = "", 0, False
        self._error: Exception | None = None
        self.eval_losses: dict[int, float] = {}
        self._policy = _policy(config)
        self.manager = self._open()

    def start(self, step: int, tree: Any, extra: dict) -> None:
        """Starts to save, in process 0; `check` and `wait_for_save` report a failure."""
        self.wait_for_save()
        self._step, self.failure, self._under_way = step, "", True
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))
        try:
            self._record()
            self.eval_losses = {x: loss for x, loss in self.eval_losses.items() if x == step}
            files.require_space(self._folder, files.num_bytes(tree))
            self.manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax and TensorStore raise whatever they like.
            self._error = error

    def evaluated(self, step: int, loss: float) -> None:
        """Records the validation loss of a step once its checkpoint, if it has one, is on disk."""
        self.eval_losses[step] = loss
        self.check()
        if not self._under_way:
            self.unrecorded()

    def unrecorded(self) -> str:
        """Tries to record the losses that are not; returns what can't be and why, or ""."""
        try:
            self._record()
        except Exception as error:  # As above: reading metrics is Orbax's part.
            step = next(iter(self.eval_losses))
            return f"the loss of checkpoint {step} could not be recorded ({files.reason(error)})"
        return ""

    def _record(self) -> None:
        """Records losses in the checkpoints that are on disk."""
        for step, loss in list(self.eval_losses.items()):
            if (checkpoint := self._folder / str(step)).is_dir():
                integrity.record_eval_loss(checkpoint, loss)
                self._remove_former_best()
                del self.eval_losses[step]

    def _remove_former_best(self) -> None:
        """Removes checkpoints that are to be kept no longer, now that one has got its loss."""
        self.manager.reload()
        found: Any = [
            SimpleNamespace(step=step, metrics=self.manager.metrics(step))
            for step in self.manager.all_steps()
        ]
        context = preservation_policy.PreservationContext()
        kept = self._policy.should_preserve(found, context=context)
        for checkpoint, keep in zip(found, kept, strict=True):
            if not keep:
                with contextlib.suppress(OSError):  # The next save tries again.
                    self.manager.delete(checkpoint.step)

    def check(self) -> None:
        """Reports a save that has failed, without waiting for one in progress."""
        if self._under_way and (self._error or not self.manager.is_saving_in_progress()):
            self.wait_for_save()

    def wait_for_save(self, then: str | None = None) -> None:
        """Waits for a save to end; if it failed, removes its files and reports it.

        Args:
          then: what the report says happens next, by default the next try; if empty, no report.
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
            # After a failed save, Orbax no longer knows which old checkpoints it was to remove.
            self._close()
            self.manager = self._open()
        self.unrecorded()

    def close(self) -> None:
        """Waits for a save in progress, and ends Orbax's threads."""
        self.wait_for_save("the run ends without it")
        self._close()

    def _open(self) -> ocp.CheckpointManager:
        if processes.is_main():
            self._sweep()
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=self._policy,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=str(process),
            ),
            # In the background, Orbax would wait forever for a folder that can't be created.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _sweep(self) -> None:
        """Removes leftovers of saves; retries, as writes in progress can create them again."""
        for _ in range(10):
            parts = list(self._folder.glob(LEFTOVERS))
            if not parts:
                break
            for path in parts:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.2)

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # Errors of saving have been reported.
            self.manager.close()


@functools.cache
def quieten() -> None:
    """Silences the hundreds of tracebacks after a failed save; `report` prints one line instead.

    The first array's failure ends the event loop to which TensorStore reports the other failures.
    """

    def wanted(record: LogRecord) -> bool:
        # For a task that was never awaited, only the traceback may name Orbax.
        told = record.pathname + Formatter().format(record) if record.levelno >= ERROR else ""
        return not any(mark in told for mark in ("/orbax/checkpoint/", "orbax-checkpoint-tmp"))

    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # '__import__': Python is already shutting down.
        if str(unraisable.exc_value) not in ("Event loop is closed", "'__import__'"):
            before(unraisable)

    logging.get_absl_logger().addFilter(wanted)
    getLogger("asyncio").addFilter(wanted)
    sys.unraisablehook = hook


def _loss(metrics: dict) -> float:
    return metrics[integrity.METRIC]


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
    """Preserves the newest scheduled checkpoint, one that no interruption caused."""

    every: int

    def should_preserve(self, checkpoints, *, context):
        del context
        scheduled = [c.step for c in checkpoints if c.step % self.every == 0]
        return [c.step == max(scheduled, default=None) for c in checkpoints]
