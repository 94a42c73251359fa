"""Whole runs, as a user starts them."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, USER_XLA_FLAGS
from test_agreement import corrupt, flip_lowest_bit

from jaxdp.common.config import flatten
from jaxdp.common.errors import ConfigError, RunError
from jaxdp.run import loop
from jaxdp.sync.methods import METHODS
from jaxdp.workdir.generation import generate
from jaxdp.workdir.metrics import read_jsonl

pytestmark = pytest.mark.slow
TIMES = {"tokens_per_second", "step_time_ms", "data_wait_ms", "mfu"}
CLOCKED = TIMES | {"balance/slowest_process", "balance/slowest_ms"}


def figures(workdir):
    """What is logged, without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in CLOCKED} for r in read_jsonl(workdir)]


def after(times):
    """A `stop_requested` that says yes once it has been asked so many times."""
    asked = iter(range(100))
    return lambda: next(asked) >= times


def train_in_parts(config, workdir, devices, times):
    """Trains to the end, each time until asked so often; the result, and the interruptions."""
    for interruptions in itertools.count():
        result = loop.train(config, workdir, devices=devices, stop_requested=after(times))
        if result.finished:
            return result, interruptions


def params_of(result):
    return jax.tree.leaves(jax.device_get(result.state.params))


def assert_close_losses(one, other):
    """Equal up to the order in which float32 numbers are summed, over a few steps."""
    assert [r["step"] for r in one] == [r["step"] for r in other]
    for a, b in zip(one, other, strict=True):
        for name in ("train/loss", "eval/loss"):
            if name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


def contents(workdir):
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def flags(config, workdir, **overrides):
    """The command line that makes configs/default.py the config of the tests."""
    values = flatten(config) | overrides
    keys = [f"--config.{key}={value}" for key, value in values.items() if value != ""]
    return ["--config=configs/default.py", f"--workdir={workdir}", *keys]


