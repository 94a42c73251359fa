import jax
import numpy as np
import pytest
from jax import lax

from jaxdp.common import hlo
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.sync import traffic
from jaxdp.sync.traffic import Collective


@pytest.mark.parametrize(
    ("kind", "sent", "hops"),
    [("all-reduce", 150, 6), ("reduce-scatter", 75, 3), ("all-gather", 75, 3)],
)
def test_a_ring_of_four(kind, sent, hops):
    assert Collective(kind, 100).sent(4) == sent
    assert Collective(kind, 100).hops(4) == hops
    assert Collective(kind, 100).sent(1) == Collective(kind, 100).hops(1) == 0


def test_rounds_are_shared_by_their_steps():
    round_ = [Collective("all-reduce", 100, 10), Collective("collective-permute", 5, 1)]
    assert traffic.sent_per_step(round_, 4) == 15 + 5


def test_bytes_of_floats_only():
    tree = {"a": np.zeros((2, 3), np.float32), "count": np.zeros((), np.int32)}
    assert traffic.num_bytes(tree) == 24
    assert traffic.num_bytes(tree, "bfloat16") == 12


def compiled(function, x, devices=4):
    replicas = Replicas(jax.local_devices()[:devices])
    step = replicas.pmap(lambda _, part: function(part), out_axes=0)
    arguments = replicas.replicate(np.float32(0)), replicas.shard(x)
    return step, arguments, step.lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("function", "kind", "size"),
    [
        (lambda x: lax.psum(x, AXIS), "all-reduce", 4 * 2 * 8),
        (lambda x: lax.psum_scatter(x[0], AXIS, tiled=True), "reduce-scatter", 4 * 8),
        (lambda x: lax.all_gather(x, AXIS), "all-gather", 4 * 4 * 2 * 8),
        (lambda x: lax.ppermute(x, AXIS, [(0, 1), (1, 0)]), "collective-permute", 4 * 2 * 8),
    ],
)
def test_collectives_of_a_compiled_program(function, kind, size):
    _, _, text = compiled(function, np.ones((8, 8), np.float32))
    [found] = traffic.collectives(text, 4).values()
    assert (found.kind, found.bytes) == (kind, size)


FORMS = {
    "f32[10]{0} all-reduce(%x)": 40,
    "(bf16[], bf16[3,2]{1,0}) all-reduce(%a, %b)": 14,
    "f32[2]{0} reduce-scatter(%x)": 32,
    "f32[20]{0} all-reduce-start(%y)": 80,
    "((f32[10]{0}), f32[10]{0}) all-reduce-start(%x)": 40,
    "(f32[10]{0}, f32[10]{0}) all-reduce-start(%x)": 40,
    "(f32[10]{0}, bf16[4]{0}) all-reduce-start(%x, %y)": 48,
    "((f32[10], bf16[4]), (f32[10], bf16[4])) all-reduce-start(%x, %y)": 48,
    "(f32[2]{0}, f32[8]{0}) all-gather-start(%x)": 32,
    "((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%x, %y)": 48,
    "((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%z)": 32,
    "((f32[8]{0}), f32[2]{0}, u32[], /*index=3*/u32[]) reduce-scatter-start(%z)": 32,
    "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%z)": 32,
    "((f32[8]{0:T(256)}), f32[8]{0:T(256)}) all-to-all-start((f32[8]{0:T(256)}) %z)": 32,
}


@pytest.mark.parametrize("form", FORMS)
def test_bytes_in_all_forms_that_collectives_have(form):
    """GPUs have two instructions for each, of which the first may also show its operands."""
    kind = next(kind for kind in traffic.KINDS if kind in form)
    [(name, found)] = traffic.collectives(f"  %name.1 = {form}, channel_id=1", 4).items()
    assert (name, found.kind, found.bytes) == ("name.1", kind, FORMS[form])


def test_the_end_of_a_collective_is_no_other():
    text = """
      %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1
      ROOT %done = f32[8]{0} all-gather-done((f32[2]{0}, f32[8]{0}) %start)
    """
    assert list(traffic.collectives(text, 4)) == ["start"]
    assert [x.operands for x in hlo.instructions(text.splitlines())] == [("x",), ("start",)]


def test_waiting_is_a_share_of_time_and_none_where_nothing_is_recorded():
    step, arguments, text = compiled(lambda x: lax.psum(x * 2, AXIS), np.ones((8, 64), np.float32))
    jax.block_until_ready(step(*arguments))
    shares = []
    for names in (traffic.collectives(text, 4), ["no-such-thing"]):
        trace = traffic.Trace(names, 4)
        for _ in range(3):
            jax.block_until_ready(step(*arguments))
        shares.append(trace.stop())
    assert 0 < shares[0] < 1.5  # Clocks of host and profiler differ a little.
    assert shares[1] is None
