"""The parameters' exponential moving average (EMA), compared with its definition."""

import itertools

import jax
import numpy as np
import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.run import evaluation, loop
from jaxdp.step.ema import decay_over, updated
from jaxdp.sync.methods import METHODS
from jaxdp.workdir.parameters import load_params
from support.runs import after, figures
from support.steps import batches, bits, choose, start

# A few roundings of numbers below 1, on each of two ways to compute the same average.
TOLERANCE = 1e-6


def train(config, devices, steps=6):
    """Trains; returns [(steps done, parameters)] of each round, and the parameters to evaluate."""
    config.num_train_steps = steps
    program, replicas, state = start(config, devices)
    after, waiting = [(0, jax.device_get(state.params))], batches(steps)
    while (done := after[-1][0]) < steps:
        part = list(itertools.islice(waiting, program.round_length(done)))
        state, _ = program(done, state, replicas.shard_steps(part))
        after.append((done + len(part), jax.device_get(state.params)))
    return after, jax.device_get(program.eval_params(state))


def by_hand(after, decay):
    """Returns the EMA by its definition: each step of a round has the parameters at its end."""
    [(_, ema), *rounds] = after
    done = 0
    for end, params in rounds:
        for t in range(done + 1, end + 1):
            d = min(decay, (1 + t) / (10 + t))
            ema = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, ema, params)
        done = end
    return ema


def assert_close(one, other, tolerance=TOLERANCE):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_its_definition_says(config, method):
    """With every sync method; and it differs from the parameters."""
    config.ema.decay = 0.3  # Reached after 2 steps.
    after, ema = train(choose(config, method, every=3), 2)
    assert_close(ema, by_hand(after, 0.3))
    with pytest.raises(AssertionError):
        assert_close(ema, after[-1][1])


@pytest.mark.parametrize("steps", [1, 7])
def test_a_round_is_its_steps_with_the_same_parameters(steps):
    ema, params = {"a": np.float32(1)}, {"a": np.float32(3)}
    once = updated(ema, params, 0.9, np.int32(4), steps)
    for step in range(steps):
        ema = updated(ema, params, 0.9, np.int32(4 + step), 1)
    assert_close(once, ema)
    assert decay_over(0.9, np.int32(10**9), 1) == np.float32(0.9)
    assert decay_over(0.9, np.int32(0), 1) == pytest.approx(2 / 11)


@pytest.mark.parametrize("method", ["gradient_mean", "sharded"])
def test_any_number_of_devices_has_the_same(config, method):
    """Up to the tolerance of parameters in test_train_step, as the EMA is a mean of them."""
    config.ema.decay = 0.9
    assert_close(train(config, 1)[1], train(choose(config, method), 4)[1], 2e-4)


def test_it_is_the_same_to_the_bit_in_fixed_order(config):
    config.ema.decay = 0.9
    choose(config, "fixed_order")
    assert len({bits(train(config, devices)[1]) for devices in (1, 2, 4)}) == 1


def test_each_device_holds_its_part_where_it_holds_that_of_the_moments(config):
    config.ema.decay = 0.9
    _, _, state = start(choose(config, "sharded"), 4)
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    held = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state.ema)]
    assert held == [-(-size // 4) for size in sizes]


def test_without_it_nothing_is_kept(config):
    program, _, state = start(config, 2)
    assert not jax.tree.leaves(state.ema)
    assert program.eval_params(state) is state.params


def test_a_skipped_update_leaves_it_finite(config):
    config.ema.decay = 0.5
    program, replicas, state = start(config, 2)
    bad = next(batches(1))
    bad["weights"][0] = np.inf
    before = jax.device_get(state.params)
    state, metrics = program(0, state, replicas.shard_steps([bad]))
    assert metrics["skipped"] > 0
    assert_close(state.ema, before)


@pytest.mark.parametrize(
    ("method", "devices"), [("gradient_mean", 2), ("sharded", 4), ("diloco", 2)]
)
def test_resuming_is_not_stopping_and_all_evaluate_it(config, tmp_path, method, devices):
    config.ema.decay, config.sync.every, config.eval_every = 0.8, 1, 2
    config.sync.method = method
    devices = jax.local_devices()[:devices]
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    parts = loop.train(config, tmp_path / "parts", devices=devices, stop_requested=after(6))
    assert not parts.finished
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert bits((whole.state.params, whole.state.ema)) == bits(
        (parts.state.params, parts.state.ema)
    )
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")

    # generate reads the EMA, and evaluate gives the loss that the run logged for it.
    params = jax.device_get(whole.state.params)
    read, step = load_params(tmp_path / "whole", params)
    shapes = jax.tree.map(np.shape, params)
    assert step == 6 and jax.tree.map(np.shape, read) == shapes
    with pytest.raises(AssertionError):
        assert_close(read, params)
    _, found = evaluation.evaluate_checkpoint(tmp_path / "whole", devices=devices)
    [last] = [r for r in figures(tmp_path / "whole") if r["step"] == 6]
    assert evaluation.figures(found).items() <= last.items()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_slices_go_on_as_a_whole_and_on_other_devices(config, tmp_path, optimizer):
    config.ema.decay, config.sync.method, config.optimizer.name = 0.8, "sharded", optimizer
    loop.train(
        config,
        tmp_path,
        devices=jax.local_devices()[:4],
        stop_requested=after(6),
    )
    shapes = loop.train(config, tmp_path, devices=jax.local_devices()[:2]).state.params
    sharded = jax.device_get(load_params(tmp_path, shapes)[0])
    config.sync.method = "gradient_mean"
    result = loop.train(config, tmp_path, devices=jax.local_devices()[:1])
    assert result.step == 6 and bits(result.state.ema) == bits(sharded)


def test_a_checkpoint_without_it_is_of_another_run(trained, workdir, config):
    """Also where the workdir's config.json, by which it is usually noticed, is missing."""
    config = loop.configs.load(workdir / "config.json")
    config.ema.decay = 0.9
    for says in (r"ema\.decay=0\.9 \(was 0\.0\)", "ema/embed/embedding is absent"):
        with pytest.raises(ConfigError, match=f"different run.*{says}"):
            loop.train(config, workdir, devices=jax.local_devices()[:1])
        assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "4"}
        (workdir / "config.json").unlink(missing_ok=True)
