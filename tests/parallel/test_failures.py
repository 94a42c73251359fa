import json
import os
import threading

import jax
import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.parallel import failures, processes
from jaxdp.parallel.links import ENDED, Links


class Store:
    """JAX's key-value store, without processes."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, text):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = text

    def key_value_try_get(self, key):
        raise jax.errors.JaxRuntimeError("NOT_FOUND")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("no such\nkey: x"), 2, "no such key: x"),
        (RunError("a reason"), 1, "a reason"),
        (OSError(5, "Input/output error"), 1, "OSError: [Errno 5] Input/output error"),
    ],
)
def test_the_first_failure_is_told_to_the_others(monkeypatch, error, status, text):
    store = Store()
    monkeypatch.setattr(processes.distributed.global_state, "client", store)
    monkeypatch.setattr(processes.distributed.global_state, "process_id", 3)
    with pytest.raises(type(error)), failures.shared(Links({})):
        raise error
    assert json.loads(store.values[failures.FAILED]) == [3, status, text]
    with pytest.raises(ValueError), failures.shared(Links({})):
        raise ValueError("later")
    assert json.loads(store.values[failures.FAILED])[0] == 3


def test_the_links_of_a_process_that_is_alone_are_closed_too():
    links = Links({})
    with pytest.raises(OSError), failures.shared(links):
        raise OSError
    links.wake()  # Else one that isn't closed would wait for ever.
    with pytest.raises(ValueError, match="file descriptor"):
        links.lost()


class Lost(Links):
    """Connections that have lost process 0."""

    def __init__(self):
        super().__init__({})
        self.told = [{0: ENDED}]

    def lost(self):
        return self.told.pop() if self.told else super().lost()


def test_the_end_of_process_0_ends_this_one_before_jax_does(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(processes.distributed.global_state, "client", Store())
    monkeypatch.setattr(os, "_exit", lambda status: status == 1 and ended.set())
    with failures.shared(Lost()):
        assert ended.wait(60)
    assert capsys.readouterr().err == f"jaxdp: process 0 has failed: {ENDED}\n"
