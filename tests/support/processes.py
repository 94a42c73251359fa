"""Runs in processes of their own, as a user starts them."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

from support import environment
from support.runs import flags
from support.texts import REPOSITORY

USER_XLA_FLAGS = os.environ["XLA_FLAGS"].replace(environment.FAST, "")


def start(*arguments, devices=1):
    """Starts `python -m jaxdp.train` as a user does; returns the process."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jaxdp.train", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": USER_XLA_FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def identities(processes):
    """The flags that tell each of several processes who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*group, f"--process_id={i}"] for i in range(processes)]


def start_group(config, workdir, processes, devices):
    """Runs a config on several processes to the end; returns what they printed."""
    started = [
        start(*flags(config, workdir), *identity, devices=devices)
        for identity in identities(processes)
    ]
    outs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, outs
    return outs


class Run:
    """A process and what it has printed so far."""

    def __init__(self, *arguments, devices=2):
        self.process = start(*arguments, devices=devices)
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
