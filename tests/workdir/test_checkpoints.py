import errno
import os
import shutil

import jax
import numpy as np
import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import num_bytes
from jaxdp.parallel import messages
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.step.setup import make_setup
from jaxdp.step.state import abstract_state, saved_shapes, state_axes
from jaxdp.sync.methods import METHODS
from jaxdp.workdir import integrity, saver
from jaxdp.workdir.conversion import Conversion
from jaxdp.workdir.parameters import load_params
from support.checkpoints import open_checkpoints, save_and_evaluate, state_of, two_checkpoints
from support.steps import VOCAB
from support.steps import start as begin


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_nothing_to_restore_in_a_new_workdir(tmp_path, config):
    with open_checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.restore(state_of(0)) is None


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2), (1, 8)])
def test_restores_bit_by_bit_on_other_devices(tmp_path, config, before, after):
    state = state_of(7, value=0.1, devices=before)
    with open_checkpoints(tmp_path, config, before) as checkpoints:
        checkpoints.save(7, state, {"digest": "x"})
    with open_checkpoints(tmp_path, config, after) as checkpoints:
        step, extra, restored = checkpoints.restore(state_of(0, devices=after))
    assert (step, extra["digest"], extra["devices"]) == (7, "x", before)
    for part in ("params", "opt_state"):
        a, b = (jax.tree.structure(getattr(s, part)) for s in (restored, state))
        assert a == b
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert len(a.addressable_shards) == after


def test_keeps_the_newest_the_best_and_the_milestones(tmp_path, config):
    """Also across a restart, which must not forget which one was the best."""
    config.checkpoint.update({"keep_last": 2, "keep_every": 4, "every": 100})
    with open_checkpoints(tmp_path, config) as checkpoints:
        losses = {1: 5.0, 2: 3.0, 3: 1.0, 4: 4.0, 5: None, 6: 6.0, 7: 7.0}
        save_and_evaluate(checkpoints, losses)
    assert saved_steps(tmp_path) == [3, 4, 6, 7]
    with open_checkpoints(tmp_path, config) as checkpoints:
        save_and_evaluate(checkpoints, {9: 3.0, 10: None, 11: 8.0})
    assert saved_steps(tmp_path) == [3, 4, 10, 11]


def test_a_later_best_replaces_the_best(tmp_path, config):
    config.checkpoint.update({"keep_last": 1, "every": 100})
    with open_checkpoints(tmp_path, config) as checkpoints:
        save_and_evaluate(checkpoints, {1: 2.0, 2: 1.0, 3: float("nan"), 4: 3.0})
    assert saved_steps(tmp_path) == [2, 4]


def test_the_former_best_goes_when_the_new_best_is_known(tmp_path, config):
    """A step is saved before it is evaluated, so the loss comes later; maybe to another process."""
    config.checkpoint.update({"keep_last": 1, "every": 100})
    with open_checkpoints(tmp_path, config) as checkpoints:
        save_and_evaluate(checkpoints, {1: 2.0, 2: None})
    assert saved_steps(tmp_path) == [1, 2]
    with open_checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.restore(state_of(0))[0] == 2
        assert [checkpoints.evaluation(step) for step in (1, 2)] == [(2.0, None), None]
        checkpoints.evaluated(2, 1.0)
        assert saved_steps(tmp_path) == [2]
        assert checkpoints.evaluation(2) == (1.0, None)


def test_no_later_step_is_saved_before_a_loss_is_recorded(tmp_path, config, monkeypatch):
    """So only the newest checkpoint can lack its loss; there, a run that resumes evaluates."""

    def full(checkpoint, loss, tokens):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines = []
    with open_checkpoints(tmp_path, config, report=lines.append) as checkpoints:
        monkeypatch.setattr(integrity, "record_eval_loss", full)
        save_and_evaluate(checkpoints, {1: 2.0, 2: 1.0})
        checkpoints.wait()
        assert saved_steps(tmp_path) == [1] and len(lines) == 1
        assert lines[0].startswith("Checkpoint 2 could not be saved (No space left on device)")
        # A roll-back needs the loss, whether it is on disk or not.
        assert checkpoints.evaluation(1) == (2.0, None)
        assert checkpoints.finish(state_of(2)) == (
            "checkpoint 2 could not be saved (No space left on device; the newest is checkpoint 1)"
        )
        monkeypatch.undo()
        assert checkpoints.finish(state_of(2)) == ""
        assert integrity.evaluation(tmp_path / "checkpoints" / "1") == (2.0, None)
        assert integrity.evaluation(tmp_path / "checkpoints" / "2") == (1.0, None)
        checkpoints.save(3, state_of(3), {})
        monkeypatch.setattr(integrity, "record_eval_loss", full)
        checkpoints.evaluated(3, 3.0)
        assert checkpoints.finish(state_of(3)) == (
            "the loss of checkpoint 3 could not be recorded (No space left on device)"
        )


