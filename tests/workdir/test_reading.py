"""What a failure to read a checkpoint means, and what is done about it."""

import errno
import os
import shutil

import jax
import optax
import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.run import resuming, workdir_access
from jaxdp.workdir import integrity, reading
from jaxdp.workdir.parameters import load_params
from support.checkpoints import open_checkpoints, state_of, two_checkpoints
from support.runs import contents


def io_error(number=errno.ESTALE):
    return OSError(number, os.strerror(number))


def tensorstores(text):
    return ValueError(f"UNKNOWN: Error reading local file: Failed [os_error_code='{text}']")


@pytest.fixture
def two(tmp_path, config, monkeypatch):
    """A workdir with checkpoints 3 and 5, where nothing waits."""
    two_checkpoints(tmp_path, config)
    monkeypatch.setattr(reading, "PAUSES", (0, 0))
    return tmp_path


def failing(monkeypatch, name, errors):
    """Makes a function of `integrity` raise these errors first."""
    call, left = getattr(integrity, name), list(errors)

    def fails(*args):
        if left:
            raise left.pop(0)
        return call(*args)

    monkeypatch.setattr(integrity, name, fails)


PLACES = ["readable", "read_extra", "check_arrays", "check_fingerprints"]


@pytest.mark.parametrize("place", PLACES)
def test_an_io_error_is_tried_again(two, config, monkeypatch, place):
    lines = []
    failing(monkeypatch, place, [io_error(), tensorstores(errno.EIO)])
    with open_checkpoints(two, config, report=lines.append) as checkpoints:
        assert checkpoints.restore(state_of(0))[0] == 5
    assert [line.partition(" can't")[2] for line in lines] == [
        " be read (Stale file handle): trying again in 0 s.",
        " be read (Input/output error): trying again in 0 s.",
    ]


@pytest.mark.parametrize("place", PLACES)
def test_an_io_error_that_stays_moves_nothing(two, config, monkeypatch, place):
    before = contents(two)
    failing(monkeypatch, place, [io_error(errno.EACCES)] * 3)
    with (
        pytest.raises(RunError, match=r"can't be read \(Permission denied\): .*nothing was"),
        open_checkpoints(two, config, report=lambda line: None) as checkpoints,
    ):
        checkpoints.restore(state_of(0))
    assert contents(two) == before


FULL = [
    MemoryError(),
    io_error(errno.ENOMEM),
    jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"
    ),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_full_memory_is_told_and_moves_nothing(two, config, monkeypatch, error):
    before, lines = contents(two), []
    failing(monkeypatch, "check_fingerprints", [error, error])
    message = r"\Atoo little memory to read checkpoint 5 \("
    with (
        pytest.raises(RunError, match=message),
        open_checkpoints(two, config, report=lines.append) as checkpoints,
    ):
        checkpoints.restore(state_of(0))
    with pytest.raises(RunError, match=message):
        load_params(two, state_of(0).params, report=lines.append)
    assert contents(two) == before and lines == []


def test_the_cause_of_an_error_tells_what_it_means():
    """Orbax wraps what a device or the disk raises."""
    for cause, full, damage in (
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no"), True, False),
        (jax.errors.JaxRuntimeError("INTERNAL: no"), False, False),
        (io_error(errno.ENOMEM), True, True),
        (io_error(errno.ENOENT), False, True),
        (ValueError("no"), False, True),
    ):
        error = ValueError("reading failed")
        error.__cause__ = cause
        assert (reading.out_of_memory(error), reading.is_damage(error)) == (full, damage)


def test_a_device_that_fails_says_nothing_about_the_files(two, config, monkeypatch):
    before = contents(two)
    failing(monkeypatch, "check_fingerprints", [jax.errors.JaxRuntimeError("INTERNAL: no answer")])
    with (
        open_checkpoints(two, config, report=pytest.fail) as checkpoints,
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
    ):
        checkpoints.restore(state_of(0))
    assert contents(two) == before


def test_parameters_are_read_again_too(two, monkeypatch):
    lines = []
    failing(monkeypatch, "read_extra", [io_error()])
    assert load_params(two, state_of(0).params, report=lines.append)[1] == 5
    assert lines == ["checkpoint 5 can't be read (Stale file handle): trying again in 0 s."]


def test_a_checkpoint_that_its_run_removes_is_not_damaged(two, monkeypatch):
    """A run under way removes old ones while another process reads them."""
    check = integrity.check_arrays

    def too_late(folder, *args):
        if folder.name == "5":
            shutil.rmtree(folder)
        check(folder, *args)

    monkeypatch.setattr(integrity, "check_arrays", too_late)
    assert load_params(two, state_of(0).params, report=pytest.fail)[1] == 3


def test_a_folder_that_can_not_be_read_is_not_an_empty_one(two, config, monkeypatch):
    """Else the run would begin again, beside its checkpoints."""

    def refuse(path):
        raise io_error(errno.EACCES)

    monkeypatch.setattr(integrity.os, "listdir", refuse)
    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied\): choose another"):
        workdir_access.check_workdir(two)
    for read in (
        lambda: open_checkpoints(two, config, report=str),
        lambda: load_params(two, state_of(0).params, report=str),
        lambda: resuming.newest_position(two, config, str),
    ):
        with pytest.raises(RunError, match=r"checkpoints can't be read \(Permission denied\): see"):
            read()


def test_json_that_has_changed_is_damage(two, config):
    """It holds the place in the data, which no fingerprint of an array covers."""
    with open_checkpoints(two, config) as checkpoints:
        checkpoints.save(7, state_of(7), {"sequences": [56]})
    path = two / "checkpoints" / "7" / "extra" / "metadata"
    path.write_text(path.read_text().replace("56", "57"))
    lines = []
    with open_checkpoints(two, config, report=lines.append) as checkpoints:
        assert checkpoints.restore(state_of(0))[0] == 5
    assert lines[0] == "Checkpoint 7 is damaged (DamagedError: its JSON is not what was saved)."


def test_another_structure_is_named_and_moves_nothing(two, config):
    before, state = contents(two), state_of(0)
    for tx in (optax.sgd(0.1), optax.chain(optax.adam(0.1), optax.trace(0.9))):
        like = state.replace(tx=tx, opt_state=tx.init(state.params))
        with (
            open_checkpoints(two, config, report=pytest.fail) as checkpoints,
            pytest.raises(ConfigError, match=r"a different run \(opt_state/.* is .*absent"),
        ):
            checkpoints.restore(like)
    assert contents(two) == before
