"""Programs for GPUs that this machine doesn't have; nothing runs."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxdp.common import hlo
from jaxdp.common.errors import ConfigError
from jaxdp.configs import gpt2_124m
from jaxdp.estimate import compiled, gpus
from jaxdp.estimate.schedule import Schedule, covered_share

VOCAB = 8192


def compiler_is_there() -> bool:
    try:
        gpus.absent_devices(gpus.GPUS["h100"], 1)
    except ConfigError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not compiler_is_there(), reason="XLA's compiler for GPUs comes with the extra plan-gpu"
)


@pytest.fixture(scope="module")
def step():
    """A config of GPT-2's width and two layers, and its step for eight H100s."""
    config = gpt2_124m.get_config()
    config.update({"global_batch_size": 16, "grad_accum_steps": 1})
    config.model.num_layers = 2
    return config, compiled.compile_step(config, VOCAB, compiled.absent_machine("h100", 8))


@needs_compiler
def test_attention_is_cudnns_and_products_are_16_bit(step):
    config, program = step
    kernels = list(Schedule(program.text, 8).kernels())
    attention = [x for x in kernels if x.group == "attention"]
    assert len(attention) == 2 * config.model.num_layers  # Forward and backward.
    assert all("bf16" in x.instruction.shape for x in attention)


@needs_compiler
def test_no_float32_logits_are_stored(step):
    config, program = step
    logits = 2 * config.seq_len * VOCAB  # Two sequences on each device.
    wide = [
        x.instruction
        for x in Schedule(program.text, 8).kernels()
        if x.instruction.shape.startswith("f32") and hlo.num_bytes(x.instruction.shape) >= 4 * logits
    ]
    assert not wide, [(x.name, x.shape, x.op_name) for x in wide]


@needs_compiler
def test_no_scatter_adds_16_bit_numbers(step):
    """Sums of gradients would be wrong by percents, and slow."""
    _, program = step
    computations = hlo.parse(program.text).computations.values()
    scatters = [x for part in computations for x in part if x.kind == "scatter"]
    narrow = [x for x in scatters if x.shape.startswith(("bf16", "f16"))]
    assert not narrow, [(x.name, x.shape, x.op_name) for x in narrow]


@needs_compiler
def test_gradients_are_summed_while_the_backward_pass_runs(step):
    config, program = step
    transfers = Schedule(program.text, 8).transfers()
    assert {x.kind for x in transfers} == {"all-reduce"}
    assert covered_share(transfers) > 0.4
