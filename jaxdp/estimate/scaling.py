"""Predicts the speed of a run: FLOPs, time per step, and efficiency on more devices.

Only shapes are used; nothing is allocated, except for a matrix product that `measure_rate` times.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.common.config import with_value
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.flops import flops_per_token
from jaxdp.model.transformer import Transformer, num_parameters, parameter_shapes
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.sync import methods
from jaxdp.sync.traffic import Collective


class Network(NamedTuple):
    """The links between devices: within an island, and between islands.

    Attributes:
      bandwidth: bytes per second that a device sends to other islands.
      latency: seconds per message.
      inside: bytes per second that it sends within its island; 0: `bandwidth`.
      per_host: devices of a machine, for sync.islands=-1; 0: all are in one.
    """

    bandwidth: float
    latency: float
    inside: float = 0
    per_host: int = 0


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


def shapes(config: ConfigDict, vocab: int) -> tuple[Any, Any]:
    """Returns the shapes of a config's parameters, and of its optimizer's state."""
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, vocab)))
    return params, jax.eval_shape(get_optimizer(config, get_schedule(config)).init, params)


def communication(collectives: list[Collective], count: int, network: Network) -> float:
    """Returns seconds per optimizer step: bytes / bandwidth, and latency of consecutive messages.

    Args:
      collectives: the collectives of one round.
      count: N devices.
      network: their links.
    """

    def seconds(c: Collective) -> float:
        bandwidth = network.inside if c.inside and network.inside else network.bandwidth
        return c.sent(count) / bandwidth + c.hops(count) * network.latency

    return sum(seconds(c) / c.steps for c in collectives)


def efficiencies(
    config: ConfigDict, vocab: int, count: int, rate: float, network: Network
) -> dict[str, dict[int, float]]:
    """Predicts the efficiency of each sync method on each number of devices that it supports.

    Weak scaling: the batch per device stays what it is with `count` devices. Communication does
    not overlap with computing. Devices are one ring, or with sync.islands a ring in each island
    and rings between islands.

    Args:
      config: a valid config; its sync.method is replaced.
      vocab: vocabulary size.
      count: devices that share config.global_batch_size.
      rate: FLOP/s of a device.
      network: the devices' links.

    Returns:
      {method: {devices: compute / (compute + communication)}}.
    """
    compute = compute_seconds(config, vocab, count, rate)
    params, opt_state = shapes(config, vocab)
    table: dict[str, dict[int, float]] = {}
    for name, method in methods.METHODS.items():
        other = with_value(config, "sync.method", name)
        if config.sync.dtype not in method.dtypes:
            other.sync.dtype = method.dtypes[0]
        if not method.has_islands:
            other.sync.islands = 0
        table[name] = {}
        for n in COUNTS:
            hosts = max(1, n // (network.per_host or n))
            if n <= method.max_devices(other) and n % max(1, other.sync.islands) == 0:
                sent = methods.traffic(other, params, opt_state, n, hosts)
                table[name][n] = compute / (compute + communication(sent, n, network))
    return table
