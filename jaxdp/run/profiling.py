"""Profiles some steps of a run with JAX's profiler."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.parallel import processes

FOLDER = "profile"


class Profile:
    """Records a trace of profile.num_steps steps, or the rounds that contain them, in process 0.

    It begins with the first round from profile.start_step on whose program is already compiled.
    """

    def __init__(self, config: ConfigDict, workdir: Path, done: int, say: Callable[[str], None]):
        """Prepares to record; nothing is recorded if the run starts after profile.start_step.

        Args:
          config: a valid config.
          workdir: the run's folder; the trace goes into its folder "profile".
          done: steps done at the start.
          say: called with a line of text about where the trace is.
        """
        self._config, self._folder, self._say = config.profile, workdir / FOLDER, say
        self._began: int | None = None
        wanted = self._config.num_steps > 0 and processes.is_main()
        self._wanted = wanted and done <= self._config.start_step

    @contextlib.contextmanager
    def round(self, done: int, state: Any, new: bool) -> Iterator[None]:
        """Annotates a round in the trace, and starts the trace before it if that is due.

        Args:
          done: steps done before the round.
          state: the state before the round; recording waits for it, so that the trace holds no
            part of earlier steps.
          new: whether the round was compiled just now.
        """
        if self._wanted and done >= self._config.start_step and not new:
            jax.block_until_ready(state)
            self._wanted, self._began = False, done
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            except (RuntimeError, OSError) as error:  # For example, another trace is on.
                self._fail(error)
        if self._began is None:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield

    def stop(self, done: int, metrics: Any) -> bool:
        """Ends the trace after its last round; returns whether it did. Call it after each round.

        Args:
          done: steps done after the round.
          metrics: the metrics of the round; recording ends once they are computed.
        """
        if self._began is None or done < self._began + self._config.num_steps:
            return False
        jax.block_until_ready(metrics)
        self._write(f"steps {self._began + 1:,} to {done:,}")
        return True

    def close(self) -> None:
        """Ends the trace of a run that ends before its last profiled step."""
        if self._began is not None:
            self._write(f"the steps after {self._began:,}")

    def _write(self, which: str) -> None:
        self._began = None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:  # For example, the disk is full.
            self._fail(error)
            return
        self._say(
            f"Profile of {which}: xprof --logdir {self._folder} (pip install xprof) shows it, or "
            "ui.perfetto.dev its perfetto_trace.json.gz."
        )

    def _fail(self, error: Exception) -> None:
        self._began = None
        self._say(f"No profile could be made ({' '.join(str(error).split())[:200]}).")
