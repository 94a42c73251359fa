"""Sums of which only small integers cross the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.common.choices import LEVELS
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.sync import compression
from jaxdp.sync.encoding import decode, encode, num_encoded_bytes
from jaxdp.sync.islands import Islands
from jaxdp.workdir.conversion import Conversion
from support.steps import batches, bits, choose, start, train


@pytest.mark.parametrize(("levels", "largest"), [(256, 127), (16, 7)])
def test_rounding_loses_at_most_half_of_a_block_s_unit(levels, largest):
    """The unit is the largest number of a block, divided by 127 or 7, to 8 bits."""
    x = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    x[:, 128:256] *= 1e-6
    sent = encode(jnp.asarray(x), levels)
    assert sent.dtype == jnp.uint8
    assert sent.shape == (3, num_encoded_bytes(300, levels))
    lost = np.abs(x - np.asarray(decode(sent, 300, levels)))
    for part in (slice(0, 128), slice(128, 256), slice(256, 300)):
        unit = np.abs(x[:, part]).max(-1) / largest
        # A unit that bfloat16 rounds down by 2^-9 makes the largest number too large by that.
        limit = np.maximum(0.5 * (1 + 2**-8), largest * 2**-8) * unit
        assert (lost[:, part].max(-1) <= limit).all()


@pytest.mark.parametrize(("levels", "share"), [(4, 0.1175), (3, 0.1902), (2, 1 - 2 / np.pi)])
def test_few_levels_lose_little_of_normal_numbers_and_never_all(levels, share):
    """The share of the squares that the best 4, 3 and 2 levels lose (Max 1960, table I).

    What is lost of any block is less than the block, so what error feedback keeps stays small.
    """
    x = np.random.default_rng(0).normal(size=(1, 2**16)).astype(np.float32)
    found = np.asarray(decode(encode(jnp.asarray(x), levels), x.size, levels))
    # Four levels that are equally far apart lose 0.1188 rather than 0.1175.
    assert np.sum((x - found) ** 2) / np.sum(x**2) == pytest.approx(share, rel=0.03)
    alone = np.zeros((1, 128), np.float32)
    alone[0, 5] = -3
    for block in (alone, np.ones_like(alone), x[:, :128] ** 5):
        found = np.asarray(decode(encode(jnp.asarray(block), levels), 128, levels))
        assert np.sum((block - found) ** 2) < np.sum(block**2)


@pytest.mark.parametrize("levels", LEVELS.values())
def test_whole_units_zeros_and_what_is_not_finite(levels):
    """Levels that are equally far apart are kept: integers, or halves if they are 4 or 2."""
    count = levels - 1 if levels > 4 else levels  # As many below 0 as above it.
    numbers = np.arange(count) - (count - 1) / 2
    x = np.zeros((1, 384), np.float32)
    x[0, :128] = np.resize(numbers, 128) if levels <= 4 else np.pad(numbers, (0, 128))[:128]
    x[0, 300] = np.nan
    found = np.asarray(decode(encode(jnp.asarray(x), levels), 384, levels))
    np.testing.assert_array_equal(found[:, :256], x[:, :256])
    assert np.isnan(found[:, 256:]).all()
    x[0, 300] = np.inf
    assert not np.isfinite(np.asarray(decode(encode(jnp.asarray(x), levels), 384, levels))[0, 300])


def summed(steps, levels, islands):
    """Exact sums and sums received over some steps, and the last residuals, of all devices."""
    rng, replicas = np.random.default_rng(0), Replicas(jax.local_devices()[: islands.devices])
    residual = compression.empty_residual(
        {"a": np.zeros((7, 20)), "b": np.zeros(3)}, islands.devices
    )
    residual = jax.tree.map(lambda x: np.stack([x] * islands.devices), residual)

    def step(lost, tree):
        tree = jax.tree.map(lambda x: x[0], tree)
        return compression.compressed_sum(tree, lost, AXIS, levels, islands.devices)

    p_step = replicas.pmap(step, state_axes=0, out_axes=0)
    exact, got = [], []
    for _ in range(steps):
        tree = {"a": rng.normal(size=(4, 7, 20)), "b": rng.normal(size=(4, 3))}
        tree = jax.tree.map(np.float32, tree)
        found, residual = p_step(residual, replicas.shard(tree))
        found = jax.device_get(found)
        assert all(
            bits(jax.tree.map(lambda x, i=i: x[i], found))
            == bits(jax.tree.map(lambda x: x[0], found))
            for i in range(4)
        )
        exact.append(jax.tree.map(lambda x: x.sum(0), tree))
        got.append(jax.tree.map(lambda x: x[0], found))
    return exact, got, jax.device_get(residual)


@pytest.mark.parametrize("levels", LEVELS.values())
def test_what_is_lost_is_kept_and_comes_later(levels):
    """After any number of steps: sums received + what is kept = exact sums, on equal devices."""
    islands = Islands(4, 4)
    exact, got, residual = summed(20, levels, islands)
    assert bits(exact[0]) != bits(got[0])
    like = exact[0]
    total = jax.tree.map(lambda *x: sum(x), *exact)
    received = jax.tree.map(lambda *x: sum(x), *got)
    # Of other devices, the same is kept.
    for where in (islands, Islands(2, 2), Islands(8, 2), Islands(8, 8), Islands(1, 1)):
        kept = compression.move_residual(residual, like, islands, where)
        back = compression.move_residual(kept, like, where, Islands(1, 1))
        for name, x in like.items():
            lost = (
                back["sent"][name].reshape(-1)[: x.size]
                + back["summed"][name].reshape(-1)[: x.size]
            )
            # Eighty float32 numbers near 1 are added.
            np.testing.assert_allclose(
                received[name] + lost.reshape(x.shape), total[name], atol=1e-4
            )


@pytest.mark.parametrize("method", ["gradient_mean", "sharded", "diloco"])
def test_training_with_int4_is_close_to_training_with_float32(config, method):
    """The mean loss of the last steps is nearer to float32's than the loss falls per step."""
    config.optimizer.learning_rate = 3e-3
    runs = {
        dtype: train(choose(config, method, every=2, dtype=dtype), 4, steps=12, uneven=False)
        for dtype in ("float32", "int4")
    }
    losses = {name: [float(f["loss"]) for f in figures] for name, (figures, _) in runs.items()}
    assert losses["float32"] != losses["int4"]
    fallen = losses["float32"][0] - np.mean(losses["float32"][-4:])
    apart = abs(np.mean(losses["float32"][-4:]) - np.mean(losses["int4"][-4:]))
    assert fallen > 0 and apart < 0.1 * fallen


