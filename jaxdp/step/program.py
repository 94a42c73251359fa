"""The compiled training steps of a run: one for each sync method and round length it needs."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdp.model.transformer import parameter_shapes
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, state_axes
from jaxdp.step.train_step import at_step, step_of
from jaxdp.sync import traffic
from jaxdp.sync.method import Sync
from jaxdp.sync.traffic import Collective

# The calls of a compiled program that the profiler records; it has warmed up by then.
TRACED = range(4, 7)


class Sizes(NamedTuple):
    """Bytes that a device needs to run a program.

    Attributes:
      arguments: its arguments.
      results: those results that don't take the memory of a donated argument.
      temporaries: the most that it needs beside them.
    """

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def sizes_of(program: Any) -> Sizes:
    """Returns the sizes of a `jax.stages.Compiled`, as its compiler reports them."""
    found = program.memory_analysis()
    return Sizes(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
    )


class Program:
    """Runs rounds of optimizer steps; a round ends when the replicas synchronise.

    Attributes:
      setup: the run's setup.
      replicas: the devices.
      method: the sync method; the first sync.after steps use gradient_mean.
      collectives: collectives of the program compiled last, by instruction name; None before.
      waiting: share of the devices' time spent in collectives; None where not measured.
    """

    def __init__(self, setup: Setup, replicas: Replicas):
        """Prepares a program; nothing is compiled yet."""
        self.config, self.method = setup.config, setup.method
        self.setup, self.replicas = setup, replicas
        late = setup.config.sync.after > 0
        self._first_method = Sync(setup.config, AXIS) if late else setup.method
        self._p_whole = replicas.pmap(
            lambda tree, _: self.method.join_slices(tree["ema"], tree["params"]),
            state_axes={"ema": 0, "params": None},
        )
        self._p_steps: dict[tuple[Sync, int], Any] = {}
        self.collectives: dict[str, Collective] | None = None
        self.waiting: float | None = None
        self._calls = 0
        self._trace: traffic.Trace | None = None

    def round_length(self, done: int) -> int:
        """Returns the number of steps of the round after `done` steps; the last may be shorter."""
        every = self._method(done).every
        return min(every - done % every, self.config.num_train_steps - done)

    def is_new(self, done: int) -> bool:
        """Returns whether the round after `done` steps is still to be compiled."""
        return (self._method(done), self.round_length(done)) not in self._p_steps

    def __call__(self, done: int, state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Runs the round after `done` steps; see `train_step.train_step`."""
        method, steps = self._method(done), self.round_length(done)
        assert batch["inputs"].shape[1] == steps
        if self.is_new(done):
            self.compile(done, state, batch)
        self._calls += 1
        return self._p_steps[method, steps](state, batch)

    def compile(self, done: int, state: Any, batch: Any) -> Sizes:
        """Compiles the round after `done` steps, for arrays shaped like this state and batch.

        Returns:
          What a device needs to run it.
        """
        method = self._method(done)
        p_step = pmapped(self.setup, self.replicas, state, method)
        self._p_steps[method, self.round_length(done)] = p_step
        # JAX keeps the compiled program, so calls of p_step don't compile again.
        program = p_step.lower(state, batch).compile()
        self.collectives = traffic.collectives(program.as_text(), self.replicas.device_count)
        self.close()
        self._calls = 0
        return sizes_of(program)

    def at_step(self, state: Any, step: int) -> Any:
        """Moves a state to another step by `train_step.at_step`; the given state is donated."""
        axes = state_axes(state, self.method)
        move = self.replicas.pmap(at_step, state_axes=axes, out_axes=axes, donate=True)
        here = np.full(len(self.replicas.devices), step, np.int32)
        return move(state, self.replicas.put(here))

    def eval_params(self, state: Any) -> Any:
        """Returns the parameters for evaluation and sampling, replicated: their EMA, if kept.

        Where each device keeps a slice of the EMA, all processes have to call this.
        """
        if not self.method.ema_decay:
            return state.params
        if not self.method.per_device_ema:
            return state.ema
        unused = self.replicas.shard(np.zeros(len(self.replicas.devices)))
        return self._p_whole({"ema": state.ema, "params": state.params}, unused)

    def measure_waiting(self, metrics: dict[str, jax.Array]) -> bool:
        """Measures `waiting` by the profiler over a few rounds; to be called after each round.

        Args:
          metrics: metrics of that round; the profiler starts and stops when they are computed.

        Returns:
          Whether a measurement ended.
        """
        # JAX has one profiler, and a profile that the config asks for goes first.
        if not self.collectives or not processes.is_main() or self.config.profile.num_steps:
            return False
        if self._calls == TRACED.start and self._trace is None:
            jax.block_until_ready(metrics)
            # Not measured where the user's own profiling is on, or the disk is full.
            with contextlib.suppress(RuntimeError, OSError):
                self._trace = traffic.Trace(self.collectives, len(self.replicas.devices))
        elif self._calls == TRACED.stop and self._trace:
            jax.block_until_ready(metrics)
            trace, self._trace = self._trace, None
            with contextlib.suppress(RuntimeError, OSError):
                self.waiting = trace.stop()
            return True
        return False

    def close(self) -> None:
        """Ends a measurement under way: the run ends, or another program is compiled."""
        if self._trace:
            with contextlib.suppress(RuntimeError, OSError):
                self._trace.stop()
            self._trace = None

    def traffic(self) -> list[Collective]:
        """Returns the collectives of a round, as the sync method defines them."""
        params = parameter_shapes(self.setup.model)
        opt_state = jax.eval_shape(self.setup.optimizer.init, params)
        return self.method.traffic(params, opt_state, self.replicas.device_count)

    def _method(self, done: int) -> Sync:
        return self._first_method if done < self.config.sync.after else self.method


def pmapped(setup: Setup, replicas: Replicas, state: State, method: Sync | None = None) -> Any:
    """Returns the pmapped training step of a setup; it donates its state.

    Args:
      setup: the run's setup.
      replicas: the devices.
      state: a state of arrays or of shapes; only its structure is used.
      method: the sync method, if not the setup's own.
    """
    axes = state_axes(state, method or setup.method)
    step = step_of(setup, method)
    return replicas.pmap(step, state_axes=axes, out_axes=(axes, None), donate=True)


def pmapped_evaluation(setup: Setup, replicas: Replicas, rows: int | None = None) -> Any:
    """Returns the pmapped `Objective.eval_step` of a setup; it needs no more memory than training.

    Args:
      setup: the run's setup.
      replicas: the devices.
      rows: the most sequences that a device evaluates at a time; by default, as many as it trains
        on at a time.
    """
    count = micro_batches(setup.sizes.per_device, rows or setup.sizes.micro)
    step, apply_fn = setup.objective.eval_step, setup.model.apply
    return replicas.pmap(functools.partial(step, apply_fn=apply_fn, micro_batches=count))


def micro_batches(per_device: int, rows: int) -> int:
    """Returns the least number of equal parts, of at most `rows` sequences each.

    Examples:
      >>> micro_batches(96, rows=12), micro_batches(96, rows=20), micro_batches(4, rows=12)
      (8, 6, 1)
    """
    counts = range(1, per_device + 1)
    return next(n for n in counts if per_device % n == 0 and per_device // n <= rows)
