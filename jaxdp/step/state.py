"""The training state, with one definition of its shapes for training, checkpoints and plans.

Shapes: N devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from jaxdp.model.transformer import initial_params, parameter_shapes
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.setup import Setup
from jaxdp.sync.islands import Islands
from jaxdp.sync.method import Sync

FIELDS = ("step", "params", "opt_state", "outer", "ema", "residual", "local_params")


class State(TrainState):
    """The state of a run after a step: flax's TrainState, and fields that only some runs have.

    Fields in `per_device_fields` are [N, ...], one entry per device; all others are equal on all
    devices.

    Attributes:
      outer: state of DiLoCo's outer optimizer; () without one.
      ema: EMA of the parameters (see `ema`), or each device's slice of it; () without one.
      residual: what a device's compressed sums have lost (see `compression`); {} without them.
      local_params: the parameters that a device goes on from, where those are not `params` (see
        `fragments`); () elsewhere.
    """

    outer: Any = ()
    ema: Any = ()
    residual: Any = flax.struct.field(default_factory=dict)
    local_params: Any = ()


def create_state(setup: Setup, replicas: Replicas, read: Callable[[], Any] | None = None) -> State:
    """Creates the state of step 0 on all devices.

    Args:
      setup: the run's setup.
      replicas: the devices.
      read: returns the initial parameters, on the host; by default they are drawn at random.
    """
    params = replicas.replicate(read() if read else initial_params(setup.model, setup.config.seed))
    start = replicas.pmap(functools.partial(_of_device, setup), out_axes=_axes(setup))
    return start(params, replicas.shard(np.zeros(len(replicas.devices))))


def abstract_state(setup: Setup) -> State:
    """Returns the state with shapes and dtypes in place of arrays; nothing is computed."""
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
    """Returns one device's state at step 0; call it under the axis 'batch'."""
    del unused
    opt_state, outer = setup.method.init(setup.optimizer, params)
    ema = setup.method.ema_slice(params) if setup.method.ema_decay else ()
    lost = setup.method.residual(params, setup.islands)
    step = jnp.zeros((), jnp.int32)
    own = params if setup.method.per_device_params else ()
    made = (opt_state, outer, ema, lost, own)
    return State(step, setup.model.apply, params, setup.optimizer, *made)


def per_device_fields(method: Sync) -> set[str]:
    """Returns the names of the fields that differ between devices, [N, ...]."""
    own = {
        "opt_state": method.per_device_opt_state,
        "ema": method.per_device_ema and method.ema_decay > 0,
        "residual": method.levels > 0,
        "local_params": method.per_device_params,
    }
    return {name for name, is_own in own.items() if is_own}


def state_axes(state: State, method: Sync) -> State:
    """Returns 0 for fields with a device axis and None for others, as `jax.pmap` takes them."""
    own = per_device_fields(method)
    return state.replace(**{name: 0 if name in own else None for name in FIELDS})


def per_device_shapes(state: State, method: Sync) -> State:
    """Returns the shapes that one device sees of an abstract state: without the device axis."""

    def without_devices(x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    own = {name: getattr(state, name) for name in per_device_fields(method)}
    return state.replace(**jax.tree.map(without_devices, own))


def fields_of(state: State) -> dict[str, Any]:
    """Returns the fields of a state that hold arrays, by name."""
    fields = {name: getattr(state, name) for name in FIELDS}
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def unsliced_shapes(state: State, method: Sync) -> dict[str, Any]:
    """Returns the fields in `per_device_fields` with the shapes that a single device would have.

    Residuals are left out: they have no such shape.

    Args:
      state: a state of arrays or of shapes; only shapes are used.
      method: the sync method.
    """
    shapes = {
        "opt_state": lambda: jax.eval_shape(state.tx.init, state.params),
        "ema": lambda: state.params,
        "local_params": lambda: state.params,
    }
    return {name: shapes[name]() for name in per_device_fields(method) - {"residual"}}


def saved_shapes(state: State, method: Sync, islands: Islands) -> dict[str, Any]:
    """Returns shapes and dtypes of the arrays in a checkpoint.

    Args:
      state: a state of arrays or of shapes; only shapes are used.
      method: the sync method of the run that wrote the checkpoint.
      islands: the devices of that run.
    """
    own = unsliced_shapes(state, method)
    count = islands.devices
    saved = {name: method.saved_shapes(like, count) for name, like in own.items()}
    if method.levels:
        one = jax.eval_shape(lambda: method.residual(state.params, islands))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)
        saved["residual"] = shapes
    return fields_of(state) | saved
