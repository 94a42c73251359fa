"""Runs in this process, and what they leave."""

import itertools
import json

import jax
import numpy as np
from tensorboardX.proto import event_pb2

from jaxdp.common.config import flatten
from jaxdp.huggingface import save
from jaxdp.run import loop
from jaxdp.workdir import finished, integrity
from jaxdp.workdir.metrics import read_jsonl

TIMES = {"tokens_per_second", "step_time_ms", "data_wait_ms", "mfu"}
CLOCKED = TIMES | {"wall_time", "balance/slowest_process", "balance/slowest_ms"}


def figures(workdir):
    """What is logged, without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in CLOCKED} for r in read_jsonl(workdir)]


def checkpoints_of(workdir):
    """{step: (its validation loss with the tokens, the state of early stopping in it)}."""
    found = {}
    for path in integrity.steps(workdir / "checkpoints"):
        extra = json.loads((path / "extra" / "metadata").read_text())
        found[int(path.name)] = integrity.evaluation(path), extra["stopping"]
    return found


def after(times):
    """A `stop_requested` that says yes once it has been asked so many times.

    It is asked once at the start, twice for each round, before it waits for its data and then, and
    before each batch of an evaluation.
    """
    asked = itertools.count()
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


def assert_same_end(config, one, other):
    """Two finished runs have the same parameters, to the bit, and have logged the same."""
    states = (loop.train(config, place).state for place in (one, other))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert figures(one) == figures(other)


def logged(workdir):
    """[(step, tag)] of TensorBoard's events."""
    [path] = (workdir / "tensorboard").iterdir()
    tags, data = [], path.read_bytes()
    while data:  # TFRecord: length, its checksum, event, its checksum.
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        tags += [(event.step, value.tag) for value in event.summary.value]
        data = data[16 + length :]
    return tags


def opened(workdir, tmp_path, which="newest"):
    """The folder, and the run as it lies in the workdir."""
    save.export(workdir, tmp_path / "out", which)
    return tmp_path / "out", finished.open_workdir(workdir)