def test_interruptions_leave_the_newest_that_was_due(tmp_path, config):
    """To which a run goes back where it diverges, however often it was stopped since."""
    config.checkpoint.update({"keep_last": 1, "every": 4})
    with open_checkpoints(tmp_path, config) as checkpoints:
        save_and_evaluate(checkpoints, {3: 1.0, 4: 2.0, 5: None, 6: None, 7: None})
    assert saved_steps(tmp_path) == [3, 4, 7]
    with open_checkpoints(tmp_path, config) as checkpoints:
        found = checkpoints.restore(state_of(0), lambda step, extra: step % 4 == 0)
        assert found[0] == 4


def test_what_was_due_stays_so_when_the_interval_changes(tmp_path, config):
    """An interruption's checkpoint doesn't become due by that, either."""
    config.checkpoint.update({"keep_last": 1, "every": 4})
    with open_checkpoints(tmp_path, config) as checkpoints:
        for step in (4, 5, 8, 9):
            checkpoints.save(step, state_of(step), {integrity.GOOD: step % 4 == 0})
    config.checkpoint.every = 3
    with open_checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(10, state_of(10), {integrity.GOOD: False})
    assert saved_steps(tmp_path) == [8, 10]


def test_one_that_has_lost_its_json_is_in_no_others_way(tmp_path, config):
    config.checkpoint.update({"keep_last": 1, "every": 100})
    lines = []
    with open_checkpoints(tmp_path, config, report=lines.append) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        (tmp_path / "checkpoints" / "1" / "extra" / "metadata").unlink()
        save_and_evaluate(checkpoints, {2: None, 3: None})
    assert saved_steps(tmp_path) == [3] and not lines


def test_losses_over_other_text_are_not_compared(tmp_path, config):
    """The best over each text is kept; `best` is over the text of the newest loss."""
    config.checkpoint.update({"keep_last": 1, "every": 100})

    def best():
        steps = integrity.steps_of(tmp_path / "checkpoints")
        return integrity.step_of(tmp_path / "checkpoints", steps, "best")

    with open_checkpoints(tmp_path, config) as checkpoints:
        evaluations = {1: (5.0, None), 2: (2.0, 90), 3: (3.0, 7), 4: (2.5, 7), 5: (2.7, 7)}
        for step, evaluation in evaluations.items():
            checkpoints.save(step, state_of(step), {})
            checkpoints.evaluated(step, *evaluation)
        checkpoints.wait()
        assert saved_steps(tmp_path) == [2, 4, 5] and best() == 4
        assert checkpoints.evaluation(4) == (2.5, 7)
        checkpoints.save(6, state_of(6), {})
        checkpoints.evaluated(6, 2.1, 90)
    assert saved_steps(tmp_path) == [2, 4, 6] and best() == 2


