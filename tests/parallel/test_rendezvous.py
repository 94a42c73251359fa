"""Processes are threads here; they meet over real sockets."""

import errno
import gc
import io
import os
import socket
import sys
import threading

import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.parallel import meeting as meetings
from jaxdp.parallel import rendezvous
from jaxdp.parallel.identity import Identity
from jaxdp.parallel.links import CUT_OFF, ENDED, Links


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meeting(*numbers, facts=lambda i: {"version": "1"}, address=None, patience=60.0, limit=120.0):
    """What (number, count) each come to: None where they have met, or the error."""
    address = address or f"127.0.0.1:{free_port()}"
    ends = [None] * len(numbers)

    def come(k, number, count):
        try:
            rendezvous.meet(Identity(address, count, number), facts(k), patience, limit)
        except (ConfigError, RunError) as error:
            ends[k] = error

    threads = [
        threading.Thread(target=come, args=(k, *which), daemon=True)
        for k, which in enumerate(numbers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return ends


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_processes_meet_in_any_order(host):
    if host == "[::1]" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    numbers = [(i, 9) for i in (3, 1, 8, 0, 2, 4, 7, 6, 5)]
    assert meeting(*numbers, address=f"{host}:{free_port()}") == [None] * 9


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes have the number 1"),
        ([(0, 2), (0, 2)], "two processes have the number 0"),
        ([(0, 2), (1, 3)], "--num_processes differs: it is 2 in process 0 and 3 in process 1"),
        ([(0, 3), (1, 2)], "--num_processes differs: it is 3 in process 0 and 2 in process 1"),
    ],
)
def test_wrong_numbers_are_told_to_all(monkeypatch, numbers, said):
    monkeypatch.setattr(meetings, "LINGER", 0.1)
    ends = meeting(*numbers)
    assert all(isinstance(end, ConfigError) and said in str(end) for end in ends), ends


def test_what_differs_is_told_to_all():
    ends = meeting((0, 3), (1, 3), (2, 3), facts=lambda k: {"same": "x", "version": str(k // 2)})
    assert len(set(map(str, ends))) == 1
    assert "version differs: it is '0' in process 0" in str(ends[0])
    assert "'1' in process 2" in str(ends[0])


class Listening(io.StringIO):
    """A stderr that notes when a text is written to it."""

    def __init__(self, text):
        super().__init__()
        self.text, self.written = text, threading.Event()

    def write(self, text):
        if self.text in text:
            self.written.set()
        return super().write(text)


@pytest.mark.parametrize(
    ("early", "late", "said"),
    [
        ([0, 2], [1, 3], "still waiting for processes 1, 3 of 4: check that all 4 were started"),
        ([1, 2, 3], [0], "still waiting for process 0 at --coordinator_address=127.0.0.1"),
    ],
)
def test_who_is_late_is_said_and_waited_for(monkeypatch, early, late, said):
    address, ends = f"127.0.0.1:{free_port()}", []
    monkeypatch.setattr(sys, "stderr", Listening(said))

    def come(number):
        rendezvous.meet(Identity(address, 4, number), {}, patience=0.5)
        ends.append(number)

    threads = [threading.Thread(target=come, args=(i,), daemon=True) for i in early + late]
    for thread in threads[: len(early)]:
        thread.start()
    assert sys.stderr.written.wait(60)
    for thread in threads[len(early) :]:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ends) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("number", "missing"), [(0, "processes 1, 2 of 3"), (1, "process 0 at --coordinator_address")]
)
def test_no_process_waits_for_ever(number, missing):
    [end] = meeting((number, 3), patience=0.1, limit=0.2)
    assert isinstance(end, RunError) and missing in str(end) and "--num_processes" in str(end)


def test_a_host_that_no_one_knows_is_refused(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for end in meeting((0, 2), (1, 2), address="node.invalid:1234", patience=0.0):
        assert isinstance(end, ConfigError)
        assert "--coordinator_address=node.invalid:1234 can't be reached" in str(end)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_refused(monkeypatch, host):
    with socket.socket() as other:
        other.bind((host, 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr(meetings, "CONNECT", 0.1)  # The other program never answers.
        [end] = meeting((0, 2), address=address, patience=0.0)
    assert isinstance(end, ConfigError) and "is in use by another program" in str(end)


def test_strangers_and_those_who_left_do_not_count():
    """A port scanner, a request of another protocol, and a process that is started again."""
    address = f"127.0.0.1:{free_port()}"
    ends = []
    main = threading.Thread(
        target=lambda: ends.append(rendezvous.meet(Identity(address, 3, 0), {})), daemon=True
    )
    main.start()
    to = "127.0.0.1", int(address.split(":")[1])
    hello = b'{"id": 1, "count": 3, "name": "--process_id", "place": "a", "facts": {}}\n'
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"id": "x"}\n', hello):
        while True:
            try:
                with socket.create_connection(to) as connection:
                    connection.sendall(sent)
                break
            except ConnectionRefusedError:
                continue
    assert main.is_alive()
    last = threading.Thread(
        target=lambda: ends.append(rendezvous.meet(Identity(address, 3, 2), {})), daemon=True
    )
    last.start()
    ends.append(rendezvous.meet(Identity(address, 3, 1), {}))
    main.join(60), last.join(60)
    assert len(ends) == 3


def test_who_ends_without_a_good_bye_is_lost():
    address, links = f"127.0.0.1:{free_port()}", {}

    def come(number):
        links[number] = rendezvous.meet(Identity(address, 4, number), {})

    threads = [threading.Thread(target=come, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))):
        pass  # Their connections leave the port to JAX.
    links.pop(1).close()
    del links[2]  # As if its process was killed: the kernel closes what it had.
    gc.collect()
    lost = {}
    while not lost:  # Process 1's good-bye ends a wait, too.
        lost = links[0].lost()
    assert lost == {2: ENDED}
    links[0].wake()
    assert links[0].lost() == links[0].lost() == {}
    links.pop(0).close()
    assert links[3].lost() == {}


def test_a_machine_that_does_not_answer_is_lost():
    class Unreachable:
        """A connection after the kernel's questions have had no answer."""

        def __init__(self, number):
            self.error, self.options = OSError(number, ""), {}
            self.pipe, other = os.pipe()
            os.close(other)

        def fileno(self):
            return self.pipe

        def setblocking(self, blocking):
            assert not blocking

        def setsockopt(self, level, option, value):
            self.options[option] = value

        def recv(self, *_):
            raise self.error

        def close(self):
            os.close(self.pipe)

    lost, reset = Unreachable(errno.ETIMEDOUT), Unreachable(errno.ECONNRESET)
    assert Links({1: lost, 2: reset}).lost() == {1: CUT_OFF}
    assert lost.options[socket.SO_KEEPALIVE] == 1
    grpc_gives_up = 20_000  # Milliseconds, after which JAX aborts.
    assert lost.options[socket.TCP_USER_TIMEOUT] < grpc_gives_up
