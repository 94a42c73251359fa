import gzip
import json
from collections import Counter

import jax
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.run import loop
from jaxdp.run.profiling import Profile
from jaxdp.step.setup import validate
from jaxdp.sync import traffic


def events(workdir):
    """How often an event of each name was recorded."""
    [file] = (workdir / "profile").rglob("perfetto_trace.json.gz")
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return Counter(event.get("name", "") for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("method", "asked", "recorded", "steps"),
    [("gradient_mean", 3, 3, "5 to 7"), ("diloco", 2, 1, "7 to 9")],  # A round of three steps.
)
def test_whole_rounds_are_recorded(config, tmp_path, capsys, method, asked, recorded, steps):
    """An all-reduce on each device for each of them; no half of one more."""
    config.update({"num_train_steps": 12, "eval_every": 12})
    config.sync.method = method
    config.profile.update({"start_step": 4, "num_steps": asked})
    loop.train(config, tmp_path, devices=jax.local_devices()[:2])
    found = events(tmp_path)
    assert found["train"] == recorded
    reduces = [n for name, n in found.items() if name.startswith("all-reduce")]
    assert reduces and all(n == 2 * recorded for n in reduces)
    out = capsys.readouterr().out
    assert f"Profile of steps {steps}: xprof --logdir {tmp_path / 'profile'} " in out


def test_where_the_profiler_is_in_use_the_run_goes_on(config, tmp_path, capsys):
    config.profile.update({"start_step": 2, "num_steps": 2})
    own = traffic.Trace((), 1)
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:1])
    own.stop()
    assert result.finished and not (tmp_path / "profile").exists()
    assert "No profile could be made (Profile has already been started" in capsys.readouterr().out


@pytest.fixture
def rounds(config, tmp_path, monkeypatch):
    """Goes through rounds of a run: when the profiler starts and stops, and what is said."""
    log = []

    def run(numbers, length=1, new=()):
        profile = Profile(config, tmp_path, numbers[0], log.append)
        monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: log.append(f"on {done}"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append(f"off {done}"))
        for done in numbers:
            with profile.round(done, (), done in new):
                pass
            if profile.stop(done + length, ()):
                log.append("ended")
        profile.close()
        profile.close()
        return [line.split(": xprof")[0] for line in log]

    return run


def test_none_by_default(rounds):
    assert rounds(range(100)) == []


def test_what_has_to_be_compiled_is_not_recorded(config, rounds):
    config.profile.update({"start_step": 0, "num_steps": 2})
    assert rounds(range(9), new=[0]) == ["on 1", "off 2", "Profile of steps 2 to 3", "ended"]


def test_what_is_past_is_not_recorded(config, rounds):
    config.profile.update({"start_step": 4, "num_steps": 2})
    [said] = rounds(range(5, 20))
    assert rounds(range(4, 20))[1:] == ["on 4", "off 5", "Profile of steps 5 to 6", "ended"]
    assert said.startswith("No profile is made: the run goes on after step 5, ")
    assert "profile.start_step=4: set that to 5 or more" in said


def test_a_run_that_goes_on_after_its_profile_says_nothing(config, rounds, tmp_path):
    config.profile.update({"start_step": 4, "num_steps": 2})
    (tmp_path / "profile").mkdir()
    assert rounds(range(5, 20)) == []


@pytest.mark.parametrize(
    ("total", "length", "start"), [(1, 1, 0), (6, 6, 0), (6, 6, 3), (12, 6, 7), (12, 3, 10)]
)
def test_what_to_change_is_said_where_none_could_be_made(config, rounds, total, length, start):
    """And each of these ways leads to one."""

    def said(done):
        return rounds(range(0, done, length), length=length, new=[0])

    config.profile.update({"start_step": start, "num_steps": 1})
    config.num_train_steps = total
    [line] = said(total)
    assert line.startswith("No profile was made: no round from profile.start_step=")
    assert "train for longer, or use a smaller one, in a new --workdir" in line
    config.num_train_steps = 10 * total
    [_, line] = said(total)
    assert f"when the run goes on, set that to {total} or more" in line
    assert said(4 * total)[-1] == "ended"


def test_a_run_that_ends_before_its_profile_says_so(config, rounds):
    config.profile.update({"start_step": 4, "num_steps": 2})
    config.num_train_steps = 3
    [said] = rounds(range(3), new=[0])
    assert said == (
        "No profile was made: the run ended after step 3, and profile.start_step=4: train for "
        "longer, or use a smaller one, in a new --workdir."
    )


def test_a_run_of_one_round_says_that_it_has_no_profile(config, tmp_path, capsys):
    config.update({"num_train_steps": 6, "eval_every": 6})
    config.sync.update({"method": "diloco", "every": 6})
    config.checkpoint.every = 6
    config.profile.update({"start_step": 0, "num_steps": 4})
    assert loop.train(config, tmp_path, devices=jax.local_devices()[:2]).finished
    assert "No profile was made: " in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_rounds_are_whole(config, rounds):
    config.profile.update({"start_step": 4, "num_steps": 4})
    said = ["on 6", "off 9", "Profile of steps 7 to 12", "ended"]
    assert rounds(range(0, 30, 3), length=3) == said


def test_a_run_that_is_interrupted_leaves_what_is_recorded(config, rounds):
    config.profile.update({"start_step": 4, "num_steps": 4})
    assert rounds(range(6)) == ["on 4", "off 5", "Profile of the steps after 4"]


def test_a_full_disk_costs_no_run(config, tmp_path, monkeypatch):
    def fail():
        raise OSError(28, "No space left on device")

    said: list[str] = []
    config.profile.update({"start_step": 0, "num_steps": 1})
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = Profile(config, tmp_path, 0, said.append)
    with profile.round(0, (), new=False):
        pass
    assert profile.stop(1, ()) and "No space left" in said[0]
    profile.close()
    assert len(said) == 1


def test_steps_beyond_the_end_are_refused(config):
    config.profile.update({"start_step": 4, "num_steps": 2})
    validate(config)
    for change in ({"num_steps": 3}, {"start_step": 6, "num_steps": 1}):
        config.profile.update(change)
        with pytest.raises(ConfigError, match=r"profile\.start_step=.* reach beyond .*=6: make"):
            validate(config)
    config.profile.num_steps = 0
    validate(config)
