import jax
import numpy as np
import pytest
from jax import lax

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


def test_names_as_gpu_programs_have_them():
    text = """
      %all-reduce-start.1 = ((f32[10]{0}), f32[10]{0}) all-reduce-start(%x), channel_id=1
      %all-reduce-start.2 = f32[20]{0} all-reduce-start(%y), channel_id=2
      %reduce-scatter-start = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%z)
      %all-reduce-done.1 = f32[10]{0} all-reduce-done(%all-reduce-start.1)
      %all-reduce-done.2 = f32[20]{0} all-reduce-done(%all-reduce-start.2)
      %reduce-scatter-done = f32[2]{0} reduce-scatter-done(%reduce-scatter-start)
      ROOT %psum.2 = (bf16[], bf16[3,2]{1,0}) all-reduce(%a, %b), to_apply=%add
    """
    found = traffic.collectives(text, 4)
    assert [(n, c.kind, c.bytes) for n, c in found.items()] == [
        ("all-reduce-start.1", "all-reduce", 40),
        ("all-reduce-start.2", "all-reduce", 80),
        ("reduce-scatter-start", "reduce-scatter", 32),
        ("psum.2", "all-reduce", 14),
    ]


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
