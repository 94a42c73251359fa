"""The benchmarks whose figures matter only elsewhere: that they work, and read programs rightly."""

import sys

import jax
import numpy as np
import pytest
from jax import lax

from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.sync import traffic
from support.texts import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

from schedule import Schedule
from turns import Contestant, OutOfMemory


def scheduled(function):
    """The schedule of a program of two devices, and where its one collective stands."""
    replicas = Replicas(jax.local_devices()[:2])
    step = replicas.pmap(lambda _, x: function(x[0]), out_axes=0)
    arguments = replicas.replicate(np.float32(0)), replicas.shard(np.ones((2, 64, 64), np.float32))
    text = step.lower(*arguments).compile().as_text()
    [name] = traffic.collectives(text, 2)
    schedule = Schedule(text)
    return schedule, schedule.place(name)


PRODUCT = 2 * 64**3  # FLOPs.


def test_a_collective_that_waits_for_all_products():
    schedule, place = scheduled(lambda x: lax.psum(x @ x, AXIS))
    assert schedule.flops == PRODUCT
    assert (place.flops_before, place.flops_free) == (1, 0)


def test_a_collective_that_all_products_wait_for():
    schedule, place = scheduled(lambda x: lax.psum(x, AXIS) @ x)
    assert schedule.flops == PRODUCT
    assert (place.flops_before, place.flops_free) == (0, 0)
    assert place.number <= schedule.length


def test_products_that_could_hide_a_collective():
    """Three in a loop could; one before and one after could not."""

    def function(x):
        loop = lax.fori_loop(0, 3, lambda _, y: y @ x, x)
        return lax.psum(x.T @ x, AXIS) @ x, loop

    schedule, place = scheduled(function)
    assert schedule.flops == 5 * PRODUCT
    assert place.flops_free == pytest.approx(3 / 5)


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
