"""The compiled training step of a run: which method when, how many steps at once, at what price."""

import contextlib
from typing import Any

import jax
import numpy as np

from jaxdp.model.transformer import parameter_shapes
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, state_axes
from jaxdp.step.train_step import at_step, step_of
from jaxdp.sync import traffic
from jaxdp.sync.methods import Sync
from jaxdp.sync.traffic import Collective

# Calls after a start that are recorded by the profiler, once everything is warm.
TRACED = range(4, 7)


class Program:
    """Runs rounds of optimizer steps: one at a time, or as many as replicas train alone.

    Attributes:
      method: how replicas agree (after the first sync.after steps).
      collectives: of the program compiled last, by instruction; None before.
      waiting: share of the devices' time that goes into collectives; None where not measured.
    """

    def __init__(self, setup: Setup, replicas: Replicas):
        """Compiles nothing yet."""
        self.config, self.method = setup.config, setup.method
        self._setup, self._replicas = setup, replicas
        late = setup.config.sync.after > 0
        self._first_method = Sync(setup.config, AXIS) if late else setup.method
        self._p_whole = replicas.pmap(
            lambda tree, _: self.method.whole(tree["ema"], tree["params"]),
            state_axes={"ema": 0, "params": None},
        )
        self._p_steps: dict[tuple[Sync, int], Any] = {}
        self.collectives: dict[str, Collective] | None = None
        self.waiting: float | None = None
        self._calls = 0
        self._trace: traffic.Trace | None = None

    def round_length(self, done: int) -> int:
        """Steps of the round that begins after `done` steps; the run's end can cut it short."""
        every = self._method(done).every
        return min(every - done % every, self.config.num_train_steps - done)

    def is_new(self, done: int) -> bool:
        """Whether the round after `done` steps has to be compiled first."""
        return (self._method(done), self.round_length(done)) not in self._p_steps

    def __call__(self, done: int, state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """One round, from a state that has done so many steps; see `train_step.train_step`."""
        method, steps = self._method(done), self.round_length(done)
        assert batch["inputs"].shape[1] == steps
        if self.is_new(done):
            self.compile(done, state, batch)
        self._calls += 1
        return self._p_steps[method, steps](state, batch)

    def compile(self, done: int, state: Any, batch: Any) -> None:
        """Compiles the round after `done` steps, for batches such as this one."""
        method = self._method(done)
        p_step = pmapped(self._setup, self._replicas, state, method)
        self._p_steps[method, self.round_length(done)] = p_step
        # A call finds the program compiled.
        text = p_step.lower(state, batch).compile().as_text()
        self.collectives = traffic.collectives(text, self._replicas.device_count)
        self.close()
        self._calls = 0

    def at_step(self, state: Any, step: int) -> Any:
        """See `train_step.at_step`; the state's memory is used again."""
        axes = state_axes(state, self.method)
        move = self._replicas.pmap(at_step, state_axes=axes, out_axes=axes, donate=True)
        here = np.full(len(self._replicas.devices), step, np.int32)
        return move(state, self._replicas.put(here))

    def to_evaluate(self, state: Any) -> Any:
        """The parameters to evaluate and sample with, replicated: their average, if there is one.

        Where devices have parts of it, all processes have to call it.
        """
        if not self.method.ema_decay:
            return state.params
        if not self.method.own_ema:
            return state.ema
        unused = self._replicas.shard(np.zeros(len(self._replicas.devices)))
        return self._p_whole({"ema": state.ema, "params": state.params}, unused)

    def trace(self, metrics: dict[str, jax.Array]) -> bool:
        """To be called after each round: lets the profiler measure a few; returns whether it did.

        Args:
          metrics: of that round; the profiler starts and stops when they are there.
        """
        # JAX has one profiler, which the run's profile is to have.
        if not self.collectives or not processes.is_main() or self.config.profile.num_steps:
            return False
        if self._calls == TRACED.start and self._trace is None:
            jax.block_until_ready(metrics)
            # JAX has one profiler: where the user has it on already, waiting is not measured.
            # Neither is it where there's no room for the record.
            with contextlib.suppress(RuntimeError, OSError):
                self._trace = traffic.Trace(self.collectives, len(self._replicas.devices))
        elif self._calls == TRACED.stop and self._trace:
            jax.block_until_ready(metrics)
            trace, self._trace = self._trace, None
            with contextlib.suppress(RuntimeError, OSError):
                self.waiting = trace.stop()
            return True
        return False

    def close(self) -> None:
        """Ends what a run that ends early, or goes on with another program, has left open."""
        if self._trace:
            with contextlib.suppress(RuntimeError, OSError):
                self._trace.stop()
            self._trace = None

    def traffic(self) -> list[Collective]:
        """What a round sends, by the method's definition."""
        params = parameter_shapes(self._setup.model)
        opt_state = jax.eval_shape(self._setup.optimizer.init, params)
        return self.method.traffic(params, opt_state, self._replicas.device_count)

    def _method(self, done: int) -> Sync:
        return self._first_method if done < self.config.sync.after else self.method


def pmapped(setup: Setup, replicas: Replicas, state: State, method: Sync | None = None) -> Any:
    """The pmapped training step of a setup; a state that is given to it is lost.

    Args:
      setup: of the run.
      replicas: the devices.
      state: with arrays or their shapes; only its structure is looked at.
      method: how replicas agree, where it isn't the setup's own.
    """
    axes = state_axes(state, method or setup.method)
    step = step_of(setup, method)
    return replicas.pmap(step, state_axes=axes, out_axes=(axes, None), donate=True)
