import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from jaxdp.checkpoint import Checkpoints, load_params
from jaxdp.config import ConfigError
from jaxdp.parallel import Replicas


def state_of(step, value=0.0, devices=1):
    params = {"a": jnp.arange(6.0).reshape(2, 3) + value, "b": {"c": jnp.full((4,), value)}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    grads = jax.tree.map(jnp.ones_like, params)
    state = state.apply_gradients(grads=grads).replace(step=jnp.array(step, jnp.int32))
    return Replicas(jax.local_devices()[:devices]).replicate(state)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_nothing_to_restore_in_a_new_workdir(tmp_path, config):
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest() is None


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2), (1, 8)])
def test_restores_bit_by_bit_on_other_devices(tmp_path, config, before, after):
    state = state_of(7, value=0.1, devices=before)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(7, state, {"digest": "x"}, 1.5)
    replicas = Replicas(jax.local_devices()[:after])
    with Checkpoints(tmp_path, config) as checkpoints:
        step, extra = checkpoints.latest()
        restored = checkpoints.restore(step, state_of(0, devices=after), replicas)
    assert (step, extra) == (7, {"digest": "x"})
    for part in ("params", "opt_state"):
        a, b = (jax.tree.structure(getattr(s, part)) for s in (restored, state))
        assert a == b
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert len(a.addressable_shards) == after


def test_keeps_the_newest_the_best_and_the_milestones(tmp_path, config):
    """Also across a restart, which must not forget which one was the best."""
    config.checkpoint.update({"keep_last": 2, "keep_every": 4})
    state = state_of(0)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in enumerate([5.0, 3.0, 1.0, 4.0, None, 6.0, 7.0], 1):
            checkpoints.save(step, state, {}, loss)
    assert saved_steps(tmp_path) == [3, 4, 6, 7]
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in ((9, 3.0), (10, None), (11, 8.0)):
            checkpoints.save(step, state, {}, loss)
    assert saved_steps(tmp_path) == [3, 4, 10, 11]


def test_a_later_best_replaces_the_best(tmp_path, config):
    config.checkpoint.keep_last = 1
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in enumerate([2.0, 1.0, float("nan"), 3.0], 1):
            checkpoints.save(step, state_of(0), {}, loss)
    assert saved_steps(tmp_path) == [2, 4]


def test_parameters_alone(tmp_path, config):
    state = state_of(3, value=0.5)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, state, {}, None)
    shapes = jax.eval_shape(lambda: state.params)
    params, step = load_params(tmp_path, shapes)
    assert step == 3
    for a, b in zip(*map(jax.tree.leaves, (params, state.params)), strict=True):
        assert (a == b).all()


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoints does not exist: --workdir"):
        load_params(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no checkpoint: train first"):
        load_params(tmp_path, {})
