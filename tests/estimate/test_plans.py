"""Plans, for this machine's devices; tests/estimate/test_gpus.py has others."""

import importlib

import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.common.files import num_bytes
from jaxdp.estimate import assumptions, gpus, memory
from jaxdp.estimate.plan import plan
from jaxdp.step.setup import make_setup
from jaxdp.sync.methods import METHODS
from support.texts import REPOSITORY

VOCAB = 300
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
CONFIGS.remove("finetune")  # It needs a model: see tests/huggingface/test_load.py.
SMALL = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_dim": 16,
    "model.mlp_dim": 0,
    "model.num_kv_heads": 0,
    "seq_len": 32,
    "global_batch_size": 8,
    "grad_accum_steps": 1,
    "loss_chunks": 1,
}


def planned(config, **options):
    """A plan on two devices, and the lines that it said."""
    said = []
    options = {"devices": 2, "tflops": 1, "vocab_size": VOCAB} | options
    return plan(config, report=said.append, **options), said


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_plan(name):
    config = importlib.import_module(f"jaxdp.configs.{name}").get_config()
    config.update_from_flattened_dict(SMALL)
    found, said = planned(config, memory_gib=1e-6)  # So that no larger batch is tried.
    state = memory.state_shapes(make_setup(config, VOCAB, 2, mask_id=0))
    assert found.memory > num_bytes(state)
    assert not found.fits and found.largest_batch == 0
    assert "DOESN'T FIT in 0.00 GiB (given): raise grad_accum_steps" in repr(found)
    assert len(said) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(config, method):
    config.sync.method = method
    found, _ = planned(config, memory_gib=1e-6)
    # On CPUs, collectives run one after the other.
    assert found.covered == 0
    kinds = {"sharded": "reduce-scatter", "fixed_order": "collective-permute"}
    assert kinds.get(method, "all-reduce") in found.tables["The compiled step"]


@pytest.mark.parametrize(("objective", "packing"), [("causal", "documents"), ("masked", "padded")])
def test_masked_attention_has_a_plan(config, objective, packing):
    config.objective, config.data.packing = objective, packing
    assert planned(config, memory_gib=1e-6)[0].memory > 0


def test_the_largest_batch_fits_and_is_compiled(config):
    found, said = planned(config, memory_gib=0.01)
    assert found.fits and found.largest_batch > config.global_batch_size // 2
    assert "FITS in 0.01 GiB (given)" in repr(found)
    assert f"{found.largest_batch} sequences per device" in repr(found)
    assert any(f" {found.largest_batch} sequences each" in line for line in said)
    config.global_batch_size = 2 * found.largest_batch
    assert planned(config, memory_gib=0.01)[0].memory <= 0.01 * 2**30


def test_speed_is_flops_by_the_rate_and_the_run_its_steps(config):
    found, _ = planned(config, memory_gib=1e-6)
    tokens = config.global_batch_size * config.seq_len
    assert found.tokens_per_second == pytest.approx(tokens / found.seconds)
    assert f"{found.tokens_per_second:,.0f} tokens/s" in repr(found)
    assert f"0:00 for num_train_steps={config.num_train_steps}" in repr(found)
    config.num_train_steps = 2**31 - 1
    slow, _ = planned(config, memory_gib=1e-6, tflops=1e-3)
    assert slow.seconds == pytest.approx(1000 * found.seconds)
    days = config.num_train_steps * slow.seconds / 86_400
    assert f"{days:.1f} days for num_train_steps" in repr(slow)


def test_jax_takes_a_share_of_a_gpus_memory(monkeypatch):
    for name in assumptions.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    gpu = gpus.GPUS["h100"]
    assert assumptions.room_of("h100", None) == (
        gpu.memory * 3 // 4,
        "75% of 79.11 GiB, by JAX's default",
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert assumptions.room_of("h100", None)[0] == int(0.9 * gpu.memory)
    assert assumptions.room_of("h100", 10)[0] == 10 * 2**30
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "much")
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION='much' is no number"):
        assumptions.room_of("h100", None)


def test_a_gpus_rate_and_link_are_assumed(config):
    config.model.dtype = "bfloat16"
    assert assumptions.rate_of(config, "h100", None, 0.5)[0] == 0.5 * 989e12
    assert assumptions.rate_of(config, "h100", 3, 0.5)[0] == 3e12
    config.model.dtype = "float32"
    assert assumptions.rate_of(config, "h100", None, 0.5)[0] == 0.25 * 989e12
    assert assumptions.gbps_of("h100", 1, None, None) == (3600, 3600)
    assert assumptions.gbps_of("h100", 2, None, None) == (100, 3600)
    assert assumptions.gbps_of(None, 1, None, None) == (100, 100)
    assert assumptions.gbps_of("h100", 2, 5, None) == (5, 3600)
    assert assumptions.gbps_of(None, 1, 5, 40) == (5, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "b300"}, "--gpu='b300' is unknown: choose from h100, h200, a100"),
        ({"gpu": "h100", "devices": 4, "hosts": 3}, "--devices=4 can't be split .* --hosts=3"),
        ({"hosts": 2}, "--hosts=2 goes with --gpu"),
        ({"devices": 1000}, "--devices=1000 is more than this machine has, 8: lower it"),
    ],
)
def test_devices_that_there_are_not_are_refused(config, options, message):
    config.global_batch_size = 1000
    with pytest.raises(ConfigError, match=message):
        planned(config, **options)
