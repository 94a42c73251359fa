import json
import math

import jax
import numpy as np
import pytest

from jaxdp.workdir import metrics
from jaxdp.workdir.metrics import MetricsWriter, Throughput, load_balance, peak_flops, read_jsonl
from support.runs import logged


def test_one_line_per_step(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.write(2, {"train/loss": 1.5, "mfu": None})
        writer.write(2, {"eval/loss": 1.25})
    assert read_jsonl(tmp_path) == [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": 1.5, "mfu": None, "eval/loss": 1.25},
    ]


def test_every_line_is_strict_json(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": math.nan, "eval/perplexity": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["eval/perplexity"] is None


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/l')  # Killed while it wrote.
    with MetricsWriter(tmp_path, config, 3) as writer:
        writer.write(4, {"train/loss": 40.0})
    assert [r["train/loss"] for r in read_jsonl(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_a_flushed_step_is_on_disk(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.flush()
        assert read_jsonl(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_tensorboard_gets_the_scalars(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0) as writer:
        writer.write(3, {"train/loss": 2.0})
        writer.write_text(3, "sample", "Once upon a time")
    tags = logged(tmp_path)
    assert (3, "train/loss") in tags
    assert any(tag.startswith("sample") for _, tag in tags)


def test_an_inactive_writer_writes_nothing(tmp_path, config):
    with MetricsWriter(tmp_path, config, 0, active=False) as writer:
        writer.write(1, {"train/loss": 2.0})
        writer.write_text(1, "sample", "text")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_throughput_counts_steps_and_not_pauses(clock):
    throughput = Throughput(flops_per_token=6, device_count=1)
    throughput.start(steps=-1)
    throughput.add(tokens=100, data_wait=5.0)  # The first step, compiled before.
    throughput.add(tokens=100, data_wait=0.5)
    throughput.add(tokens=100, data_wait=0.1)
    clock[0] = 14.0
    throughput.pause(10.0)
    figures = throughput.read()
    assert figures["tokens_per_second"] == 200 / 4
    assert figures["step_time_ms"] == 2000
    assert figures["data_wait_ms"] == pytest.approx(300)
    assert figures["mfu"] is None  # A CPU's peak isn't known.


def test_throughput_of_no_step_is_unknown(clock):
    assert set(Throughput(6, 1).read().values()) == {None}


def test_mfu_is_a_share_of_all_devices_peak(clock, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1000.0)
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
