import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.estimate import plan, scaling
from jaxdp.step.setup import batch_sizes, can_split


def test_device_counts_that_do_not_divide_are_those_that_are_refused(config):
    config.global_batch_size, config.grad_accum_steps = 24, 3
    assert [n for n in scaling.COUNTS if can_split(config, n)] == [1, 2, 4, 8]
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


def test_the_plan_is_for_as_many_devices_as_wanted(fresh_command):
    arguments = ("--config=configs/quickstart.py", "--config.ema.decay=0.999", "--memory_gib=0.001")
    text = fresh_command("plan", *arguments, "--tflops=1", "--devices=4", devices=0).stdout
    assert "4 x cpu, 2 sequences each" in text
    assert "their EMA" in text and "DOESN'T FIT in 0.00 GiB (given)" in text


def test_the_plot_is_written(command, tmp_path):
    path = tmp_path / "plan.png"
    arguments = ("--config=configs/quickstart.py", "--memory_gib=0.001", f"--png={path}")
    text = command("plan", *arguments).stdout
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "timed here" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--devices=0",), "--devices"),
        (("--devices=3",), "--devices=3 is more than this machine has"),
        (("--gpu=h100", "--devices=8", "--hosts=3"), "--hosts=3"),
        (("--gpu=b300",), "--gpu='b300'"),
        (("--mfu=2",), "--mfu"),
        (("--bandwidth_gbps=-1",), "--bandwidth_gbps"),
        (("--tflops=fast",), "--tflops"),
        (("--hours=0", "--tflops=1"), "--hours=0 is no time"),
        (("--hours=nan",), "--hours=nan is not finite"),
        (("--config.model.dim=3",), "model.dim"),
        (("--config.model.num_heads=3",), "model.num_heads=3"),
        (
            ("--tflops=1", "--memory_gib=0.001", "--png=/nowhere/plan.png"),
            "--png='/nowhere/plan.png'",
        ),
    ],
)
def test_wrong_flags_are_refused_in_a_line(command, arguments, message):
    config = ("--config=configs/quickstart.py",) if arguments else ()
    process = command("plan", *config, *arguments, check=2)
    assert process.stderr.startswith("jaxdp: ")
    assert message in process.stderr
    assert process.stderr.count("\n") == 1