def start(*arguments, devices=1):
    """Starts `python -m jaxdp.train` as a user does; returns the process."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jaxdp.train", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": USER_XLA_FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_and_all_it_leaves(config, tmp_path, command):
    workdir = tmp_path / "run"
    config.num_train_steps = 60
    out = command("train", *flags(config, workdir, eval_every=30), devices=2).stdout
    for text in (
        "2 x cpu in 1 process",
        "8 sequences x 16 tokens",
        "per host 8, per device 4, micro 4",
        "evaluation at step 30: loss",
        "bits/byte",
        "gradient_mean, 1 all-reduce per step",
        "Compiled: 1 all-reduce",
        "of the devices' time in collectives",
        "Sample",
        "Finished",
    ):
        assert text in out
    assert json.loads((workdir / "config.json").read_text())["num_train_steps"] == 60
    assert (workdir / "tokenizer.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert {"57", "60"} <= {p.name for p in (workdir / "checkpoints").iterdir()}
    records = read_jsonl(workdir)
    assert [r["step"] for r in records] == list(range(1, 61))
    assert {"train/loss", "eval/loss", "eval/perplexity", *TIMES} <= records[-1].keys()
    # The text is easy; a model that learns nothing stays at log(27) = 3.3.
    assert records[-1]["eval/loss"] < 2.5

    again = command("train", *flags(config, workdir, eval_every=30))
    assert "Already finished: all 60 steps are done" in again.stdout
    assert figures(workdir) == [{k: v for k, v in r.items() if k not in CLOCKED} for r in records]

    text = command("generate", f"--workdir={workdir}", "--prompt=1 is", "--prompt=2 is").stdout
    assert text.startswith("1 is") and "\n2 is" in text


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "muon"])
def test_resuming_is_not_stopping(config, tmp_path, optimizer):
    """Bit by bit, with dropout, wherever the run was interrupted."""
    config.optimizer.name = optimizer
    config.model.dropout = 0.2
    devices = jax.local_devices()[:2]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(2))
    assert not stopped.finished and 0 < stopped.step < 6
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert parts.finished
    for a, b in zip(params_of(whole), params_of(parts), strict=True):
        assert a.tobytes() == b.tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resuming_on_other_devices_is_the_same_run(config, tmp_path):
    config.model.dropout = 0.2
    loop.train(config, tmp_path / "whole", devices=jax.local_devices()[:1])
    loop.train(
        config,
        tmp_path / "parts",
        devices=jax.local_devices()[:4],
        stop_requested=after(2),
    )
    loop.train(config, tmp_path / "parts", devices=jax.local_devices()[:8])
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))


def test_a_killed_run_goes_on_as_if_nothing_had_been(config, tmp_path, command):
    """SIGKILL after the first checkpoint; the files end up the same but for the times."""
    config.num_train_steps = 400
    config.checkpoint.every = 20
    command("train", *flags(config, tmp_path / "whole"))
    process = start(*flags(config, tmp_path / "parts"))
    deadline = time.time() + 120
    folder = tmp_path / "parts" / "checkpoints"
    while not any(path.name.isdigit() for path in folder.glob("*")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    out = command("train", *flags(config, tmp_path / "parts")).stdout
    assert re.search(r"Going on after step \d+", out)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(config, tmp_path, command, number):
    config.num_train_steps = 20_000
    process = start(*flags(config, tmp_path, eval_every=10_000), devices=2)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(number)
            break
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "Stopped as asked; run again to go on" in out
    [step] = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()][-1:]
    command("train", *flags(config, tmp_path, num_train_steps=step + 2, eval_every=10_000))
    assert [r["step"] for r in read_jsonl(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_not_stopping_however_replicas_agree(config, tmp_path, method):
    """Bit by bit: parameters, each device's own moments, DiLoCo's outer momentum."""
    config.sync.update({"method": method, "every": 2})
    config.update({"num_train_steps": 12, "eval_every": 4})
    config.checkpoint.every = 4
    config.model.dropout = 0.2
    devices = jax.local_devices()[:4]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    stopped = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(1))
    assert not stopped.finished and 0 < stopped.step < 12
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    for a, b in zip(*map(jax.tree.leaves, (whole.state, parts.state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_methods_with_one_state_can_follow_each_other(config, tmp_path):
    """The same losses as gradient_mean alone; DiLoCo's state is another, and it is refused."""
    config.model.dropout = 0.2
    config.optimizer.schedule = "constant"  # Parts of the run know nothing of its length.
    config.num_train_steps = 9
    loop.train(config, tmp_path / "whole", devices=jax.local_devices()[:2])
    for method, devices, steps in (("sharded", 4, 3), ("fixed_order", 8, 6), ("sharded", 2, 9)):
        config.sync.method = method
        config.num_train_steps = steps
        loop.train(config, tmp_path / "parts", devices=jax.local_devices()[:devices])
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))
    config.sync.update({"method": "diloco", "every": 3})
    with pytest.raises(ConfigError, match=r"sync\.method='diloco' \(was 'sharded'\)"):
        loop.train(config, tmp_path / "parts")


def test_fixed_order_is_one_run_on_any_devices(config, tmp_path, command):
    """The same bits on 1, 2, 4, 8 devices, on 4 processes x 2, and across changes of devices."""
    config.update({"num_train_steps": 50, "eval_every": 50, "log_every": 50})
    config.sync.method = "fixed_order"
    config.optimizer.schedule = "constant"  # Parts of the run know nothing of its length.
    config.checkpoint.every = 50
    for devices in (1, 2, 4, 8):
        command("train", *flags(config, tmp_path / str(devices)), devices=devices)
    start_group(config, tmp_path / "4x2", processes=4, devices=2)
    for devices, steps in ((4, 20), (2, 35), (8, 50)):
        arguments = flags(config, tmp_path / "changing", num_train_steps=steps)
        command("train", *arguments, devices=devices)
    runs = ["1", "2", "4", "8", "4x2", "changing"]
    ends = [loop.train(config, tmp_path / run).state for run in runs]
    bits = [b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(end)) for end in ends]
    assert len(set(bits)) == 1