@pytest.mark.parametrize("dtype", list(LEVELS))
def test_a_checkpoint_of_slices_keeps_all_that_devices_hold(config, dtype):
    """Also where slices are padded, as with 4 devices and arrays of 18 numbers."""
    config.model.embed_dim = 18
    program, replicas, state = start(choose(config, "sharded", dtype=dtype), 4)
    for done, batch in enumerate(batches(3)):
        state, _ = program(done, state, replicas.shard_steps([batch]))
    conversion = Conversion(program.setup, replicas)
    again = conversion.state(conversion.saved(state), state, program.setup.islands)
    held = jax.device_get((state.params, state.opt_state, state.residual))
    assert bits(held) == bits(jax.device_get((again.params, again.opt_state, again.residual)))


def test_an_update_that_is_not_finite_leaves_the_residual_as_it_was(config):
    choose(config, "gradient_mean", dtype="int8")
    program, replicas, state = start(config, 2)
    first, second = batches(2)
    state, _ = program(0, state, replicas.shard_steps([first]))
    before = jax.device_get(state.residual)
    assert any(x.any() for x in jax.tree.leaves(before))
    second["weights"] = np.full_like(second["weights"], np.nan)
    state, metrics = program(1, state, replicas.shard_steps([second]))
    assert metrics["skipped"][0] > 0
    assert bits(before) == bits(jax.device_get(state.residual))
