"""The rounds of optimizer steps of a run: their batches come, they are compiled, they run."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxdp.common.terminal import Display
from jaxdp.data import batch as batches
from jaxdp.data.batch import Batch
from jaxdp.estimate.memory import check_fits
from jaxdp.parallel.replicas import device_memory, prefetch
from jaxdp.run import report
from jaxdp.run.profiling import Profile
from jaxdp.run.step_log import StepLog
from jaxdp.run.watchdog import Watchdog
from jaxdp.step.program import Program
from jaxdp.step.state import State


class Rounds:
    """Trains round by round; a round ends when the replicas synchronise.

    The metrics of a round are fetched after the next is dispatched, so that the devices never wait
    for Python. More than two rounds in flight can deadlock CPU devices.
    """

    def __init__(
        self,
        program: Program,
        log: StepLog,
        profile: Profile,
        display: Display,
        watchdog: Watchdog,
        start: int,
    ):
        """Prepares the rounds from step `start` on; compiles and fetches nothing yet."""
        self._program, self._log, self._profile = program, log, profile
        self._display, self._watchdog, self._start = display, watchdog, start
        self._busy = 0.0  # Seconds from requesting the last batch to dispatching its round.
        self._asked = self._waited = 0.0  # When the last batch was requested; how long it took.
        self.seek(start)

    def seek(self, done: int) -> None:
        """Goes to the data after `done` steps."""
        replicas = self._program.replicas
        self._batches = prefetch(self._host_batches(done), replicas.shard_steps)

    def _host_batches(self, done: int) -> Iterator[list[Batch]]:
        """Yields each round's batches; they carry this process's busy time."""
        setup = self._program.setup
        feed = setup.feed.train(done)
        while done < setup.config.num_train_steps:
            steps = self._program.round_length(done)
            busy = self._busy
            yield [batches.with_process(x, busy) for x in itertools.islice(feed, steps)]
            done += steps

    def compile(self, done: int, state: State) -> bool:
        """Compiles the round after `done` steps if it is new; returns whether it was.

        Raises:
          ConfigError: a device has less memory than the compiled program needs.
        """
        program, setup = self._program, self._program.setup
        if not program.is_new(done):
            return False
        self._watchdog.beat("compiling a step", done, slow=True)
        self._display.line("Compiling the training step ...")
        steps = program.round_length(done)
        shapes = batches.training_shapes(setup.config, steps, setup.sizes.per_device)
        needed = program.compile(done, state, program.replicas.zeros(shapes))
        check_fits(setup, needed.total, device_memory())
        return True

    def fetch(self, done: int) -> Any:
        """Waits for the batches of the round after `done` steps; returns them, on the devices."""
        self._watchdog.beat("waiting for data", done)
        self._asked = time.perf_counter()
        batch = next(self._batches)
        self._waited = time.perf_counter() - self._asked
        return batch

    def train(self, done: int, state: State, batch: Any, new: bool) -> tuple[int, State]:
        """Runs one round on all devices: forward, backward, synchronise, update.

        Args:
          done: steps done before the round.
          state: the state after `done` steps; its arrays are donated.
          batch: the batches of the round, on the devices.
          new: whether the round was compiled just now.

        Returns:
          The steps done after the round, and the state after them.
        """
        program, profile = self._program, self._profile
        steps = program.round_length(done)
        self._watchdog.beat("training", done, slow=new)
        with profile.round(done, state, new):
            state, metrics = program(done, state, batch)
        dispatched = time.perf_counter()
        self._log.read()
        if new:
            jax.block_until_ready(metrics)
            self._display.line(f"Compiled: {report.collectives(program)}.")
        if done == self._start:
            self._display.start(done, program.config.num_train_steps)
        profiled = program.measure_waiting(metrics) or profile.stop(done + steps, metrics)
        if new or profiled:  # This round also compiled or profiled.
            self._log.throughput.start(steps=-steps)
        self._busy = dispatched - self._asked
        self._log.read_later(done, metrics, self._waited)
        return done + steps, state

    def close(self) -> None:
        """Ends measurements and profiles that are under way."""
        self._program.close()
        self._profile.close()
