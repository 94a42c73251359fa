"""Compares Muon's step time with AdamW's: steps of both in turns in one process.

    python benchmarks/muon.py --config=configs/shakespeare_char_cpu.py \
        --config.data.path=tinyshakespeare.txt

The figure is the median over turns of Muon's time divided by AdamW's in the same turn, so that
other load on the machine affects both alike.
"""

import sys
import time

import jax
import numpy as np
import steps
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.parallel import cpu
from jaxdp.parallel.replicas import Replicas

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
TURNS = flags.DEFINE_integer("turns", 15, "Number of turns.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps of each optimizer in a turn.")


def main() -> int:
    """Times both optimizers, and prints a line."""
    cli.prepare_jax()
    cpu.prepare(CONFIG.value, two_devices=True)
    runs = {name: trainer(name) for name in ("adamw", "muon")}
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run(3)  # The first calls compile.
    for _ in range(TURNS.value):
        for name, run in runs.items():
            began = time.perf_counter()
            run(STEPS.value)
            seconds[name].append((time.perf_counter() - began) / STEPS.value)
    ratios = np.divide(seconds["muon"], seconds["adamw"])
    times = ", ".join(f"{name} {1e3 * np.median(x):.1f} ms" for name, x in seconds.items())
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"{devices}: {times}; ratio {np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )
    return 0


def trainer(name: str):
    """Returns a function that trains the config with an optimizer for a number of steps."""
    config = CONFIG.value.copy_and_resolve_references()
    config.optimizer.name = name
    cache, replicas = open_cache(config), Replicas(jax.local_devices())
    return steps.trainer(config, cache.vocab_size, replicas, Feed(config, cache).train(0))


if __name__ == "__main__":
    sys.exit(cli.run(main))
