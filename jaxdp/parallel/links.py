"""Connections between process 0 and the others: lines of JSON, and who has ended."""

import contextlib
import errno
import json
import select
import socket
from collections.abc import Iterator
from typing import Any

GOOD_BYE = b"good-bye\n"
LONGEST = 2**16  # Bytes of a line.
# Seconds without an answer of the other machine after which it counts as lost. After 20, gRPC, by
# which JAX connects processes, gives its own connections up, and JAX aborts.
SILENCE = 15
# Seconds between two questions to the other machine whether it is there. The last one that can be
# answered comes up to 2 * PROBE before SILENCE, so a network that is cut for 13 s isn't lost.
PROBE = 1
NO_ANSWER = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
ENDED = "it has ended without a word; killed, or out of memory?"
CUT_OFF = (
    f"its machine hasn't answered for {SILENCE} s: is it down, or the network cut? Run again to go "
    "on from the newest checkpoint"
)


class Links:
    """Connections between process 0 and the others, which show at once when one has ended.

    Nothing is sent over them until a process says good-bye. The kernel asks the other machine
    whether it is there, so they also show, after SILENCE seconds, that it can't be reached.
    """

    def __init__(self, connections: dict[int, socket.socket]):
        """Takes over TCP connections, by the number of the process at the other end."""
        self._connections = connections
        self._bell, self._ringer = socket.socketpair()
        for connection in connections.values():
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)

    def lost(self) -> dict[int, str]:
        """Waits until a process ends, or until `wake`.

        Returns:
          The processes lost since the last call, without a good-bye: ENDED or CUT_OFF.
        """
        poll = select.poll()
        for connection in (self._bell, *self._connections.values()):
            poll.register(connection, select.POLLIN)
        poll.poll()
        found = {id: _end(connection) for id, connection in self._connections.items()}
        for id in [id for id, end in found.items() if end is not None]:
            self._connections.pop(id).close()
        return {id: end for id, end in found.items() if end}

    def wake(self) -> None:
        """Ends the wait of `lost` in another thread, and all later ones."""
        self._ringer.close()

    def close(self) -> None:
        """Says good-bye to all."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(GOOD_BYE)
            connection.close()
        self._connections = {}
        self._bell.close()
        self._ringer.close()


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


def _end(connection: socket.socket) -> str | None:
    """Returns how the process at the other end was lost, "" if it wasn't; None if it is there."""
    try:
        return "" if connection.recv(len(GOOD_BYE)) else ENDED
    except BlockingIOError:
        return None
    except OSError as error:
        # Whatever else has cut it says nothing about the process.
        return CUT_OFF if error.errno in NO_ANSWER else ""
