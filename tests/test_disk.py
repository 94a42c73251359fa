"""Full disks: a limit on the size of files makes writes fail, until it is lifted."""

import asyncio
import contextlib
import errno
import gc
import json
import os
import resource
import shutil
import subprocess

import pytest
from orbax.checkpoint._src.path import async_path
from test_faults import Run, assert_same_end, group
from test_runs import contents, figures, flags
from test_step import VOCAB
from test_step import start as begin

from jaxdp.common.errors import ConfigError
from jaxdp.common.files import PatientFile, num_bytes, reason, write_whole
from jaxdp.data.cache import open_cache
from jaxdp.model.transformer import ModelConfig, Transformer
from jaxdp.run import loop, preflight
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.step.train_step import saved_shapes
from jaxdp.sync.methods import METHODS
from jaxdp.workdir import saver
from jaxdp.workdir.checkpoints import Checkpoints

FULL = 700  # Bytes: config.json and metrics.jsonl are larger, and so is each checkpoint's data.


class FullDisk:
    """A raw file on a disk that takes `room` bytes."""

    room = 0

    def __init__(self, path, mode):
        self._file = open(path, mode, buffering=0)  # noqa: SIM115
        self.tell, self.truncate, self.close = map(
            self._file.__getattribute__, ("tell", "truncate", "close")
        )

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: self.room]
        FullDisk.room -= len(taken)
        return self._file.write(taken)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr("jaxdp.common.files.FileIO", FullDisk)
    return FullDisk


def test_what_has_no_room_is_written_later_at_the_very_byte(tmp_path, full_disk):
    file = PatientFile(tmp_path / "folder" / "file")
    for room, data in ((100, b"one\n"), (3, b"two, long\n"), (0, b"three\n"), (2, b"four\n")):
        full_disk.room = room
        file.write(data)
    assert file.waiting() == 3 and file.error.errno == errno.ENOSPC
    full_disk.room = 100
    file.flush()
    assert file.waiting() == 0 and file.error is None
    assert (tmp_path / "folder" / "file").read_bytes() == b"one\ntwo, long\nthree\nfour\n"


def test_a_part_that_stays_alone_is_removed_at_the_end(tmp_path, full_disk):
    file = PatientFile(tmp_path / "file")
    full_disk.room = 6
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"one\n"


def test_reasons_are_the_systems():
    inner = OSError(errno.EDQUOT, "Disk quota exceeded")
    outer = RuntimeError("Failed")
    outer.__cause__ = inner
    assert reason(outer) == "Disk quota exceeded"
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28'] [...]")
    assert reason(tensorstore) == "No space left on device"
    assert reason(ValueError("something\nelse")) == "ValueError: something"