def test_what_can_not_be_removed_costs_a_line(tmp_path, config, monkeypatch):
    """Once for each; the saves count, and what is left is removed as soon as it can be."""
    config.checkpoint.update({"keep_last": 1, "every": 100})
    lines = []

    def fails(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with open_checkpoints(tmp_path, config, report=lines.append) as checkpoints:
        monkeypatch.setattr(saver.shutil, "rmtree", fails)
        save_and_evaluate(checkpoints, {1: None, 2: None, 3: None, 4: None})
        assert checkpoints.finish(state_of(4)) == ""
        assert lines and all("can't be removed (Operation not permitted)" in x for x in lines)
        assert len(set(lines)) == len(lines) <= 3
        assert [int(path.name) for path in integrity.steps(tmp_path / "checkpoints")] == [4]
        monkeypatch.undo()
        # One that stays is in no other's way.
        (tmp_path / "checkpoints" / f"4{saver.REMOVED}").write_text("")
        save_and_evaluate(checkpoints, {5: None})
        checkpoints.wait()
        assert str(tmp_path / "checkpoints" / "4") in lines[-1]
        (tmp_path / "checkpoints" / f"4{saver.REMOVED}").unlink()
        shutil.move(tmp_path / "checkpoints" / "4", tmp_path / "elsewhere")
        (tmp_path / "checkpoints" / "4").symlink_to(tmp_path / "elsewhere")
        save_and_evaluate(checkpoints, {6: None})
    assert saved_steps(tmp_path) == [6]


def test_a_folder_that_is_removed_is_made_again(tmp_path, config):
    """By whom ever, before a save or during it; with the newest state, nothing is lost."""
    lines, folder = [], tmp_path / "run" / "checkpoints"
    with open_checkpoints(tmp_path / "run", config, report=lines.append) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        checkpoints.save(2, state_of(2), {})
        checkpoints.wait()
        assert lines == [f"{folder} was removed under the run; it is made again."]
        checkpoints.save(3, state_of(3), {})
        folder.rename(tmp_path / "moved")
        assert checkpoints.finish(state_of(3)) == ""
        folder.rename(tmp_path / "moved again")
        folder.write_text("")
        checkpoints.save(4, state_of(4), {})
        assert checkpoints.finish(state_of(4)) == (
            "checkpoint 4 could not be saved (File exists; there is no checkpoint)"
        )
        folder.unlink()
        checkpoints.save(5, state_of(5), {})
    with open_checkpoints(tmp_path / "run", config) as checkpoints:
        assert checkpoints.restore(state_of(0))[0] == 5


def test_parameters_alone(tmp_path, config):
    state = state_of(3, value=0.5)
    with open_checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, state, {})
    shapes = jax.eval_shape(lambda: state.params)
    params, step = load_params(tmp_path, shapes)
    assert step == 3
    for a, b in zip(*map(jax.tree.leaves, (params, state.params)), strict=True):
        assert (a == b).all()


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoints does not exist: give the --workdir"):
        load_params(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint: train first"):
        load_params(tmp_path, {})


def own_state(config, devices, step):
    """A state of a method that has an opt_state per device, after a step on different gradients."""
    method = METHODS[config.sync.method](config, AXIS)
    replicas = Replicas(jax.local_devices()[:devices])
    shared = state_of(step, value=0.5, devices=devices)
    axes = state_axes(shared, method)

    def init(state, own):
        opt_state, outer = method.init(state.tx, state.params)
        opt_state = jax.tree.map(lambda x: x + own[0] if x.ndim else x, opt_state)
        return state.replace(opt_state=opt_state, outer=outer)

    own = replicas.shard(np.arange(devices, dtype=np.float32))
    return replicas.pmap(init, out_axes=axes)(shared, own)


@pytest.mark.parametrize("method", ["sharded", "diloco"])
def test_what_each_device_has_of_its_own_comes_back(tmp_path, config, method):
    config.sync.method = method
    state = own_state(config, 4, 7)
    with open_checkpoints(tmp_path, config, 4) as checkpoints:
        checkpoints.save(7, state, {})
    with open_checkpoints(tmp_path, config, 4) as checkpoints:
        _, _, restored = checkpoints.restore(own_state(config, 4, 0))
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        # A slice's padding is not saved, and never used: six numbers on four devices are eight.
        a, b = np.asarray(a), np.asarray(b)
        padded = method == "sharded" and a.shape == (4, 2)
        count = 6 if padded else a.size
        assert a.reshape(-1)[:count].tobytes() == b.reshape(-1)[:count].tobytes()


def test_slices_are_cut_anew_for_other_devices_and_methods(tmp_path, config):
    config.sync.method = "sharded"
    state = own_state(config, 4, 7)
    with open_checkpoints(tmp_path, config, 4) as checkpoints:
        checkpoints.save(7, state, {})
    mu = np.asarray(state.opt_state[0].mu["a"]).reshape(-1)[:6].reshape(2, 3)
    with open_checkpoints(tmp_path, config, 2) as checkpoints:
        _, _, two = checkpoints.restore(own_state(config, 2, 0))
    assert (np.asarray(two.opt_state[0].mu["a"]).reshape(2, 3) == mu).all()
    config.sync.method = "gradient_mean"
    with open_checkpoints(tmp_path, config, 1) as checkpoints:
        _, _, whole = checkpoints.restore(state_of(0))
    assert (np.asarray(whole.opt_state[0].mu["a"]) == mu).all()


def test_diloco_goes_on_with_mean_moments_on_other_devices(tmp_path, config):
    config.sync.method = "diloco"
    with open_checkpoints(tmp_path, config, 4) as checkpoints:
        checkpoints.save(7, own_state(config, 4, 7), {})
    with open_checkpoints(tmp_path, config, 2) as checkpoints:
        _, _, two = checkpoints.restore(own_state(config, 2, 0))
    assert two.opt_state[0].mu["a"].shape == (2, 2, 3)
    assert (np.asarray(two.opt_state[0].mu["a"]) == 1.5).all()


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(path):
    data = bytearray(path.read_bytes())
    for i in range(0, len(data), max(len(data) // 7, 1)):
        data[i] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_bits, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, config, harm):
    """Whatever file of it is harmed: the state restored is one that was saved, to the bit."""
    two_checkpoints(tmp_path / "whole", config)
    harmed = 0
    for i, name in enumerate(files_of(tmp_path / "whole" / "checkpoints" / "5")):
        workdir = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", workdir)
        harm(workdir / "checkpoints" / "5" / name)
        lines = []
        with open_checkpoints(workdir, config, report=lines.append) as checkpoints:
            step, _, state = checkpoints.restore(state_of(0))
        for a, b in zip(
            *map(jax.tree.leaves, (state, state_of(step, value=float(step)))), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
        if step == 3:
            harmed += 1
            assert "Checkpoint 5 is damaged" in lines[0]
            assert (workdir / "checkpoints-damaged" / "5").is_dir()
            assert saved_steps(workdir) == [3]
        else:
            assert step == 5 and not lines  # The file was none that matters.
    assert harmed >= 3


@pytest.mark.parametrize("harmed", [0, 1])
def test_nothing_is_moved_that_only_one_process_finds_damaged(
    tmp_path, config, monkeypatch, harmed
):
    """Process 0 is this one; process 1 tells the opposite of what it finds."""

    def told_by_two(wrong, name=""):
        return [wrong, "" if wrong else "DataLossError"]

    two_checkpoints(tmp_path, config)
    if harmed == 0:
        truncate(tmp_path / "checkpoints" / "5" / "extra" / "metadata")
    before = files_of(tmp_path)
    monkeypatch.setattr(messages, "gather", told_by_two)
    said = f"checkpoint 5 is damaged for process {harmed} .* and not for process {1 - harmed}:"
    with open_checkpoints(tmp_path, config) as checkpoints, pytest.raises(RunError, match=said):
        checkpoints.restore(state_of(0))
    assert files_of(tmp_path) == before


def test_the_same_step_can_be_damaged_twice(tmp_path, config):
    with open_checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, state_of(3), {})
    for _ in range(2):
        with open_checkpoints(tmp_path, config) as checkpoints:
            checkpoints.save(5, state_of(5), {})
        (tmp_path / "checkpoints" / "5" / "extra" / "metadata").unlink()
        with open_checkpoints(tmp_path, config) as checkpoints:
            assert checkpoints.restore(state_of(0))[0] == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints-damaged").iterdir()) == ["5", "5.1"]


def test_where_all_are_damaged_nothing_is_touched(tmp_path, config):
    two_checkpoints(tmp_path, config)
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "extra" / "metadata").unlink()
    left = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "x").write_text("x")
    before = files_of(tmp_path)
    with (
        open_checkpoints(tmp_path, config) as checkpoints,
        pytest.raises(RunError, match=r"all checkpoints in .* are damaged \(5, 3\): restore them"),
    ):
        checkpoints.restore(state_of(0))
    assert files_of(tmp_path) == before
    with open_checkpoints(tmp_path, config) as checkpoints:
        checkpoints.sweep()
    assert not left.exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_checkpoint_is_known_before(config, method):
    config.sync.method = method
    _, replicas, state = begin(config, 4)
    setup = make_setup(config, VOCAB, 4)
    shapes = saved_shapes(abstract_state(setup), setup.method, setup.islands)
    assert num_bytes(Conversion(setup, replicas).saved(state)) == num_bytes(shapes)
