"""Connections between process 0 and the others: lines of JSON, and who has ended."""

import contextlib
import json
import select
import socket
from collections.abc import Iterator
from typing import Any

GOOD_BYE = b"good-bye\n"
LONGEST = 2**16  # Bytes of a line.


class Links:
    """Connections between process 0 and the others, which show at once when one has ended.

    Nothing is sent over them until a process says good-bye.
    """

    def __init__(self, connections: dict[int, socket.socket]):
        """Takes over connections, by the number of the process at the other end."""
        self._connections = connections

    def lost(self) -> list[int]:
        """Returns the processes that have ended without a good-bye, since the last call."""
        found = []
        for id, connection in list(self._connections.items()):
            said = _received(connection)
            if said is not None:
                self._connections.pop(id).close()
                if said == b"":
                    found.append(id)
        return found

    def close(self) -> None:
        """Says good-bye to all."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(GOOD_BYE)
            connection.close()
        self._connections = {}


def lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects, a line each, that come over a connection."""
    with connection.makefile("rb") as stream:
        while line := stream.readline(LONGEST):
            value = json.loads(line)
            if not isinstance(value, dict):
                raise TypeError
            yield value


def send(connection: socket.socket, value: dict[str, Any]) -> None:
    """Sends a JSON object as a line."""
    connection.sendall(json.dumps(value).encode() + b"\n")


def is_open(connection: socket.socket) -> bool:
    """Returns whether the other end of a connection has not been closed; it sends nothing more."""
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
        return not poll.poll(0) or connection.recv(1, socket.MSG_PEEK) != b""
    except (OSError, ValueError):  # ValueError: it has been closed at this end.
        return False


def _received(connection: socket.socket) -> bytes | None:
    """Returns what has come over a connection, b"" at its end; None if nothing has."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    try:
        return connection.recv(len(GOOD_BYE)) if poll.poll(0) else None
    except OSError:  # The network has cut it; that says nothing about the process.
        return GOOD_BYE
