"""A program that the fork server starts is what a new interpreter would make of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from support import forks
from support.forks import Process
from support.processes import limited

PROBE = """
import json, os, random, sys

import jax

seen = {
    "config": {name: repr(value) for name, value in jax.config.values.items()},
    "devices": jax.device_count(),
    "argv": sys.argv,
    "path": sys.path,
    "cwd": os.getcwd(),
    "env": dict(os.environ),
    "name": __name__,
    "random": random.random(),
}
print(json.dumps(seen))
"""
ENVIRONMENTS = [
    {},
    {"JAX_NUM_CPU_DEVICES": "3", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
    {"JAX_COMPILATION_CACHE_DIR": "/nowhere", "JAX_DEBUG_NANS": "true", "MINE": "ü\n"},
    {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    },
]


PROGRAM = """
import atexit, os, signal, sys, threading, time

atexit.register(print, "atexit")
how = sys.argv[1]
print("began", os.getpgrp() == os.getpid(), flush=True)
if how == "raise":
    raise ValueError("so")
if how == "exit":
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    sys.exit(7)
if how == "term":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.fixture
def started(folder):
    """Starts the program, and waits until it runs; returns it, and its output as a file."""
    processes = []

    def start(how):
        process = Process(
            "program",
            how,
            cwd=folder,
            env=dict(os.environ),
            stdout=(out := open(folder / "out", "w+")),  # noqa: SIM115
            stderr=out,
        )
        processes.append((process, out))
        while "began" not in (folder / "out").read_text():
            time.sleep(0.01)
        return process, folder / "out"

    yield start
    for process, out in processes:
        process.send_signal(signal.SIGKILL)
        out.close()


@pytest.mark.parametrize("changes", ENVIRONMENTS, ids=lambda changes: "-".join(changes) or "none")
def test_it_sees_what_a_new_interpreter_sees(folder, changes):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(forks.READ_AT_IMPORT)}
    given = {"cwd": folder, "env": clean | {"JAX_PLATFORMS": "cpu"} | changes}
    fresh = [sys.executable, "-m", "probe", "a", "--b"]
    seen = [json.loads(subprocess.run(fresh, stdout=subprocess.PIPE, check=True, **given).stdout)]
    for _ in range(2):
        with tempfile.TemporaryFile("w+") as out:
            assert Process("probe", "a", "--b", stdout=out, stderr=2, **given).wait(100) == 0
            out.seek(0)
            seen.append(json.loads(out.read()))
    assert len({each.pop("random") for each in seen}) == 3
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [("raise", 1, "ValueError: so\natexit\n"), ("exit", 7, "began True\nthread\natexit\n")],
)
def test_it_ends_as_an_interpreter_does(started, how, status, says):
    """It waits for its threads, and does what was registered for the end."""
    process, out = started(how)
    assert process.wait(100) == process.poll() == process.returncode == status
    assert out.read_text().endswith(says)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)]
)
def test_signals_reach_it(started, number, status):
    process, out = started("sleep")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert process.wait(100) == status
    assert ("KeyboardInterrupt" in out.read_text()) == (number == signal.SIGINT)


def test_its_own_handlers_are_called_and_it_can_be_stopped(started):
    process, _ = started("term")
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    assert process.wait(100) == 75


def test_it_can_be_limited(started):
    process, _ = started("sleep")
    with limited(process.pid, 1000):
        assert "1000" in Path(f"/proc/{process.pid}/limits").read_text()
