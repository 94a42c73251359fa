"""Runs in processes of their own, as a user starts them."""

import contextlib
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from support import environment
from support.forks import Process
from support.runs import flags
from support.texts import REPOSITORY


def environment_of(devices: int) -> dict[str, str]:
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}


def command(
    name: str,
    *arguments: str,
    devices: int = 1,
    check: int | None = 0,
    stdin: str = "",
    cwd: Path = REPOSITORY,
):
    """Runs `python -m jaxdp.NAME ...` in a fork; returns the finished process."""
    file = functools.partial(tempfile.TemporaryFile, "w+")
    with file() as given, file() as out, file() as err:
        given.write(stdin), given.seek(0)
        process = Process(
            f"jaxdp.{name}",
            *arguments,
            cwd=cwd,
            env=environment_of(devices),
            stdin=given,
            stdout=out,
            stderr=err,
        )
        try:
            process.wait(600)
        finally:
            process.send_signal(signal.SIGKILL)
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(process.args, process.returncode, out.read(), err.read())
    return checked(done, check)


def fresh_command(name: str, *arguments: str, devices: int = 1, check: int | None = 0):
    """The same with an interpreter of its own, as a user starts it, and all of XLA's passes."""
    done = subprocess.run(
        [sys.executable, "-m", f"jaxdp.{name}", *arguments],
        cwd=REPOSITORY,
        env=environment_of(devices) | {"XLA_FLAGS": environment.users_flags()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return checked(done, check)


def checked(done: subprocess.CompletedProcess, status: int | None) -> subprocess.CompletedProcess:
    """Asserts an exit status, unless it is None."""
    if status is not None:
        assert done.returncode == status, done.stdout + done.stderr
    return done


def identities(processes):
    """The flags that tell each of several processes who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*group, f"--process_id={i}"] for i in range(processes)]


def start_group(config, workdir, processes, devices):
    """Runs a config on several processes to the end; returns what they printed."""
    runs = [
        Run(*flags(config, workdir), *identity, devices=devices)
        for identity in identities(processes)
    ]
    statuses = [run.ended(300) for run in runs]
    assert statuses == [0] * processes, [run.printed for run in runs]
    return [run.printed for run in runs]


class Run:
    """A `python -m jaxdp.train`, forked, and what it has printed so far."""

    def __init__(self, *arguments, devices=2):
        read, write = os.pipe()
        self.process = self.started(
            *arguments, cwd=REPOSITORY, env=environment_of(devices), stdout=write, stderr=write
        )
        os.close(write)
        self.printed = ""
        self._reader = threading.Thread(target=self._read, args=(read,))
        self._reader.start()

    def started(self, *arguments, **options):
        return Process("jaxdp.train", *arguments, **options)

    def _read(self, printed: int):
        with open(printed, errors="replace") as stream:
            for line in stream:
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

    def until_printed(self, text) -> bool:
        """Waits for a text; returns whether the process was still there when it came."""
        return self.until(lambda: text in self.printed)

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.ended()

    def ended(self, seconds=120) -> int:
        """Waits for the end and for all that was printed; returns the exit status."""
        status = self.process.wait(seconds)
        self._reader.join()
        return status


class FreshRun(Run):
    """The same with an interpreter of its own, which can start others as it was started."""

    def started(self, *arguments, **options):
        return subprocess.Popen([sys.executable, "-m", "jaxdp.train", *arguments], **options)


@contextlib.contextmanager
def group(config, workdir, *, processes=2, main_only=()):
    """Runs a config on several processes of a device each; none outlives the block.

    The first gets some more flags.
    """
    runs = []
    try:
        for i, identity in enumerate(identities(processes)):
            more = () if i else main_only
            runs.append(Run(*flags(config, workdir), *more, *identity, devices=1))
        yield runs
    finally:
        for run in runs:
            run.kill()  # Stopped ones, too.


@contextlib.contextmanager
def limited(process, size):
    """Files that a process writes end at `size` bytes."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)
