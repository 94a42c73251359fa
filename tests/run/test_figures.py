"""The figures of logged steps."""

import jax
import numpy as np
import pytest

from jaxdp.run import figures
from jaxdp.run.figures import Throughput, load_balance, peak_flops


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(figures.time, "perf_counter", lambda: now[0])
    return now


def test_throughput_counts_steps_and_not_pauses(clock):
    throughput = Throughput(flops_per_token=6, device_count=1)
    throughput.start(steps=-1)
    throughput.add(tokens=100, data_wait=5.0)  # The first step, compiled before.
    throughput.add(tokens=100, data_wait=0.5)
    throughput.add(tokens=100, data_wait=0.1)
    clock[0] = 14.0
    throughput.pause(10.0)
    found = throughput.read()
    assert found["tokens_per_second"] == 200 / 4
    assert found["step_time_ms"] == 2000
    assert found["data_wait_ms"] == pytest.approx(300)
    assert found["mfu"] is None  # A CPU's peak isn't known.


def test_throughput_of_no_step_is_unknown(clock):
    assert set(Throughput(6, 1).read().values()) == {None}


def test_mfu_is_a_share_of_all_devices_peak(clock, monkeypatch):
    monkeypatch.setattr(figures, "peak_flops", lambda device: 1000.0)
    throughput = Throughput(flops_per_token=10, device_count=2)
    throughput.add(tokens=100, data_wait=0.0)
    clock[0] = 2.0
    assert throughput.read()["mfu"] == 10 * 50 / 2000


def test_peaks_are_found_by_the_name_of_the_device():
    class Device:
        device_kind = "NVIDIA H200"

    assert peak_flops(Device()) == 989e12
    assert peak_flops(jax.local_devices()[0]) == 0


def test_load_balance_of_a_step(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    step = {
        "tokens": np.array([[9.0, 9.0, 9.0, 9.0], [8.0, 2.0, 8.0, 6.0]]),
        "busy": np.array([[1.0, 1.0, 1.0, 1.0], [0.001, 0.001, 0.25, 0.25]]),
    }
    assert load_balance(step, 1, positions=8) == {
        "balance/tokens_min": 2,
        "balance/tokens_max": 8,
        "balance/padding": 1 - 24 / 32,
        "balance/slowest_process": 1,
        "balance/slowest_ms": 250.0,
    }
