"""The watchdog, by a clock of the test's own."""

import json
import threading

import jax
import pytest

from jaxdp.common.errors import RunError
from jaxdp.common.streams import Readers
from jaxdp.data import pipeline
from jaxdp.parallel import failures, messages
from jaxdp.run import loop, watchdog
from jaxdp.run.watchdog import FACTOR, SLOW, TICK, Watchdog


class Ended(Exception):
    pass


@pytest.fixture
def end_raises(monkeypatch):
    def end(message):
        raise Ended(message)

    monkeypatch.setattr(watchdog, "end", end)


def pass_seconds(dog, seconds):
    for _ in range(round(seconds / TICK)):
        dog.tick()


def seconds_until_end(dog):
    for count in range(1, 100_000):
        try:
            dog.tick()
        except Ended:
            return count * TICK
    raise AssertionError("never")


@pytest.mark.usefixtures("end_raises")
@pytest.mark.parametrize("first", [1, 15 * SLOW])
def test_the_limit_is_learnt_from_the_first_round_on(first):
    """A round of many local steps may take longer than the setting each time."""
    dog = Watchdog(20)
    dog.beat("training", 0)
    pass_seconds(dog, first)
    dog.beat("training", 1)
    learnt = max(20, FACTOR * first)  # 10 x 1 s would be less than the setting.
    assert seconds_until_end(dog) == learnt + TICK
    dog.beat("training", 2)
    assert seconds_until_end(dog) == (learnt + TICK) * FACTOR + TICK


@pytest.mark.usefixtures("end_raises")
def test_an_activity_teaches_nothing_about_others():
    """Compiling and saving may take long, and still a step that hangs is found soon."""
    dog = Watchdog(20)
    assert seconds_until_end(dog) == 20 * SLOW + TICK
    for step in range(2):
        dog.beat("saving", step, slow=True)
        pass_seconds(dog, 20 * SLOW)
    for step in range(2, 5):
        dog.beat("training", step)
        pass_seconds(dog, 1)
    dog.beat("training", 5)
    assert seconds_until_end(dog) == 20 + TICK
    dog.beat("saving", 5, slow=True)
    assert seconds_until_end(dog) == 20 * SLOW * FACTOR + TICK


@pytest.mark.usefixtures("end_raises")
def test_no_time_passes_while_nobody_takes_what_is_printed(monkeypatch):
    """As after Ctrl-S in the terminal, or while ssh has lost its connection."""
    dog = Watchdog(20)
    with monkeypatch.context() as stuck:
        stuck.setattr(Readers, "waiting", True)
        pass_seconds(dog, 1000 * SLOW)
    assert seconds_until_end(dog) == 20 * SLOW + TICK


@pytest.mark.usefixtures("end_raises")
@pytest.mark.parametrize(("passes", "limit"), [(1, 20 * SLOW), (2, 20)])
def test_the_whole_first_pass_is_slow(passes, limit):
    """Batches are fetched ahead of the one that is compiled for."""
    dog = Watchdog(20)
    for _ in range(passes):
        batches = dog.each(range(3), "evaluating", 4)
        for _ in range(3):
            next(batches)
    assert seconds_until_end(dog) == limit + TICK


@pytest.mark.usefixtures("end_raises")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("behind", "; the others wait for process 2 (waiting for data after step 7); run again"),
        ("together", "; all processes are at the same point; run again"),
        ("silent", "; silent: process 2 (training after step 8); run again"),
        ("unknown", "; silent: process 2 (never heard from); run again"),
        ("deaf", "; process 0 does not answer; run again"),
    ],
)
def test_it_says_who_lags(monkeypatch, case, words):
    told = {}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(messages, "published", lambda: told)
    monkeypatch.setattr(messages, "publish", lambda text: told.update({1: text}))
    dog = Watchdog(60)
    for step in (7, 8):
        dog.beat("training", step)
    dog.talk()
    number = json.loads(told[1])[0]
    message = ""
    for second in range(100):
        told[0] = json.dumps((number, "training", 8, second, False))
        if case != "unknown" and not (case == "silent" and second > 40):
            doing = ("waiting for data", 7) if case == "behind" else ("training", 8)
            told[2] = json.dumps((number - (case == "behind"), *doing, second, False))
        if case != "deaf" or second < 40:
            dog.talk()
        try:
            pass_seconds(dog, 1)
        except Ended as error:
            message = str(error)
            break
    assert message.startswith("no progress for 60 s (the longest before took 0.5 s): training")
    assert words in message
    assert message.endswith("with a larger hang_seconds (now 60; 0: wait for ever)")


def test_a_source_that_hangs_is_found_in_one_process(config, tmp_path, monkeypatch):
    """By the thread, in the midst of a run; when train() is over, there is none."""
    hang = threading.Event()

    def end(message):
        # On a busy machine, what else is done may be too slow as well.
        if "waiting for data after step 3; run again to go on" in message:
            hang.set()

    monkeypatch.setattr(watchdog, "end", end)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    train_batches = pipeline.train_batches

    def hanging(*args, **kwargs):
        for number, batch in enumerate(train_batches(*args, **kwargs)):
            if number == 5:
                assert hang.wait(600)
                raise OSError("the disk is gone")
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", hanging)
    before = set(threading.enumerate())
    config.hang_seconds = 1
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train(config, tmp_path, devices=jax.local_devices()[:1])
    assert "watchdog" not in str(set(threading.enumerate()) - before)


def test_only_a_lost_process_is_called_that(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = jax.errors.JaxRuntimeError
    lost = pytest.raises(RunError, match=r"has ended .*Read error.*; run again")
    with lost, failures.explaining_lost_peers():
        raise error("UNKNOWN: Gloo all-reduce failed: Read error")
    with pytest.raises(error), failures.explaining_lost_peers():
        raise error("RESOURCE_EXHAUSTED: Out of memory")
