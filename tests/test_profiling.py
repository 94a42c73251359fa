import gzip
import json
from collections import Counter

import jax
import pytest

from jaxdp import loop, price
from jaxdp.config import ConfigError, validate
from jaxdp.profiling import Profile


@pytest.fixture
def events(config, tmp_path):
    """Trains and returns what is recorded: how often an event of each name is there."""
    config.update({"num_train_steps": 12, "eval_every": 12})
    config.optimizer.warmup_steps = 1

    def run(workdir=tmp_path, devices=2, **options):
        loop.train(config, workdir, devices=jax.local_devices()[:devices], **options)
        files = list((workdir / "profile").rglob("perfetto_trace.json.gz"))
        if not files:
            return None
        [file] = files
        trace = json.loads(gzip.decompress(file.read_bytes()))
        return Counter(event.get("name") for event in trace["traceEvents"])

    return run


@pytest.mark.parametrize(
    ("method", "start", "asked", "recorded", "steps"),
    [
        ("gradient_mean", 5, 3, 3, "6 to 8"),
        ("gradient_mean", 0, 2, 2, "2 to 3"),  # The first is compiled.
        ("diloco", 4, 2, 1, "7 to 9"),  # A round of three steps.
    ],
)
def test_whole_rounds_are_recorded(
    config, events, tmp_path, capsys, method, start, asked, recorded, steps
):
    """An all-reduce on each device for each of them; no half of one more."""
    config.sync.method = method
    config.profile.update({"start_step": start, "num_steps": asked})
    found = events()
    assert found["train"] == recorded
    reduces = [n for name, n in found.items() if name and name.startswith("all-reduce")]
    assert reduces and all(n == 2 * recorded for n in reduces)
    out = capsys.readouterr().out
    assert f"Profile of steps {steps}: " in out and f"xprof --logdir {tmp_path / 'profile'} " in out


def test_none_by_default(config, events, tmp_path, capsys):
    assert events() is None
    assert not (tmp_path / "profile").exists() and "Profile" not in capsys.readouterr().out


def test_what_is_past_is_not_recorded(config, events, capsys):
    asked = iter(range(100))
    events(stop_requested=lambda: next(asked) >= 5)
    config.profile.update({"start_step": 2, "num_steps": 2})
    assert events() is None


def test_where_the_profiler_is_in_use_the_run_goes_on(config, events, tmp_path, capsys):
    config.profile.update({"start_step": 2, "num_steps": 2})
    own = price.Trace((), 1)
    assert events(tmp_path / "run") is None
    own.stop()
    assert "No profile could be made (Profile has already been started" in capsys.readouterr().out


def test_a_run_that_is_interrupted_leaves_what_is_recorded(config, events, capsys):
    config.profile.update({"start_step": 2, "num_steps": 9})
    asked = iter(range(100))
    found = events(stop_requested=lambda: next(asked) >= 5)
    assert 1 <= found["train"] < 9
    assert "Profile of the steps after 2: " in capsys.readouterr().out


def test_a_full_disk_costs_no_run(config, tmp_path, monkeypatch):
    def fail():
        raise OSError(28, "No space left on device")

    said: list[str] = []
    config.profile.update({"start_step": 0, "num_steps": 1})
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = Profile(config, tmp_path, said.append)
    profile.start(0)
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
