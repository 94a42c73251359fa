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

    It begins with the first round from profile.start_step on whose program is already compiled. If
    there is none, a line says so.
    """

    def __init__(self, config: ConfigDict, workdir: Path, done: int, say: Callable[[str], None]):
        """Prepares to record; a run that starts after profile.start_step records nothing.

        Args:
          config: a valid config.
          workdir: the run's folder; the trace goes into its folder "profile".
          done: steps done at the start.
          say: called with a line of text about where the trace is, or why there is none.
        """
        self._config, self._folder, self._say = config.profile, workdir / FOLDER, say
        self._began: int | None = None
        self._start = self._done = done
        self._total = config.num_train_steps
        self._wanted = self._config.num_steps > 0 and processes.is_main()
        if self._wanted and done > self._config.start_step:
            self._wanted = False
            if not self._folder.exists():  # Else it was made before the run was interrupted.
                self._say(
                    f"No profile is made: the run goes on after step {done:,}, which is past "
                    f"profile.start_step={self._config.start_step}: set that to {done} or more."
                )

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
        self._done = done
        if self._began is None or done < self._began + self._config.num_steps:
            return False
        jax.block_until_ready(metrics)
        self._write(f"steps {self._began + 1:,} to {done:,}")
        return True

    def close(self) -> None:
        """Ends the trace of a run that ends before its last profiled step, or says why none is."""
        if self._began is not None:
            self._write(f"the steps after {self._began:,}")
        elif self._wanted and self._start < self._done:
            self._say(f"No profile was made: {self._missed()}.")
        self._wanted = False

    def _missed(self) -> str:
        """Says why no round could be recorded, and what to change."""
        start = self._config.start_step
        why = f"the run ended after step {self._done:,}, and profile.start_step={start}"
        if self._done > start:
            why = f"no round from profile.start_step={start} on was compiled before it began"
        if self._done < self._total:
            return f"{why}: when the run goes on, set that to {self._done} or more"
        return f"{why}: train for longer, or use a smaller one, in a new --workdir"

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
