"""Real processes that hang, die or stop for a while."""

import signal
import time

import pytest

from support.processes import Run, group
from support.runs import flags


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_ends_when_another_hangs_or_dies(config, tmp_path, process, number):
    """With a line that says so; without the watchdog it took 100 s, or for ever on a GPU."""
    config.update({"num_train_steps": 100_000, "eval_every": 100_000, "hang_seconds": 4})
    config.checkpoint.every = 100_000
    with group(config, tmp_path) as runs:
        assert runs[0].until_printed("\nstep      5/")
        runs[process].process.send_signal(number)
        sent = time.time()
        other = runs[1 - process]
        assert other.ended(60) == 1
        print(f"{time.time() - sent:.1f} s, {other.printed}")
    if number == signal.SIGSTOP:
        # It waits for the other where it fetches metrics, or where it measures the waiting itself.
        assert "Thread 0x" in other.printed and "in train_steps" in other.printed
        silent = ("process 0 does not answer", "silent: process 1 (")
        assert silent[process] in other.printed
    else:
        # JAX, too, says it when process 0 has ended, and would abort the others.
        words = ("another process of the run has ended", "has failed: it has ended without a word")
        assert any(x in other.printed for x in words)
        assert "Traceback" not in other.printed


def test_a_process_that_fails_alone_ends_the_others(config, tmp_path):
    """It must not wait for them at its exit, as JAX would have it do for minutes."""
    with group(config, tmp_path, main_only=["--config.seq_len=1"]) as runs:
        statuses = [run.ended(60) for run in runs]
    assert statuses[0] == 2 and statuses[1] not in (0, 75)
    assert (
        runs[0].printed == "jaxdp: seq_len=1 is out of range: give a value from 2 to 2147483647\n"
    )


def test_a_process_that_was_stopped_goes_on(config, tmp_path):
    """Ctrl-Z and fg, for longer than the watchdog's patience."""
    config.update({"num_train_steps": 100_000, "eval_every": 100_000, "log_every": 50})
    config.hang_seconds = 2
    run = Run(*flags(config, tmp_path))
    try:
        assert run.until_printed("\nstep     50/")
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        run.process.send_signal(signal.SIGCONT)
        continued = time.time()
        assert run.until(lambda: time.time() > continued + 2), run.printed
        run.process.send_signal(signal.SIGTERM)
        assert run.ended() == 75, run.printed
    finally:
        run.kill()
