"""Real `python -m jaxdp.train` processes, killed and harmed."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from support.processes import Run, group
from support.runs import assert_same_end, figures, flags


def when(moment, run, workdir, cache, delay):
    """Returns once it is the moment to kill a run, or the run has ended."""
    began = time.time()
    conditions = {
        "any time": lambda: time.time() > began + 8 * delay,
        "training": lambda: "\nstep " in run.printed,
        "saving": lambda: any((workdir / "checkpoints").glob("*tmp*")),
        "evaluating": lambda: "\nevaluation" in run.printed,
        "building the cache": lambda: any(cache.glob("*.building")),
    }
    if run.until(conditions[moment]) and moment in ("training", "evaluating"):
        reached = time.time()
        run.until(lambda: time.time() > reached + delay)


STEPS = 2000  # More than a fast machine makes before the last kill.
KILLS = {
    "adamw": ("building the cache", "saving", "evaluating"),
    "lion": ("any time", "training", "building the cache"),
    "sgd": ("any time", "saving", "training"),
    "muon": ("training", "saving", "evaluating"),
}


@pytest.mark.parametrize("optimizer", KILLS)
def test_kills_leave_no_trace(config, tmp_path, optimizer):
    """SIGKILL while saving, evaluating, building the cache, training, and at any time."""
    config.update({"num_train_steps": STEPS, "log_every": 50, "eval_every": 200})
    config.checkpoint.every = 25
    config.model.dropout = 0.2
    config.optimizer.name = optimizer
    config.data.cache_dir = str(tmp_path / "tokens")
    workdir, cache = tmp_path / "parts", tmp_path / "tokens"
    draw = random.Random(optimizer)
    killed = []
    for moment in KILLS[optimizer]:
        if moment == "building the cache":
            shutil.rmtree(cache, ignore_errors=True)
        run = Run(*flags(config, workdir))
        when(moment, run, workdir, cache, draw.random())
        if run.process.poll() is None:
            killed.append(moment)
        run.kill()
        assert "Traceback" not in run.printed, run.printed
    assert killed == list(KILLS[optimizer])
    config.checkpoint.every = STEPS  # When it saves changes nothing.
    for place in (workdir, tmp_path / "whole"):
        run = Run(*flags(config, place))
        assert run.ended() == 0, run.printed
    assert figures(tmp_path / "whole") == figures(workdir)
    assert fingerprints(tmp_path / "whole") == fingerprints(workdir)


def fingerprints(workdir):
    """Of all arrays of the last state, moments too, as its checkpoint has them."""
    extra = workdir / "checkpoints" / str(STEPS) / "extra" / "metadata"
    found = json.loads(extra.read_text())["fingerprints"]
    assert any(name.startswith("opt_state") for name in found)
    return found


def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(config, tmp_path):
    """While compiling, evaluating and training: all save the same step and exit with 75."""
    config.update({"num_train_steps": 120, "log_every": 10, "eval_every": 40})
    config.checkpoint.every = 100
    config.model.dropout = 0.2
    # An evaluation begins when its step has been logged; its first batch has to be compiled.
    moments = {
        "compiling": ("Compiling", signal.SIGTERM),
        "evaluating": ("\nstep     40/", signal.SIGUSR1),
        "training": ("\nstep     70/", signal.SIGHUP),
    }
    newest = 0
    for number, (moment, (sign, sent)) in enumerate(moments.items()):
        with group(config, tmp_path / "parts") as runs:
            assert runs[0].until_printed(sign)
            runs[(number + 1) % 2].process.send_signal(sent)
            asked = time.time()
            statuses = [run.ended() for run in runs]
            print(f"{moment}: {time.time() - asked:.1f} s from the signal to the end")
        assert statuses == [75, 75], [run.printed for run in runs]
        assert "Stopped as asked" in runs[0].printed
        if newest:
            assert f"Going on after step {newest}." in runs[0].printed
        # Process 0 says it, whichever was asked.
        assert runs[0].printed.count("jaxdp: stopping after this step (") == 1
        assert "stopping" not in runs[1].printed
        steps = [int(path.name) for path in (tmp_path / "parts/checkpoints").iterdir()]
        before, newest = newest, max(steps, default=0)
        # Where it was asked before the first step, there was nothing to save.
        assert newest > before or moment == "compiling"
    assert newest < config.num_train_steps
    for place in ("parts", "whole"):
        with group(config, tmp_path / place) as runs:
            assert [run.ended() for run in runs] == [0, 0], runs[0].printed
    assert_same_end(config, tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_goes_on_as_if_nothing_had_been(config, tmp_path, command):
    """SIGKILL after the first checkpoint; the files end up the same but for the times."""
    config.num_train_steps = 400
    config.checkpoint.every = 20
    command("train", *flags(config, tmp_path / "whole"))
    run = Run(*flags(config, tmp_path / "parts"), devices=1)
    folder = tmp_path / "parts" / "checkpoints"
    assert run.until(lambda: any(path.name.isdigit() for path in folder.glob("*")))
    run.kill()
    out = command("train", *flags(config, tmp_path / "parts")).stdout
    assert re.search(r"Going on after step \d+", out)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
