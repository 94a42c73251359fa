import functools
import importlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY

from jaxdp.common.config import batch_sizes
from jaxdp.common.errors import ConfigError
from jaxdp.configs import quickstart
from jaxdp.estimate import liveness, plan, prediction
from jaxdp.sync.methods import METHODS
from jaxdp.sync.traffic import Collective

VOCAB = 20
# What XLA stores is known by rules, not exactly; its own packing of buffers wastes some, too.
TOLERANCE = 10.0


def peak(function, *shapes):
    return liveness.peak_bytes(jax.make_jaxpr(function)(*shapes).jaxpr)


def table(config, bandwidth=1e9, latency=1e-5):
    return prediction.efficiencies(config, VOCAB, 1, 1e12, bandwidth, latency)


def test_elementwise_chains_need_no_memory_but_for_slow_functions_that_are_read_twice():
    x = prediction.shape((1000,))
    assert peak(lambda x: x * 2 + 1, x) == 0
    assert peak(lambda x: jnp.tanh(x) * 2, x) == 0
    assert peak(lambda x: (jnp.tanh(x) * 2, jnp.tanh(x) + 1), x) == 0

    def twice(x):
        y = jnp.tanh(x)
        return y * 2, y + x

    assert peak(twice, x) == 4000


def test_a_chain_of_products_needs_two_of_them_at_a_time():
    x = prediction.shape((100, 100))
    for length in (3, 6):
        assert peak(lambda x, n=length: functools.reduce(jnp.matmul, [x] * n).sum(), x) == 80_000


def test_dead_code_needs_no_memory():
    assert peak(lambda x: (x @ x, x + 1)[1], prediction.shape((100, 100))) == 0


def test_a_loop_needs_what_one_iteration_needs():
    def loop(x, length):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x) @ x, None), x, length=length)[0]

    x = prediction.shape((100, 100))
    once, often = (peak(functools.partial(loop, length=n), x) for n in (1, 50))
    assert 0 < once == often


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_saves_memory_and_more_layers_need_more(config, scan_layers):
    config.model.scan_layers = scan_layers
    sizes = {}
    for layers in (2, 8):
        for remat in (False, True):
            config.model.num_layers, config.model.remat = layers, remat
            sizes[layers, remat] = prediction.predict_memory(config, VOCAB, 1).activations
    assert sizes[2, False] < sizes[8, False]
    assert sizes[8, True] < sizes[8, False] / 2


def test_remat_saves_in_loops_and_else_where_xla_recomputes_late(config, monkeypatch):
    config.model.remat = True
    for late in (False, True):
        monkeypatch.setattr(prediction, "recomputes_late", lambda late=late: late)
        config.model.scan_layers = False
        assert prediction.remat_saves(config) == late
        config.model.scan_layers = True
        assert prediction.remat_saves(config)
        config.model.remat = False
        assert not prediction.remat_saves(config)
        config.model.remat = True


def test_sharded_optimizer_state_is_a_share_and_diloco_has_an_outer_one(config):
    def sizes(method):
        config.sync.method = method
        return prediction.predict_memory(config, VOCAB, 4)

    whole, sharded, diloco = sizes("gradient_mean"), sizes("sharded"), sizes("diloco")
    # Slices are padded to equal lengths; there are counters besides the moments.
    assert sharded.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert diloco.optimizer == whole.optimizer + whole.parameters
    assert whole.parameters == sharded.parameters == diloco.parameters
    assert sharded.total < whole.total < diloco.total


def test_smaller_parts_of_a_batch_need_less(config):
    whole = prediction.predict_memory(config, VOCAB, 1)
    config.grad_accum_steps = 4
    assert prediction.predict_memory(config, VOCAB, 1).activations < whole.activations


def test_a_loss_in_chunks_needs_less(config):
    vocab = 5000  # Logits are the most of what is stored.
    whole = prediction.predict_memory(config, vocab, 1)
    config.loss_chunks = 4
    chunked = prediction.predict_memory(config, vocab, 1)
    assert chunked.activations < whole.activations / 2
    compiled = prediction.compiled_memory(config, vocab, 1)
    assert chunked.total == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(("count", "accum"), [(1, 1), (2, 3)])
def test_the_largest_batch_fits_and_the_next_does_not(config, count, accum):
    limit, config.grad_accum_steps = 2_000_000, accum
    largest = prediction.largest_batch(config, VOCAB, count, limit)

    def total(per_device):
        config.global_batch_size = per_device * count
        return prediction.predict_memory(config, VOCAB, count).total

    assert largest % accum == 0
    assert total(largest) <= limit < total(largest + accum)


def test_no_batch_fits_where_the_parameters_do_not(config):
    assert prediction.largest_batch(config, VOCAB, 1, 10_000) == 0


def test_efficiency_is_1_on_one_device_and_falls(config):
    for method, by_count in table(config).items():
        values = list(by_count.values())
        assert values[0] == 1, method
        assert values == sorted(values, reverse=True), method
        assert len(set(values)) == len(values), method


