"""Measures what a run costs beyond its compiled step: data, metrics, checkpoints, dispatch.

    python benchmarks/overheads.py --config=configs/shakespeare_char.py --workdir=runs/overheads \
        --config.data.path=tinyshakespeare.txt --config.global_batch_size=8

`loop.train` sets up a real run, and its parts are called here one by one. Parts on this thread
(metrics, the check of the replicas, dispatch) are timed while the devices are idle. That is more
than they cost in a run, where the devices compute meanwhile. Parts that also work in the background
slow the steps beside them, so these are timed in turns with bare steps. The figure is the median
over turns of the difference (below 0 if noise is larger). A checkpoint's turn is a save, and as
many steps as pass until it is on disk. Costs are spread over steps: a checkpoint's over 100, a
check's over sync.check_every.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError
from jaxdp.model.transformer import num_parameters
from jaxdp.parallel import cpu
from jaxdp.run import loop
from jaxdp.run.result import Result
from jaxdp.run.session import Run
from jaxdp.step.setup import same_on_two_devices
from jaxdp.workdir.checkpoints import folder_of

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "A new folder for the run.")
TURNS = flags.DEFINE_integer("turns", 8, "Number of turns.")
STEPS = 10  # In a turn; a multiple of log_every.
SAVE_EVERY = 100  # Steps over which a checkpoint's time is spread.


class Overheads:
    """A run whose parts are measured one by one, in place of its loop."""

    def __init__(self, run: Run, state: Any, start: int):
        """Compiles the step, and what else is compiled on its first use."""
        self.run, self.state, self.done = run, state, start
        run.begin(start)
        run.display.start(start, run.config.num_train_steps)
        self.batch = run.rounds.fetch(start)
        self.dispatched: list[float] = []
        self.logged: list[float] = []
        self.steps(3)
        self._check()
        self.save_steps = self.save_until_done()

    def steps(
        self, count: int, fed: bool = False, log: bool = False, until: Callable = lambda: False
    ) -> list[float]:
        """Trains, fetching metrics a step behind as the loop does; returns seconds of each step."""
        pending, seconds = None, []
        for _ in range(count):
            began = time.perf_counter()
            batch = self.run.rounds.fetch(self.done) if fed else self.batch
            waited = time.perf_counter() - began
            self.state, metrics = self.run.program(self.done, self.state, batch)
            if pending is not None:
                jax.block_until_ready(pending[1])
                if log:
                    self.run.log.add(*pending)
            pending, self.done = (self.done, metrics, waited), self.done + 1
            seconds.append(time.perf_counter() - began)
            if until():
                break
        began = time.perf_counter()
        jax.block_until_ready(self.state)
        seconds[-1] += time.perf_counter() - began
        if log:
            self.run.log.add(*pending)
        return seconds

    def save_until_done(self) -> int:
        """Saves a checkpoint; returns the number of steps until it is on disk."""
        self.run.save(self.done, self.state, evaluating=False)
        # Orbax gives a checkpoint's folder its name when it is complete.
        folder = folder_of(self.run.workdir) / str(self.done)
        return len(self.steps(1000, until=folder.is_dir))

    def alone(self, count: int) -> None:
        """Trains one step at a time; records seconds to dispatch each, and to log its metrics."""
        for _ in range(count):
            before = self.done
            began = time.perf_counter()
            self.state, metrics = self.run.program(before, self.state, self.batch)
            self.dispatched.append(time.perf_counter() - began)
            jax.block_until_ready((self.state, metrics))
            self.done += 1
            began = time.perf_counter()
            self.run.log.add(before, metrics, 0.0)
            self.logged.append(time.perf_counter() - began)

    def _check(self) -> None:
        self.run.check_replicas(self.done, self.done, self.state, always=True)

    def checked(self) -> float:
        """Checks the replicas; returns the seconds."""
        return _seconds(self._check)

    def saved(self) -> tuple[float, float, float]:
        """Saves; returns seconds it costs in all, until it returns, and at most in one step.

        The first compares with as many steps without a save, the mean of before and after.
        """
        count = self.save_steps
        without = self.steps(count)
        call = _seconds(lambda: self.run.save(self.done, self.state, evaluating=False))
        during = self.steps(count)
        self.run.checkpoints.check()
        self.run.checkpoints.wait()
        without = (sum(without) + sum(self.steps(count))) / 2
        step = without / count
        return call + sum(during) - without, call, max(call, max(during) - step)


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(run: Run, state: Any, start: int) -> Result:
    """Measures a run in place of its loop, and prints a table."""
    o = Overheads(run, state, start)
    bare, fed, logged, checks, saves = [], [], [], [], []
    for _ in range(TURNS.value):
        bare.append(sum(o.steps(STEPS)) / STEPS)
        fed.append(sum(o.steps(STEPS, fed=True)) / STEPS)
        logged.append(sum(o.steps(STEPS, fed=True, log=True)) / STEPS)
        o.alone(STEPS)
        checks.append(o.checked())
        saves.append(o.saved())
    step, every = statistics.median(bare), run.config.sync.check_every
    many, one = merged(run, o.state)
    extra, call, stall = (statistics.median(x) for x in zip(*saves, strict=True))
    waits = [_seconds(lambda: o.run.rounds.fetch(o.done)) for _ in range(STEPS)]
    rows = {
        "waiting for a batch (this thread)": statistics.median(waits),
        "data, beside the step": _difference(fed, bare),
        "data, metrics and progress, beside the step": _difference(logged, bare),
        "metrics and progress (this thread)": statistics.mean(o.logged),
        f"a checkpoint, over {SAVE_EVERY} steps": extra / SAVE_EVERY,
        f"a check of the replicas, over {every} steps": statistics.median(checks) / every,
        "dispatch of the step (this thread)": statistics.median(o.dispatched),
    }
    o.run.display.stop()
    leaves = len(jax.tree.leaves(o.state))
    print(
        f"{num_parameters(o.state.params):,} parameters, {run.replicas.device_count} x "
        f"{jax.devices()[0].device_kind}, step {1e3 * step:.1f} ms ({leaves} arrays)\n\n"
        "| | ms per step | % of the step |\n|---|---|---|"
    )
    for name, seconds in rows.items():
        print(f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / step:.2f} |")
    print(
        f"\nA checkpoint: {1e3 * extra:.0f} ms in all, of which the loop stands still for "
        f"{1e3 * call:.0f}; on disk after {o.save_steps} steps; a step held up by at most "
        f"{1e3 * max(s for *_, s in saves):.0f} ms (median {1e3 * stall:.0f}). A check: "
        f"{1e3 * statistics.median(checks):.1f} ms. Dispatch of a program that only adds: "
        f"{1e3 * many:.2f} ms with {leaves} arrays, {1e3 * one:.2f} ms with one of the same size."
    )
    return Result(o.done, False, {}, o.state)


def _difference(some: list[float], bare: list[float]) -> float:
    return statistics.median(x - y for x, y in zip(some, bare, strict=True))


def merged(run: Run, state: Any) -> tuple[float, float]:
    """Times the dispatch of a program that adds 1 to all arrays of a state, or to one as large."""
    add = run.replicas.pmap(lambda tree, _: jax.tree.map(lambda x: x + 1, tree), donate=True)
    nothing = run.replicas.put(np.zeros(len(run.replicas.devices)))
    many = jax.device_get(jax.tree.leaves(state))
    one = np.zeros(sum(x.size for x in many), np.float32)
    found = []
    for arrays in (many, one):
        tree, seconds = add(run.replicas.replicate(arrays), nothing), []
        for _ in range(30):
            jax.block_until_ready(tree)
            began = time.perf_counter()
            tree = add(tree, nothing)
            seconds.append(time.perf_counter() - began)
        found.append(statistics.median(seconds))
    return found[0], found[1]


def main() -> int:
    """Starts a run with `measure` as its loop."""
    if not (CONFIG.value and WORKDIR.value):
        raise ConfigError("--config or --workdir is missing: give a config and a new folder")
    cli.prepare_jax()
    cpu.prepare(CONFIG.value, two_devices=same_on_two_devices(CONFIG.value))
    loop.train_steps = measure
    loop.train(CONFIG.value, WORKDIR.value)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_overrides))
