"""A run's state as the arrays of a checkpoint, and back, on any number of devices."""

from typing import Any

import jax
import numpy as np

from jaxdp.parallel.replicas import Replicas, to_local
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, fields_of, per_device_fields, unsliced_shapes
from jaxdp.sync.islands import Islands


class Conversion:
    """Makes arrays to save of a state, and a state of saved arrays.

    If possible, what is saved doesn't depend on the number of devices.
    """

    def __init__(self, setup: Setup, replicas: Replicas):
        """Takes the setup and the devices of the run that saves and restores."""
        self._setup, self._replicas = setup, replicas
        self._own = per_device_fields(setup.method)

    def saved(self, state: State) -> dict[str, Any]:
        """Returns the arrays to save; all processes have to call this."""
        tree = fields_of(state)
        for name, like in unsliced_shapes(state, self._setup.method).items():
            own = self._replicas.gather_per_device(tree[name])
            tree[name] = self._setup.method.save(own, like, state.params)
        if "residual" in tree:
            tree["residual"] = self._replicas.gather_per_device(tree["residual"])
        return tree

    def targets(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns what Orbax restores arrays of these shapes to: the host, or the devices."""
        return {
            name: _on_host(tree) if name in self._own else self._replicas.global_shapes(tree)
            for name, tree in shapes.items()
        }

    def local(self, restored: dict[str, Any]) -> dict[str, Any]:
        """Returns what Orbax has restored, as arrays that are local to this process."""
        shared = {name: tree for name, tree in restored.items() if name not in self._own}
        return restored | to_local(shared)

    def state(self, arrays: dict[str, Any], like: State, writer: Islands) -> State:
        """Returns the state on the devices.

        Args:
          arrays: what `local` has returned.
          like: a state with arrays or shapes; only the shapes are used.
          writer: the devices of the run that has saved it.
        """
        shared = {name: tree for name, tree in arrays.items() if name not in self._own}
        placed = {
            name: self._replicas.put_per_device(self._load(name, arrays[name], like, writer))
            for name in self._own
        }
        return like.replace(**self._replicas.replicate(shared), **placed)

    def _load(self, name: str, saved: Any, like: State, writer: Islands) -> Any:
        """Converts a field of another number of devices to this one's, [N, ...]."""
        method = self._setup.method
        if name == "residual":
            return method.load_residual(saved, like.params, writer, self._setup.islands)
        return method.load(saved, like.params, writer, self._setup.islands)


def first_copies(tree: Any) -> Any:
    """Returns the first device's copy of each replicated array; arrays on the host as they are."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def _on_host(shapes: Any) -> Any:
    """Returns NumPy arrays of these shapes: Orbax then restores to the host."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
