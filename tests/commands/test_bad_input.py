"""Bad configs and command lines: a right result, or one clear line, and nothing changed."""

import shutil
import sys

import jax
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError
from jaxdp.data import files
from jaxdp.run import loop
from support.bad_input import (
    ARGUMENTS,
    KEYS,
    NUMBERS,
    SURROGATE,
    TRIED,
    assert_clear,
    contents,
    refusal,
    run_command,
    set_anywhere,
    train,
    tries,
)
from support.runs import flags as command_line
from support.texts import REPOSITORY

ODD_TEXTS = st.one_of(
    st.sampled_from(
        ["", "\0", SURROGATE, "~nobody-of-that-name/x", "x" * 5000, "..", "/", "[", "😀"]
    ),
    st.text(st.characters(), max_size=20),
)
OTHERS = st.sampled_from([None, True, b"x", [], [1], (1,), {}, {"a": 1}, set(), object(), len, 1j])
VALUES = st.one_of(NUMBERS, ODD_TEXTS, OTHERS)
GROUPS = sorted({key.split(".")[0] for key in KEYS if "." in key})
WRONG_KEYS = st.one_of(
    st.sampled_from(sorted(KEYS)).map(lambda key: key[:-1]),
    st.sampled_from(sorted(KEYS)).map(lambda key: f"{key}.x"),
    st.sampled_from([*GROUPS, "model.", ".x", "config", "get", "update", "items", "__class__"]),
    st.text(max_size=8),
)


@pytest.fixture
def config(config):
    """A config with a sample, whose prompt is checked."""
    config.sample.num_tokens = 8
    return config


@tries(400)
@given(
    changes=st.lists(
        st.tuples(st.one_of(st.sampled_from(sorted(KEYS)), WRONG_KEYS), VALUES),
        min_size=1,
        max_size=3,
    )
)
@example(changes=[("global_batch_size", 2**31 - 1)])
@example(changes=[("model.embed_dim", 2**20)])
@example(changes=[("num_epochs", 2**31 - 1)])
@example(changes=[("tokenizer", "x" * 5000)])
@example(changes=[("data.cache_dir", "~nobody-of-that-name/x")])
@example(changes=[("sample.prompt", SURROGATE)])
def test_configs(changes, config, tmp_path, no_compiling):
    values = config.to_dict()
    for key, value in changes:
        set_anywhere(values, key, value)
    try:
        bad = ConfigDict(values)
    except (ValueError, TypeError, AttributeError):
        assume(False)  # Not even a ConfigDict, so no file can give it.
    workdir = tmp_path / "run"
    if refusal("configs", train, bad, workdir):
        assert not workdir.exists()
    shutil.rmtree(workdir, ignore_errors=True)


CONFIG_FILES = [
    "",
    "def get_config(): return None",
    "def get_config(): return 3",
    "def get_config(): return {'seed': 1}",
    "def get_config(): raise ValueError('no\\nway')",
    "def get_config(): raise KeyError",
    "def get_config(): import sys; sys.exit(7)",
    "def get_config(): return get_config()",
    "def get_config(x): return x",
    "get_config = 3",
    "import no_such_module",
    "raise SystemExit",
    "1/0",
    "\0",
    "(" * 1000,
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()",
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'model': 3})",
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({1: {2: 3}})",
    "from ml_collections import FrozenConfigDict as F\ndef get_config(): return F({'model': {}})",
]


@pytest.mark.parametrize("body", CONFIG_FILES)
def test_config_files_that_give_rubbish(body, tmp_path, no_compiling):
    (tmp_path / "bad.py").write_text(body)
    line = [f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path / 'run'}"]
    status, _ = run_command("config files", "train", *line)
    assert status == cli.WRONG_INPUT
    assert not (tmp_path / "run").exists()


@tries(50)
@given(body=st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode)))
def test_config_files_of_random_bytes(body, tmp_path, no_compiling):
    (tmp_path / "bad.py").write_bytes(body)
    line = [f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path / 'run'}"]
    status, _ = run_command("config files", "train", *line)
    assert status == cli.WRONG_INPUT


OVERRIDES = st.one_of(
    st.builds(
        "--config.{}={}".format,
        st.one_of(st.sampled_from(sorted(KEYS)), WRONG_KEYS.filter(lambda key: "\0" not in key)),
        st.one_of(
            ARGUMENTS,
            st.sampled_from(
                ["", "nan", "inf", "-1", "1e999", "9" * 5000, "[1]", "None", SURROGATE]
            ),
            NUMBERS.filter(lambda n: abs(n) < 10**100 or n != n).map(str),
        ),
    ),
    st.sampled_from(sorted(KEYS)).map("--config.{}".format),
    ARGUMENTS.map("--{}".format).filter(lambda a: not a.startswith(("--flagfile", "--undefok"))),
    ARGUMENTS,
)


@tries(250)
@given(override=OVERRIDES)
@example(override="--config.x=")
@example(override="--config.=3")
@example(override="--config.model=3")
@example(override="--config.seed=abc")
@example(override="--config.seed")
@example(override="--config=")
@example(override="--config=configs/default.py:x")
@example(override="--config=/")
@example(override="--workdir=" + "x" * 5000)
@example(override="--process_id=1")
@example(override="--num_processes=x")
def test_overrides(override, config, tmp_path, no_compiling):
    config.tokenizer = "byte"
    workdir = tmp_path / "run"
    line = command_line(config, workdir)
    line[0] = f"--config={REPOSITORY / 'configs' / 'default.py'}"
    status, _ = run_command("overrides", "train", *line, override)
    assert status == cli.WRONG_INPUT or workdir.exists() or "--workdir" in override
    if status == cli.WRONG_INPUT:
        assert not workdir.exists()
    shutil.rmtree(workdir, ignore_errors=True)


