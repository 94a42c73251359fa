"""Processes that are started together, with tiny scripts in place of a training."""

import ctypes
import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdp.common.errors import STOPPED, ConfigError
from jaxdp.common.stopping import SAME
from jaxdp.parallel import launcher
from support.texts import REPOSITORY

LAUNCH = """
import json, os, sys
from jaxdp.parallel import launcher
scripts, grace, cores = json.loads(sys.argv[1])
children = [launcher.Child([sys.executable, "-c", x], {"NUMBER": str(i)}, cores)
            for i, x in enumerate(scripts)]
status = launcher.run(children, grace)
print("launched on", sorted(os.sched_getaffinity(0)))
sys.exit(status)
"""
FOR_EVER = "import time; time.sleep(1000)"
# As jaxdp.train: it can be told to stop from a moment on, and SIGTERM sent again ends it.
TRAINING = """
import os, sys, threading, time
from jaxdp.common.stopping import Listener, StopRequest
from jaxdp.parallel import launcher
launcher.end_with_launcher()
print("started", os.getpid(), file=sys.stderr, flush=True)
while not os.path.exists("ready"): time.sleep(0.01)
stop = threading.Event()
def asked(line):
    print("asked", file=sys.stderr, flush=True)
    stop.set()
Listener(StopRequest(say=asked))
print("ready", file=sys.stderr, flush=True)
stop.wait()
while not os.path.exists("saved"): time.sleep(0.01)
sys.exit(75)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a launcher in a process group of its own; none outlives the test."""
    started = []

    def launch(*scripts, grace=60.0, cores=()):
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", LAUNCH, json.dumps([scripts, grace, cores])],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=(tmp_path / "out").open("w"),
                stderr=(tmp_path / "err").open("w"),
                process_group=0,
            )
        )
        return started[-1]

    yield launch
    for process in started:
        process.kill()


def until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def children_of(process):
    """Descriptors of a launcher's children, which become readable when they end."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as numbers:
        return [os.pidfd_open(int(number)) for number in numbers.read().split()]


def assert_ended(children):
    for child in children:
        assert select.select([child], [], [], 60)[0]
        os.close(child)


@pytest.mark.parametrize(
    ("scripts", "status"),
    [
        (["", ""], 0),
        (["exit(75)", "exit(75)"], STOPPED),
        (["exit(75)", ""], STOPPED),
        (["", "exit(3)", ""], 3),
        (["import os; os.kill(os.getpid(), 9)", ""], 128 + 9),
    ],
)
def test_the_status_is_that_of_all_or_of_the_one_that_failed(start, scripts, status):
    assert start(*scripts).wait(60) == status


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_those_that_would_wait_for_ever(start, tmp_path, failing):
    scripts = [FOR_EVER] * 3
    scripts[failing] = "exit(4)"
    assert start(*scripts, grace=0.0).wait(60) == 4
    assert f"process {failing} of 3 ended with status 4" in (tmp_path / "err").read_text()


# Says why it ends, waits until the launcher has seen the end of process 1, and fails with 5.
FOLLOWING = """
import os, sys, time
print("jaxdp: I have lost it", file=sys.stderr)
while not os.path.exists("first"): time.sleep(0.01)
while os.path.exists("/proc/" + open("first").read()): time.sleep(0.01)
exit(5)
"""
FIRST = """
import os, sys
print("hidden"); print("shown\\njaxdp: my disk is full", file=sys.stderr)
open("writing", "w").write(str(os.getpid())); os.rename("writing", "first")
exit(1)
"""


def test_the_first_failure_counts_and_only_its_reason_is_shown(start, tmp_path):
    """With all that the main process prints, and stderr of the others."""
    assert start("print('display')\n" + FOLLOWING, FIRST, FOLLOWING).wait(60) == 1
    assert (tmp_path / "out").read_text().startswith("display\nlaunched on")
    assert sorted((tmp_path / "err").read_text().splitlines()) == [
        "[process 1] jaxdp: my disk is full",
        "[process 1] shown",
        "jaxdp: I have lost it",
        "jaxdp: process 1 of 3 ended with status 1, and so the others were ended, too",
    ]


def test_wrong_input_is_told_once(start, tmp_path):
    script = "import sys; print('jaxdp: x=1 is wrong', file=sys.stderr); exit(2)"
    assert start(script, script, script).wait(60) == 2
    assert (tmp_path / "err").read_text() == "jaxdp: x=1 is wrong\n"


def training(start, tmp_path, *, ready):
    """Starts two that train, to the point where they can be told to stop, or just before."""
    process = start(TRAINING, TRAINING)
    if ready:
        (tmp_path / "ready").touch()
    until(lambda: (tmp_path / "err").read_text().count("ready" if ready else "started") == 2)
    return process, children_of(process)


@pytest.mark.parametrize(
    ("number", "to", "ready"),
    [
        (signal.SIGTERM, os.kill, True),
        (signal.SIGHUP, os.killpg, True),
        (signal.SIGUSR1, os.kill, False),
        (signal.SIGINT, os.killpg, True),
        (signal.SIGTERM, os.killpg, False),
        (signal.SIGINT, os.kill, False),
    ],
)
def test_a_signal_stops_all_and_they_can_save(start, tmp_path, number, to, ready):
    """To the launcher, or as Ctrl-C to all at once; also before they can do anything about it."""
    process, children = training(start, tmp_path, ready=ready)
    to(process.pid, number)
    (tmp_path / "ready").touch()
    until(lambda: (tmp_path / "err").read_text().count("asked") == 2)
    (tmp_path / "saved").touch()
    assert process.wait(60) == STOPPED
    assert_ended(children)


def test_a_signal_that_is_sent_again_kills(start, tmp_path):
    """Also those that can't do anything any more."""
    process, children = training(start, tmp_path, ready=False)
    process.send_signal(signal.SIGINT)
    until(lambda: pending(process))
    process.send_signal(signal.SIGHUP)  # Another is no impatience.
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(SAME / 4)
    assert process.returncode == 128 + signal.SIGINT
    assert_ended(children)


