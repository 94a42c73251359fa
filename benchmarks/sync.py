"""Compares all sync methods: loss after the same tokens, bytes sent, and time per step.

    python benchmarks/sync.py --config=configs/shakespeare_char_cpu.py --devices=4 \
        --config.data.path=tinyshakespeare.txt --workdir=runs/sync

Each method trains the config to its end, in a workdir of its own (if this is run again, finished
runs are not repeated). Then steps of all methods are timed in turns in one process, so that other
load on the machine affects all of them alike. The figure is the median over turns of a method's
time, divided by gradient_mean's time in the same turn.
"""

import itertools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.data.batch import with_process
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import loop
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state
from jaxdp.sync import traffic
from jaxdp.sync.methods import METHODS
from jaxdp.workdir.metrics import read_jsonl

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", "runs/sync", "Folder for a workdir of each method.")
DEVICES = flags.DEFINE_integer("devices", 4, "Number of devices; the CPU is split into as many.")
TURNS = flags.DEFINE_integer("turns", 15, "Number of turns in the timing.")


def main() -> int:
    """Trains and times each method, and prints a table."""
    cli.prepare_jax()
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    configs = {name: with_method(name) for name in METHODS}
    losses = {name: final_loss(name, config) for name, config in configs.items()}
    timed = {name: Timed(config) for name, config in configs.items()}
    seconds = {name: [] for name in METHODS}
    for _ in range(TURNS.value):
        for name, run in timed.items():
            seconds[name].append(run())
    base = np.array(seconds["gradient_mean"])
    print(f"\n{DEVICES.value} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print("| sync.method | validation loss | bytes sent per token | collectives | step time |")
    print("|---|---|---|---|---|")
    for name, run in timed.items():
        ratio = np.median(np.array(seconds[name]) / base)
        print(
            f"| {name} | {losses[name]:.4f} | {run.bytes_per_token:,.0f} | {run.collectives} | "
            f"{ratio:.2f} ({1e3 * np.median(seconds[name]):.1f} ms) |"
        )
    return 0


def with_method(name: str):
    """Returns the config with a sync method, and virtual replicas that divide its batch."""
    config = CONFIG.value.copy_and_resolve_references()
    config.sync.method = name
    total = config.global_batch_size
    if name == "fixed_order":
        config.sync.virtual_replicas = max(n for n in (1, 2, 4, 8) if total % n == 0)
    return config


def final_loss(name: str, config) -> float:
    """Trains to the end; returns the last loss on the validation split."""
    workdir = Path(WORKDIR.value) / name
    loop.train(config, workdir, devices=jax.local_devices()[: DEVICES.value])
    return [r["eval/loss"] for r in read_jsonl(workdir) if "eval/loss" in r][-1]


class Timed:
    """The compiled program of a method, ready to be timed."""

    def __init__(self, config):
        """Compiles the program, and puts its batches on the devices."""
        cache = open_cache(config)
        setup = make_setup(config, cache.vocab_size, DEVICES.value)
        self._replicas = Replicas(jax.local_devices()[: DEVICES.value])
        self._program = Program(setup, self._replicas)
        self._state = create_state(setup, self._replicas)
        self._steps = config.sync.every
        batches = Feed(config, cache).train(0)
        batches = [
            with_process(batch, busy=0.0) for batch in itertools.islice(batches, self._steps)
        ]
        length = self._program.round_length(0)
        put = self._replicas.shard_steps
        self._rounds = [put(batches[i : i + length]) for i in range(0, self._steps, length)]
        self()
        found = self._program.collectives.values()
        self.collectives = f"{len(found)} in {length} steps" if length > 1 else f"{len(found)}"
        sent = traffic.sent_per_step(self._program.traffic(), DEVICES.value)
        self.bytes_per_token = sent * DEVICES.value / config.global_batch_size / config.seq_len

    def __call__(self) -> float:
        """Runs sync.every steps; returns seconds per step."""
        began = time.perf_counter()
        for batch in self._rounds:
            self._state, metrics = self._program(0, self._state, batch)
            jax.block_until_ready(metrics)
        return (time.perf_counter() - began) / self._steps


if __name__ == "__main__":
    sys.exit(cli.run(main))
