"""The checkpoints of a run: what they hold, saving them, and restoring intact ones."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import first_line, reason, way_out
from jaxdp.parallel import messages, processes
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, saved_shapes
from jaxdp.sync.islands import Islands
from jaxdp.workdir import integrity
from jaxdp.workdir.aside import Aside
from jaxdp.workdir.conversion import Conversion, first_copies
from jaxdp.workdir.reading import ending_reads, is_damage, patiently
from jaxdp.workdir.saver import Saver

T = TypeVar("T")
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a workdir, `checkpoints/<step>/`, named by the steps done.

    Kept are the newest keep_last, the best by validation loss, the multiples of keep_every, and the
    newest to which a diverged run may roll back; see `integrity.best_steps` and `is_good`.
    Each holds the state (`step`, `params`, `opt_state`, ...), a fingerprint of each of its arrays,
    and a small JSON with what else a run needs to resume.
    """

    def __init__(
        self,
        workdir: Path,
        setup: Setup,
        replicas: Replicas,
        report: Callable[[str], None] = print,
    ):
        """Opens the workdir's checkpoints; creates their folder if it doesn't exist.

        Args:
          workdir: the folder of the run.
          setup: the run's setup.
          replicas: its devices.
          report: called with a line of text about a damaged checkpoint.

        Raises:
          ConfigError: the folder can't be created.
          RunError: all checkpoints are damaged, or the disk doesn't answer; nothing is moved.
        """
        self._setup, self._report = setup, report
        self._conversion = Conversion(setup, replicas)
        self._folder = folder_of(workdir)
        messages.on_main(lambda: _make(self._folder))
        self._aside = Aside(self._folder, report)
        # Orbax opens a folder only if it can read the metrics of each checkpoint.
        damaged = self._patiently(lambda: _unreadable(self._folder), self._folder)
        if damaged and len(damaged) == len(integrity.steps(self._folder)):
            raise integrity.all_damaged(self._folder, [int(path.name) for path in damaged])
        self._aside.move({int(path.name): "its metrics can't be read" for path in damaged})
        self._saver = self._patiently(
            lambda: Saver(self._folder, setup.config, report), self._folder
        )
        self._last: tuple[int, dict] | None = None

    def sweep(self) -> None:
        """Removes what interrupted saves have left; for a run that goes on, before it saves."""
        if processes.is_main():
            self._saver.sweep()

    def save(self, step: int, state: State, extra: dict) -> None:
        """Starts to save in the background; waits only for the last save and a copy of the state.

        Args:
          step: steps done; names the checkpoint.
          state: the state after that step, on the devices.
          extra: JSON to save with it.
        """
        self._last = (step, extra)
        tree = self._conversion.saved(state)
        if processes.is_main():
            extra = extra | {
                "devices": self._setup.islands.devices,
                "islands": self._setup.islands.islands,
                integrity.FINGERPRINTS: integrity.fingerprints_by_path(tree),
            }
            extra = integrity.sealed(extra)
            # With several processes, Orbax refuses arrays on the devices of one. Of an array that
            # is on several devices, it would fetch a slice from each, and compile each slice.
            one = first_copies(tree) if jax.process_count() == 1 else jax.device_get(tree)
            self._saver.start(step, one, extra)

    def evaluated(self, step: int, loss: float, tokens: int | None = None) -> None:
        """Records a step's validation loss in its checkpoint, if it has one; see `Saver`.

        Args:
          step: steps done.
          loss: nats per token.
          tokens: how many it is the mean of; None: not known.
        """
        if processes.is_main():
            self._saver.evaluated(step, loss, tokens)

    def evaluation(self, step: int) -> tuple[float, int | None] | None:
        """Returns a checkpoint's validation loss and its tokens; all processes have to call this.

        The loss is infinite if it isn't finite; None if the checkpoint hasn't been evaluated.
        """
        found = None
        if processes.is_main():
            folder = self._folder / str(step)
            recorded = self._patiently(lambda: integrity.evaluation(folder), step)
            found = self._saver.evaluations.get(step, recorded)
        found = json.loads(messages.from_main(json.dumps(found)))
        return tuple(found) if found else None

    def check(self) -> None:
        """Reports a save that failed in the background, without waiting for one in progress."""
        self._saver.check()

    def finish(self, state: State) -> str:
        """Waits until the state last given to `save` is on disk; if that fails, tries once more.

        Args:
          state: the same state.

        Returns:
          An empty string, or, in process 0, why it could not be saved and which checkpoint is the
          newest.
        """
        self._saver.wait_for_save("trying once more")
        if self._last is not None and messages.from_main(self._saver.failure):
            step, extra = self._last
            self.save(step, state, extra)
            self._saver.wait_for_save("")
        if self._last is None or not self._saver.failure:
            return self._saver.unrecorded()
        has = _newest(self._folder)
        return f"checkpoint {self._last[0]} could not be saved ({self._saver.failure}; {has})"

    def restore(
        self, like: State, fit: Callable[[int, dict], bool] = lambda step, extra: True
    ) -> tuple[int, dict, State] | None:
        """Restores the newest intact checkpoint, whatever number of devices wrote it.

        Newer ones that are damaged are reported and moved to checkpoints-damaged/.

        Args:
          like: a state with arrays or shapes; only the shapes are used.
          fit: (step, JSON saved with it) -> whether to accept a checkpoint; raises ConfigError if
            it belongs to another run.

        Returns:
          The step, the JSON saved with it, and the state, on the devices; None if no checkpoint is
          accepted.

        Raises:
          ConfigError: the checkpoints belong to another run or model; nothing is moved.
          RunError: all checkpoints are damaged, or the newest can't be read for another reason
            (the disk doesn't answer, memory is full); nothing is moved.
        """
        damaged: dict[int, str] = {}
        other = None
        for step in self._steps():
            try:
                folder = self._folder / str(step)
                extra = self._patiently(functools.partial(integrity.read_extra, folder), step)
                if not fit(step, extra):
                    continue
                read = functools.partial(self._read, step, like, extra)
                restored = self._patiently(read, step)
            except ConfigError:
                self._aside.put_back()
                raise
            except Exception as error:  # Orbax and TensorStore raise whatever they like.
                if not is_damage(error):
                    self._aside.put_back()
                    raise
                other = error if isinstance(error, integrity.OtherModelError) else other
                self._check_all_see(step, first_line(error))
                damaged[step] = first_line(error)
                continue
            self._check_all_see(step, "")
            self._aside.move(damaged)
            self._aside.keep()
            if damaged:
                self._saver.manager.reload()
            return step, extra, restored
        self._aside.put_back()
        if other is not None:
            raise ConfigError(
                f"this workdir holds a different run ({other}): use the config of that run, or "
                "another --workdir"
            )
        if damaged:
            for step, wrong in damaged.items():
                self._report(f"Checkpoint {step} is damaged ({wrong}).")
            raise integrity.all_damaged(self._folder, list(damaged))
        return None

    def _check_all_see(self, step: int, wrong: str) -> None:
        """Asserts that a checkpoint is damaged for all processes or for none; each has to call it.

        Args:
          step: the step of the checkpoint.
          wrong: why this process can't use it; empty if it can.
        """
        told = messages.gather(wrong)
        if any(told) and not all(told):
            bad = next(i for i, text in enumerate(told) if text)
            self._aside.put_back()
            raise RunError(
                f"checkpoint {step} is damaged for process {bad} ({told[bad]}) and not for process "
                f"{told.index('')}: nothing was moved; check that machine's disk, and run again"
            )

    def _steps(self) -> list[int]:
        """Waits until process 0 has written; returns the steps on disk, newest first."""
        self.wait()
        messages.barrier()
        return self._patiently(lambda: integrity.steps_of(self._folder), self._folder)

    def _patiently(self, read: Callable[[], T], what: int | Path) -> T:
        name = f"checkpoint {what}" if isinstance(what, int) else str(what)
        return patiently(read, name, self._report)

    def _read(self, step: int, like: State, extra: dict) -> State:
        """Reads the state of a checkpoint; if it is damaged, raises any exception."""
        # Checkpoints of older versions don't know islands.
        writer = Islands(extra["devices"], extra.get("islands", extra["devices"]))
        shapes = saved_shapes(like, self._setup.method, writer)
        integrity.check_arrays(self._folder / str(step), shapes, extra)
        targets = self._conversion.targets(shapes)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        with ending_reads():
            found = self._saver.manager.restore(step, args=args).state
        arrays = self._conversion.local(dict(found))
        integrity.check_fingerprints(arrays, extra[integrity.FINGERPRINTS])
        if int(arrays["step"]) != step:
            raise ValueError(f"it was saved after step {int(arrays['step'])}")
        return self._conversion.state(arrays, like, writer)

    def wait(self) -> None:
        """Waits until everything is on disk, or reports why it can't be."""
        self._saver.wait_for_save()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for a save in progress, and ends Orbax's threads."""
        self._saver.close()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be made ({reason(error)}): {way_out(reason(error))}, or use another "
            "--workdir"
        ) from None


def _unreadable(folder: Path) -> list[Path]:
    return [path for path in integrity.steps(folder) if not integrity.readable(path)]


def _newest(folder: Path) -> str:
    try:
        steps = integrity.steps_of(folder)
    except OSError as error:
        return f"{folder} can't be read: {reason(error)}"
    return f"the newest is checkpoint {steps[0]}" if steps else "there is no checkpoint"


def folder_of(workdir: Path) -> Path:
    """Returns the folder of a run's checkpoints, whether it exists or not."""
    return workdir.absolute() / FOLDER
