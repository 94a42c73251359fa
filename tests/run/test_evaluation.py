import math

import jax
import numpy as np
import pytest

from jaxdp.common.files import num_bytes
from jaxdp.data.batch import TOKENS, training_shapes
from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.run import evaluation, loop
from jaxdp.run.evaluation import Evaluation, evaluate
from jaxdp.step.program import pmapped, pmapped_evaluation
from jaxdp.step.setup import make_setup
from jaxdp.step.state import abstract_state, per_device_shapes


def test_perplexity_and_bits_per_byte():
    found = Evaluation(loss=math.log(8), tokens=10, tokens_per_byte=0.5)
    assert found.perplexity == pytest.approx(8)
    # Three bits per token, half a token per byte.
    assert found.bits_per_byte == pytest.approx(1.5)
    assert Evaluation(1000.0, 1).perplexity == math.inf


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mean_over_tokens_not_over_batches(count):
    rng = np.random.default_rng(0)
    batches = [
        {
            "inputs": rng.normal(size=(4, 3)).astype(np.float32),
            "weights": rng.integers(0, 2, (4, 3)).astype(np.float32),
        }
        for _ in range(count)
    ]

    def p_eval_step(_, batch):
        sums = (batch["inputs"] * batch["weights"]).sum(), batch["weights"].sum()
        return jax.lax.psum(sums, AXIS)

    replicas = Replicas(jax.local_devices()[:2])
    step = replicas.pmap(p_eval_step)
    result = evaluate(step, replicas.replicate(np.float32(0)), batches, replicas)
    weight = sum(b["weights"].sum() for b in batches)
    expected = sum((b["inputs"] * b["weights"]).sum() for b in batches) / weight
    assert result.tokens == weight
    assert result.loss == pytest.approx(expected, rel=1e-5)


def bytes_of(program, *shapes):
    """What XLA's buffers take on a device: arguments, results that aren't donated, temporaries."""
    found = program.lower(*shapes).compile().memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


@pytest.mark.parametrize(
    "keys",
    [
        {"grad_accum_steps": 4},
        {"sync.method": "fixed_order"},
        {"sync.method": "sharded", "ema.decay": 0.99, "grad_accum_steps": 4},
    ],
)
def test_evaluation_needs_no_more_memory_than_training(config, keys):
    """With a vocabulary so large that logits are most of it, while the state stays in memory."""
    config.update({"global_batch_size": 16, "seq_len": 32})
    config.update_from_flattened_dict(keys)
    setup, replicas = make_setup(config, 4096, 2), Replicas(jax.local_devices()[:2])
    state, rows = abstract_state(setup), setup.sizes.per_device

    def of(*dimensions, dtype):
        return jax.ShapeDtypeStruct((2, *dimensions), dtype)

    shapes = training_shapes(config, setup.method.every, rows)
    batch = {name: of(*x.shape, dtype=x.dtype) for name, x in shapes.items()}
    training = bytes_of(pmapped(setup, replicas, state), state, batch)

    tokens = {name: of(rows, config.seq_len, dtype=dtype) for name, dtype in TOKENS.items()}
    batch = tokens | {"number": of(rows, dtype=np.int32)}
    other = num_bytes(per_device_shapes(state, setup.method))
    if not setup.method.per_device_ema:  # Otherwise the devices' slices are joined for it.
        other -= num_bytes(state.params)

    def evaluating(at_a_time=None):
        program = pmapped_evaluation(setup, replicas, at_a_time)
        return other + bytes_of(program, state.params, batch)

    # All of a device's sequences at once have four times the logits, and here need far more.
    assert evaluating() < training and 2 * evaluating() < evaluating(rows)


def test_as_many_sequences_at_a_time_as_the_run_that_saved_the_checkpoint(
    config, tmp_path, monkeypatch
):
    """However few devices evaluate it; the mean is the same, up to the order of sums."""
    ran = loop.train(config, tmp_path, devices=jax.local_devices()[:4])
    asked = []

    def spied(setup, replicas, rows):
        asked.append((setup.sizes.micro, rows))
        return pmapped_evaluation(setup, replicas, rows)

    monkeypatch.setattr(evaluation, "pmapped_evaluation", spied)
    _, found = evaluation.evaluate_checkpoint(tmp_path, devices=jax.local_devices()[:1])
    assert asked == [(8, 2)]
    # Sums of some hundred float32 terms in another order.
    assert found[""].loss == pytest.approx(ran.evaluation.loss, rel=1e-6)
    changes = {"grad_accum_steps": 8}  # For devices with less memory.
    evaluation.evaluate_checkpoint(tmp_path, "newest", changes, devices=jax.local_devices()[:1])
    assert asked[1] == (1, 1)
