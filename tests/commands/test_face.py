"""What `import jaxdp` offers, and what a notebook shows of it."""

import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

import jaxdp
from jaxdp.common import config as configs
from jaxdp.common import usage
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.run.evaluation import Evaluation
from jaxdp.run.result import Result
from jaxdp.workdir import finished


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_jaxdp_imports_nothing_heavy():
    heavy = '{"jax", "numpy", "ml_collections", "absl", "tensorflow"}'
    assert python(f"import jaxdp, sys; print({heavy} & set(sys.modules))") == "set()"
    # Nor does what a notebook does before it uses something.
    code = f"import jaxdp, sys; dir(jaxdp), jaxdp.ConfigError; print({heavy} & set(sys.modules))"
    assert python(code) == "set()"


@pytest.mark.parametrize("name", jaxdp.__all__)
def test_all_that_is_offered_is_there_and_documented(name):
    assert name in dir(jaxdp)
    found = getattr(jaxdp, name)
    assert callable(found) and found.__doc__
    assert name in jaxdp.__doc__


def test_what_is_offered_has_names_apart_from_the_commands():
    assert not {*jaxdp.__all__} & {*usage.COMMANDS}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jaxdp.no_such_name


def test_a_command_stays_a_module():
    assert python("import jaxdp.train; jaxdp.train_model; print(jaxdp.train)").startswith("<module")


def test_a_run_from_a_notebook(workdir, tmp_path):
    """It is finished already; tests of `loop.train` train others."""
    devices = jax.local_devices()[:1]
    result = jaxdp.train_model(configs.load(workdir / "config.json"), str(workdir), devices=devices)
    assert repr(result) == f"Result(step={result.step}, finished=True)"
    logged = jaxdp.read_metrics(str(workdir))
    assert logged[-1]["step"] == result.step == 4
    step, found = jaxdp.evaluate_model(str(workdir), devices=devices)
    assert (step, found[""].loss) == (result.step, logged[-1]["eval/loss"])
    [text] = jaxdp.generate_text(str(workdir), ["1 is"], num_tokens=3)
    assert text.startswith("1 is")
    assert jaxdp.export_model(str(workdir), str(tmp_path / "exported")) == result.step
    assert (tmp_path / "exported" / "config.json").is_file()
    assert len(repr(finished.open_workdir(workdir))) < 300


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 2.0},
        {"top_k": -5},
        {"num_tokens": -3},
        {"num_tokens": 2.5},
        {"seed": -1},
        {"seed": 2**40},
        {"seed": True},
        {"seed": None},
    ],
)
def test_wrong_numbers_for_a_text_are_refused(options, workdir, no_compiling):
    [(name, value)] = options.items()
    with pytest.raises(jaxdp.ConfigError, match=f"--{name}={value} is not allowed: give a"):
        jaxdp.generate_text(workdir, ["1 is"], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bandwidth_gbps": -1},
        {"inside_bandwidth_gbps": 0},
        {"memory_gib": -1},
        {"mfu": 0},
        {"mfu": 1.5},
        {"tflops": float("inf")},
        {"devices": 0},
        {"hosts": 0},
        {"vocab_size": 0},
        {"latency_us": -1},
    ],
)
def test_wrong_numbers_for_a_plan_are_refused(options, config, no_compiling):
    [(name, value)] = options.items()
    with pytest.raises(jaxdp.ConfigError, match=f"--{name}={value} is not allowed: give a"):
        jaxdp.plan_run(config, **options)


@pytest.mark.parametrize("which", ["foo", "-1", "1.5", -1, None])
def test_what_names_no_checkpoint_is_refused(which, workdir, tmp_path, no_compiling):
    for call in (
        lambda: jaxdp.generate_text(workdir, ["1 is"], which=which),
        lambda: jaxdp.evaluate_model(workdir, which, devices=jax.local_devices()[:1]),
        lambda: jaxdp.export_model(workdir, tmp_path / "out", which=which),
    ):
        with pytest.raises(jaxdp.ConfigError, match=f"--step={which!r} names no checkpoint"):
            call()


def test_other_mistakes_are_a_line_too(config, tmp_path):
    with pytest.raises(jaxdp.ConfigError, match=r"metrics.jsonl can't be read \(No such file"):
        jaxdp.read_metrics(tmp_path)
    for call in (lambda c: jaxdp.train_model(c, tmp_path), jaxdp.plan_run):
        with pytest.raises(jaxdp.ConfigError, match="the config is of type dict: give a Conf"):
            call(config.to_dict())


def test_a_plan_from_a_notebook(config: ConfigDict):
    said = []
    plan = jaxdp.plan_run(config, devices=2, tflops=1, memory_gib=1e-3, report=said.append)
    shown = repr(plan)
    for title, rows in plan.tables.items():
        assert title in shown
        assert all(f"{name}" in shown and value in shown for name, value in rows.items())
    assert plan.assumptions.devices == 2 and plan.memory > 0
    assert plan.efficiency["gradient_mean"][1] == 1
    assert f"{plan.largest_batch} sequences per device" in shown
    assert said[0] == "Compiling for 2 x cpu, 4 sequences each ..."


def test_reprs_are_short(config: ConfigDict):
    result = Result(3, False, {}, state=list(range(10_000)))
    assert repr(result) == "Result(step=3, finished=False)"
    evaluated = Result(3, True, {"": Evaluation(1.5, 10)}, state=list(range(10_000)))
    assert repr(evaluated) == "Result(step=3, finished=True, validation_loss=1.5000)"
    cache = open_cache(config, report=lambda line: None)
    assert len(repr(cache)) < 600 and str(cache.folder) in repr(cache)
    assert len(repr(Feed(config, cache))) < 700
