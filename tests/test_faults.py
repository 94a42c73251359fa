"""Real `python -m jaxdp.train` processes, killed and harmed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, USER_XLA_FLAGS
from test_runs import figures, flags

from jaxdp import loop

pytestmark = pytest.mark.slow


class Run:
    """A process and what it has printed so far."""

    def __init__(self, *arguments, devices=2):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "jaxdp.train", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": USER_XLA_FLAGS},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.printed += line

    def until(self, condition, seconds=120) -> bool:
        """Waits for a condition; returns whether the process was still there when it held."""
        deadline = time.time() + seconds
        while self.process.poll() is None:
            if condition():
                return True
            assert time.time() < deadline, self.printed
            time.sleep(0.002)
        return False

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.join()

    def join(self, seconds=120):
        """Waits for the end, and for all that was printed."""
        self.process.wait(seconds)
        self._reader.join()


def when(moment, run, workdir, cache, delay):
    """Returns once it is the moment to kill a run, or the run has ended."""
    began, before = time.time(), set(cache.glob("*.building-*"))
    conditions = {
        "any time": lambda: time.time() > began + 8 * delay,
        "training": lambda: "\nstep " in run.printed,
        "saving": lambda: any((workdir / "checkpoints").glob("*tmp*")),
        "evaluating": lambda: "\nevaluation" in run.printed,
        "building the cache": lambda: set(cache.glob("*.building-*")) - before,
    }
    if run.until(conditions[moment]) and moment in ("training", "evaluating"):
        reached = time.time()
        run.until(lambda: time.time() > reached + delay)


def test_twenty_kills_leave_no_trace(config, tmp_path):
    """SIGKILL while saving, evaluating, building the cache, training, and at any time."""
    config.update({"num_train_steps": 8000, "log_every": 50, "eval_every": 200})
    config.checkpoint.every = 25
    config.model.dropout = 0.2
    config.data.cache_dir = str(tmp_path / "tokens")
    workdir, cache = tmp_path / "parts", tmp_path / "tokens"
    draw = random.Random(0)
    moments = ["building the cache"] * 2 + ["saving"] * 6 + ["evaluating"] * 4
    moments += ["training"] * 4 + ["any time"] * 4
    killed = []
    for moment in moments:
        if moment == "building the cache":
            shutil.rmtree(cache, ignore_errors=True)
        run = Run(*flags(config, workdir))
        when(moment, run, workdir, cache, draw.random())
        if run.process.poll() is None:
            killed.append(moment)
        run.kill()
        assert "Traceback" not in run.printed, run.printed
    print(f"killed {len(killed)} times: {killed}")
    assert killed == moments
    for place in (workdir, tmp_path / "whole"):
        run = Run(*flags(config, place))
        run.process.wait(300)
        assert run.process.returncode == 0, run.printed
    whole, parts = (loop.train(config, place) for place in (tmp_path / "whole", workdir))
    for a, b in zip(*map(jax.tree.leaves, (whole.state, parts.state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert figures(tmp_path / "whole") == figures(workdir)