@contextlib.contextmanager
def limited(process, size):
    """Files that a process writes end at `size` bytes."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


def test_a_file_that_has_no_room_stays_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, "old")
    with limited(0, 2), pytest.raises(ConfigError, match=r"config.json can't be written \(File "):
        write_whole(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_half_a_token_cache_is_not_left(config, tmp_path):
    config.data.cache_dir = str(tmp_path / "tokens")
    with (
        limited(0, 1000),
        pytest.raises(
            ConfigError, match=r"data.cache_dir='.*' can't be written \(File too large\)"
        ),
    ):
        open_cache(config)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]
    assert len(open_cache(config).train) > 1000


async def _own(path, text):
    path.write_text(text)


@pytest.mark.parametrize("whose, told", [(async_path.write_text, False), (_own, True)])
@pytest.mark.parametrize("start", [asyncio.ensure_future, lambda x: asyncio.gather(x)])
def test_only_orbax_fails_in_silence_where_nobody_awaits(tmp_path, caplog, whose, told, start):
    saver._quieten()

    async def forget():
        task = start(whose(tmp_path / "missing" / "file", ""))
        while not task.done():
            await asyncio.sleep(0.01)

    asyncio.run(forget())
    gc.collect()
    assert ("FileNotFoundError" in caplog.text) == told


def test_too_small_a_disk_is_refused_before_anything_is_computed(config, tmp_path, monkeypatch):
    def refuse(workdir, shapes):
        raise ConfigError("full")

    def never(*arguments):
        raise AssertionError("the state was made")

    monkeypatch.setattr(preflight, "check_disk", refuse)
    monkeypatch.setattr(loop, "create_state", never)
    with pytest.raises(ConfigError, match="full"):
        loop.train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_checkpoint_is_known_before(config, tmp_path, method):
    config.sync.method = method
    program, replicas, state = begin(config, 4)
    model = Transformer(ModelConfig.from_config(config, VOCAB))
    optimizer = get_optimizer(config, get_schedule(config))
    shapes = saved_shapes(model, optimizer, program.method, 4)
    with Checkpoints(tmp_path, config, replicas, program.method) as checkpoints:
        assert num_bytes(checkpoints._saved(state)) == num_bytes(shapes)


def long(config):
    config.update({"num_train_steps": 900, "log_every": 10, "eval_every": 450})
    config.checkpoint.update({"every": 150, "keep_last": 1})
    config.model.dropout = 0.2
    return config


def whole(workdir):
    """The checkpoints that are whole, and all that is in them."""
    folders = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    return {int(p.name): contents(p) for p in folders}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


def finish(config, workdir):
    run = Run(*flags(config, workdir))
    assert run.ended() == 0, run.printed


def until_saved(config, workdir):
    """A run that has saved its first checkpoint."""
    run = Run(*flags(long(config), workdir))
    assert run.until(lambda: whole(workdir)), run.printed
    return run


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_leaves_no_trace(config, tmp_path, undisturbed):
    workdir = tmp_path / "run"
    run = until_saved(config, workdir)
    with limited(run.process.pid, FULL):
        assert run.until(lambda: "could not be saved" in run.printed), run.printed
        before = whole(workdir)
        assert run.until(lambda: run.printed.count("could not be saved") > 1), run.printed
        assert whole(workdir) == before != {}
    run.ended()
    assert run.process.returncode == 0, run.printed
    assert "File too large): training goes on; the next try is at step" in run.printed
    assert "Traceback" not in run.printed and "ERROR" not in run.printed
    finish(config, undisturbed)
    assert_same_end(config, workdir, undisturbed)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_a_line(config, tmp_path, undisturbed):
    workdir = tmp_path / "run"
    run = until_saved(config, workdir)
    with limited(run.process.pid, FULL):
        run.ended()
    assert run.process.returncode == 1, run.printed
    [line] = [x for x in run.printed.splitlines() if x.startswith("jaxdp: ")]
    newest = max(whole(workdir))
    assert len(list((workdir / "checkpoints").iterdir())) == len(whole(workdir))
    saved = f"(File too large; the newest is that of step {newest})"
    assert f"checkpoint 900 could not be saved {saved}" in line
    assert "lines of metrics.jsonl could not be written (File too large)" in line
    before = run.printed.partition("jaxdp: ")[0]
    assert "Traceback" not in before and "ERROR" not in before
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        json.loads(text)
    finish(config, workdir)
    if not (undisturbed / "checkpoints").exists():
        finish(config, undisturbed)
    assert_same_end(config, workdir, undisturbed)


@pytest.mark.slow
def test_processes_that_find_the_disk_full_end_alike(config, tmp_path):
    """Only process 0 writes checkpoints; that it can't, all of them learn, and none waits."""
    long(config).sync.method = "sharded"
    config.update({"num_train_steps": 120, "eval_every": 120})
    config.checkpoint.every = 40
    with group(config, tmp_path) as runs:
        assert runs[0].until(lambda: whole(tmp_path)), runs[0].printed
        with limited(runs[0].process.pid, FULL):
            for run in runs:
                run.ended()
    lines = [x for run in runs for x in run.printed.splitlines() if x.startswith("jaxdp: ")]
    assert [run.process.returncode for run in runs] == [1, 1], [run.printed for run in runs]
    assert len(lines) == 2 and len(set(lines)) == 1
    assert "checkpoint 120 could not be saved (File too large; the newest is that of" in lines[0]


@pytest.mark.slow
def test_a_file_system_that_is_full(config, tmp_path):
    """The same with a real one, where the tests may mount it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        run = until_saved(config, tmp_path / "run")
        with open(tmp_path / "ballast", "wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            assert run.until(lambda: "could not be saved (No space left" in run.printed), (
                run.printed
            )
            ballast.truncate(0)
        run.ended()
        assert run.process.returncode == 0, run.printed
        assert max(whole(tmp_path / "run")) == 900
        assert [r["step"] for r in figures(tmp_path / "run")] == list(range(10, 901, 10))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