def test_fewer_synchronisations_and_more_bandwidth_are_more_efficient(config):
    slow, fast = table(config, 1e8), table(config, 1e10)
    assert set(slow) == set(METHODS)
    for method in METHODS:
        assert slow[method][8] < fast[method][8]
    assert slow["gradient_mean"][8] < slow["diloco"][8]
    assert max(slow["fixed_order"]) == config.sync.virtual_replicas


def test_communication_is_the_rings_formula():
    time = prediction.communication([Collective("all-reduce", 1_000_000, 5)], 4, 1e6, 0.25)
    assert time == pytest.approx((2 * 3 / 4 * 1 + 2 * 3 * 0.25) / 5)


def test_device_counts_that_do_not_divide_are_those_that_are_refused(config):
    config.global_batch_size, config.grad_accum_steps = 24, 3
    assert [n for n in plan.COUNTS if prediction.splits(config, n)] == [1, 2, 4, 8]
    with pytest.raises(ConfigError):
        batch_sizes(config, 1, 16)


@pytest.mark.parametrize(
    ("tokenizer", "objective", "size"),
    [("byte", "causal", 257), ("byte", "masked", 258), ("train:bpe:5000", "causal", 5000)],
)
def test_vocabulary_comes_from_the_config_alone_where_it_can(config, tokenizer, objective, size):
    config.data.path, config.tokenizer, config.objective = "", tokenizer, objective
    assert plan.vocabulary(config, None, pytest.fail) == size
    assert plan.vocabulary(config, 300, pytest.fail) == 300


def test_vocabulary_comes_from_the_data_otherwise(config):
    assert 20 < plan.vocabulary(config, None, print) < 60
    config.data.path = ""
    with pytest.raises(ConfigError, match=r"data\.path=''"):
        plan.vocabulary(config, None, print)


# Runs a command; then prints the most memory that it had, in KiB.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_a_model_that_fits_nowhere_is_planned():
    """GPT-2 XL's size: 1.5 B parameters, 25 GB with the optimizer's state."""
    plan = [
        *(sys.executable, "-m", "jaxdp.plan", "--config=configs/gpt2_124m.py"),
        "--config.model.num_layers=48",
        "--config.model.embed_dim=1600",
        "--config.model.num_heads=25",
        "--config.model.scan_layers",
        *("--vocab_size=50257", "--devices=8", "--tflops=100", "--memory_gib=80"),
    ]
    text = subprocess.run(
        [sys.executable, "-c", MEASURED, *plan],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "1.56B in 6.23GB" in text
    # The parameters alone would be more.
    assert int(text.split()[-1]) < 3 * 2**20


SHIPPED = {"quickstart": 4096, "shakespeare_char_cpu": 65, "shakespeare_char": 65}


def error(config, vocab, devices):
    """Percent, as --check prints it."""
    return float(plan.check_rows(config, vocab, devices)["error"].rstrip("%"))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "remat"), [(1, False), (2, False), (2, True), (4, False)])
@pytest.mark.parametrize("name", SHIPPED)
def test_predicted_memory_is_near_xlas(name, devices, remat):
    config = importlib.import_module(f"jaxdp.configs.{name}").get_config()
    config.model.remat = remat
    assert abs(error(config, SHIPPED[name], devices)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_predicted_memory_is_near_xlas_with_every_method(method):
    config = quickstart.get_config()
    config.sync.method = method
    assert abs(error(config, SHIPPED["quickstart"], 4)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient_mean", "sharded", "diloco"])
def test_predicted_memory_has_the_average_of_parameters(method):
    config = quickstart.get_config()
    config.ema.decay, config.sync.method = 0.999, method
    assert abs(error(config, SHIPPED["quickstart"], 4)) < 15


@pytest.mark.slow
def test_the_command_compares_with_xla(command):
    arguments = ("--config=configs/quickstart.py", "--config.ema.decay=0.999", "--check")
    text = command("plan", *arguments, "--tflops=1", devices=2).stdout
    assert "their average" in text
    [found] = re.findall(r"error +([-+][\d.]+)%", text)
    assert abs(float(found)) < 15, text


@pytest.mark.slow
def test_the_plot_is_written(command, tmp_path):
    path = tmp_path / "plan.png"
    text = command("plan", "--config=configs/quickstart.py", f"--png={path}").stdout
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "timed here" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--devices=0",), "--devices"),
        (("--devices=3",), "global_batch_size=8"),
        (("--devices=8", "--check"), "--devices=8"),
        (("--bandwidth_gbps=-1",), "--bandwidth_gbps"),
        (("--tflops=fast",), "--tflops"),
        (("--config.model.dim=3",), "model.dim"),
        (("--config.model.num_heads=3",), "model.num_heads=3"),
        (("--tflops=1", "--png=/nowhere/plan.png"), "--png='/nowhere/plan.png'"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(command, arguments, message):
    config = ("--config=configs/quickstart.py",) if arguments else ()
    process = command("plan", *config, *arguments, check=2)
    assert process.stderr.startswith("jaxdp: ")
    assert message in process.stderr
    assert process.stderr.count("\n") == 1
