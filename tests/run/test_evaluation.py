import math

import jax
import numpy as np
import pytest

from jaxdp.parallel.replicas import AXIS, Replicas
from jaxdp.run.evaluation import Evaluation, evaluate


def test_perplexity_and_bits_per_byte():
    evaluation = Evaluation(loss=math.log(8), tokens=10, tokens_per_byte=0.5)
    assert evaluation.perplexity == pytest.approx(8)
    # Three bits per token, half a token per byte.
    assert evaluation.bits_per_byte == pytest.approx(1.5)
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
