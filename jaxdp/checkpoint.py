"""Checkpoints, by Orbax: written in the background, whole or not at all."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxdp import parallel
from jaxdp.config import ConfigError
from jaxdp.methods import Sync
from jaxdp.parallel import Replicas

FOLDER = "checkpoints"
METRIC = "eval/loss"


class Checkpoints:
    """The checkpoints of a workdir, `checkpoints/<step>/`, step being the steps done.

    Kept are the newest keep_last, the best by validation loss, and the multiples of keep_every.
    Each holds the state (`step`, `params`, `opt_state`) and a small JSON of what the run must find
    again when it goes on.
    """

    def __init__(self, workdir: Path, config: ConfigDict, replicas: Replicas, method: Sync):
        """Opens the workdir's checkpoints, or an empty set of them.

        Args:
          workdir: of the run.
          config: with the keys of configs/default.py.
          replicas: the devices.
          method: how they agree; says what of the state each of them has of its own.
        """
        self._replicas, self._method = replicas, method
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policy(config),
            best_fn=_loss,  # Without it, metrics are not written to disk.
            best_mode="min",
        )
        self._manager = ocp.CheckpointManager(_folder(workdir), options=options)

    def save(self, step: int, state: Any, extra: dict, eval_loss: float | None) -> None:
        """Starts to save; waits only for the one before and for a copy of the state.

        Args:
          step: steps done; names the checkpoint.
          state: on the devices.
          extra: JSON.
          eval_loss: at this very step, where it was evaluated.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(self._saved(state)),
            extra=ocp.args.JsonSave(extra | {"devices": self._replicas.device_count}),
        )
        # An infinite loss is the worst: such a checkpoint is kept only while it is new.
        finite = eval_loss is not None and math.isfinite(eval_loss)
        metrics = {METRIC: eval_loss if finite else math.inf}
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def latest(self) -> tuple[int, dict] | None:
        """The newest checkpoint's step and the JSON saved with it; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return step, self._manager.restore(step, args=args).extra

    def restore(self, step: int, devices: int, state: Any) -> Any:
        """Restores a checkpoint, written on however many devices.

        Args:
          step: which one.
          devices: how many it was written on.
          state: on the devices, of the same shapes; its values are not used.

        Returns:
          The state, on the devices.
        """
        shared = jax.tree.map(ocp.utils.to_shape_dtype_struct, parallel.to_global(_shared(state)))
        own = {}
        if self._method.own_opt_state:
            like = self._method.saved_shapes(_shapes(state), devices)
            # Orbax reads to the host, not to a device, where it is shown a NumPy array.
            empty = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)
            own = {"opt_state": empty}
            del shared["opt_state"]
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shared | own))
        found = dict(self._manager.restore(step, args=args).state)
        if own:
            saved = found.pop("opt_state")
            saved = self._method.load(saved, self._replicas.device_count)
            own = {"opt_state": self._replicas.put_own(saved)}
        return state.replace(**self._replicas.replicate(parallel.to_local(found)), **own)

    def _saved(self, state: Any) -> dict:
        """What goes into a checkpoint: the same whatever the number of devices, where it can be."""
        tree = _shared(state)
        if not self._method.own_opt_state:
            return parallel.to_global(tree)
        own = self._replicas.gather_own(tree.pop("opt_state"))
        return parallel.to_global(tree) | {"opt_state": self._method.save(own, _shapes(state))}

    def wait(self) -> None:
        """Returns when all is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits, and frees threads."""
        self._manager.close()


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
        found = manager.restore(step, args=ocp.args.Composite(state=restore))
        return found.state["params"], step


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / FOLDER


def _shared(state: Any) -> dict:
    fields = ("step", "params", "opt_state") + (("outer",) if jax.tree.leaves(state.outer) else ())
    return {name: getattr(state, name) for name in fields}


def _shapes(state: Any) -> Any:
    """Of the optimizer's state on one device that has it all."""
    return jax.eval_shape(state.tx.init, state.params)


def _loss(metrics: dict) -> float:
    return metrics[METRIC]


def _policy(config: ConfigDict) -> preservation_policy.PreservationPolicy:
    c = config.checkpoint
    best = preservation_policy.BestN(
        get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    policies = [preservation_policy.LatestN(c.keep_last), best]
    if c.keep_every:
        policies.append(preservation_policy.EveryNSteps(c.keep_every))
    return preservation_policy.AnyPreservationPolicy(policies)
