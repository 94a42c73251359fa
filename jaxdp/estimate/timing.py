"""Times a training step on this machine's devices, before there is a run."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdp.common.config import with_value
from jaxdp.data.batch import training_shapes
from jaxdp.estimate import scaling
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.program import pmapped, sizes_of
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state

MEASURE_SECONDS, MEASURE_ROUNDS = 4.0, 5  # The least that a step is timed for.


def timed(
    config: ConfigDict,
    vocab: int,
    devices: Sequence[jax.Device],
    room: int,
    report: Callable[[str], None],
) -> tuple[ConfigDict, float]:
    """Compiles a training step and times it on tokens without a meaning.

    Args:
      config: a config to train.
      vocab: size of the tokenizer's vocabulary.
      devices: those that train, of this machine.
      room: bytes of memory that each has.
      report: called with a line of text before it compiles.

    Returns:
      The config, with as many micro-batches as it takes to fit, and FLOP/s that a device reaches.
    """
    replicas, c = Replicas(devices), config.model
    report(
        f"Timing {c.num_layers} layers x {c.embed_dim}, {config.global_batch_size} sequences ..."
    )
    while True:
        setup = make_setup(config, vocab, len(devices))
        state = create_state(setup, replicas)
        every, rows = setup.method.every, setup.sizes.per_device
        shapes = replicas.shapes(training_shapes(config, every, rows))
        batch = replicas.put(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes))
        step = pmapped(setup, replicas, state).lower(state, batch).compile()
        if sizes_of(step).total <= room or rows % (2 * config.grad_accum_steps):
            break
        config = with_value(config, "grad_accum_steps", 2 * config.grad_accum_steps)
    seconds: list[float] = []
    while sum(seconds) < MEASURE_SECONDS or len(seconds) < MEASURE_ROUNDS:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    flops = scaling.compute_seconds(config, vocab, len(devices), rate=1)
    return config, flops * every / statistics.median(seconds[1:])
