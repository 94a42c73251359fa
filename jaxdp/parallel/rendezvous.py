"""The processes of a run meet at the address of process 0, before JAX connects them there.

JAX can't tell which process is missing, has been started twice, or belongs to another run: it waits
for minutes, or aborts them all. So each first sends process 0 a line of JSON that says who it is.
Once all are there process 0 (`meeting`) answers all of them with the same line: go on, or what is
wrong.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.parallel import meeting
from jaxdp.parallel.identity import Identity, host_and_port
from jaxdp.parallel.links import Links, lines

PATIENCE = 20.0  # Seconds in which processes that are started together usually meet.
LIMIT = 300.0  # Seconds after which a process no longer waits, as JAX has it.


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
    if identity.id != 0:
        return Links({0: guest.wait()})
    with meeting.hosted(identity, guest.ask, patience / 2) as there:
        guest.wait().close()
    return there.links()


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
            time.sleep(meeting.TICK)

    def ask(self) -> socket.socket | str:
        """Waits like `wait`, but only as long as process 0 answers; else returns why it doesn't."""
        try:
            with contextlib.ExitStack() as stack:
                connection = socket.create_connection(self._to, timeout=meeting.CONNECT)
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


def _list(numbers: list[int], count: int) -> str:
    """Names some of a run's processes: "processes 1, 2 of 4"."""
    some = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {some} of {count}"
