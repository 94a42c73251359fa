"""Programs for GPUs that this machine doesn't have; nothing runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxdp.common import hlo
from jaxdp.common.errors import ConfigError
from jaxdp.configs import gpt2_124m
from jaxdp.estimate import compiled, gpus
from jaxdp.estimate.schedule import Schedule, covered_share
from jaxdp.model.norms import Norm
from jaxdp.model.target import target

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
        if x.instruction.shape.startswith("f32")
        and hlo.num_bytes(x.instruction.shape) >= 4 * logits
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
def test_a_parameter_and_its_moments_are_updated_by_one_kernel(step):
    config, program = step
    table = f"f32[{VOCAB},{config.model.embed_dim}]"
    kernels = [x.instruction for x in Schedule(program.text, 8).kernels()]
    assert [x.shape.count(table) for x in kernels if x.shape.startswith(f"({table}")] == [3]


@needs_compiler
def test_gradients_are_summed_while_the_backward_pass_runs(step):
    _, program = step
    transfers = Schedule(program.text, 8).transfers()
    assert {x.kind for x in transfers} == {"all-reduce"}
    # The last 30 MB have nothing to hide behind: a third of all here, 6% of GPT-2 124M's.
    assert covered_share(transfers) > 0.6


@needs_compiler
@pytest.mark.parametrize(
    ("method", "dtype", "kind", "accum", "share"),
    [
        ("gradient_mean", "float32", "all-reduce", 1, 0.9),
        ("gradient_mean", "float32", "all-reduce", 3, 0.9),
        # Its own flag makes 0.90 of nothing.
        ("gradient_mean", "int8", "all-to-all", 1, 0.8),
        ("sharded", "float32", "reduce-scatter", 1, 0.9),
    ],
)
def test_gradients_of_many_layers_do_not_wait_for_each_other(method, dtype, kind, accum, share):
    """Of several micro-batches, the last one's backward pass covers them."""
    config = gpt2_124m.get_config()
    config.update({"global_batch_size": 8 * accum, "grad_accum_steps": accum, "seq_len": 128})
    config.model.num_layers, config.sync.method, config.sync.dtype = 20, method, dtype
    program = compiled.compile_step(config, VOCAB, compiled.absent_machine("h100", 8))
    found = [x for x in Schedule(program.text, 8).transfers() if x.kind == kind]
    assert len(found) > 16
    assert covered_share(found) > share


@needs_compiler
@pytest.mark.parametrize("width", [64, 128])
def test_norms_of_heads_are_kernels(width):
    """As wide as heads are, for queries and keys (model.qk_norm)."""
    norm = Norm(centred=False, bias=False, epsilon=1e-6, dtype=jnp.bfloat16)

    def loss(scale, x):
        return norm.apply({"params": {"scale": scale}}, x)[1].astype(jnp.float32).sum()

    shapes = [
        jax.ShapeDtypeStruct((width,), jnp.float32),
        jax.ShapeDtypeStruct((2, 256, 3, width), jnp.bfloat16),
    ]
    machine = compiled.absent_machine("h100", 1)
    text = compiled.compile_function(jax.grad(loss, (0, 1)), *shapes, machine=machine).text
    assert "norm_backward" in text


@needs_compiler
@pytest.mark.parametrize("name", gpus.GPUS)
def test_each_gpu_is_known_to_the_compiler(name):
    machine = compiled.absent_machine(name, 1)
    gpu, [device] = gpus.GPUS[name], machine.devices
    assert device.device_kind == gpu.device_kind
    assert float(device.compute_capability) == gpu.chip.capability
    assert gpus.peak_flops(device) == gpus.peak_flops(gpu) > 0
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    program = compiled.compile_function(jnp.matmul, x, x, machine=machine)
    assert program.sizes.arguments == 2 * 256 * 256 * 2
    assert program.memory >= 3 * 256 * 256 * 2


@needs_compiler
def test_the_gpus_of_two_machines_are_those_of_two_processes(config):
    machine = compiled.absent_machine("h100", 4, hosts=2)
    assert [x.process_index for x in machine.devices] == [0, 0, 1, 1]
    text = compiled.compile_step(config, VOCAB, machine).text
    assert "num_partitions=4" in text
    assert Schedule(text, 4).transfers()
    # ... which are two islands, between which the bytes of integers cross.
    config.sync.update({"method": "diloco", "every": 2, "dtype": "int8", "islands": -1})
    assert "all-to-all" in compiled.compile_step(config, VOCAB, machine).text


@needs_compiler
def test_what_jax_knows_of_this_machine_is_as_before(step):
    before = target()
    with compiled.absent_machine("a100", 1).compiling():
        assert target() == gpus.GPUS["a100"].target
    assert target() == before


def test_a_missing_compiler_is_said_in_a_line(monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(gpus.importlib, "import_module", absent)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # Set there; unset after the test.
    with pytest.raises(ConfigError, match=r"NVIDIA H100 .*: pip install 'jaxdp\[plan-gpu\]'"):
        compiled.absent_machine("h100", 8)


@needs_compiler
@pytest.mark.parametrize(("dtype", "delay"), [("float32", 2), ("int4", 4)])
def test_exchanges_are_under_way_while_the_steps_of_a_delay_run(dtype, delay):
    """All of them but the few bytes of the metrics, of a program for eight H100s."""
    config = gpt2_124m.get_config()
    config.update({"global_batch_size": 8, "grad_accum_steps": 1, "seq_len": 128})
    config.model.update({"num_layers": 1, "num_heads": 2, "embed_dim": 128})
    config.sync.update({"method": "diloco", "every": 12, "fragments": 2})
    config.sync.update({"dtype": dtype, "delay": delay})
    text = compiled.compile_step(config, 512, compiled.absent_machine("h100", 8)).text
    large = [x for x in Schedule(text, 8).transfers() if x.bytes > 4000]
    assert {x.kind for x in large} == (
        {"all-reduce"} if dtype == "float32" else {"all-to-all", "all-gather"}
    )
    assert all(x.covered for x in large)
