"""The checkpoints of a run: what is in them, what of it is whole, and reading it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from jaxdp import parallel
from jaxdp.agreement import fingerprints
from jaxdp.config import ConfigError, RunError
from jaxdp.disk import first_line
from jaxdp.methods import Sync
from jaxdp.parallel import Replicas
from jaxdp.saving import Saver

FOLDER = "checkpoints"
MARKS = "fingerprints"


class Checkpoints:
    """The checkpoints of a workdir, `checkpoints/<step>/`, step being the steps done.

    Kept are the newest keep_last, the best by validation loss, the multiples of keep_every, and the
    newest of the multiples of `every`, to which a run that diverges goes back.
    Each holds the state (`step`, `params`, `opt_state`), a fingerprint of each of its arrays, and a
    small JSON of what the run must find again when it goes on.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        replicas: Replicas,
        method: Sync,
        report: Callable[[str], None] = print,
    ):
        """Opens the workdir's checkpoints, or an empty set of them.

        Args:
          workdir: of the run.
          config: with the keys of configs/default.py.
          replicas: the devices.
          method: how they agree; says what of the state each of them has of its own.
          report: is told in a line what is wrong with a checkpoint.

        Raises:
          ConfigError: their folder can't be made.
          RunError: there are some, and all are damaged; nothing is moved.
        """
        self._replicas, self._method, self._report = replicas, method, report
        self._folder = _folder(workdir)
        parallel.on_main(lambda: _make(self._folder))
        # Orbax opens a folder only if it can read the metrics of each checkpoint.
        steps = [path for path in self._folder.glob("*") if path.name.isdecimal()]
        damaged = [path for path in steps if not _readable(path / "metrics" / "metrics")]
        if damaged and len(damaged) == len(steps):
            raise self._all_damaged([int(path.name) for path in damaged])
        for path in damaged:
            report(f"Checkpoint {path.name} is damaged (its metrics can't be read).")
        self._set_aside([int(path.name) for path in damaged])
        self._saver = Saver(self._folder, config, report)
        self._last: tuple[int, dict, float | None] | None = None

    def save(self, step: int, state: Any, extra: dict, eval_loss: float | None) -> None:
        """Starts to save; waits only for the one before and for a copy of the state.

        Args:
          step: steps done; names the checkpoint.
          state: on the devices.
          extra: JSON.
          eval_loss: at this very step, where it was evaluated.
        """
        self._last = (step, extra, eval_loss)
        tree = self._saved(state)
        if parallel.is_main():
            extra = extra | {"devices": self._replicas.device_count, MARKS: _marks(tree)}
            # Orbax refuses what is on the devices of one process of several.
            tree = tree if jax.process_count() == 1 else jax.device_get(tree)
            self._saver.start(step, tree, extra, eval_loss)

    def check(self) -> None:
        """Reports a save that failed in the background; doesn't wait for one under way."""
        self._saver.check()

    def finish(self, state: Any) -> str:
        """Returns when the state that was last given to `save` is on disk.

        Where it could not be saved, it is tried once more.

        Args:
          state: that very state.

        Returns:
          Nothing, or why it could not be saved and which the newest checkpoint is; process 0 knows.
        """
        self._saver.settle("trying once more")
        if self._last is not None and parallel.from_main(self._saver.failure):
            step, extra, eval_loss = self._last
            self.save(step, state, extra, eval_loss)
            self._saver.settle("")
        if self._last is None or not self._saver.failure:
            return ""
        newest = self._manager.latest_step()
        has = "there is no checkpoint" if newest is None else f"the newest is that of step {newest}"
        return f"checkpoint {self._last[0]} could not be saved ({self._saver.failure}; {has})"

    def restore(
        self, state: Any, fit: Callable[[int, dict], bool] = lambda step, extra: True
    ) -> tuple[int, dict, Any] | None:
        """Restores the newest checkpoint that is whole, written on however many devices.

        Newer ones that are damaged are reported and moved to checkpoints-damaged/.

        Args:
          state: on the devices, of the same shapes; its values are not used.
          fit: (step, JSON saved with it) -> whether this checkpoint will do.

        Returns:
          The step, the JSON saved with it, and the state, on the devices; None where there is no
          checkpoint that will do.

        Raises:
          RunError: there are some, and all are damaged; nothing is moved.
        """
        damaged = []
        for step in self._steps():
            try:
                extra = self._read_extra(step)
                if not fit(step, extra):
                    continue
                restored = self._read(step, state, extra)
            except Exception as error:  # Orbax and TensorStore raise whatever they like.
                self._report(f"Checkpoint {step} is damaged ({first_line(error)}).")
                damaged.append(step)
                continue
            self._set_aside(damaged)
            if damaged:
                self._manager.reload()
            return step, extra, restored
        if damaged:
            raise self._all_damaged(damaged)
        return None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        return self._saver.manager

    def _steps(self) -> list[int]:
        """Of the checkpoints on disk, the newest first; process 0 has written them."""
        self.wait()
        parallel.barrier("checkpoints written")
        if not parallel.is_main():
            self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def _read_extra(self, step: int) -> dict:
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).extra

    def _read(self, step: int, state: Any, extra: dict) -> Any:
        """The state of a checkpoint; raises anything where it is damaged."""
        target = _shared(state)
        if self._method.own_opt_state:
            like = self._method.saved_shapes(_shapes(state), extra["devices"])
            # Orbax reads to the host, not to a device, where it is shown a NumPy array.
            target["opt_state"] = jax.tree.map(
                lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like
            )
        target = self._globally(parallel.to_global, target)
        target = jax.tree.map(
            lambda x: ocp.utils.to_shape_dtype_struct(x) if isinstance(x, jax.Array) else x, target
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        found = self._globally(
            parallel.to_local, dict(self._manager.restore(step, args=args).state)
        )
        _check_marks(found, extra[MARKS])
        own = {}
        if self._method.own_opt_state:
            saved = self._method.load(found.pop("opt_state"), self._replicas.device_count)
            own = {"opt_state": self._replicas.put_own(saved)}
        return state.replace(**self._replicas.replicate(found), **own)

    def _saved(self, state: Any) -> dict:
        """What goes into a checkpoint: the same whatever the number of devices, where it can be."""
        tree = _shared(state)
        if self._method.own_opt_state:
            own = self._replicas.gather_own(tree["opt_state"])
            tree["opt_state"] = self._method.save(own, _shapes(state))
        return tree

    def _globally(self, convert: Callable[[Any], Any], tree: dict) -> dict:
        """Converts what is on devices; a method's own opt_state is on the host."""
        own = {name: tree[name] for name in ("opt_state",) if self._method.own_opt_state}
        return convert({name: x for name, x in tree.items() if name not in own}) | own

    def _all_damaged(self, steps: list[int]) -> RunError:
        return RunError(
            f"all checkpoints in {self._folder} are damaged ({', '.join(map(str, steps))}): "
            "restore them from a copy, or use another --workdir; nothing was changed"
        )

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        parallel.barrier("all have seen what is damaged")
        if parallel.is_main():
            aside = self._folder.with_name(f"{FOLDER}-damaged")
            aside.mkdir(exist_ok=True)
            for step in steps:
                number = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
                target = aside / (f"{step}.{number}" if number else str(step))
                (self._folder / str(step)).rename(target)
                self._report(f"It was moved to {target}.")
        parallel.barrier("checkpoints set aside")

    def wait(self) -> None:
        """Returns when all is on disk, or could not be saved, which is reported."""
        self._saver.settle()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits, and frees threads."""
        self._saver.close()


def load_params(workdir: Path, params: Any) -> tuple[Any, int]:
    """Reads only the parameters of the newest checkpoint, on one device.

    Args:
      workdir: of a run.
      params: a pytree of arrays or of their shapes and dtypes.

    Returns:
      The parameters, and the step they are of.

    Raises:
      ConfigError: there is no checkpoint.
    """
    folder = _folder(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), {"params": params}
    )
    options = ocp.CheckpointManagerOptions(create=False)
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: --workdir must be that of a training run")
    with ocp.CheckpointManager(folder, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{folder} holds no checkpoint: train first, with the same --workdir")
        restore = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        found = manager.restore(
            step, args=ocp.args.Composite(state=restore, extra=ocp.args.JsonRestore())
        )
        _check_marks({"params": found.state["params"]}, found.extra[MARKS])
        return found.state["params"], step


def _marks(tree: Any) -> dict[str, int]:
    """A fingerprint of each array, by path."""
    leaves = jax.tree.leaves_with_path(tree)
    on_devices = [x for _, x in leaves if isinstance(x, jax.Array)]
    marks = iter(np.asarray(_fingerprints(on_devices)) if on_devices else ())
    # What is on the host goes through a device array by array: it may be too large for one.
    found = [next(marks) if isinstance(x, jax.Array) else _fingerprints([x])[0] for _, x in leaves]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(mark) for name, mark in zip(names, found, strict=True)}


def _check_marks(tree: Any, expected: dict[str, int]) -> None:
    """Raises ValueError for an array that isn't as it was when it was saved."""
    for name, mark in _marks(tree).items():
        if expected[name] != mark:
            raise ValueError(f"{name} is not what was saved")


def _readable(path: Path) -> bool:
    try:
        return not path.exists() or isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


_fingerprints = jax.jit(fingerprints)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be made ({error.strerror}): make room, or use another --workdir"
        ) from None


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / FOLDER


def _shared(state: Any) -> dict:
    fields = ("step", "params", "opt_state") + (("outer",) if jax.tree.leaves(state.outer) else ())
    return {name: getattr(state, name) for name in fields}


def _shapes(state: Any) -> Any:
    """Of the optimizer's state on one device that has it all."""
    return jax.eval_shape(state.tx.init, state.params)
