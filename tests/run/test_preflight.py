import collections
import contextlib
import multiprocessing
import os
import shutil

import jax
import numpy as np
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.estimate import memory
from jaxdp.run import loop, preflight, rounds, workdir_access
from jaxdp.step.setup import make_setup

VOCAB = 300


def hold(workdir, ready, over):
    with workdir_access.locked(workdir):
        ready.set()
        over.wait(60)


def test_a_workdir_is_for_one_run_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, over))
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(ConfigError, match=f"--workdir={tmp_path} is in use by another run: wait"),
        workdir_access.locked(tmp_path),
    ):
        pass
    other.kill()  # A process that dies leaves no lock behind.
    other.join()
    with workdir_access.locked(tmp_path):
        pass


def test_a_lock_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), workdir_access.locked(tmp_path):
        raise ZeroDivisionError
    with workdir_access.locked(tmp_path):
        pass


def test_something_else_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "lock").symlink_to(tmp_path / "file")
    with (
        pytest.raises(ConfigError, match=r"can't be locked \(.*/lock: .*\): remove that file"),
        workdir_access.locked(tmp_path),
    ):
        pass


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    state = {"x": np.zeros(1000, np.float32), "y": np.zeros((), np.int32)}
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 4004))
    workdir_access.check_disk(tmp_path, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 4003))
    with pytest.raises(ConfigError, match="has 4kB free and a checkpoint takes 4kB: make room"):
        workdir_access.check_disk(tmp_path, state)
    # A run removes what an interrupted save has left.
    left = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "state" / "x"
    left.parent.mkdir(parents=True)
    left.write_text("x")
    workdir_access.check_disk(tmp_path, state)


def test_collectives_that_gloo_would_mix_up_are_refused(config, monkeypatch):
    """With sync.delay two run at once: one between islands, and one within each of them."""
    config.sync.update({"method": "diloco", "islands": 2, "every": 2, "delay": 1})
    setup = make_setup(config, VOCAB, 4)
    preflight.check_delay(setup)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"\Async\.delay=1 does not work on CPUs in several"):
        preflight.check_delay(setup)
    config.sync.islands = 0
    preflight.check_delay(make_setup(config, VOCAB, 4))


def test_a_platform_that_is_not_there_is_refused(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(preflight.jax, "local_devices", fail)
    with pytest.raises(ConfigError, match=r"JAX_PLATFORMS='cuda' can't be used \(Unable to .*'\):"):
        preflight.check_devices()


def test_too_small_a_disk_is_refused_before_anything_is_computed(config, tmp_path, monkeypatch):
    def refuse(workdir, shapes):
        raise ConfigError("full")

    def never(*arguments):
        raise AssertionError("the state was made")

    monkeypatch.setattr(workdir_access, "check_disk", refuse)
    monkeypatch.setattr(loop, "Run", never)
    with pytest.raises(ConfigError, match="full"):
        loop.train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_state_that_can_not_fit_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch, no_compiling
):
    """It takes three times the memory of the parameters, and the first estimate counts two."""
    setup = make_setup(config, VOCAB, 8)
    least = memory.least_bytes(setup)
    for room, refused in ((least - 1, True), (least, False)):
        monkeypatch.setattr(preflight, "device_memory", lambda room=room: room)
        with (
            pytest.raises(ConfigError, match=r"model is too large: its state, .*'adamw', and the")
            if refused
            else contextlib.nullcontext()
        ):
            preflight.check_memory(setup)


def test_a_step_that_does_not_fit_is_refused_once_it_is_compiled(config, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "device_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"the compiled step takes .* which has 1kB: "):
        loop.train(config, tmp_path / "run")


FOREIGN = ["lock", "metrics.jsonl", "config.json", "tensorboard", "checkpoints", "checkpoints/5"]


def anothers_files(workdir):
    for name in ("checkpoints/5", "tensorboard"):
        (workdir / name).mkdir(parents=True)
    for name in ("lock", "metrics.jsonl", "config.json"):
        (workdir / name).touch()


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_another_user_are_refused_before_training(name, tmp_path, monkeypatch):
    """Tests may run as root, whom no permission binds."""
    anothers_files(tmp_path)
    workdir_access.check_workdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path != tmp_path / name)
    message = f"{tmp_path / name} belongs to user .*: make it writable, or use"
    with pytest.raises(ConfigError, match=message):
        workdir_access.check_workdir(tmp_path)


