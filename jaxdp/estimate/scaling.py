"""Predicts the speed of a run: FLOPs, time per step, and efficiency on more devices.

Only shapes are used; nothing is allocated, except for a matrix product that `measure_rate` times.
"""

import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.common.config import with_value
from jaxdp.model.transformer import (
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
    parameter_shapes,
)
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.sync import methods
from jaxdp.sync.traffic import Collective

COUNTS = tuple(2**i for i in range(11))
MEASURE_SECONDS = 0.3


def step_flops(config: ConfigDict, vocab: int, count: int) -> tuple[int, int]:
    """Returns FLOPs per token, and per device and optimizer step, without remat's recomputation."""
    model = ModelConfig.from_config(config, vocab)
    per_token = flops_per_token(model, num_parameters(parameter_shapes(Transformer(model))))
    return per_token, per_token * config.global_batch_size // count * config.seq_len


def compute_seconds(config: ConfigDict, vocab: int, count: int, rate: float) -> float:
    """Returns seconds per optimizer step at `rate` FLOP/s per device; remat adds a third."""
    return step_flops(config, vocab, count)[1] * (4 / 3 if config.model.remat else 1) / rate


def measure_rate(config: ConfigDict) -> float:
    """Times the feed-forward matrix product; returns FLOP/s of a device. A step reaches less."""
    dtype, width = config.model.dtype, config.model.embed_dim
    hidden = config.model.mlp_dim or 4 * width
    # More than a few thousand rows make it no faster.
    rows = min(config.global_batch_size * config.seq_len, 4096)
    product = jax.jit(jnp.matmul)
    x, kernel = jnp.ones((rows, width), dtype), jnp.ones((width, hidden), dtype)
    product(x, kernel).block_until_ready()
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
        product(x, kernel).block_until_ready()
        done += 1
    # In a run, virtual CPU devices share the cores that one used alone here.
    sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    return done * 2 * rows * width * hidden / seconds / sharing


def communication(
    collectives: list[Collective], count: int, bandwidth: float, latency: float
) -> float:
    """Returns seconds per optimizer step: bytes / bandwidth, and latency of consecutive messages.

    Args:
      collectives: the collectives of one round.
      count: N devices.
      bandwidth: bytes per second that a device sends.
      latency: seconds per message.
    """
    return sum((c.sent(count) / bandwidth + c.hops(count) * latency) / c.steps for c in collectives)


def efficiencies(
    config: ConfigDict, vocab: int, count: int, rate: float, bandwidth: float, latency: float
) -> dict[str, dict[int, float]]:
    """Predicts the efficiency of each sync method on each number of devices that it supports.

    Weak scaling: the batch per device stays what it is with `count` devices. Communication does
    not overlap with computing, and all links are equal, as in one ring.

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
    for name, method in methods.METHODS.items():
        other = with_value(config, "sync.method", name)
        if config.sync.dtype not in method.dtypes:
            other.sync.dtype = method.dtypes[0]
        table[name] = {
            n: compute
            / (
                compute
                + communication(methods.traffic(other, params, opt_state, n), n, bandwidth, latency)
            )
            for n in COUNTS
            if n <= method.max_devices(other)
        }
    return table
