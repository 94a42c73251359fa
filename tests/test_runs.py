"""Whole runs, as a user starts them."""

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

from jaxdp import loop
from jaxdp.config import ConfigError, flatten
from jaxdp.generate import generate
from jaxdp.metrics import read_jsonl

pytestmark = pytest.mark.slow
TIMES = {"tokens_per_second", "step_time_ms", "data_wait_ms", "mfu"}


def figures(workdir):
    """What is logged, without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_jsonl(workdir)]


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
    return subprocess.Popen(
        [sys.executable, "-m", "jaxdp.train", *arguments],
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
    assert figures(workdir) == [{k: v for k, v in r.items() if k not in TIMES} for r in records]

    text = command("generate", f"--workdir={workdir}", "--prompt=1 is", "--prompt=2 is").stdout
    assert text.startswith("1 is") and "\n2 is" in text


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "muon"])
def test_resuming_is_not_stopping(config, tmp_path, optimizer):
    """Bit by bit, with dropout, wherever the run was interrupted."""
    config.optimizer.name = optimizer
    config.model.dropout = 0.2
    devices = jax.local_devices()[:2]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    asked = iter(range(100))
    stopped = loop.train(
        config, tmp_path / "parts", devices=devices, stop_requested=lambda: next(asked) >= 2
    )
    assert not stopped.finished and 0 < stopped.step < 6
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert parts.finished
    for a, b in zip(params_of(whole), params_of(parts), strict=True):
        assert a.tobytes() == b.tobytes()
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resuming_on_other_devices_is_the_same_run(config, tmp_path):
    config.model.dropout = 0.2
    loop.train(config, tmp_path / "whole", devices=jax.local_devices()[:1])
    asked = iter(range(100))
    loop.train(
        config,
        tmp_path / "parts",
        devices=jax.local_devices()[:4],
        stop_requested=lambda: next(asked) >= 2,
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


def test_two_processes_are_one(config, tmp_path, command):
    """2 processes x 2 devices on loopback reach the losses of 1 x 4, and stop and go on as one."""
    config.model.dropout = 0.2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        start(*flags(config, tmp_path / "2x2"), *group, f"--process_id={i}", devices=2)
        for i in range(2)
    ]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "4 x cpu in 2 processes" in outs[0]
    assert "Finished" in outs[0] and "Finished" not in outs[1]
    command("train", *flags(config, tmp_path / "1x4"), devices=4)
    assert_close_losses(figures(tmp_path / "2x2"), figures(tmp_path / "1x4"))

    # What two processes wrote, one process reads.
    result = loop.train(config, tmp_path / "2x2", devices=jax.local_devices()[:1])
    assert result.finished and result.step == config.num_train_steps


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
