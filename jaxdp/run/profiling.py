"""A record of what the devices do in some steps of a run, by JAX's profiler."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.parallel import processes

FOLDER = "profile"


class Profile:
    """Records profile.num_steps whole steps, or as many rounds as have so many, in process 0.

    The first is the first after profile.start_step whose program is compiled already.
    """

    def __init__(self, config: ConfigDict, workdir: Path, say: Callable[[str], None]):
        """Nothing is recorded before `start`.

        Args:
          config: a valid one.
          workdir: of the run; the record goes into its folder "profile".
          say: is told in a line where it is.
        """
        self._config, self._folder, self._say = config.profile, workdir / FOLDER, say
        self._wanted = False
        self._began: int | None = None

    def start(self, done: int) -> None:
        """The run begins, or goes on, after so many steps; what is past is not recorded."""
        wanted = self._config.num_steps > 0 and processes.is_main()
        self._wanted = wanted and done <= self._config.start_step

    @contextlib.contextmanager
    def round(self, done: int, state: Any, new: bool) -> Iterator[None]:
        """Marks a round in the record, and begins with that if it is time.

        Args:
          done: steps done before.
          state: at that step; recording begins when it is there, so that no part of the steps
            before is in it.
          new: whether the round has to be compiled first.
        """
        if self._wanted and done >= self._config.start_step and not new:
            jax.block_until_ready(state)
            self._wanted, self._began = False, done
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            except (RuntimeError, OSError) as error:  # The user has it on already, say.
                self._fail(error)
        if self._began is None:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            yield

    def stop(self, done: int, metrics: Any) -> bool:
        """To be called after each round: whether recording has ended with it.

        Args:
          done: steps done with it.
          metrics: of it; recording ends when they are there.
        """
        if self._began is None or done < self._began + self._config.num_steps:
            return False
        jax.block_until_ready(metrics)
        self._write(f"steps {self._began + 1:,} to {done:,}")
        return True

    def close(self) -> None:
        """Ends the record of a run that ends early."""
        if self._began is not None:
            self._write(f"the steps after {self._began:,}")

    def _write(self, which: str) -> None:
        self._began = None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:  # The disk is full, say.
            self._fail(error)
            return
        self._say(
            f"Profile of {which}: xprof --logdir {self._folder} (pip install xprof) shows it, or "
            "ui.perfetto.dev its perfetto_trace.json.gz."
        )

    def _fail(self, error: Exception) -> None:
        self._began = None
        self._say(f"No profile could be made ({' '.join(str(error).split())[:200]}).")
