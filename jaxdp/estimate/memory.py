"""Memory that a training step needs per device: predicted, and as XLA compiles it.

Only shapes are used: nothing is allocated.
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
    """Bytes per device at the peak of a step."""

    parameters: int
    average: int
    optimizer: int
    gradients: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(dataclasses.astuple(self))


def shape(dimensions: tuple[int, ...], dtype: Any = "float32") -> Any:
    """Returns a `jax.ShapeDtypeStruct`, the shape and dtype of an array without its values."""
    return jax.ShapeDtypeStruct(dimensions, dtype)


def setup_of(config: ConfigDict, vocab: int, count: int) -> Setup:
    """Returns a run's setup without its data; the mask token is 0, which changes no shape."""
    return make_setup(config, vocab, count, mask_id=0)


def trace(function: Callable, count: int, *args: Any) -> Any:
    """Returns the jaxpr of a function as one of `count` devices runs it."""
    return jax.make_jaxpr(function, axis_env=[(AXIS, count)])(*args)


def remat_saves(config: ConfigDict) -> bool:
    """Returns whether model.remat is on and saves memory: in a scan, or if XLA recomputes late."""
    return config.model.remat and (config.model.scan_layers or recomputes_late())


@functools.cache
def recomputes_late() -> bool:
    """Returns whether XLA recomputes layers with remat in the backward pass, and not before.

    The CPU backend of jax 0.10 removes what it can of the recomputation, and does the rest at the
    end of the forward pass: outside a scan, model.remat costs time and saves nothing. This compiles
    small layers to find out.
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
    """Predicts the memory that one of `count` devices needs; see `liveness.peak_bytes`."""
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
    """Returns the config with model.remat on only if it saves memory; see `remat_saves`."""
    return changed(config, "model.remat", remat_saves(config))


def changed(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """Returns a copy of the config with another value for a key such as "model.remat"."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict({key: value})
    return config


def largest_batch(config: ConfigDict, vocab: int, count: int, limit: int) -> int:
    """Returns the most sequences per device that fit in `limit` bytes; 0 if not even one does."""
    unit = METHODS[config.sync.method].batch_unit(config, count)

    @functools.cache
    def total(units: int) -> int:
        other = changed(config, "global_batch_size", units * unit * count)
        return predict_memory(other, vocab, count).total

    # Memory grows linearly except at first, so the secant method needs only a few steps.
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
    """Returns the bytes per device that XLA reports: arguments, undonated results, temporaries."""
    sizes = compiled_step(config, vocab, count).memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def compiled_step(config: ConfigDict, vocab: int, count: int) -> Any:
    """Compiles a round's steps for `count` local devices; returns a `jax.stages.Compiled`."""
    setup, replicas = setup_of(config, vocab, count), Replicas(jax.local_devices()[:count])
    state = abstract_state(setup)
    batch = jax.tree.map(
        lambda x: shape((count, *x.shape), x.dtype),
        training_shapes(config, setup.method.every, setup.sizes.per_device),
    )
    return pmapped(setup, replicas, state).lower(state, batch).compile()