@pytest.mark.parametrize("method", ["sharded", "diloco"])
def test_states_of_several_processes(config, tmp_path, command, method):
    """What two processes of two devices each have of their own goes on in one process."""
    config.sync.update({"method": method, "every": 3})
    start_group(config, tmp_path / "parts", processes=2, devices=2)
    assert (tmp_path / "parts" / "checkpoints" / "6").is_dir()
    for run, steps in (("parts", 12), ("whole", 6), ("whole", 12)):
        command("train", *flags(config, tmp_path / run, num_train_steps=steps), devices=4)
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))


def identities(processes):
    """The flags that tell each of several processes who it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*group, f"--process_id={i}"] for i in range(processes)]


def start_group(config, workdir, processes, devices):
    """Runs a config on several processes to the end; returns what they printed."""
    started = [
        start(*flags(config, workdir), *identity, devices=devices)
        for identity in identities(processes)
    ]
    outs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, outs
    return outs


@pytest.mark.parametrize("when", ["at a check", "before a checkpoint"])
def test_a_corrupted_replica_stops_the_run_before_anything_is_saved(
    config, tmp_path, monkeypatch, when
):
    create_state = loop.create_state

    def corrupted(model, optimizer, seed, replicas, method):
        state = create_state(model, optimizer, seed, replicas, method)
        path = "layer_1/mlp/up/kernel"
        return state.replace(params=corrupt(state.params, path, 2, replicas, flip_lowest_bit))

    monkeypatch.setattr(loop, "create_state", corrupted)
    config.optimizer.learning_rate = 0.0  # So that one bit stays one bit.
    config.sync.check_every = 2 if when == "at a check" else 100
    step = 2 if when == "at a check" else 3
    message = f"after step {step} device 2 of 0..3 .* first in params/layer_1/mlp/up/kernel"
    with pytest.raises(RunError, match=message):
        loop.train(config, tmp_path, devices=jax.local_devices()[:4])
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("method", ["gradient_mean", "parameter_mean"])
def test_epochs_end_with_a_batch_that_is_not_full(config, tmp_path, method):
    """Some devices have no token in it; the run ends, and the losses are those of one device."""
    config.update({"num_epochs": 1, "seq_len": 128, "eval_every": 100, "log_every": 1})
    config.sync.update({"method": method, "every": 10})
    config.checkpoint.every = 100
    result = loop.train(config, tmp_path / "many", devices=jax.local_devices()[:8])
    records = figures(tmp_path / "many")
    assert result.finished and [r["step"] for r in records] == list(range(1, result.step + 1))
    assert records[0]["balance/padding"] == 0 < records[-1]["balance/padding"]
    assert records[-1]["balance/tokens_min"] == 0 < records[-1]["balance/tokens_max"]
    if method == "gradient_mean":
        loop.train(config, tmp_path / "one", devices=jax.local_devices()[:1])
        assert_close_losses(figures(tmp_path / "one"), records)


def test_two_processes_are_one(config, tmp_path, command):
    """2 processes x 2 devices on loopback reach the losses of 1 x 4, and stop and go on as one."""
    config.model.dropout = 0.2
    outs = start_group(config, tmp_path / "2x2", processes=2, devices=2)
    assert "4 x cpu in 2 processes" in outs[0]
    assert "Finished" in outs[0] and "Finished" not in outs[1]
    command("train", *flags(config, tmp_path / "1x4"), devices=4)
    assert_close_losses(figures(tmp_path / "2x2"), figures(tmp_path / "1x4"))

    # What two processes wrote, one process reads.
    result = loop.train(config, tmp_path / "2x2", devices=jax.local_devices()[:1])
    assert result.finished and result.step == config.num_train_steps


def test_four_processes_are_one(config, tmp_path, command):
    """A cluster on loopback: 4 processes x 2 devices reach the losses of 1 x 8.

    Not to the bit, but with fixed_order (above): gloo adds the gradients of several processes in
    another order than XLA those of one.
    """
    outs = start_group(config, tmp_path / "4x2", processes=4, devices=2)
    assert "8 x cpu in 4 processes" in outs[0]
    command("train", *flags(config, tmp_path / "1x8"), devices=8)
    assert_close_losses(figures(tmp_path / "4x2"), figures(tmp_path / "1x8"))


def test_many_steps_on_eight_devices_come_to_an_end(config, tmp_path, command):
    """CPU devices wait for each other for ever, until XLA aborts, where too many are in flight."""
    out = command(
        "train",
        *flags(config, tmp_path, num_train_steps=500, log_every=100, eval_every=250),
        "--config.checkpoint.every=250",
        devices=8,
    ).stdout
    assert "500 of 500" in out


def test_masked_language_model(config, tmp_path):
    config.objective = "masked"
    config.tokenizer = "byte"
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    assert result.finished
    with pytest.raises(ConfigError, match="can't continue text"):
        generate(tmp_path, ["a"])


def test_every_option_of_the_model_trains(config, tmp_path):
    config.model.update(
        {
            "positions": "rotary",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "tied_head": False,
            "bias": True,
            "num_kv_heads": 1,
            "dropout": 0.1,
            "dtype": "bfloat16",
            "remat": True,
            "scan_layers": True,
            "vocab_multiple": 32,
        }
    )
    config.tokenizer = "train:bpe:300"
    config.grad_accum_steps = 2
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    assert result.finished and np.isfinite(result.evaluation.loss)
    [text] = generate(tmp_path, ["7 is"], num_tokens=30)
    assert text.startswith("7 is") and len(text) > 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.no_such_key=1", "no_such_key='1' is no key of the config"),
        ("--config.model.num_layer=1", "did you mean model.num_layers?"),
        ("--config.seq_len=long", "--config.seq_len=long"),
        ("--config.seq_len=1", "seq_len=1 is out of range"),
        ("--config.global_batch_size=3", "global_batch_size=3 can't be split equally"),
        ("--config.data.path=/no/such/file", "data.path='/no/such/file' matches no file"),
        ("--config.data.path=tfds:nonsense", "data.path='tfds:nonsense' is not known to TFDS"),
        ("--config.seq_len=10000", "too few for one sequence of seq_len=10000"),
        ("--workdir=/proc/nowhere", "--workdir=/proc/nowhere can't be written"),
        ("--config=configs/nowhere.py", "--config can't be read"),
        ("nonsense", "'nonsense' is not understood"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(config, tmp_path, command, override, message):
    workdir = tmp_path / "run"
    process = command("train", *flags(config, workdir), override, devices=2, check=2)
    [line] = [x for x in process.stderr.splitlines() if x.startswith("jaxdp: ")]
    assert message in line
    assert "Traceback" not in process.stderr
    assert not (workdir / "config.json").exists()


def test_a_missing_accelerator_is_one_line_and_status_2(config, tmp_path, command, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    process = command("train", *flags(config, tmp_path / "run"), check=2)
    assert "jaxdp: JAX_PLATFORMS='cuda' can't be used" in process.stderr
    assert "Traceback" not in process.stderr


def test_another_run_is_not_overwritten(config, tmp_path):
    loop.train(config, tmp_path, devices=jax.local_devices()[:1])
    before = contents(tmp_path)
    other = config.copy_and_resolve_references()
    other.model.num_layers = 3
    with pytest.raises(ConfigError, match=r"model\.num_layers=3 \(was 2\)"):
        loop.train(other, tmp_path)
    other = config.copy_and_resolve_references()
    other.data.eval_fraction = 0.2
    with pytest.raises(ConfigError, match="no longer gives the tokens"):
        loop.train(other, tmp_path)
    assert contents(tmp_path) == before
