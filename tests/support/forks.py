"""Programs started by the fork server, with the interface of subprocess.Popen."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
READ_AT_IMPORT = ("JAX_", "TF_", "XLA_")  # Beginnings of names; a child has its own.


@cache
def server() -> socket.socket:
    """The end of the server's socket that takes jobs; the first call in a process starts it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = {k: v for k, v in os.environ.items() if not k.startswith(READ_AT_IMPORT)}
    with theirs:
        subprocess.Popen(
            [sys.executable, "-u", SERVER, str(theirs.fileno())],
            env=env | {"OPENBLAS_NUM_THREADS": "1"},  # Else NumPy starts threads.
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # So that Ctrl-C ends the tests in their own way.
        )
    return ours


class Process:
    """`python -m MODULE ARGUMENTS`, forked; the leader of a process group of its own."""

    def __init__(
        self, *argv: str, cwd: Path, env: dict[str, str], stdout, stderr, stdin=None
    ) -> None:
        """Starts it; the streams are files, or file descriptors; no stdin: nothing to read."""
        self.args = argv
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = {"argv": argv, "cwd": str(cwd), "env": env}
        with theirs, open(os.devnull) as nothing:
            fds = [nothing if stdin is None else stdin, stdout, stderr, theirs]
            fds = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
            socket.send_fds(server(), [json.dumps(job).encode()], fds)
        self.pid = int(self._status.recv(100))

    def poll(self) -> int | None:
        """The exit status, or None while it runs; -N where signal N ended it."""
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended.

        Raises:
          TimeoutExpired: it hasn't within so many seconds.
        """
        if self._await(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                told = self._status.recv(100)
            except (TimeoutError, BlockingIOError):
                return None
            assert told, "the fork server is gone"
            self.returncode = int(told)
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
