"""How much memory a training step needs per device: predicted, and as XLA compiles it.

Shapes only: nothing is allocated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.common.files import num_bytes
from jaxdp.data.batch import training_shapes
from jaxdp.estimate import liveness
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.program import pmapped
from jaxdp.step.setup import Setup, make_setup
from jaxdp.step.state import abstract_state, of_one_device
from jaxdp.step.train_step import step_of
from jaxdp.sync.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, in the step's most demanding moment."""

    parameters: int
    average: int
    optimizer: int
    gradients: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(dataclasses.astuple(self))


def shape(dimensions: tuple[int, ...], dtype: Any = "float32") -> Any:
    """An array that isn't there."""
    return jax.ShapeDtypeStruct(dimensions, dtype)


def setup_of(config: ConfigDict, vocab: int, count: int) -> Setup:
    """The setup of a run without its data: which token is the mask doesn't change any shape."""
    return make_setup(config, vocab, count, mask_id=0)


def trace(function: Callable, count: int, *args: Any) -> Any:
    """The jaxpr of what one of `count` devices does."""
    return jax.make_jaxpr(function, axis_env=[(AXIS, count)])(*args)


def remat_saves(config: ConfigDict) -> bool:
    """Whether model.remat saves memory: in a loop always, else where XLA recomputes late enough."""
    return config.model.remat and (config.model.scan_layers or recomputes_late())


@functools.cache
def recomputes_late() -> bool:
    """Whether XLA recomputes layers in the backward pass, where it is asked to.

    The CPU backend of jax 0.10 merges what it can and does the rest at the end of the forward pass,
    so that model.remat costs time and saves nothing but in a loop. Asked by compiling small layers.
    """

    def temporary(wrap: Callable) -> int:
        layer = wrap(lambda x, w: x + jnp.tanh(jnp.tanh(x @ w) @ w))

        def loss(kernels, x):
            return functools.reduce(layer, kernels, x).sum()

        kernels = [shape((64, 64))] * 8
        compiled = jax.jit(jax.value_and_grad(loss)).lower(kernels, shape((1024, 64))).compile()
        sizes: Any = compiled.memory_analysis()
        return sizes.temp_size_in_bytes

    return temporary(jax.checkpoint) < temporary(lambda layer: layer)


def predict_memory(config: ConfigDict, vocab: int, count: int) -> Memory:
    """What one of `count` devices needs; see `liveness.peak_bytes`."""
    setup = setup_of(config, vocab, count)
    state = of_one_device(abstract_state(setup), setup.method)
    batch = training_shapes(config, setup.method.every, setup.sizes.per_device)
    peak = liveness.peak_bytes(trace(step_of(setup), count, state, batch).jaxpr)
    gradients = min(num_bytes(state.params), peak)
    return Memory(
        parameters=num_bytes(state.params),
        average=num_bytes(state.ema),
        optimizer=num_bytes((state.opt_state, state.outer)),
        gradients=gradients,
        activations=peak - gradients,
        batch=num_bytes(batch),
    )


def effective(config: ConfigDict) -> ConfigDict:
    """The config with model.remat where it saves memory; see `remat_saves`."""
    return changed(config, "model.remat", remat_saves(config))


def changed(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """A copy with another value for a key such as "model.remat"."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict({key: value})
    return config


def largest_batch(config: ConfigDict, vocab: int, count: int, limit: int) -> int:
    """Sequences per device whose memory is within `limit` bytes; 0 where not one is."""
    unit = METHODS[config.sync.method].batch_unit(config, count)

    @functools.cache
    def total(units: int) -> int:
        other = changed(config, "global_batch_size", units * unit * count)
        return predict_memory(other, vocab, count).total

    # Memory grows linearly but for its beginning, so a secant finds the place in a few steps.
    low, high = 1, 2
    for _ in range(6):
        slope = max((total(high) - total(low)) / (high - low), 1)
        low, high = high, max(int(high + (limit - total(high)) / slope), 1)
        if low == high:
            break
    while high and total(high) > limit:
        high -= 1
    return high * unit


def compiled_memory(config: ConfigDict, vocab: int, count: int) -> int:
    """XLA's own figure for a device, in bytes: arguments, results not donated, temporary."""
    sizes = compiled_step(config, vocab, count).memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def compiled_step(config: ConfigDict, vocab: int, count: int) -> Any:
    """The step of a round, compiled for `count` local devices; see `jax.stages.Compiled`."""
    setup, replicas = setup_of(config, vocab, count), Replicas(jax.local_devices()[:count])
    state = abstract_state(setup)
    batch = jax.tree.map(
        lambda x: shape((count, *x.shape), x.dtype),
        training_shapes(config, setup.method.every, setup.sizes.per_device),
    )
    return pmapped(setup, replicas, state).lower(state, batch).compile()