def pending(process):
    """Whether the launcher has passed a signal on: where it is blocked, it shows in /proc."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as numbers:
        files = [Path(f"/proc/{number}/status") for number in numbers.read().split()]
    return all(int(re.search(r"ShdPnd:\s*(\w+)", file.read_text())[1], 16) for file in files)


@pytest.mark.parametrize("ready", [True, False])
def test_no_process_outlives_a_launcher_that_is_killed(start, tmp_path, ready):
    process, children = training(start, tmp_path, ready=ready)
    process.kill()
    assert_ended(children)


def test_a_launcher_that_was_killed_before_its_process_could_ask_for_its_end(start, tmp_path):
    asking = TRAINING.replace("launcher.end", 'exec(open("wait").read()); launcher.end')
    (tmp_path / "wait").write_text(
        "open('up', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.01)"
    )
    process = start(asking)
    until((tmp_path / "up").exists)
    children = children_of(process)
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    assert_ended(children)
    assert "started" not in (tmp_path / "err").read_text()


def test_a_process_has_its_own_cores(start, tmp_path):
    own = min(os.sched_getaffinity(0))
    process = start("import os; print(os.sched_getaffinity(0), os.environ['NUMBER'])", cores=[own])
    assert process.wait(60) == 0
    everything = sorted(os.sched_getaffinity(0))
    assert (tmp_path / "out").read_text() == f"{{{own}}} 0\nlaunched on {everything}\n"


@pytest.mark.parametrize(("count", "cores"), [(1, 3), (2, 8), (3, 8), (5, 2)])
def test_cores_are_shared_out(monkeypatch, count, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    own = [set(share) for _, share in launcher.shares(count, gpus=0)]
    assert len(own) == count and set.union(*own) == set(range(cores))
    assert min(map(len, own)) == max(1, cores // count)
    if count <= cores:
        assert sum(map(len, own)) == cores


def test_gpus_are_shared_out_and_processes_numbered_over_machines(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "jaxdp", "train", "--workdir=x"])
    one, two = launcher.children(2, 4, "host:1", {"A": "b"}, machine=1, machines=3)
    command = [sys.executable, "-u", "-m", "jaxdp", "train", "--workdir=x"]
    command += ["--coordinator_address=host:1", "--num_processes=6", "--processes=1"]
    assert one.command == [*command, "--process_id=2"]
    assert two.command == [*command, "--process_id=3"]
    assert one.environ == {"A": "b", "JAX_LOCAL_DEVICE_IDS": "0,1"}
    assert two.environ == {"A": "b", "JAX_LOCAL_DEVICE_IDS": "2,3"}
    assert one.cores == two.cores == []


def test_the_address_is_reserved_for_process_0():
    with launcher.local_coordinator() as (address, environ):
        assert environ["JAX_COORDINATOR_BIND_ADDRESS"] == address
        host, port = address.split(":")
        with socket.socket() as other, pytest.raises(OSError):
            other.bind((host, int(port)))
        with socket.socket() as service:  # As gRPC listens.
            service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            service.bind((host, int(port)))
            service.listen()
            socket.create_connection((host, int(port)), timeout=60).close()


class Driver:
    """NVIDIA's, with three GPUs."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 3
        return 0


@pytest.mark.parametrize(("platforms", "count"), [("", 3), ("cuda,cpu", 3), ("cpu", 0)])
def test_gpus_are_counted_as_jax_would_use_them(monkeypatch, platforms, count):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "a plugin")
    assert launcher.visible_gpus() == count
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert launcher.visible_gpus() == 0


@pytest.mark.parametrize(
    ("given", "gpus", "count"), [("1", 8, 1), ("2", 8, 2), ("auto", 8, 8), ("9999", 0, 9999)]
)
def test_a_number_of_processes(given, gpus, count):
    assert launcher.process_count(given, gpus) == count


@pytest.mark.parametrize(
    ("given", "gpus", "message"),
    [
        ("auto", 0, "--processes=auto is one for each GPU"),
        ("0", 0, "--processes=0 is no number of processes"),
        ("", 0, "--processes= is no number of processes"),
        ("-1", 0, "is no number of processes"),
        ("two", 0, "is no number of processes"),
        ("10000", 0, "is no number of processes"),
        ("3", 8, "--processes=3 can't split 8 GPUs equally"),
        ("2", 1, "--processes=2 can't split 1 GPU equally"),
    ],
)
def test_a_wrong_number_of_processes(given, gpus, message):
    with pytest.raises(ConfigError, match=message):
        launcher.process_count(given, gpus)
