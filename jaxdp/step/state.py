"""The state of a run: made once, and the same shapes for training, checkpoints and plans.

Shapes: N devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from jaxdp.model.transformer import initial_params, parameter_shapes
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.setup import Setup
from jaxdp.sync.methods import Sync

FIELDS = ("step", "params", "opt_state", "outer", "ema")


class State(TrainState):
    """What a run is at a step: flax's TrainState, and what only some runs have.

    Every field is the same on all devices, except those that `own_fields` names: these are
    [N, ...], each device with its own.

    Attributes:
      outer: state of DiLoCo's outer optimizer; () without one.
      ema: average of the parameters, or a device's slice of it; () without one. See `ema`.
    """

    outer: Any = ()
    ema: Any = ()


def create_state(setup: Setup, replicas: Replicas, read: Callable[[], Any] | None = None) -> State:
    """Makes the state of step 0 on all devices.

    Args:
      setup: of the run.
      replicas: the devices.
      read: returns the parameters to start from, on the host; by default they are drawn.
    """
    params = replicas.replicate(read() if read else initial_params(setup.model, setup.config.seed))
    start = replicas.pmap(functools.partial(_of_device, setup), out_axes=_axes(setup))
    return start(params, replicas.shard(np.zeros(len(replicas.devices))))


def abstract_state(setup: Setup) -> State:
    """The state with shapes and dtypes for arrays; nothing is computed."""
    on_all_devices = jax.vmap(
        functools.partial(_of_device, setup),
        in_axes=(None, 0),
        out_axes=_axes(setup),
        axis_name=AXIS,
    )
    numbers = np.zeros(setup.device_count)
    return jax.eval_shape(on_all_devices, parameter_shapes(setup.model), numbers)


def _axes(setup: Setup) -> State:
    nothing: Any = ()
    state = State(0, setup.model.apply, nothing, setup.optimizer, nothing)
    return state_axes(state, setup.method)


def _of_device(setup: Setup, params: Any, unused: Any) -> State:
    """What one device holds at step 0; call it under the axis 'batch'."""
    del unused
    opt_state, outer = setup.method.init(setup.optimizer, params)
    ema = setup.method.part(params) if setup.method.ema_decay else ()
    step = jnp.zeros((), jnp.int32)
    return State(step, setup.model.apply, params, setup.optimizer, opt_state, outer, ema)


def own_fields(method: Sync) -> set[str]:
    """The fields of which each device has its own, [N, ...]."""
    own = {"opt_state": method.own_opt_state, "ema": method.own_ema and method.ema_decay > 0}
    return {name for name, is_own in own.items() if is_own}


def state_axes(state: State, method: Sync) -> State:
    """Which fields of a state have an axis of devices, as `jax.pmap` wants to be told."""
    own = own_fields(method)
    return state.replace(**{name: 0 if name in own else None for name in FIELDS})


def of_one_device(state: State, method: Sync) -> State:
    """The shapes that one device sees of an abstract state."""

    def without_devices(x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    own = {name: getattr(state, name) for name in own_fields(method)}
    return state.replace(**jax.tree.map(without_devices, own))


def fields_of(state: State) -> dict[str, Any]:
    """The fields of a state that hold anything, by name."""
    fields = {name: getattr(state, name) for name in FIELDS}
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def whole_fields(state: State, method: Sync) -> dict[str, Any]:
    """The fields of which each device has its own, with the shapes that a single device has.

    Args:
      state: with arrays or their shapes; only shapes are looked at.
      method: how the devices agree.
    """
    shapes = {
        "opt_state": lambda: jax.eval_shape(state.tx.init, state.params),
        "ema": lambda: state.params,
    }
    return {name: shapes[name]() for name in own_fields(method)}


def saved_shapes(state: State, method: Sync, device_count: int) -> dict[str, Any]:
    """Shapes and dtypes of the arrays in a checkpoint.

    Args:
      state: with arrays or their shapes; only shapes are looked at.
      method: how the devices agreed that wrote the checkpoint.
      device_count: how many there were.
    """
    own = whole_fields(state, method)
    return fields_of(state) | {
        name: method.saved_shapes(like, device_count) for name, like in own.items()
    }
