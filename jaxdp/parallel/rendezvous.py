"""The processes of a run meet at the address of process 0, before JAX connects them there.

JAX can't tell which process is missing, has been started twice, or belongs to another run: it waits
for minutes, or aborts them all. So each first sends process 0 a line of JSON that says who it is.
Once all are there process 0 answers all of them with the same line: go on, or what is wrong.
"""

import contextlib
import errno
import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdp.common.errors import ConfigError, RunError, shown
from jaxdp.parallel.identity import COUNT, Identity, host_and_port
from jaxdp.parallel.links import Links, is_open, lines, send

PATIENCE = 20.0  # Seconds in which processes that are started together usually meet.
LIMIT = 300.0  # Seconds after which a process no longer waits, as JAX has it.
TICK = 0.5  # Seconds between two attempts, and between two messages to those that wait.
CONNECT = 10.0  # Seconds for an answer, which comes at least with every tick.
LINGER = 5.0  # Seconds in which process 0 tells those that come late what is wrong.
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # Where process 0 listens, if not at the port of everyone.


def meet(
    identity: Identity,
    facts: Mapping[str, str],
    patience: float = PATIENCE,
    limit: float = LIMIT,
) -> Links:
    """Waits until all processes of the run are there; each of them has to call it.

    Args:
      identity: who this process is.
      facts: what has to be equal in all processes, by name.
      patience: seconds after which it says whom it waits for.
      limit: seconds after which it gives up.

    Returns:
      In process 0 the connections to the others; in each other one the connection to process 0.

    Raises:
      ConfigError: the processes don't go together, or the address can't be used.
      RunError: some process isn't there after `limit` seconds.
    """
    place = f"{socket.gethostname()}, process ID {os.getpid()}"
    hello = {
        "id": identity.id,
        "count": identity.count,
        "name": identity.names[2],
        "place": place,
        "facts": dict(facts),
    }
    guest = _Guest(identity, hello, patience, limit)
    with _host(guest) if identity.id == 0 else contextlib.nullcontext() as meeting:
        connection = guest.wait()
    if meeting is None:
        return Links({0: connection})
    connection.close()
    return meeting.links()


class _Guest:
    """A process that waits for the others."""

    def __init__(self, identity: Identity, hello: dict, patience: float, limit: float):
        self.identity, self.patience, self._limit = identity, patience, limit
        self._line = json.dumps(hello).encode() + b"\n"
        self._start, self._next = time.monotonic(), patience
        self._to = host_and_port(identity.address, identity.where)

    def wait(self) -> socket.socket:
        """Waits until process 0 says that all are there; raises ConfigError for what is wrong.

        Returns:
          The connection to process 0.
        """
        while True:
            answer = self.ask()
            if isinstance(answer, socket.socket):
                return answer
            self._check_time(f"process 0 at {self.identity.where}", answer)
            time.sleep(TICK)

    def ask(self) -> socket.socket | str:
        """Waits like `wait`, but only as long as process 0 answers; else returns why it doesn't."""
        try:
            with contextlib.ExitStack() as stack:
                connection = socket.create_connection(self._to, timeout=CONNECT)
                stack.enter_context(connection)
                connection.sendall(self._line)
                for answer in lines(connection):
                    if answer.get("verdict"):
                        raise ConfigError(str(answer["verdict"]))
                    if "verdict" in answer:
                        stack.pop_all()  # It stays open.
                        return connection
                    self._check_time(_list(answer["missing"], self.identity.count), "")
            return "it has closed the connection"
        except socket.gaierror as error:
            reason = f"the host can't be found: {error.strerror}"
            # Kubernetes gives a pod's name an address only when the pod starts.
            if "KUBERNETES_SERVICE_HOST" not in os.environ and self._seconds > self.patience:
                raise ConfigError(
                    f"{self.identity.where} can't be reached ({reason}): give the name or the IP "
                    "address of process 0's machine"
                ) from None
            return reason
        except OSError as error:
            return error.strerror or str(error)
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError):
            return "another program answers there, or a run that has begun without this process"

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _check_time(self, who: str, reason: str) -> None:
        """Says from time to time whom this process waits for; raises RunError after the limit."""
        if self._seconds < min(self._next, self._limit):
            return
        self._next += 3 * self.patience
        name = self.identity.names[1]
        check = f"check that all {self.identity.count} were started, as {name} says"
        if reason and self.identity.id == 0:
            check = "this is process 0, so check that the address is this machine's"
        elif reason:
            check += ", and that they can reach process 0"
        text = f"{who}{f' ({reason})' if reason else ''}"
        if self._seconds >= self._limit:
            raise RunError(f"waited {self._limit:.0f} s for {text}: {check}")
        print(
            f"jaxdp: still waiting for {text}: {check}; it ends after {self._limit:.0f} s",
            file=sys.stderr,
            flush=True,
        )


class _Meeting:
    """Who has come, and what was decided; in process 0."""

    def __init__(self, count: int):
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
        meeting: _Meeting = self.server.meeting  # type: ignore[attr-defined]
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

    def __init__(self, host: str, port: int, meeting: _Meeting):
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
def _host(guest: _Guest) -> Iterator[_Meeting]:
    """Lets the processes meet here; at the end waits until all of them know what was decided."""
    meeting = _Meeting(guest.identity.count)
    server = _open(guest, meeting)
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


def _open(guest: _Guest, meeting: _Meeting) -> _Server:
    """Opens process 0's port, for which it may wait: an earlier run takes seconds to leave it."""
    where = guest.identity.where
    host, port = "::", host_and_port(guest.identity.address, where)[1]
    if os.environ.get(BIND):
        host, port = host_and_port(os.environ[BIND], BIND)
    until = time.monotonic() + guest.patience / 2
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
                guest.ask()  # Another process 0 says so.
                time.sleep(TICK)


def _list(numbers: list[int], count: int) -> str:
    """Names some of a run's processes: "processes 1, 2 of 4"."""
    some = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {some} of {count}"
