import jax
import numpy as np
from jax import lax

from jaxdp.parallel.replicas import AXIS, Replicas, prefetch, row_numbers


def test_rows_number_the_global_batch():
    replicas = Replicas(jax.local_devices()[:4])
    step = replicas.pmap(lambda _, x: lax.all_gather(row_numbers(len(x)), AXIS))
    rows = step(replicas.replicate(np.float32(0)), replicas.shard(np.zeros(12)))
    assert (np.asarray(rows) == np.arange(12).reshape(4, 3)).all()


def test_shard_gives_each_device_its_rows_in_order():
    sharded = Replicas(jax.local_devices()[:4]).shard({"x": np.arange(8)})["x"]
    assert sharded.shape == (4, 2)
    pieces = {s.device: np.asarray(s.data) for s in sharded.addressable_shards}
    for i, device in enumerate(jax.local_devices()[:4]):
        assert (pieces[device] == [[2 * i, 2 * i + 1]]).all()


def test_state_keeps_its_shape_and_is_on_every_device():
    replicas = Replicas(jax.local_devices()[:4])
    state = replicas.replicate(np.arange(3.0))
    new = replicas.pmap(lambda s, x: s + lax.psum(x.sum(), AXIS))(state, replicas.shard(np.ones(8)))
    assert new.shape == (3,)
    assert new.sharding.is_fully_replicated
    assert len(new.addressable_shards) == 4
    assert all((s.data == np.arange(3.0) + 8).all() for s in new.addressable_shards)


def test_donated_state_is_not_copied_again():
    """A step takes only arrays that are already on the devices."""
    replicas = Replicas(jax.local_devices()[:2])
    step = replicas.pmap(lambda s, x: s + lax.psum(x.sum(), AXIS), donate=True)
    batch = replicas.shard(np.ones(4))
    state = step(replicas.replicate(np.zeros(3)), batch)
    with jax.transfer_guard("disallow"):
        new = step(state, batch)
    assert state.is_deleted()
    assert (new == 8).all()


def test_prefetch_keeps_order_and_loses_nothing():
    replicas = Replicas(jax.local_devices()[:2])
    for count in (0, 1, 2, 5):
        got = list(prefetch((np.full(2, i) for i in range(count)), replicas.shard))
        assert [int(x[0, 0]) for x in got] == list(range(count))


def test_steps_of_a_round_stay_in_order():
    replicas = Replicas(jax.local_devices()[:2])
    sharded = replicas.shard_steps([{"x": np.arange(4) + 10 * i} for i in range(3)])["x"]
    assert (
        np.asarray(sharded) == [[[0, 1], [10, 11], [20, 21]], [[2, 3], [12, 13], [22, 23]]]
    ).all()


def test_each_device_gets_its_own_and_gives_it_back():
    replicas = Replicas(jax.local_devices()[:4])
    own = replicas.put_per_device({"x": np.arange(12).reshape(4, 3)})
    assert [int(s.data[0, 0]) for s in own["x"].addressable_shards] == [0, 3, 6, 9]
    step = replicas.pmap(lambda s, _: s + 1, state_axes=0, out_axes=0)
    back = replicas.gather_per_device(step(own["x"], replicas.shard(np.zeros(4))))
    assert (back == np.arange(12).reshape(4, 3) + 1).all()
