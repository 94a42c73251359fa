"""What a run will need: memory per device, time per step, efficiency on more devices.

Shapes only: nothing is allocated but for a matrix product that `measure_rate` times.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError
from jaxdp.common.files import num_bytes
from jaxdp.data.feed import round_shapes
from jaxdp.estimate import liveness
from jaxdp.model.transformer import (
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
    parameter_shapes,
)
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.objective import get_objective
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.step.train_step import State, state_axes, train_step
from jaxdp.sync import methods
from jaxdp.sync.traffic import Collective

COUNTS = tuple(2**i for i in range(11))
MEASURE_SECONDS = 0.3


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


def abstract_step(
    config: ConfigDict, vocab: int, count: int
) -> tuple[functools.partial, State, Any]:
    """The training step of a round, and shapes of what one of `count` devices gives to it.

    Raises:
      ConfigError: the batch can't be split over the devices.
    """
    sizes = configs.batch_sizes(config, 1, count)
    method = methods.METHODS[config.sync.method](config, AXIS)
    model, schedule = Transformer(ModelConfig.from_config(config, vocab)), get_schedule(config)
    optimizer, params = get_optimizer(config, schedule), parameter_shapes(model)
    init = functools.partial(method.init, optimizer)
    opt_state, outer = trace(init, count, params)[1]
    ema = trace(method.part, count, params)[1] if method.ema_decay else ()
    state = State(shape((), "int32"), model.apply, params, optimizer, opt_state, outer, ema)
    batch = round_shapes(config, method.every, sizes.per_device)
    step = functools.partial(
        train_step,
        method=method,
        schedule=schedule,
        objective=get_objective(config, vocab, mask_id=0),
        clip_norm=config.optimizer.clip_norm,
    )
    return step, state, batch


def shape(dimensions: tuple[int, ...], dtype: Any = "float32") -> Any:
    """An array that isn't there."""
    return jax.ShapeDtypeStruct(dimensions, dtype)


def trace(function: Callable, count: int, *args: Any) -> tuple[Any, Any]:
    """The jaxpr of what one of `count` devices does, and the shapes of its results."""
    axes = [(AXIS, count)]
    return jax.make_jaxpr(function, axis_env=axes, return_shape=True)(*args)


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
    step, state, batch = abstract_step(config, vocab, count)
    peak = liveness.peak_bytes(trace(step, count, state, batch)[0].jaxpr)
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


def splits(config: ConfigDict, count: int) -> bool:
    """Whether so many devices can share the batch."""
    try:
        configs.batch_sizes(config, 1, count)
    except ConfigError:
        return False
    return True


def largest_batch(config: ConfigDict, vocab: int, count: int, limit: int) -> int:
    """Sequences per device whose memory is within `limit` bytes; 0 where not one is."""
    unit = config.grad_accum_steps
    if config.sync.method == "fixed_order":
        unit = config.sync.virtual_replicas // count

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
    step, state, batch = abstract_step(config, vocab, count)
    method, replicas = step.keywords["method"], Replicas(jax.local_devices()[:count])

    def on_all(tree):
        return jax.tree.map(lambda x: shape((count, *x.shape), x.dtype), tree)

    if method.own_opt_state:
        state = state.replace(opt_state=on_all(state.opt_state))
    if method.own_ema:
        state = state.replace(ema=on_all(state.ema))
    axes = state_axes(state, method)
    p_step = replicas.pmap(step, state_axes=axes, out_axes=(axes, None), donate=True)
    return p_step.lower(state, on_all(batch)).compile()


def step_flops(config: ConfigDict, vocab: int, count: int) -> tuple[int, int]:
    """Per token, and per device and optimizer step, without what remat repeats."""
    model = ModelConfig.from_config(config, vocab)
    per_token = flops_per_token(model, num_parameters(parameter_shapes(Transformer(model))))
    return per_token, per_token * config.global_batch_size // count * config.seq_len


def compute_seconds(config: ConfigDict, vocab: int, count: int, rate: float) -> float:
    """Of an optimizer step at `rate` FLOP/s per device; remat does the forward third twice."""
    return step_flops(config, vocab, count)[1] * (4 / 3 if config.model.remat else 1) / rate


def measure_rate(config: ConfigDict) -> float:
    """FLOP/s of a device in the feed-forward layer's product: a whole step reaches less."""
    dtype, width = config.model.dtype, config.model.embed_dim
    hidden = config.model.mlp_dim or 4 * width
    # More rows than a few thousand make it no faster.
    rows = min(config.global_batch_size * config.seq_len, 4096)
    product = jax.jit(jnp.matmul)
    x, kernel = jnp.ones((rows, width), dtype), jnp.ones((width, hidden), dtype)
    product(x, kernel).block_until_ready()
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
        product(x, kernel).block_until_ready()
        done += 1
    # Virtual CPU devices share the cores that one of them had to itself here.
    sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    return done * 2 * rows * width * hidden / seconds / sharing


def communication(
    collectives: list[Collective], count: int, bandwidth: float, latency: float
) -> float:
    """Seconds per optimizer step: bytes / bandwidth, and the latency of messages in a row.

    Args:
      collectives: of a round.
      count: N devices.
      bandwidth: bytes per second that a device sends.
      latency: seconds per message.
    """
    return sum((c.sent(count) / bandwidth + c.hops(count) * latency) / c.steps for c in collectives)


def efficiencies(
    config: ConfigDict, vocab: int, count: int, rate: float, bandwidth: float, latency: float
) -> dict[str, dict[int, float]]:
    """Predicted efficiency of each method on each number of devices, where it can be used.

    Weak scaling: each device has the batch that one of `count` devices has. Communication is not
    overlapped with computing, and all links are equal, as in one ring.

    Args:
      config: a valid config; its sync.method is replaced.
      vocab: vocabulary size.
      count: devices that share config.global_batch_size.
      rate: FLOP/s of a device.
      bandwidth: bytes per second that a device sends.
      latency: seconds per message.

    Returns:
      {method: {devices: compute / (compute + communication)}}.
    """
    compute = compute_seconds(config, vocab, count, rate)
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, vocab)))
    opt_state = jax.eval_shape(get_optimizer(config, get_schedule(config)).init, params)
    table: dict[str, dict[int, float]] = {}
    for name in methods.METHODS:
        other = changed(config, "sync.method", name)
        if name not in ("gradient_mean", "sharded"):
            other.sync.dtype = "float32"
        most = config.sync.virtual_replicas if name == "fixed_order" else COUNTS[-1]
        table[name] = {
            n: compute
            / (
                compute
                + communication(methods.traffic(other, params, opt_state, n), n, bandwidth, latency)
            )
            for n in COUNTS
            if n <= most
        }
    return table
