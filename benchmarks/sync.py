"""Compares sync methods: loss after the same tokens, bytes sent, and time for each token.

    python benchmarks/sync.py --config=configs/shakespeare_char_cpu.py --devices=4 --seeds=3 \
        --config.data.path=tinyshakespeare.txt --config.optimizer.name=muon \
        --config.optimizer.learning_rate=0.01 --config.optimizer.schedule=linear \
        --config.optimizer.final_fraction=0.0 --workdir=runs/sync --plot=loss_over_bytes.svg

Each of `CONTESTANTS`, or those in --only, trains the config to its end with each seed, in a workdir
of its own (if this is run again, finished runs are not repeated), and is evaluated on the whole
validation split. Then steps of all are timed in turns in one process, so that other load on the
machine affects all of them alike. The figure is the median over turns of a method's time for a
token, divided by gradient_mean's in the same turn. Each device is an island: all bytes count as
sent between islands.
"""

import itertools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxdp.common import cli, pictures
from jaxdp.data.batch import with_process
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import loop
from jaxdp.step.program import Program
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state
from jaxdp.sync import traffic
from jaxdp.workdir.metrics import last_loss

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", "runs/sync", "Folder for the workdirs of all runs.")
DEVICES = flags.DEFINE_integer("devices", 4, "Number of devices; the CPU is split into as many.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds: 0, 1 ...")
TURNS = flags.DEFINE_integer("turns", 15, "Number of turns in the timing; 0: no timing.")
ONLY = flags.DEFINE_list("only", [], "Names of the contestants; all by default.")
PLOT = flags.DEFINE_string(
    "plot", "", "PNG or SVG file for a plot of the loss over the bytes sent."
)


def local(method: str, every: int, **keys):
    """Returns the keys of a method that synchronises every few steps."""
    return {"method": method, "every": every, **keys}


def outer(rate: float, momentum: float):
    """Returns the keys of an outer optimizer."""
    return {"outer_learning_rate": rate, "outer_momentum": momentum}


# {name, with which the workdirs' names begin: the keys of config.sync to change, and "batch" if the
# global batch is to be so many times as large, with as many tokens in all}
CONTESTANTS = {
    "gradient_mean": {},
    "gradient_mean-int4": {"dtype": "int4"},
    "sharded": {"method": "sharded"},
    "fixed_order": {"method": "fixed_order"},
    "parameter_mean-10": local("parameter_mean", 10),
    "diloco-10": local("diloco", 10),
    "diloco-3-int4": local("diloco", 3, outer_momentum=0.3, dtype="int4"),
    "diloco-6-ternary": local("diloco", 6, outer_momentum=0.3, dtype="ternary"),
    "diloco-4-int1": local("diloco", 4, outer_momentum=0.3, dtype="int1"),
    "diloco-2-int4-batch2": outer(1.5, 0.0) | local("diloco", 2, dtype="int4", batch=2),
    "diloco-3-ternary-batch2": outer(1.4, 0.0) | local("diloco", 3, dtype="ternary", batch=2),
    "diloco-11-ternary-batch2": outer(1.5, 0.2) | local("diloco", 11, dtype="ternary", batch=2),
    "diloco-15-int1": local("diloco", 15, outer_momentum=0.3, dtype="int1"),
}


def main() -> int:
    """Trains and times each contestant, and prints a table."""
    cli.prepare_jax()
    picture = pictures.check("plot", PLOT.value) if PLOT.value else None
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    configs = {name: with_keys(name) for name in ONLY.value or CONTESTANTS}
    losses = {name: final_losses(name, config) for name, config in configs.items()}
    timed = {name: Timed(config) for name, config in configs.items()}
    times = in_turns(timed) if TURNS.value else dict.fromkeys(timed, "")
    base = timed["gradient_mean"].bytes_per_token if "gradient_mean" in timed else np.nan
    print(f"\n{DEVICES.value} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print("| sync | validation loss | seeds | bytes sent per token | fewer | collectives | time |")
    print("|---|---|---|---|---|---|---|")
    for name, run in timed.items():
        seeds = ", ".join(f"{loss:.4f}" for loss in losses[name])
        print(
            f"| {name} | {np.mean(losses[name]):.4f} | {seeds} | {run.bytes_per_token:,.0f} | "
            f"{base / run.bytes_per_token:.1f} | {run.collectives} | {times[name]} |"
        )
    if picture:
        plot({name: (run.bytes_per_token, losses[name]) for name, run in timed.items()}, picture)
    return 0


def with_keys(name: str) -> ConfigDict:
    """Returns the config of a contestant; it is evaluated and saved only at its end."""
    config = CONFIG.value.copy_and_resolve_references()
    keys = dict(CONTESTANTS[name])
    factor = keys.pop("batch", 1)
    config.sync.update(keys)
    config.global_batch_size *= factor
    config.num_train_steps //= factor
    config.optimizer.warmup_steps //= factor
    config.optimizer.learning_rate *= factor**0.5
    total, every = config.global_batch_size, config.sync.every
    if config.sync.method == "fixed_order":
        config.sync.virtual_replicas = max(n for n in (1, 2, 4, 8) if total % n == 0)
    config.eval_every = config.checkpoint.every = -(-config.num_train_steps // every) * every
    return config


def final_losses(name: str, config: ConfigDict) -> list[float]:
    """Trains to the end with each seed; returns the last losses on the validation split."""
    losses = []
    for config.seed in range(SEEDS.value):
        workdir = Path(WORKDIR.value) / f"{name}-seed{config.seed}"
        loop.train(config, workdir, devices=jax.local_devices()[: DEVICES.value])
        losses.append(last_loss(workdir))
    return losses


def in_turns(timed: dict) -> dict[str, str]:
    """Times all in turns; returns multiples of gradient_mean's time, and s per million tokens."""
    seconds = {name: [] for name in timed}
    for _ in range(TURNS.value):
        for name, run in timed.items():
            seconds[name].append(run())
    base = np.array(seconds["gradient_mean"])
    return {
        name: f"{np.median(np.array(found) / base):.2f} ({np.median(found):.1f} s)"
        for name, found in seconds.items()
    }


def plot(found: dict, picture: Path) -> None:
    """Draws (bytes per token, losses of all seeds) of each contestant."""
    figure = pictures.new(7, 4.5)
    axes = figure.subplots()
    for name, (sent, losses) in found.items():
        axes.plot([sent] * len(losses), losses, "o", color="tab:blue", alpha=0.5)
        axes.annotate(name, (sent, np.mean(losses)), (6, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.3, y=0.1)
    axes.set(xscale="log", xlabel="bytes sent per token", ylabel="validation loss")
    pictures.save(figure, "plot", picture)


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
        self._tokens = self._steps * config.global_batch_size * config.seq_len
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
        """Runs sync.every steps; returns seconds per million tokens."""
        began = time.perf_counter()
        for batch in self._rounds:
            self._state, metrics = self._program(0, self._state, batch)
            jax.block_until_ready(metrics)
        return 1e6 * (time.perf_counter() - began) / self._tokens


if __name__ == "__main__":
    sys.exit(cli.run(main))