def test_files_that_only_their_owner_can_replace_are_refused(tmp_path, monkeypatch):
    """In a folder for all, such as /tmp."""
    anothers_files(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "access", lambda *_, **__: True)
    workdir_access.check_workdir(tmp_path)
    tmp_path.chmod(0o1777)
    with pytest.raises(
        ConfigError, match=r"config\.json belongs to user \d+, and user 54321 .*: change its owner"
    ):
        workdir_access.check_workdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "train", "evaluation", "warned"),
    [
        ("tfds:a", "train", "train", True),
        ("hf:a", "train", "train[99%:]", True),
        ("tfds:a", "train[:99%]", "train", True),
        ("tfds:a", "train[:99%]", "train[90%:]", True),
        ("tfds:a", "train[:99%]", "train[99%:]", False),
        ("tfds:a", "train[:-1000]", "train[-1000:]", False),
        ("tfds:a", "train[-1000:]", "train[-1000:]", True),
        ("tfds:a", "train[0:]", "train[:10%]", True),
        ("tfds:a", "train[:10%]+test", "train[95%:]+test", True),
        ("hf:a", "train.v1", "train.v1[99%:]", True),
        ("hf:a", "train", "", False),
        ("text:a", "train", "train", False),  # It has no splits of its own.
        ("texts/hf:a.txt", "train", "train", False),  # Nor has this one.
    ],
)
def test_evaluation_on_what_is_trained_on_is_said(config, path, train, evaluation, warned):
    feed, said = Feed(config, open_cache(config)), []
    config.data.update({"path": path, "train_split": train, "eval_split": evaluation})
    preflight.check_data(feed, said.append)
    assert bool(said) == warned and all("text that is trained on" in line for line in said)


@pytest.mark.parametrize(
    ("path", "warned"),
    [
        ("0.5*text:{0}/a.txt+0.5*text:{0}", True),
        ("0.5*text:{0}/a.txt+0.5*text:{0}/link.txt", False),  # Both are divided alike.
        ("0.5*text:{0}/a.txt+0.5*text:{0}/b.txt", False),
    ],
)
def test_trained_on_text_of_another_source_of_a_mixture_is_said(config, tmp_path, path, warned):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("1 is odd " * 99)
    (tmp_path / "link.txt").symlink_to("a.txt")
    config.data.path, said = path.format(tmp_path), []
    preflight.check_data(Feed(config, open_cache(config)), said.append)
    assert len(said) == warned and all("have files in common" in line for line in said)


@pytest.mark.parametrize(
    ("now", "warned"),
    [
        ({}, False),
        ({"eval_split": "train"}, True),
        ({"eval_split": "train[:2%]"}, True),
        ({"eval_split": "other"}, False),
        ({"eval_split": "", "train_split": "other"}, False),
        ({"eval_split": "", "train_split": "train"}, True),
        ({"path": "hf:b", "eval_split": "train"}, False),
    ],
)
def test_other_splits_that_the_run_trained_on_are_said(config, now, warned):
    config.data.update({"path": "hf:a", "train_split": "train[1%:]", "eval_split": "train[:1%]"})
    run, said = config.copy_and_resolve_references(), []
    config.data.update(now)
    preflight.say_of_trained_text(config, run, said.append)
    assert len(said) == warned and all("may be on text that is trained on" in s for s in said)


def test_other_documents_of_a_split_that_the_run_trained_on_are_said(config):
    """Of one split, validation is taken at distances that depend on the fraction."""
    config.data.update({"path": "hf:a", "eval_split": "", "eval_fraction": 0.1})
    for fraction, warned in ((0.1, False), (0.03, True), (0.3, True)):
        run, said = config.copy_and_resolve_references(), []
        config.data.eval_fraction = fraction
        preflight.say_of_trained_text(config, run, said.append)
        assert len(said) == warned
        config.data.eval_fraction = 0.1
    config.eval_sets = "x=hf:a"  # All of its documents.
    preflight.say_of_trained_sets(config, said.append)
    assert said[-1].startswith("Evaluation set x may be trained on")
