"""Eight forced CPU devices, small configs, and caches of the tests' own."""

import gc
from pathlib import Path

from support import environment

environment.prepare()

import jax
import pytest
from ml_collections import ConfigDict

from jaxdp.configs import default
from jaxdp.run import loop
from support import bad_input, processes
from support.texts import TEXT


@pytest.fixture(autouse=True)
def room_for_programs():
    """Frees compiled programs before the kernel's limit of memory maps per process is reached.

    Each takes a few dozen; beyond 65,530, the usual vm.max_map_count, XLA aborts the process.
    """
    yield
    with open("/proc/self/maps") as maps:
        count = sum(1 for _ in maps)
    if count > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A token cache shared by all tests of a session."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of about 28 kB that is easy to learn."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(text_file, cache_dir) -> ConfigDict:
    """A model so small that compiling it is most of the work."""
    c = default.get_config()
    c.data.path = str(text_file)
    c.data.cache_dir = str(cache_dir)
    c.tokenizer = "char"
    c.num_train_steps = 6
    c.global_batch_size = 8
    c.seq_len = 16
    c.log_every = 1
    c.eval_every = 3
    c.model.num_layers = 1
    c.model.num_heads = 2
    c.model.embed_dim = 16
    c.optimizer.learning_rate = 1e-2
    c.optimizer.warmup_steps = 2
    c.sync.every = 3
    c.checkpoint.every = 3
    c.sample.num_tokens = 0
    return c


@pytest.fixture
def short(config):
    """A config of a run of 2 steps."""
    config.num_train_steps, config.optimizer.warmup_steps, config.checkpoint.every = 2, 1, 1
    config.eval_every = 2
    return config


@pytest.fixture
def overfitting(config):
    """The loss falls at first, and then no more."""
    config.update({"num_train_steps": 100, "eval_every": 2, "eval_max_batches": 4})
    config.optimizer.update({"learning_rate": 0.1, "schedule": "constant", "warmup_steps": 9})
    config.checkpoint.every = 10
    config.stop.patience = 3
    return config


@pytest.fixture
def command(cache_dir):
    """Runs `python -m jaxdp.NAME ...` in a fork; returns the finished process."""
    return processes.command


@pytest.fixture
def fresh_command(cache_dir):
    """Runs `python -m jaxdp.NAME ...` as a user does; returns the finished process."""
    return processes.fresh_command


@pytest.fixture
def no_compiling(monkeypatch, tmp_path):
    """Ends a training where it would begin to compile, in a folder and a home of the test's own."""

    def reached(*args):
        raise bad_input.Reached

    monkeypatch.setattr(loop, "Run", reached)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text_file, cache_dir) -> Path:
    """A finished run with two checkpoints."""
    c = default.get_config()
    c.data.path, c.data.cache_dir, c.tokenizer = str(text_file), str(cache_dir), "char"
    c.num_train_steps, c.global_batch_size, c.seq_len, c.eval_every = 4, 4, 16, 4
    c.model.num_layers, c.model.num_heads, c.model.embed_dim = 1, 1, 8
    c.optimizer.warmup_steps, c.checkpoint.every, c.sample.num_tokens = 1, 2, 0
    workdir = tmp_path_factory.mktemp("trained") / "run"
    bad_input.train(c, workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    """A copy of it; `renewed` makes another."""
    return bad_input.renewed(tmp_path / "run", trained)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells how many bad inputs it has tried."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["bad inputs"] = dict(bad_input.TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds what a worker has tried."""
    bad_input.TRIED.update(getattr(node, "workeroutput", {}).get("bad inputs", {}))


def pytest_terminal_summary(terminalreporter):
    """Says how many bad inputs there were."""
    if bad_input.TRIED:
        count, kinds = bad_input.TRIED.total(), dict(bad_input.TRIED)
        terminalreporter.write_line(f"{count} bad inputs tried: {kinds}")
