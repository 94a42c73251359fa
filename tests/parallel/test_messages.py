"""Texts between processes: threads, with a key-value store of the test's own."""

import threading

import jax
import pytest

from jaxdp.common.errors import RunError
from jaxdp.parallel import messages, processes


class Store:
    """JAX's key-value store, as `client` gives it to a process."""

    def __init__(self):
        self.texts, self.changed, self.ended = {}, threading.Condition(), False

    def key_value_set(self, key, text):
        with self.changed:
            self.texts[key] = text
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        if self.ended:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")
        with self.changed:
            if self.changed.wait_for(lambda: key in self.texts, milliseconds / 1000):
                return self.texts[key]
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(processes.distributed.global_state, "client", Store())
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    number = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: getattr(number, "value", 1))
    store = processes.client()
    store.number = number
    return store


def as_processes(store, call):
    """What each of three processes gets of call(number)."""
    found = [None] * 3

    def run(i):
        store.number.value = i
        found[i] = call(i)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_get_the_texts_of_all_in_their_order(store):
    texts = as_processes(store, lambda i: messages.gather(f"text {i}", "a name"))
    assert texts == [["text 0", "text 1", "text 2"]] * 3


def test_alone_a_process_has_its_own_text_only():
    assert messages.gather("a") == ["a"]


def test_a_long_wait_is_said_once_and_goes_on(store, monkeypatch, capsys):
    monkeypatch.setattr(messages, "PAUSE", 0.01)
    monkeypatch.setattr(messages, "PATIENCE", 0.05)
    late = threading.Timer(0.5, store.key_value_set, ("key/all", "[]"))
    late.start()
    assert messages.gather("text", "key") == []
    assert capsys.readouterr().err == "jaxdp: waiting for the other processes ...\n"


def test_the_end_of_process_0_ends_a_wait(store):
    store.ended = True
    with pytest.raises(RunError, match=r"process 0, through which the processes talk, has ended"):
        messages.gather("text", "key")
