"""The benchmarks whose figures matter only elsewhere: that they work."""

import sys

import pytest

from support.texts import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

from turns import Contestant, OutOfMemory


def contestant(body):
    return Contestant(sys.executable, "-c", f"import turns\nturns.run(lambda: {body})")


def test_contestants_take_turns_and_tell_of_too_little_memory(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "benchmarks"))
    one = contestant("turns.serve(lambda n: turns.time.sleep(n / 1000), lambda: 12345)")
    assert one(20) >= 0.001 and one.peak == 12345
    one.end()
    with pytest.raises(OutOfMemory):
        contestant("turns.serve(lambda n: exec('raise ValueError(\"CUDA out of memory\")'))")
    with pytest.raises(SystemExit, match="has ended with 1"):
        contestant("turns.serve(lambda n: exec('raise ValueError(\"wrong\")'))")
