import re
import subprocess
import sys

import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.estimate import plan
from jaxdp.step.setup import batch_sizes, can_split
from support.texts import REPOSITORY


def test_device_counts_that_do_not_divide_are_those_that_are_refused(config):
    config.global_batch_size, config.grad_accum_steps = 24, 3
    assert [n for n in plan.COUNTS if can_split(config, n)] == [1, 2, 4, 8]
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


def test_the_command_compares_with_xla(fresh_command):
    arguments = ("--config=configs/quickstart.py", "--config.ema.decay=0.999", "--check")
    text = fresh_command("plan", *arguments, "--tflops=1", devices=2).stdout
    assert "their EMA" in text
    [found] = re.findall(r"error +([-+][\d.]+)%", text)
    assert abs(float(found)) < 15, text


def test_the_plot_is_written(command, tmp_path):
    path = tmp_path / "plan.png"
    text = command("plan", "--config=configs/quickstart.py", f"--png={path}").stdout
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "timed here" in text


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