@pytest.mark.parametrize(
    "line",
    [
        ["--config.objective=3"],
        ["--config.no_such_key=3"],
        ["--config.seq_len=0"],
        *[[f"--{flag}={number}"] for flag in ("memory_gib", "tflops") for number in ("nan", "inf")],
        ["--devices=0"],
        ["--devices=" + "9" * 30],
        ["--vocab_size=0"],
        ["--vocab_size=x"],
        ["--bandwidth_gbps=-1"],
        ["--latency_us=nan"],
        ["--check", "--devices=1000"],
        ["nonsense"],
    ],
)
def test_bad_arguments_of_plan(line, no_compiling):
    config = f"--config={REPOSITORY / 'configs' / 'default.py'}"
    status, _ = run_command("overrides", "plan", config, "--vocab_size=99", *line)
    assert status == cli.WRONG_INPUT


@pytest.mark.parametrize("body", CONFIG_FILES)
def test_config_files_that_give_rubbish_to_plan(body, tmp_path, no_compiling):
    (tmp_path / "bad.py").write_text(body)
    status, _ = run_command("config files", "plan", f"--config={tmp_path / 'bad.py'}")
    assert status == cli.WRONG_INPUT


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.path": "tfds:lm1b"}, "data.path='tfds:lm1b' can't be prepared"),
        ({"data.path": "tfds:no_such_dataset"}, "is not known to TFDS"),
        ({"tokenizer": "hf:gpt2"}, "tokenizer='hf:gpt2' can't be loaded"),
        ({"data.eval_fraction": 1e-6}, "gives 1 validation tokens, too few for one sequence of"),
        ({"global_batch_size": 7}, "global_batch_size=7 can't be split equally over 2 devices"),
        ({"sample.prompt": "é"}, "sample.prompt='é': the character 'é' is not among those"),
        (
            {"model.embed_dim": 2**20, "model.num_layers": 100},
            "model is too large: model.num_layers",
        ),
        ({"num_epochs": 2**31 - 1}, "num_epochs=2147483647 is"),
    ],
)
def test_said_before_anything_is_compiled(
    changes, says, config, tmp_path, no_compiling, monkeypatch
):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network in tests")

    TRIED["preflight"] += 1
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    config.data.data_dir = str(tmp_path / "tfds")
    for key, value in changes.items():
        set_anywhere(values := config.to_dict(), key, value)
        config = ConfigDict(values)
    with pytest.raises(ConfigError) as error:
        loop.train(config, tmp_path / "run", devices=jax.local_devices()[:2])
    assert says in str(error.value)
    assert_clear(str(error.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "place", ["/proc/nowhere/run", "{}/file/run", "{}/file", "x" * 300, "a\0b"]
)
def test_a_workdir_that_cannot_be_written(place, config, tmp_path, no_compiling):
    TRIED["preflight"] += 1
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"(?s)--workdir=.* (can't be (written|read) \(.*: choose|holds a NUL)"
    ):
        train(config, place.format(tmp_path))


def test_a_text_that_cannot_be_read(config, tmp_path, no_compiling, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    TRIED["preflight"] += 1
    config.data.cache_dir = str(tmp_path / "cache")
    monkeypatch.setattr(files, "opened", refuse)
    with pytest.raises(ConfigError, match=r"data\.path: .* can't be read \(Permission denied\): "):
        train(config, tmp_path / "run")


def test_tensorflow_gets_no_accelerator_or_is_refused(monkeypatch, config, tmp_path, no_compiling):
    from jaxdp.data import tensorflow

    hidden = []
    monkeypatch.setattr(
        tensorflow.tf.config, "set_visible_devices", lambda devices, kind: hidden.append(kind)
    )
    tensorflow.hide_accelerators()
    assert hidden == ["GPU", "TPU"]

    def started(devices, kind):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    TRIED["preflight"] += 1
    monkeypatch.setattr(tensorflow.tf.config, "set_visible_devices", started)
    with pytest.raises(ConfigError, match=r"holds this process's accelerators already .*: restart"):
        tensorflow.hide_accelerators()
    # Reading the module anew, as a first import does, is part of the checks of a run.
    monkeypatch.delitem(sys.modules, "jaxdp.data.tensorflow")
    monkeypatch.delattr("jaxdp.data.tensorflow")
    with pytest.raises(ConfigError, match="TensorFlow holds"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("harmed", "says"),
    [
        ("config.json", "config.json is damaged"),
        ("tokenizer.json", "can't be read"),
        ("checkpoints", "are damaged (4, 2): restore them from a copy"),
    ],
)
def test_generating_from_a_harmed_workdir(harmed, says, workdir, command):
    TRIED["real commands"] += 1
    for path in [workdir / harmed, *(workdir / harmed).glob("*/state/d/*")]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    before = contents(workdir)
    fault = harmed == "checkpoints"
    process = command("generate", f"--workdir={workdir}", "--prompt=1", check=1 if fault else 2)
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("jaxdp: ") and says in process.stderr
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=configs/default.py:x", "--workdir=x"], "takes 0 positional arguments"),
        (["--config=configs/quickstart.py", "--config.=3", "--workdir=x"], "='3' is no key"),
        (
            ["--config=configs/quickstart.py", "--config.tokenizer=~no-one/x", "--workdir=x"],
            "no file",
        ),
    ],
)
def test_training_with_bad_arguments(arguments, says, command, tmp_path, monkeypatch):
    TRIED["real commands"] += 1
    arguments[-1] = f"--workdir={tmp_path / 'run'}"
    process = command("train", *arguments, check=2)
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("jaxdp: ")
    assert says in process.stderr
    assert not (tmp_path / "run").exists()
