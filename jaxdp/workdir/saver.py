"""Saves checkpoints in the background with Orbax, on a disk that may be full."""

import contextlib
import errno
import functools
import shutil
import sys
import time
import warnings
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
from jaxdp.workdir import integrity

REMOVED = ".orbax-checkpoint-tmp-removed"  # Added to the name of a checkpoint that is to go.


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
      evaluations: {step: (validation loss, its tokens)} that are not recorded yet.
    """

    def __init__(self, folder: Path, config: ConfigDict, report: Callable[[str], None]):
        """Opens an existing folder, and changes nothing in it."""
        self._folder, self._config, self._report = folder, config, report
        quieten()
        self.failure, self._step, self._under_way = "", 0, False
        self._error: Exception | None = None
        self.evaluations: dict[int, tuple[float, int | None]] = {}
        self._told: set[Path] = set()  # What can't be removed, and has been reported.
        self.manager, self._closed = self._open(), False

    def start(self, step: int, tree: Any, extra: dict) -> None:
        """Starts to save, in process 0; `check` and `wait_for_save` report a failure."""
        self.wait_for_save()
        self._step, self.failure, self._under_way = step, "", True
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))
        try:
            self._restore_folder()
            self._record()
            self.evaluations = {x: y for x, y in self.evaluations.items() if x == step}
            files.require_space(self._folder, files.num_bytes(tree))
            self.manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax and TensorStore raise whatever they like.
            self._error = error

    def _restore_folder(self) -> None:
        """Makes the folder again if somebody has removed it, and opens it if it is closed."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            self._report(f"{self._folder} was removed under the run; it is made again.")
            self._reopen()
        elif self._closed:
            self._reopen()

    def evaluated(self, step: int, loss: float, tokens: int | None) -> None:
        """Records the validation loss of a step once its checkpoint, if it has one, is on disk."""
        self.evaluations[step] = loss, tokens
        self.check()
        if not self._under_way:
            self.unrecorded()

    def unrecorded(self) -> str:
        """Tries to record the losses that are not; returns what can't be and why, or ""."""
        try:
            self._record()
        except Exception as error:  # As above: reading metrics is Orbax's part.
            step = next(iter(self.evaluations))
            return f"the loss of checkpoint {step} could not be recorded ({files.reason(error)})"
        return ""

    def _record(self) -> None:
        """Records losses in the checkpoints that are on disk."""
        for step, evaluation in list(self.evaluations.items()):
            if (checkpoint := self._folder / str(step)).is_dir():
                integrity.record_eval_loss(checkpoint, *evaluation)
                self._remove_old()
                del self.evaluations[step]

    def _remove_old(self) -> None:
        """Removes checkpoints that are to be kept no longer; one that can't be costs a line.

        They are renamed first: one that is removed in part never has the name of a step.
        """
        try:
            steps = integrity.steps_of(self._folder)
            best = integrity.best_steps(self._folder, steps)
            good = next(([step] for step in steps if self._is_good(step)), [])
        except OSError as error:
            self._tell_once(self._folder, f"can't be read ({files.reason(error)})")
            return
        kept = kept_steps(steps, {*best, *good}, self._config)
        old = [self._folder / str(step) for step in steps if step not in kept]
        for path in [*old, *self._folder.glob(f"*{REMOVED}")]:
            gone = path.with_name(path.name.removesuffix(REMOVED) + REMOVED)
            try:
                path.rename(gone)
                gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)
            except OSError as error:
                why = files.reason(error)
                self._tell_once(gone, f"is no longer needed, and can't be removed ({why})")

    def _is_good(self, step: int) -> bool:
        try:
            extra = integrity.read_extra(self._folder / str(step))
        except (integrity.DamagedError, FileNotFoundError, NotADirectoryError):
            return False  # What restores it will say so.
        return integrity.is_good(step, extra, self._config.checkpoint.every)

    def _tell_once(self, path: Path, trouble: str) -> None:
        if path not in self._told:
            self._report(f"{path} {trouble}: training goes on without that.")
        self._told.add(path)

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
        saved, self._under_way = self._under_way, False
        try:
            if self._error:
                raise self._error
            if saved:
                self.manager.wait_until_finished()
            if saved and not (self._folder / str(self._step)).is_dir():
                raise FileNotFoundError(errno.ENOENT, "its folder was removed")
        except Exception as error:
            self._error, self.failure = None, files.reason(error)
            if then is None:
                c = self._config
                every = [c.checkpoint.every, *([c.eval_every] if c.stop.patience else [])]
                due = [self._step // steps * steps + steps for steps in every]
                following = min(*due, c.num_train_steps)
                then = f"training goes on; the next try is at step {following}"
            if then:
                failed = f"Checkpoint {self._step} could not be saved ({self.failure})"
                self._report(f"{failed}: {then}.")
            # After a failed save, Orbax can't be relied on; the folder may be gone, too.
            with contextlib.suppress(Exception):  # Else the next save tries, and reports.
                self._reopen()
        else:
            if saved:
                self._remove_old()
        self.unrecorded()

    def close(self) -> None:
        """Waits for a save in progress, and ends Orbax's threads."""
        self.wait_for_save("the run ends without it")
        self._close()

    def _reopen(self) -> None:
        self._close()
        if processes.is_main():
            self.sweep(tries=10)
        self.manager, self._closed = self._open(), False

    def _open(self) -> ocp.CheckpointManager:
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=preservation_policy.PreserveAll(),  # `_remove_old` removes them.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=str(process),
            ),
            # In the background, Orbax would wait forever for a folder that can't be created.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def sweep(self, tries: int = 1) -> None:
        """Removes what interrupted saves have left; no save may be under way.

        A save that has just failed may still write a file: then it takes several tries.
        """
        for _ in range(tries):
            if not (parts := leftovers(self._folder)):
                break
            for path in parts:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.2 if tries > 1 else 0)

    def _close(self) -> None:
        self._closed = True
        with contextlib.suppress(Exception):  # Errors of saving have been reported.
            self.manager.close()


@functools.cache
def quieten() -> None:
    """Silences the hundreds of messages after a failed save; `report` prints one line instead.

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

    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.get_absl_logger().addFilter(wanted)
    getLogger("asyncio").addFilter(wanted)
    sys.unraisablehook = hook


def leftovers(folder: Path) -> list[Path]:
    """Returns the folders that interrupted saves have left."""
    found = folder.glob("*.orbax-checkpoint-tmp*")
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def kept_steps(steps: list[int], wanted: set[int], config: ConfigDict) -> set[int]:
    """Returns which checkpoints are to be kept.

    Examples:
      >>> from jaxdp.configs import default
      >>> config = default.get_config()
      >>> config.checkpoint.keep_last = 1
      >>> sorted(kept_steps([32, 31, 30, 20, 10], {20, 30}, config))
      [20, 30, 32]

    Args:
      steps: those of the checkpoints on disk.
      wanted: the best ones, and the newest to which a run that diverges may go back.
      config: the run's config.
    """
    c = config.checkpoint
    kept = wanted | set(sorted(steps)[-c.keep_last :])
    return kept | {step for step in steps if c.keep_every and step % c.keep_every == 0}
