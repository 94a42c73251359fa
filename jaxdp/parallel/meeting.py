"""Process 0's side of the `rendezvous`: who has come, and whether they go together."""

import contextlib
import errno
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxdp.common.errors import ConfigError, shown
from jaxdp.parallel.identity import COUNT, Identity, host_and_port
from jaxdp.parallel.links import Links, is_open, lines, send

TICK = 0.5  # Seconds between two attempts, and between two messages to those that wait.
CONNECT = 10.0  # Seconds for an answer, which comes at least with every tick.
LINGER = 5.0  # Seconds in which process 0 tells those that come late what is wrong.
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # Where process 0 listens, if not at the port of everyone.


class Meeting:
    """Who has come, and what was decided; in process 0."""

    def __init__(self, count: int):
        """Takes the number of processes of the run."""
        self._count = count
        self._guests: dict[int, tuple[dict, socket.socket]] = {}
        self._told: set[int] = set()
        self._expected = count  # How many are to be told what was decided.
        self._lock = threading.RLock()
        self.verdict: str | None = None
        self.decided = threading.Event()

    def add(self, hello: dict[str, Any], connection: socket.socket) -> None:
        """Notes a process that has come; decides if it is the last one, or can't belong here."""
        with self._lock:
            id = int(hello["id"])
            if not is_open(connection):
                return  # It has gone again before it was heard.
            before = self._guests.get(id)
            if before and is_open(before[1]):
                self._decide(
                    f"two processes have the number {id} ({before[0]['place']}; "
                    f"{hello['place']}): give each its own {hello['name']}"
                )
            elif hello["count"] != self._count:
                self._expected = max(self._expected, int(hello["count"]))
                self._decide(
                    f"{COUNT} differs: it is {self._count} in process 0 and {hello['count']} in "
                    f"process {id} ({hello['place']}): give all the same, the number of all "
                    "processes together"
                )
            else:
                self._guests[id] = hello, connection
                if len(self._guests) == self._count and not self.missing():
                    self._decide(self._difference())

    def missing(self) -> list[int]:
        """Returns the numbers of those that aren't there, or have gone again."""
        with self._lock:
            guests = list(self._guests.items())
        there = {id for id, (_, connection) in guests if is_open(connection)}
        return sorted(set(range(self._count)) - there)

    def remove(self, connection: socket.socket) -> None:
        """Forgets a process that has ended."""
        with self._lock:
            self._guests = {i: x for i, x in self._guests.items() if x[1] is not connection}

    def tell(self, id: int, connection: socket.socket) -> None:
        """Tells a process what was decided."""
        with contextlib.suppress(OSError):
            send(connection, {"verdict": self.verdict})
        with self._lock:
            self._told.add(id)

    def links(self) -> Links:
        """Returns the connections to all processes but this one."""
        with self._lock:
            connections = {id: connection for id, (_, connection) in self._guests.items()}
        if 0 in connections:
            connections.pop(0).close()
        return Links(connections)

    def has(self, connection: Any) -> bool:
        """Returns whether a process that has come is at the other end of a connection."""
        with self._lock:
            return any(connection is other for _, other in self._guests.values())

    def all_told(self) -> bool:
        """Returns whether each process knows what was decided."""
        with self._lock:
            return self.decided.is_set() and len(self._told) >= self._expected

    def _decide(self, verdict: str) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self.decided.set()

    def _difference(self) -> str:
        first = self._guests[0][0]
        for id, (hello, _) in sorted(self._guests.items()):
            for name, value in first["facts"].items():
                if hello["facts"].get(name) != value:
                    return (
                        f"{name} differs: it is {shown(value)} in process 0 ({first['place']}) and "
                        f"{shown(hello['facts'].get(name))} in process {id} ({hello['place']}): "
                        "give all the same"
                    )
        return ""


class _Handler(socketserver.BaseRequestHandler):
    """Process 0's side of a connection."""

    def handle(self) -> None:
        meeting: Meeting = self.server.meeting  # type: ignore[attr-defined]
        self.request.settimeout(CONNECT)
        try:
            hello = next(lines(self.request))
            id = int(hello["id"])
            meeting.add(hello, self.request)
            while not meeting.decided.wait(TICK):
                send(self.request, {"missing": meeting.missing()})
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            meeting.remove(self.request)  # A process that has ended, or something that is none.
        else:
            meeting.tell(id, self.request)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024  # So many processes may come at the same moment.
    block_on_close = False

    def __init__(self, host: str, port: int, meeting: Meeting):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family, self.meeting = family, meeting
        # The launcher reserves its port by a socket that must share it.
        self.allow_reuse_port = bool(os.environ.get(BIND))
        super().__init__(address, _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def shutdown_request(self, request) -> None:
        if not self.meeting.has(request):  # The others become `Links`.
            super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Shows nothing: whoever it was has gone."""


@contextlib.contextmanager
def hosted(identity: Identity, ask: Callable[[], Any], patience: float) -> Iterator[Meeting]:
    """Lets the processes meet here; at the end waits until all of them know what was decided.

    Args:
      identity: process 0's.
      ask: asks whoever listens at its address; raises ConfigError if that is another process 0.
      patience: seconds to wait for the port: an earlier run takes a while to leave it.

    Raises:
      ConfigError: the port can't be opened.
    """
    meeting = Meeting(identity.count)
    server = _open(identity, meeting, ask, time.monotonic() + patience)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield meeting
    finally:
        until = time.monotonic() + LINGER
        while meeting.decided.is_set() and not meeting.all_told() and time.monotonic() < until:
            time.sleep(0.02)
        server.shutdown()
        server.server_close()  # JAX listens here from now on.
        if meeting.verdict != "":
            meeting.links().close()


def _open(identity: Identity, meeting: Meeting, ask: Callable[[], Any], until: float) -> _Server:
    where = identity.where
    host, port = "::", host_and_port(identity.address, where)[1]
    if os.environ.get(BIND):
        host, port = host_and_port(os.environ[BIND], BIND)
    while True:
        try:
            return _Server(host, port, meeting)
        except OSError as error:
            if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                host = "0.0.0.0"  # A machine without IPv6.
            elif error.errno != errno.EADDRINUSE:
                at = f"{BIND}={host}:{port}" if os.environ.get(BIND) else where
                raise ConfigError(
                    f"{at} can't be opened on this machine ({error.strerror}): give an address of "
                    "this machine and a free port"
                ) from None
            elif time.monotonic() > until:
                raise ConfigError(
                    f"{where}: port {port} of this machine is in use by another program, or by "
                    "another process 0: end it, or give another port"
                ) from None
            else:
                ask()
                time.sleep(TICK)
