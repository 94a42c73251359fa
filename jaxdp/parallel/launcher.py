"""Starts several processes of a run on this machine, passes signals on, and ends them together."""

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from jaxdp.common.errors import STOPPED, WRONG_INPUT, ConfigError, shown
from jaxdp.common.stopping import SIGNALS, Received, heard

GRACE = 10.0  # Seconds in which the others may end by themselves after one has failed.
TICK = 0.05  # Seconds between two looks at the processes.
LAUNCHER = "JAXDP_LAUNCHER"  # The variable that tells a process the number of its launcher.
PR_SET_PDEATHSIG = 1  # From Linux's prctl.h.


@dataclasses.dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
      command: the program and its arguments.
      environ: variables that it has besides those of this process.
      cores: the CPU cores that it may use; all of this process's if empty.
    """

    command: Sequence[str]
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: Sequence[int] = ()


def visible_gpus() -> int:
    """Counts the NVIDIA GPUs that JAX would use; respects CUDA_VISIBLE_DEVICES.

    It asks the driver, because JAX would start on all of them.
    """
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if platform not in ("", "cuda", "gpu") or importlib.util.find_spec("jax_plugins") is None:
        return 0
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def process_count(processes: str, gpus: int) -> int:
    """Returns how many processes --processes asks for on a machine with so many GPUs.

    Raises:
      ConfigError: it is no number, or the GPUs can't be split equally.
    """
    if processes == "auto" and not gpus:
        raise ConfigError(
            "--processes=auto is one for each GPU, and JAX would find none here: give a number, or "
            "pip install -e '.[cuda]'"
        )
    if processes == "auto":
        return gpus
    if not re.fullmatch("[1-9][0-9]{0,3}", processes):
        raise ConfigError(
            f"--processes={shown(processes, as_text=str)} is no number of processes: give a number "
            "from 1 to 9999, or auto for one for each GPU"
        )
    count = int(processes)
    if gpus % count:
        raise ConfigError(
            f"--processes={count} can't split {gpus} GPU{'s' * (gpus > 1)} equally: give a "
            "divisor, choose GPUs with CUDA_VISIBLE_DEVICES, or train on CPUs with "
            "JAX_PLATFORMS=cpu"
        )
    return count


@contextlib.contextmanager
def local_coordinator() -> Iterator[tuple[str, dict[str, str]]]:
    """Reserves an address for `jax.distributed` that only this machine can reach.

    Yields:
      HOST:PORT of process 0, and the environment that all processes need for it.
    """
    with socket.socket() as reserved:
        # As long as this socket has the port, nobody else gets it. It doesn't listen, and process
        # 0 may listen at the same port, because gRPC sets SO_REUSEPORT, too.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        yield address, {"JAX_COORDINATOR_BIND_ADDRESS": address}


def children(
    count: int, gpus: int, coordinator: str, environ: Mapping[str, str], machine: int, machines: int
) -> list[Child]:
    """Lists the processes to start here: this command, with flags that say who each of them is.

    Args:
      count: number of processes on each machine.
      gpus: number of GPUs of this machine.
      coordinator: HOST:PORT of process 0.
      environ: variables that all of them need.
      machine: number of this machine.
      machines: how many there are.
    """
    group = [f"--coordinator_address={coordinator}", f"--num_processes={machines * count}"]
    command = [sys.executable, *sys.orig_argv[1:], *group, "--processes=1"]
    return [
        Child([*command, f"--process_id={machine * count + i}"], {**environ, **own}, cores)
        for i, (own, cores) in enumerate(shares(count, gpus))
    ]


def shares(count: int, gpus: int) -> list[tuple[dict[str, str], list[int]]]:
    """Splits this machine over processes: its GPUs, or if it has none, its CPU cores.

    Returns:
      For each process the variables that choose its GPUs, and its cores; [] is all cores.
    """
    if gpus:
        each = gpus // count
        ids = [range(i * each, (i + 1) * each) for i in range(count)]
        return [({"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, x))}, []) for x in ids]
    cores = sorted(os.sched_getaffinity(0), key=_physical_core)
    firsts = [i * len(cores) // count for i in range(count + 1)]
    return [({}, cores[i : max(i + 1, j)]) for i, j in itertools.pairwise(firsts)]


def _physical_core(core: int) -> tuple[int, int]:
    """Returns a key that sorts the hardware threads of a physical core next to each other."""
    threads = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    with contextlib.suppress(OSError, ValueError):
        return int(re.split("[-,]", threads.read_text())[0]), core
    return core, core


def run(children: Sequence[Child], grace: float = GRACE) -> int:
    """Starts processes and waits until all have ended.

    The first is the main one: it has this process's stdin, stdout and stderr. Of the others only
    stderr is shown, line by line after their number.

    The first of `SIGNALS` is passed on; a second SIGTERM or SIGINT, more than a second after the
    first, kills them. If one fails, the others would wait for it for ever: they are killed after
    `grace` seconds.

    Returns:
      0 if all have finished; STOPPED if all have finished or stopped on request; else the exit
      status of the first that failed, or 128 + N if signal N has ended it, or all of them.
    """
    received = Received()
    before = {n: signal.signal(n, lambda n, _: received.add(n)) for n in heard()}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    processes: list[subprocess.Popen] = []
    try:
        _start(children, processes)
        printers = [_Printer(i, x.stderr) for i, x in enumerate(processes) if x.stderr]
        failed = _wait(processes, received, grace)
    finally:
        for process in processes:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    for printer in printers:
        printer.join(1)  # No longer: what a process has started may still hold its stderr.
    codes = [process.returncode for process in processes]
    if received.again:
        return 128 + received.again
    if not failed:
        return max(codes)
    for printer in printers:
        # A wrong input is the same for all, and the main process has told it.
        if printer.number == failed[0] and not codes[0] == codes[failed[0]] == WRONG_INPUT:
            printer.show_reasons()
    return _report(failed[0], codes)


def _start(children: Sequence[Child], processes: list[subprocess.Popen]) -> None:
    """Starts processes and appends them to a list."""
    # They are born with the signals blocked, until they can hear them: see stopping.Listener.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    cores = os.sched_getaffinity(0)
    try:
        for child in children:
            os.sched_setaffinity(0, child.cores or cores)  # They are born with this, too.
            main = not processes
            process = subprocess.Popen(
                child.command,
                env={**os.environ, **child.environ, LAUNCHER: str(os.getpid())},
                stdin=None if main else subprocess.DEVNULL,
                stdout=None if main else subprocess.DEVNULL,
                stderr=None if main else subprocess.PIPE,
            )
            processes.append(process)
    finally:
        os.sched_setaffinity(0, cores)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(processes: list[subprocess.Popen], received: Received, grace: float) -> list[int]:
    """Waits for the end of all; returns the numbers of those that failed, the first one first."""
    failed: list[int] = []
    deadline, passed_on = math.inf, False
    while True:
        codes = [process.poll() for process in processes]
        bad = [i for i, code in enumerate(codes) if code not in (None, 0, STOPPED)]
        failed += [i for i in bad if i not in failed]
        if None not in codes:
            return failed
        now = time.monotonic()
        if failed:
            deadline = min(deadline, now + grace)
        if received.first and not passed_on:
            # Ctrl-C and schedulers may send the signal to the whole group of processes. A second
            # one of the same kind could end them at once, the first of another kind does not.
            other = signal.SIGTERM if received.first == signal.SIGINT else signal.SIGINT
            for process in processes:
                process.send_signal(other)
            passed_on = True
        if received.again or now > deadline:
            for process in processes:
                process.kill()
        time.sleep(TICK)


class _Printer(threading.Thread):
    """Shows what a process prints to stderr, after its number.

    Lines of our own, which say why a process ends, wait until it is known which one failed first:
    the others say the same, or that they have lost it.
    """

    def __init__(self, number: int, stream: IO[bytes]):
        """Starts to read."""
        super().__init__(daemon=True)
        self.number, self._stream = number, stream
        self._reasons: list[str] = []
        self.start()

    def run(self) -> None:
        for data in self._stream:
            line = data.decode(errors="replace")
            if line.startswith("jaxdp: "):
                self._reasons.append(line)
            else:
                self._show(line)

    def show_reasons(self) -> None:
        for line in self._reasons:
            self._show(line)

    def _show(self, line: str) -> None:
        with contextlib.suppress(OSError):  # If stderr goes to a full disk, the run goes on.
            sys.stderr.write(f"[process {self.number}] {line}")
            sys.stderr.flush()


def _report(first: int, codes: list[int]) -> int:
    """Says which process failed first, if by a fault; returns its exit status as a shell has it."""
    code = codes[first]
    how = f"ended with status {code}"
    if code < 0:
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
    if code != WRONG_INPUT:
        print(
            f"jaxdp: process {first} of {len(codes)} {how}, and so the others were ended, too",
            file=sys.stderr,
        )
    return code if code > 0 else 128 - code


def end_with_launcher() -> None:
    """Lets the kernel kill this process when its launcher ends, even if that one is killed."""
    parent = os.environ.pop(LAUNCHER, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # It has ended already.
