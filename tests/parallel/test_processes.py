import os

import jax
import pytest

from jaxdp.common.errors import RunError
from jaxdp.parallel import processes, rendezvous
from jaxdp.parallel.identity import Identity


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` is called with; nothing connects."""
    calls = []
    monkeypatch.setattr(rendezvous, "meet", lambda identity, facts: calls.append((identity, facts)))
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **options: calls.append((args, options))
    )
    for name in processes.PROXIES | {"no_grpc_proxy"}:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_process_alone_waits_for_nobody(joined):
    processes.connect(None)
    assert joined == []


def test_processes_meet_first_and_leave_nothing_for_jax_to_find_out(joined):
    identity = Identity("node0:1", 4, 3, [1])
    processes.connect(identity)
    (met, facts), (arguments, options) = joined
    assert met == identity and {"the version of jaxdp", "the version of jax"} < facts.keys()
    assert arguments == ("node0:1", 4, 3, [1])
    assert options == {"cluster_detection_method": "deactivate"}
    assert "no_grpc_proxy" not in os.environ


def test_grpc_looks_for_process_0_at_no_proxy(joined, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("no_grpc_proxy", "")  # Restored afterwards.
    processes.connect(Identity("[::1]:1", 2, 0))
    assert os.getenv("no_grpc_proxy") == "::1"  # noqa: SIM112  gRPC's name.


def test_what_jax_can_not_connect_is_one_line(joined, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DEADLINE_EXCEEDED\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RunError, match=r"DEADLINE_EXCEEDED.*node0:1"):
        processes.connect(Identity("node0:1", 2, 0))
