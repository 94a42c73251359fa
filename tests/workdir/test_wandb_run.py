"""Runs in Weights & Biases; the server is never asked."""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.workdir import wandb_run
from jaxdp.workdir.metrics import MetricsWriter, read_jsonl


def never(line):
    raise AssertionError(line)


def children():
    """The processes that this one has started, by Linux's list of its threads' children."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(number) for path in tasks for number in path.read_text().split()}


@pytest.fixture
def place(tmp_path):
    """Workdirs of the same name in different folders."""

    def make(name):
        (tmp_path / name / "seed0").mkdir(parents=True, exist_ok=True)
        return tmp_path / name / "seed0"

    return make


def test_each_workdir_has_an_id_of_its_own_and_keeps_it(place):
    one, other = (wandb_run.run_id(place(name), never) for name in ("small", "large"))
    assert one != other
    assert wandb_run.run_id(place("small"), never) == one


def test_a_moved_workdir_is_the_same_run_and_a_copy_is_another(place, tmp_path):
    first = wandb_run.run_id(place("a"), never)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    said: list[str] = []
    copied = wandb_run.run_id(place("b"), said.append)
    assert copied != first and "is a copy of" in said[0]
    assert wandb_run.run_id(place("b"), never) == copied
    (tmp_path / "a").rename(tmp_path / "c")
    assert wandb_run.run_id(place("c"), never) == first
    assert wandb_run.run_id(place("a"), never) not in (first, copied)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"id": 1}', "\x00", "[" * 10_000])
def test_a_damaged_id_is_replaced(text, place):
    (place("a") / wandb_run.FILE).write_text(text)
    found = wandb_run.run_id(place("a"), never)
    assert len(found) == 12 and wandb_run.run_id(place("a"), never) == found


@pytest.fixture
def fake(monkeypatch, config):
    """A package wandb that records the calls, and raises what is put into `failing`."""
    config.wandb_project = "mine"
    calls, failing = [], {}

    def does(name):
        def call(*args, **options):
            calls.append((name, options.get("mode")))
            if name in failing and options.get("mode") != "offline":
                raise failing[name]
            return run

        return call

    run = SimpleNamespace(log=does("log"), finish=does("finish"), step=0)
    errors = SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))
    module = SimpleNamespace(Settings=dict, errors=errors)
    for name in ("init", "login", "teardown"):
        setattr(module, name, does(name))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return SimpleNamespace(calls=calls, failing=failing, errors=errors, run=run)


def test_without_a_key_a_run_is_refused(fake, config):
    wandb_run.check(config)
    fake.failing["login"] = fake.errors.UsageError(
        "No API key configured. Use `wandb login`.\nmore"
    )
    with pytest.raises(
        ConfigError, match=r"wandb_project='mine': .*No API key.* WANDB_API_KEY"
    ) as e:
        wandb_run.check(config)
    assert "\n" not in str(e.value)


def test_a_server_that_is_away_is_no_missing_key(fake, config):
    fake.failing["login"] = OSError("connection refused")
    wandb_run.check(config)


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_the_training_goes_on_whatever_fails_in_wandb(name, fake, config, tmp_path):
    fake.failing[name] = OSError("connection refused")
    said: list[str] = []
    with MetricsWriter(tmp_path, config, 0, say=said.append) as writer:
        for step in (1, 2):
            writer.write(step, {"train/loss": 2.0})
    assert [r["step"] for r in read_jsonl(tmp_path)] == [1, 2]
    assert len(said) == 1 and "connection refused" in said[0] and "training goes on" in said[0]
    assert (("init", "offline") in fake.calls) == (name == "init")


def test_what_wandb_would_ignore_is_said(fake, config, tmp_path):
    """After a kill, a run goes on from a checkpoint before the last step that wandb has."""
    fake.run.step = 4
    said: list[str] = []
    with MetricsWriter(tmp_path, config, 1, say=said.append) as writer:
        for step in (2, 3, 4, 5):
            writer.write(step, {"train/loss": 2.0})
    assert [name for name, _ in fake.calls].count("log") == 2
    assert len(said) == 1 and "wandb has this run up to step 3 already" in said[0]


def test_wandb_itself_offline(config, place, monkeypatch, tmp_path):
    """A restart goes on with its run, and another workdir of the same name doesn't."""
    pytest.importorskip("wandb", reason="needs the extra wandb, of 70 MB")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.wandb_project = "mine"
    wandb_run.check(config)
    for name, start in (("a", 0), ("a", 1), ("b", 0)):
        with MetricsWriter(place(name), config, start, say=never) as writer:
            writer.write(start + 1, {"train/loss": 2.0})
    ids = [
        [path.name.rsplit("-", 1)[1] for path in (place(name) / "wandb").glob("offline-run-*")]
        for name in ("a", "b")
    ]
    own = [wandb_run.run_id(place(name), never) for name in ("a", "b")]
    assert ids == [[own[0]] * 2, [own[1]]]


def test_wandb_itself_loses_its_service(config, place, monkeypatch):
    """The last test: in this process wandb has no service from then on."""
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb, of 70 MB")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.wandb_project = "mine"
    wandb.teardown()  # So that the service belongs to this run alone.
    before, said = children(), []
    with MetricsWriter(place("a"), config, 0, say=said.append) as writer:
        writer.write(1, {"train/loss": 2.0})
        for service in children() - before:
            os.kill(service, signal.SIGKILL)
        step = 1
        while not said and step < 1000:
            writer.write(step := step + 1, {"train/loss": 2.0})
    assert [r["step"] for r in read_jsonl(place("a"))] == list(range(1, step + 1))
    assert len(said) == 1 and "wandb has failed" in said[0] and "goes on without it" in said[0]
