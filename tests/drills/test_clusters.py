"""Several processes on loopback are one run."""

import os
import signal

import jax
import numpy as np
import pytest

from jaxdp.run import loop
from support.processes import FreshRun, group, start_group
from support.runs import assert_close_losses, figures, flags


def test_fixed_order_is_one_run_on_any_devices(config, tmp_path):
    """The same bits on 1 device, on 4 processes x 2, and on 4, then 2, then 8 devices."""
    config.update({"num_train_steps": 30, "eval_every": 30, "log_every": 30})
    config.sync.method = "fixed_order"
    config.optimizer.schedule = "constant"  # Parts of the run know nothing of its length.
    config.checkpoint.every = 30
    start_group(config, tmp_path / "4x2", processes=4, devices=2)
    changing = ((4, 10), (2, 20), (8, 30))
    for run, devices, steps in (("1", 1, 30), *(("changing", *part) for part in changing)):
        config.num_train_steps = steps
        loop.train(config, tmp_path / run, devices=jax.local_devices()[:devices])
    ends = [loop.train(config, tmp_path / run).state for run in ("1", "4x2", "changing")]
    bits = [b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(end)) for end in ends]
    assert len(set(bits)) == 1


@pytest.mark.parametrize("method", ["sharded", "diloco"])
def test_states_of_several_processes(config, tmp_path, command, method):
    """What two processes of two devices each have of their own goes on in one process."""
    config.sync.update({"method": method, "every": 3, "islands": 2 if method == "diloco" else 0})
    start_group(config, tmp_path / "parts", processes=2, devices=2)
    assert (tmp_path / "parts" / "checkpoints" / "6").is_dir()
    for run, steps in (("parts", 12), ("whole", 6), ("whole", 12)):
        command("train", *flags(config, tmp_path / run, num_train_steps=steps), devices=4)
    assert_close_losses(figures(tmp_path / "whole"), figures(tmp_path / "parts"))


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


def test_two_processes_have_the_same(config, tmp_path):
    """Each has a slice, which is put together to evaluate, to save and to go on."""
    config.ema.decay, config.sync.method, config.sample.num_tokens = 0.8, "sharded", 8
    config.optimizer.schedule = "constant"  # Whatever the number of steps.
    loop.train(config, tmp_path / "one", devices=jax.local_devices()[:2])
    for steps in (3, 6):
        config.num_train_steps = steps
        start_group(config, tmp_path / "two", processes=2, devices=1)
    assert_close_losses(figures(tmp_path / "one"), figures(tmp_path / "two"))


def test_all_processes_stop_at_the_same_step(overfitting, tmp_path):
    outs = start_group(overfitting, tmp_path, processes=2, devices=1)
    assert "stopped early" in outs[0]
    assert overfitting.num_train_steps > figures(tmp_path)[-1]["step"]


def test_a_learning_rate_that_is_far_too_high(config, tmp_path):
    """As users of two processes meet it: all go back together, and end; a line, and a table."""
    config.num_train_steps = 100
    config.checkpoint.every = 10
    config.optimizer.update({"name": "sgd", "learning_rate": 1e6, "clip_norm": 0.0})
    with group(config, tmp_path / "run") as runs:
        assert [run.ended() for run in runs] == [1, 1], runs[0].printed
    for run in runs:
        assert run.printed.count("lower optimizer.learning_rate") == 1
        assert "Traceback" not in run.printed
    assert "roll-back 3 of at most 3" in runs[0].printed
    assert "layer_0" in runs[0].printed
    assert (tmp_path / "run" / "diagnosis.json").exists()


@pytest.mark.parametrize(
    ("of_main", "said"),
    [
        (["--config.seed=5"], "have different configs: seed=5 and 0: give all the same"),
        (["--workdir={other}"], "--workdir isn't shared by all processes"),
    ],
)
def test_processes_that_do_not_agree_compute_nothing(config, tmp_path, of_main, said):
    flag = [text.format(other=tmp_path / "other") for text in of_main]
    with group(config, tmp_path / "run", main_only=flag) as runs:
        assert [run.ended() for run in runs] == [2, 2], [run.printed for run in runs]
    for run in runs:
        [line] = [line for line in run.printed.splitlines() if line.startswith("jaxdp: ")]
        assert said in line
        assert "Compiling" not in run.printed and "Traceback" not in run.printed


def test_a_command_that_starts_its_processes_is_one_run(config, tmp_path, command):
    """One is killed, all are stopped, all finish: to the bit what one process gives."""
    config.update({"num_train_steps": 20_000, "eval_every": 20_000, "log_every": 10})
    config.checkpoint.every = 20
    config.sync.method = "fixed_order"
    config.optimizer.schedule = "constant"  # Parts of the run know nothing of its length.
    folder = tmp_path / "several" / "checkpoints"

    def newest():
        return max([int(path.name) for path in folder.glob("*") if path.name.isdigit()], default=0)

    def start(**overrides):
        arguments = flags(config, tmp_path / "several", **overrides)
        return FreshRun(*arguments, "--processes=2", devices=1)

    run = start()
    try:
        assert run.until(newest, 600), run.printed
        children = children_of(run.process)
        os.kill(children[1], signal.SIGKILL)
        assert run.ended(600) == 128 + signal.SIGKILL, run.printed
        assert "process 1 of 2 was ended by signal 9 (Killed)" in run.printed
        assert not any(os.path.exists(f"/proc/{child}") for child in children)
        killed = newest()

        run = start()
        assert run.until(lambda: newest() > killed, 600), run.printed
        run.process.send_signal(signal.SIGTERM)
        assert run.ended(600) == 75, run.printed
        assert f"Going on after step {killed}." in run.printed.replace(",", "")

        steps = newest() + 5
        run = start(num_train_steps=steps)
        assert run.ended(600) == 0, run.printed
        assert "2 x cpu in 2 processes" in run.printed
        assert run.printed.count("Finished") == 1
    finally:
        run.kill()
    command("train", *flags(config, tmp_path / "one", num_train_steps=steps), devices=2)
    assert figures(tmp_path / "one") == figures(tmp_path / "several")


def children_of(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as numbers:
        return [int(number) for number in numbers.read().split()]
