"""One process trains here; what another would tell is made up."""

import json

import jax.numpy as jnp
import pytest

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.parallel import messages, processes
from jaxdp.run import consistency, loop
from support.bad_input import Reached, assert_clear


@pytest.fixture
def another(monkeypatch):
    """Makes this one process 1, to which process 0 tells the same but for a change."""

    def tells(change=lambda told: None):
        def from_main(text):
            told = json.loads(text)
            if isinstance(told, dict):  # What else a process asks process 0 stays as it is.
                change(told)
            return json.dumps(told)

        monkeypatch.setattr(messages, "from_main", from_main)
        monkeypatch.setattr(messages, "gather", lambda text: ["", text])

    return tells


def test_processes_that_agree_go_on(config, tmp_path, no_compiling, another):
    another(lambda told: told.update(who="process 0 (b)", workdir="/mnt/same"))
    with pytest.raises(Reached):
        loop.train(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}


@pytest.mark.parametrize(
    ("group", "name", "value", "said"),
    [
        ("config", "seed", 5, "different configs: seed=5 and 0: give"),
        ("config", "optimizer.learning_rate", 0.1, "optimizer.learning_rate=0.1 and 0.01: give"),
        ("config", "new.key", "x", "new.key='x' and None"),
        ("environment", "XLA_FLAGS", "--xla_x=1", "XLA_FLAGS='--xla_x=1' and"),
        ("environment", "jax_enable_x64", "True", "jax_enable_x64='True' and 'False': give"),
        ("data", "data.path", "0", "data.path gives other tokens in process 0 ("),
        ("data", "tokenizer", "0", "tokenizer gives other tokens in process 0 ("),
        ("data", "eval_sets (more)", "0", "eval_sets (more) gives other tokens in"),
    ],
)
def test_what_differs_is_named_before_anything_is_compiled(
    config, text_file, tmp_path, no_compiling, another, group, name, value, said
):
    def change(told):
        told["who"] = "process 0 (b)"
        told[group][name] = value

    config.eval_sets = f"more={text_file}"
    another(change)
    with pytest.raises(ConfigError) as error:
        loop.train(config, tmp_path / "run")
    assert said in str(error.value)
    assert_clear(str(error.value))
    assert not (tmp_path / "run").exists()


def test_processes_may_keep_caches_and_dumps_where_they_like(
    config, tmp_path, no_compiling, another, monkeypatch
):
    told = []
    another(told.append)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here --b --a=1 --a=1")
    with pytest.raises(Reached):
        loop.train(config, tmp_path / "run")
    assert "data.cache_dir" not in told[0]["config"]
    assert told[0]["environment"]["XLA_FLAGS"] == "--a=1 --b"


def test_a_workdir_that_is_not_shared_is_refused(
    config, tmp_path, no_compiling, another, monkeypatch
):
    """As it is to a process that isn't process 0, which writes to another folder."""
    monkeypatch.setattr(consistency, "SEEN_WITHIN", 0.0)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    another(lambda told: told.update(who="process 0 (b)", workdir="/elsewhere"))
    with pytest.raises(ConfigError) as error:
        loop.train(config, tmp_path / "run")
    assert "--workdir isn't shared" in str(error.value)
    assert "process 0 (b) has written to /elsewhere" in str(error.value)
    assert f"doesn't see it in {tmp_path / 'run'}: give" in str(error.value)
    assert_clear(str(error.value))


def test_all_go_on_from_the_same_step(monkeypatch):
    monkeypatch.setattr(messages, "gather", lambda text: [text, text])
    consistency.check_step(20)
    monkeypatch.setattr(messages, "gather", lambda text: [text, "10"])
    with pytest.raises(RunError, match="process 1 would go on after step 10, and process 0 after"):
        consistency.check_step(20)


def test_all_start_from_the_same_weights(monkeypatch):
    """Which a file of the same name may not hold on every machine."""
    params, other = ({"wte": jnp.arange(6.0), "head": {"w": jnp.full(3, x)}} for x in (1.0, 2.0))
    told = []
    monkeypatch.setattr(messages, "gather", lambda text: told.append(text) or [text, told[0]])
    consistency.check_weights("hf:gpt2", params)
    with pytest.raises(ConfigError) as error:
        consistency.check_weights("hf:gpt2", other)
    assert str(error.value).startswith(
        "init_from='hf:gpt2' gives other weights in process 1 than in process 0 (head/w is the "
    )
    assert_clear(str(error.value))
