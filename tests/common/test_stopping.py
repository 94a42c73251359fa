"""Requests to stop; signals come to processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

from jaxdp.common.errors import Stopped
from jaxdp.common.stopping import SAME, SIGNALS, Received, StopRequest
from support.texts import REPOSITORY

# Busy in C for ever, so that Python calls no handler.
BUSY = """
import ctypes, os, sys, threading
from jaxdp.common.stopping import Listener, StopRequest
def say(line): print(line, flush=True)
listener = Listener(StopRequest(say=say))
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)  # No signal interrupts it.
"""
# Sleeps where it may be interrupted.
TOKENISING = """
import sys, time
from jaxdp.common.errors import Stopped
from jaxdp.common.stopping import Listener, StopRequest
request = StopRequest(say=lambda line: None)
Listener(request)
try:
    with request.interruptible():
        print("ready", flush=True)
        time.sleep(1000)
except Stopped:
    print("interrupted", request.asked, flush=True)
    sys.exit(75)
"""


@pytest.fixture
def start():
    """Starts a script; none outlives the test."""
    started = []

    def launch(script, *before):
        command = [*before, sys.executable, "-c", script]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield launch
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_told_at_once_whatever_the_process_does(start, number):
    """Also where Python can't handle it: while XLA compiles or a round runs."""
    process = start(BUSY)
    process.send_signal(number)
    assert process.stdout.readline() == f"stopping ({signal.Signals(number).name})\n"


def test_a_signal_that_is_sent_again_ends_the_process(start):
    process, deadline = start(BUSY), time.time() + 60
    while process.poll() is None:
        process.terminate()
        assert time.time() < deadline
        time.sleep(SAME / 4)
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stdout.read() == "stopping (SIGTERM)\n"


def test_only_an_urgent_signal_that_comes_again_later_counts(monkeypatch):
    received, now = Received(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for after, number, again in (
        (0, signal.SIGUSR1, 0),
        (0, signal.SIGINT, 0),
        (SAME, signal.SIGINT, 0),  # The same one, by another way.
        (60, signal.SIGTERM, 0),  # SLURM's, later, to save what can be saved.
        (60, signal.SIGUSR1, 0),
        (60, signal.SIGINT, signal.SIGINT),
        (60, signal.SIGTERM, signal.SIGINT),
    ):
        now[0] += after
        received.add(number)
        assert (received.first, received.again) == (signal.SIGUSR1, again)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_may_be_interrupted_ends_at_once(start, number):
    process = start(TOKENISING)
    process.send_signal(number)
    assert process.stdout.readline() == "interrupted True\n"
    assert process.wait(60) == 75


def test_nohup_is_respected(start):
    process = start(BUSY, "nohup")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping (SIGTERM)\n"


FORKING = """
import os, signal, time
from jaxdp.common.stopping import Listener, StopRequest
Listener(StopRequest(say=lambda line: print(line, flush=True)))
print("ready", flush=True)
if not (child := os.fork()):
    while True: time.sleep(1)
os.kill(child, signal.SIGTERM)
print("child ended by", os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_forked_process_has_its_own_signals(start):
    """A signal to it ends it, as a pool of processes expects, and asks its parent for nothing."""
    process = start(FORKING)
    assert process.stdout.read() == "child ended by 15\n"


STUCK = """
import sys
from jaxdp.common import streams
from jaxdp.common.stopping import Listener, StopRequest
streams.protect()
request = StopRequest()
Listener(request)
print("ready", flush=True)
for _ in range(10_000): print("more than a pipe holds")
sys.exit(75 if request.asked else 0)
"""


def test_a_reader_that_takes_nothing_keeps_no_process_from_stopping(start):
    process = start(STUCK)
    process.terminate()
    assert process.wait(60) == 75


WAITING = BUSY.replace("for _ in", "with request.ends_within(0.0, 75):\n  for _ in").replace(
    "listener = Listener(StopRequest(say=say))", "request = StopRequest(); Listener(request)"
)


def test_waiting_for_others_in_vain_ends_with_a_status(start):
    """Where jax.distributed waits for a process that could not be started."""
    process = start(WAITING)
    process.terminate()
    assert process.wait(60) == 75


ENDING = """
import os, signal, sys
from jaxdp.common.stopping import SIGNALS, Listener, StopRequest
class Last:
    def __del__(self, kill=os.kill, me=os.getpid(), numbers=SIGNALS):
        for number in numbers: kill(me, number)
Listener(StopRequest())
sys.last = Last()  # Among the last to go.
print("ready", flush=True)
sys.exit(75)
"""


def test_a_signal_changes_no_status_while_the_interpreter_ends(start):
    assert start(ENDING).wait(60) == 75


def test_a_request_lasts():
    said, heard = [], []
    request = StopRequest(say=said.append)
    request.on_ask(lambda: heard.append(1))
    request.check()
    with request.interruptible():
        pass
    request.when = "after this step"
    request.ask("SIGTERM")
    request.ask("SIGINT")
    request.on_ask(lambda: heard.append(2))
    assert request.asked and said == ["stopping after this step (SIGTERM)"] and heard == [1, 2]
    request.check()  # Not here.
    with pytest.raises(Stopped), request.interruptible():
        raise AssertionError("this block is not to begin")


def test_a_program_can_be_polled():
    answers = iter([False, True])
    request = StopRequest(lambda: next(answers))
    with request.interruptible():  # It is not, here.
        request.check()
    assert [request.asked, request.asked] == [False, True]


@pytest.fixture(autouse=True)
def hangup():
    """Not as the tests may have been started, by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
