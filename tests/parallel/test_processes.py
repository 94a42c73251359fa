import jax
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.parallel import processes

LAUNCHERS = (
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
    "JOB_COMPLETION_INDEX",
    "JAX_COORDINATOR_ADDRESS",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_alone_without_launcher(monkeypatch):
    def refuse(*_):
        raise AssertionError("a single process must not wait for others")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    processes.initialize(None, None, None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.initialize(None, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("TPU_WORKER_HOSTNAMES", "a,b"),
        ("JOB_COMPLETION_INDEX", "0"),
        ("JAX_COORDINATOR_ADDRESS", "host:1"),
    ],
)
def test_launchers_are_left_to_jax(monkeypatch, name, value):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: calls.append(a))
    monkeypatch.setenv(name, value)
    processes.initialize(None, None, None)
    assert calls == [(None, None, None)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "incomplete"),
        ((None, 2, 0), "incomplete"),
        (("host:1", 2, 2), "--process_id=2 is out of range"),
        (("host:1", 2, -1), "--process_id=-1 is out of range"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        processes.initialize(*arguments)
