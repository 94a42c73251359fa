"""Full disks: a limit on the size of files makes writes fail, until it is lifted."""

import contextlib
import json
import shutil
import subprocess

import pytest

from support.processes import Run, group, limited
from support.runs import assert_same_end, contents, figures, flags

FULL = 700  # Bytes: config.json and metrics.jsonl are larger, and so is each checkpoint's data.


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


def test_a_disk_that_stays_full_ends_the_run_with_a_line(config, tmp_path, undisturbed):
    workdir = tmp_path / "run"
    run = until_saved(config, workdir)
    with limited(run.process.pid, FULL):
        run.ended()
    assert run.process.returncode == 1, run.printed
    [line] = [x for x in run.printed.splitlines() if x.startswith("jaxdp: ")]
    newest = max(whole(workdir))
    assert len(list((workdir / "checkpoints").iterdir())) == len(whole(workdir))
    saved = f"(File too large; the newest is checkpoint {newest})"
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
    assert "checkpoint 120 could not be saved (File too large; the newest is checkpoint" in lines[0]


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
