"""Processes that agree on where to stop: threads, with a key-value store of the test's own."""

import re
import threading

import jax
import pytest

from jaxdp.common.errors import Stopped
from jaxdp.common.stopping import StopRequest
from jaxdp.parallel import messages
from jaxdp.parallel.agreement import Agreement

COUNT = 3


class Store:
    """JAX's key-value store and barriers."""

    def __init__(self, monkeypatch):
        self.texts, self.changed = {}, threading.Condition()
        monkeypatch.setattr(jax, "process_count", lambda: COUNT)
        for name in ("set_once", "get", "barrier", "gather"):
            monkeypatch.setattr(messages, name, getattr(self, name))

    def until(self, condition):
        assert self.changed.wait_for(condition, 60)

    def set_once(self, key, text):
        key = re.sub("[0-9]", "", key)  # Each object in a process has a number of its own.
        with self.changed:
            if key in self.texts:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.texts[key] = text
            self.changed.notify_all()

    def get(self, key, seconds):
        key = re.sub("[0-9]", "", key)
        with self.changed:
            self.changed.wait_for(lambda: key in self.texts, seconds)
            return self.texts.get(key)

    def barrier(self, name):
        self.gather("", name)

    def gather(self, text, name):
        with self.changed:
            texts = self.texts.setdefault(re.sub("[0-9]", "", name), [])
            texts.append(text)
            self.changed.notify_all()
            self.until(lambda: len(texts) == COUNT)
            return texts


class Group:
    """Processes that run rounds, and fetch the metrics of each after they dispatch the next."""

    def __init__(self, monkeypatch):
        self.store = Store(monkeypatch)
        self.requests = [StopRequest() for _ in range(COUNT)]
        self.dispatched, self.stopped = [0] * COUNT, [""] * COUNT
        self.prepared, self.slow_in = [True] * COUNT, 10_000
        self.go = threading.Event()

    def run(self, asking=lambda: None):
        threads = [threading.Thread(target=self._run, args=(i,)) for i in range(COUNT)]
        for thread in threads:
            thread.start()
        asking()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def until(self, condition):
        with self.store.changed:
            self.store.until(condition)

    def _run(self, i):
        with Agreement(self.requests[i]) as agreement:
            try:
                agreement.start_together(self.prepared[i])
            except Stopped:
                self.stopped[i] = "before the first round"
                return
            while self.dispatched[i] < 1000:
                if agreement.reached():
                    self.stopped[i] = "as asked"
                    return
                if i == 1 and self.dispatched[i] == self.slow_in:
                    assert self.go.wait(60)
                with self.store.changed:
                    self.dispatched[i] += 1
                    self.store.changed.notify_all()
                    self.store.until(lambda: min(self.dispatched) >= self.dispatched[i] - 1)


@pytest.mark.parametrize("asked", [[0], [1], [2, 0], [0, 1, 2]])
def test_the_last_round_is_the_one_that_the_furthest_has_dispatched(monkeypatch, asked):
    """Process 1 is slow in round 51, which the others wait for: they have dispatched 52 rounds."""
    group = Group(monkeypatch)
    group.slow_in = 50

    def asking():
        group.until(lambda: group.dispatched == [52, 50, 52])
        for i in asked:
            group.requests[i].ask("SIGTERM")
        group.until(lambda: len(group.store.texts.get("jaxdp/stop//calls", ())) == COUNT)
        group.go.set()

    group.run(asking)
    assert group.dispatched == [52] * COUNT and group.stopped == ["as asked"] * COUNT


def test_all_stop_together_at_any_moment(monkeypatch):
    group = Group(monkeypatch)

    def asking():
        group.until(lambda: min(group.dispatched) >= 3)
        group.requests[2].ask("SIGTERM")

    group.run(asking)
    assert len(set(group.dispatched)) == 1 and group.stopped == ["as asked"] * COUNT


def test_nobody_is_asked_and_all_come_to_the_end(monkeypatch):
    group = Group(monkeypatch)
    group.run()
    assert group.dispatched == [1000] * COUNT and group.stopped == [""] * COUNT


def test_one_that_is_interrupted_while_others_wait_for_it_stops_all(monkeypatch):
    """In the first part of a run, in which it tokenises and they wait."""
    group = Group(monkeypatch)
    group.prepared[1] = False
    group.requests[1].ask("SIGTERM")
    group.run()
    assert group.stopped == ["before the first round"] * COUNT


def test_an_asking_process_asks_the_others_which_may_be_interrupted(monkeypatch):
    said = []
    group = Group(monkeypatch)
    group.requests[0] = StopRequest(say=said.append)
    group.run(lambda: group.requests[1].ask("SIGTERM"))
    assert said == ["stopping (as another process)"] and group.requests[0].asked


def test_a_process_alone_asks_nobody():
    request = StopRequest()
    with Agreement(request) as agreement:
        agreement.start_together(prepared=True)
        assert not agreement.reached()
        request.ask("SIGTERM")
        assert agreement.reached()
        with pytest.raises(Stopped):
            agreement.start_together(prepared=True)
