"""Bad input by the hundred: a right result, or one clear line, and nothing on disk changed."""

import ast
import collections
import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from conftest import REPOSITORY, TEXT
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_checkpoint import open_checkpoints, state_of, two_checkpoints
from test_config import KEYS
from test_runs import flags as command_line
from tokenizers import Tokenizer, models

from jaxdp import checkpoint, command, loop, metrics, preflight
from jaxdp import config as configs
from jaxdp import tokenizer as tokenizers
from jaxdp.config import RANGES, ConfigError, RunError
from jaxdp.configs import default
from jaxdp.data import cache as caches
from jaxdp.data.cache import open_cache
from jaxdp.generate import generate

TRIED: collections.Counter = collections.Counter()
OURS: set[str] = set()  # Names of flags of the commands.


def tries(count: int):
    """The same examples in every run; a fixture's folder serves all examples of a test."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def told():
    yield
    print(f"\nbad inputs tried: {TRIED.total()} {dict(TRIED)}")


class Reached(Exception):
    """All checks are passed; what would follow is compilation."""


@pytest.fixture
def no_compiling(monkeypatch, tmp_path):
    """Ends a training where it would begin to compile, in a folder and a home of the test's own."""

    def reached(*args):
        raise Reached

    monkeypatch.setattr(loop, "create_state", reached)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def contents(folder: Path) -> dict:
    """What a folder holds, links not followed; locks and the folder's absence count as nothing."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
        if p.name != "lock"
    }


def assert_clear(message: str) -> None:
    """One line of a sane length that has a way out after a colon."""
    assert "\n" not in message and "Traceback" not in message, message
    assert ": " in message and 20 < len(message) < 1500, message


def refusal(kind: str, function, *args) -> str | None:
    """Runs a function on a bad input: how it refuses, or None where it makes something of it."""
    TRIED[kind] += 1
    try:
        function(*args)
    except Reached:
        return None
    except ConfigError as error:
        message = " ".join(str(error).split())
        assert_clear(message)
        return message
    return None


@contextlib.contextmanager
def only_flags_of(module: str):
    """Imports a command anew with only its own flags: the commands have some of the same name."""
    absl, before = flags.FLAGS, {}
    for of, found in absl.flags_by_module_dict().items():
        OURS.update(flag.name for flag in found if of.startswith("jaxdp"))
    for name in OURS & set(absl):
        before[name] = absl[name]
        delattr(absl, name)
    kept, loaded = set(absl), sys.modules.pop(module, None)
    try:
        yield importlib.import_module(module)
    finally:
        for name in set(absl) - kept:
            delattr(absl, name)
        absl.unparse_flags()
        for name, flag in before.items():
            absl[name] = flag
        if loaded:
            sys.modules[module] = loaded


def run_command(kind: str, name: str, *argv: str) -> tuple[int, str]:
    """Runs a command in this process; returns its status and what it says on stdout.

    What it says on stderr must be nothing, or one line with the status of wrong input.
    """
    TRIED[kind] += 1
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, only_flags_of(f"jaxdp.{name}") as module:
        patch.setattr(sys, "argv", [name, *argv])
        patch.setattr(command, "prepare_jax", lambda: None)
        patch.setattr(command, "on_stop_signal", lambda callback: None)
        check = command.check_overrides if name == "train" else None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = command.run(module.main, check)
        except Reached:
            status = 0
    said = err.getvalue()
    if status == command.WRONG_INPUT:
        assert said.startswith("jaxdp: ") and said.count("\n") == 1, said
        assert_clear(said.strip())
    else:
        assert status in (0, command.FAULT), status
    return status, out.getvalue()


# Configs.

SURROGATE = "a\udcffb"
ODD_TEXTS = st.one_of(
    st.sampled_from(
        ["", "\0", SURROGATE, "~nobody-of-that-name/x", "x" * 5000, "..", "/", "[", "😀"]
    ),
    st.text(st.characters(), max_size=20),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63, -1, 0, 2**31 - 1, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]),
    st.floats(),
    st.builds(lambda: 10**5000),  # Python doesn't print it, nor could a list of examples.
    st.sampled_from([border for borders in RANGES.values() for border in borders]),
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


def set_anywhere(values: dict, key: str, value) -> None:
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            values[group] = {}
        values = values[group]
    values[name] = value


def train(config, workdir):
    return loop.train(config, workdir, devices=jax.local_devices()[:1])


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
    assert status == command.WRONG_INPUT
    assert not (tmp_path / "run").exists()


@tries(50)
@given(body=st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode)))
def test_config_files_of_random_bytes(body, tmp_path, no_compiling):
    (tmp_path / "bad.py").write_bytes(body)
    line = [f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path / 'run'}"]
    status, _ = run_command("config files", "train", *line)
    assert status == command.WRONG_INPUT


ARGUMENTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
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
    assert status == command.WRONG_INPUT or workdir.exists() or "--workdir" in override
    if status == command.WRONG_INPUT:
        assert not workdir.exists()
    shutil.rmtree(workdir, ignore_errors=True)


# Texts.

PIECES = [
    "\0",
    "\ufeff",
    "\r\n",
    "\n",
    " ",
    "\t",
    "a",
    "é",
    "e\u0301",
    "😀",
    "👩‍👩‍👧",
    "\u202e",
    "<|endoftext|>",
]
GIANT = "one line " * 30_000
BAD_BYTES = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xff\xfe"]


@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
@tries(60)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=12),
    times=st.sampled_from([1, 30]),
    bad=st.sampled_from([b"", b"", b"", *BAD_BYTES]),
)
@example(pieces=[], times=1, bad=b"")
@example(pieces=[GIANT], times=1, bad=b"")
@example(pieces=[" "], times=1000, bad=b"")
@example(pieces=["\0"], times=1000, bad=b"")
def test_texts(spec, pieces, times, bad, config, tmp_path, no_compiling):
    text, path = "".join(pieces) * times, tmp_path / "text.txt"
    path.write_bytes(text.encode() + bad)
    config.data.path, config.tokenizer = str(path), spec
    config.data.cache_dir, workdir = str(tmp_path / "cache"), tmp_path / "run"
    config.sample.num_tokens = 0
    message = refusal("texts", train, config, workdir)
    if bad:
        assert f"{path} is not UTF-8 text (byte {len(text.encode())}): convert it" in message
    if message:
        assert bad or "too few for one sequence" in message or "finds no character" in message
        assert not workdir.exists()
    else:
        cache = open_cache(config)
        end = tokenizers.end_id(cache.tokenizer)
        ids = [int(i) for i in (*cache.train, *cache.validation) if i != end]
        assert cache.tokenizer.decode(ids, skip_special_tokens=False) == text
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    shutil.rmtree(workdir, ignore_errors=True)


# Harm to files.

HARMS = ["truncate", "flip", "delete", "append", "empty", "random", "folder", "link", "loop"]


def harm(path: Path, how: str, where: float, noise: bytes) -> None:
    """Harms a file, or leaves it as it was where there is nothing to harm."""
    data = path.read_bytes()
    at = int(where * max(len(data) - 1, 0))
    flipped = data[:at] + bytes(b ^ (1 << at % 8) for b in data[at : at + 1]) + data[at + 1 :]
    # Half at most is left, and what is added is no space: JSON wouldn't be harmed.
    changed = {"truncate": data[: at // 2], "flip": flipped, "append": data + noise + b"!"}
    changed |= {"empty": b"", "random": noise}
    path.unlink()
    if how in changed:
        path.write_bytes(changed[how])
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("/no/such/file")
    elif how == "loop":
        path.symlink_to(path)


HARM = {
    "how": st.sampled_from(HARMS),
    "where": st.floats(0, 1),
    "noise": st.binary(min_size=1, max_size=40),
}

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_in(value, path=()):
    """The paths to all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths_in(inner, (*path, key))


def replace_in(text: str, number: int, new) -> str:
    """Replaces one of the values in a JSON text."""
    value = json.loads(text)
    paths = list(paths_in(value))
    *groups, key = paths[number % len(paths)]
    inner = value
    for group in groups:
        inner = inner[group]
    inner[key] = new
    return json.dumps(value)


# Tokenizers.


def word_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 7}, unk_token="?"))


BASES = {
    "byte": tokenizers.get_tokenizer("byte", "causal", lambda _: []).to_str(),
    "bpe": tokenizers.get_tokenizer("train:bpe:300", "causal", lambda _: [TEXT]).to_str(),
    "words": word_tokenizer().to_str(),
}


def use_tokenizer(text: bytes, config, tmp_path) -> None:
    path, workdir = tmp_path / "tokenizer.json", tmp_path / "run"
    path.write_bytes(text)
    config.tokenizer, config.data.cache_dir = str(path), str(tmp_path / "cache")
    if refusal("tokenizers", train, config, workdir):
        assert not workdir.exists()
    else:
        cache = open_cache(config)
        for ids in (cache.train, cache.validation):
            assert ids.max() < cache.vocab_size <= tokenizers.LARGEST_VOCABULARY
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@tries(80)
@given(base=st.sampled_from(sorted(BASES)), **HARM)
def test_harmed_tokenizer_files(base, how, where, noise, config, tmp_path, no_compiling):
    path = tmp_path / "whole.json"
    path.write_text(BASES[base])
    harm(path, how, where, noise)
    use_tokenizer(path.read_bytes() if path.is_file() else b"", config, tmp_path)
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@tries(60)
@given(value=JSON)
def test_tokenizer_files_of_another_shape(value, config, tmp_path, no_compiling):
    use_tokenizer(json.dumps(value).encode(), config, tmp_path)


IDS = st.sampled_from([-1, 0, 1, 255, 256, 300, 10**6, 2**24, 2**31, 2**32 - 1, 2**32, 2**64])


@tries(150)
@given(
    base=st.sampled_from(sorted(BASES)),
    number=st.integers(0, 10**6),
    value=st.one_of(JSON, IDS),
)
@example(base="words", number=0, value=0)
def test_tokenizers_with_one_value_replaced(base, number, value, config, tmp_path, no_compiling):
    use_tokenizer(replace_in(BASES[base], number, value).encode(), config, tmp_path)


@pytest.mark.parametrize("new_id", [2**24, 2**31, 2**32 - 1])
def test_an_id_far_beyond_the_vocabulary_is_refused(new_id, config, tmp_path, no_compiling):
    tokenizer = json.loads(BASES["words"])
    tokenizer["model"]["vocab"]["b"] = new_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=rf"tokenizer='.*3 tokens and one with the id {new_id}\)"):
        train(config, tmp_path / "run")


# Token caches.


@pytest.fixture
def cached(config, tmp_path):
    """A config, and its cache as it was made."""
    config.data.cache_dir = str(tmp_path / "cache")
    return config, open_cache(config)


def assert_restored(config, whole, before) -> None:
    """The cache is used as if it had never been harmed."""
    cache = open_cache(config)
    assert contents(whole.folder) == before
    assert (cache.train == whole.train).all() and (cache.validation == whole.validation).all()
    for name in ("folder", "vocab_size", "validation_bytes", "digest"):
        assert getattr(cache, name) == getattr(whole, name)


@tries(120)
@given(name=st.integers(0, 3), **HARM)
def test_harmed_caches_are_made_anew(name, how, where, noise, cached):
    TRIED["caches"] += 1
    config, whole = cached
    before = contents(whole.folder)
    # A mapped file must not be harmed under the test's own eyes.
    whole = caches.dataclasses.replace(
        whole, train=np.array(whole.train), validation=np.array(whole.validation)
    )
    harm(sorted(whole.folder.iterdir())[name], how, where, noise)
    reports = []
    changed = contents(whole.folder) != before
    open_cache(config, reports.append)
    assert any("is damaged" in line for line in reports) == changed
    assert_restored(config, whole, before)


@tries(60)
@given(number=st.integers(0, 100), value=st.one_of(JSON, IDS))
def test_caches_with_one_value_of_meta_replaced(number, value, cached):
    TRIED["caches"] += 1
    config, whole = cached
    before = contents(whole.folder)
    meta = whole.folder / "meta.json"
    text = replace_in(meta.read_text(), number, value)
    assume(text != json.dumps(json.loads(meta.read_text())))
    meta.write_text(text)
    assert_restored(config, whole, before)


@pytest.mark.parametrize("what", ["file", "dangling", "link", "empty", "extra", "lock"])
def test_a_cache_that_is_something_else(what, cached, tmp_path):
    TRIED["caches"] += 1
    config, whole = cached
    before = contents(whole.folder)
    if what == "extra":
        (whole.folder / "more").mkdir()
        (whole.folder / "more" / "evil.py").write_text("raise SystemExit")
        assert open_cache(config).digest == whole.digest
        return
    whole.folder.rename(tmp_path / "moved")
    if what == "file":
        whole.folder.write_text("x")
    elif what == "dangling":
        whole.folder.symlink_to("/no/such/folder")
    elif what == "link":  # As good as a folder.
        whole.folder.symlink_to(tmp_path / "moved")
    elif what == "empty":
        whole.folder.mkdir()
    else:
        shutil.rmtree(tmp_path / "cache")
        lock = Path(f"{whole.folder}.lock")
        lock.mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"data\.cache_dir: .*\.lock is no file: remove it"):
            open_cache(config)
        return
    assert_restored(config, whole, before)


def test_ids_beyond_the_vocabulary_in_a_cache_that_says_it_is_whole(cached):
    config, whole = cached
    before, digest = contents(whole.folder), whole.digest
    ids = np.array(whole.train)
    ids[5] = whole.vocab_size
    (whole.folder / "train.bin").write_bytes(ids.tobytes())
    path = whole.folder / "meta.json"
    meta = json.loads(path.read_text())
    data = ids.tobytes() + b"train" + (whole.folder / "validation.bin").read_bytes() + b"validation"
    meta["digest"] = caches.hashlib.sha256(data).hexdigest()
    assert meta["digest"] != digest
    meta["checksum"] = caches._checksum(meta)
    path.write_text(json.dumps(meta))
    reports = []
    open_cache(config, reports.append)
    assert "train.bin has ids beyond the vocabulary" in reports[0]
    assert contents(whole.folder) == before


# Workdirs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file, cache_dir) -> Path:
    """A finished run with two checkpoints."""
    c = default.get_config()
    c.data.path, c.data.cache_dir, c.tokenizer = str(text_file), str(cache_dir), "char"
    c.num_train_steps, c.global_batch_size, c.seq_len, c.eval_every = 4, 4, 16, 4
    c.model.num_layers, c.model.num_heads, c.model.embed_dim = 1, 1, 8
    c.optimizer.warmup_steps, c.checkpoint.every, c.sample.num_tokens = 1, 2, 0
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(c, workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    """A copy of it; `renewed` makes another."""
    return renewed(tmp_path / "run", trained)


def renewed(workdir: Path, trained: Path) -> Path:
    shutil.rmtree(workdir, ignore_errors=True)
    return Path(shutil.copytree(trained, workdir))


SMALL = [
    "0",
    "1",
    "-1",
    "0.5",
    "1e-30",
    "1e-320",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "1.5",
    "2",
    "1e999",
]
NO_NUMBERS = ["", "x", "0x10", "1_0", "True", "None", "٣", "9" * 30, "9" * 5000]
NUMBER_TEXTS = st.sampled_from([*SMALL, *NO_NUMBERS, str(2**31 - 1), str(2**31)])


@pytest.mark.slow
@tries(120)
@given(
    prompt=st.one_of(
        st.sampled_from(["", "1 is", "😀", SURROGATE, "a" * 10_000, "\n", "1\ufeff", "e\u0301"]),
        st.text("0123456789 isaeqru,.\n", max_size=40),
        ARGUMENTS,
    ),
    flag=st.sampled_from(["temperature", "top_p", "top_k", "seed", "num_tokens"]),
    number=NUMBER_TEXTS,
)
def test_prompts_and_flags_of_generate(prompt, flag, number, workdir):
    assume((flag, number) != ("num_tokens", str(2**31 - 1)))  # It would take days.
    before = contents(workdir)
    line = [f"--workdir={workdir}", "--num_tokens=3", f"--prompt={prompt}", f"--{flag}={number}"]
    status, out = run_command("prompts and flags", "generate", *line)
    assert status == command.WRONG_INPUT or out.startswith(prompt)
    assert status == 0 or not out
    assert contents(workdir) == before


@pytest.mark.slow
@tries(150)
@given(
    name=st.sampled_from(["config.json", "tokenizer.json"]),
    replaced=st.one_of(st.none(), st.tuples(st.integers(0, 200), st.one_of(JSON, IDS, NUMBERS))),
    **HARM,
)
def test_harmed_files_of_a_workdir(
    name, replaced, how, where, noise, trained, workdir, no_compiling
):
    """One of another model or tokenizer is found, too: generating gives the same text, or none."""
    TRIED["workdir files"] += 2
    right = generate(trained, ["1 is"], num_tokens=3)
    config = configs.load(trained / "config.json")
    renewed(workdir, trained)
    path = workdir / name
    if replaced is None:
        harm(path, how, where, noise)
    else:
        try:
            path.write_text(replace_in(path.read_text(), *replaced))
        except ValueError:  # An int of too many digits can't be written.
            assume(False)
    before = contents(workdir)
    try:
        text = generate(workdir, ["1 is"], num_tokens=3)
    except ConfigError as error:
        assert_clear(str(error))
    else:
        assert text == right
    try:
        train(config, workdir)
    except ConfigError as error:
        assert_clear(str(error))
    except Reached:
        pass
    assert contents(workdir) == before


@tries(80)
@given(
    lines=st.lists(st.one_of(st.binary(max_size=20), JSON.map(json.dumps).map(str.encode))),
    **HARM,
)
def test_harmed_metrics(lines, how, where, noise, tmp_path, config):
    """A line that is none is left out; where no file can be, the run is refused."""
    TRIED["metrics"] += 1
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}]
    good = [json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join([good[0], *lines, good[1]]) + b"\n")
    found = metrics.read_jsonl(tmp_path)
    assert found[0] == records[0] and found[-1] == records[1]
    harm(path, how, where, noise)
    if how in ("folder", "link", "loop"):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl is no file"):
            preflight.check_workdir(tmp_path)
    else:
        metrics.MetricsWriter(tmp_path, config, 1).__exit__()
        assert how == "delete" or all(r["step"] <= 1 for r in metrics.read_jsonl(tmp_path))
    path.rmdir() if how == "folder" else path.unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "tensorboard", ignore_errors=True)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "config.json", "tokenizer.json"])
def test_a_workdir_with_something_else_in_a_files_place(name, trained, workdir, no_compiling):
    TRIED["workdir files"] += 1
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        path.mkdir()
    before = contents(workdir)
    kind = "file" if "." in name else "folder"
    with pytest.raises(
        ConfigError, match=rf"\A{path} is no {kind}, as a run needs it: move it away"
    ):
        train(configs.load(trained / "config.json"), workdir)
    assert contents(workdir) == before


# Checkpoints.

STRAYS = ["abc", "-1", "007", "3.5", "٣", "5.orbax-checkpoint-tmp", ".hidden", "9" * 30, "9", "1e3"]


@pytest.fixture
def two(tmp_path, config):
    """A workdir with checkpoints 3 and 5 of a tiny state."""
    two_checkpoints(tmp_path / "whole", config)
    return tmp_path / "whole"


def assert_one_that_was_saved(step: int, params) -> None:
    assert step in (3, 5)
    expected = state_of(step, value=float(step)).params
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check_checkpoints(kind: str, workdir: Path, config) -> list[str]:
    """Reads parameters, then the state; returns what is reported."""
    TRIED[kind] += 2
    before, reports = contents(workdir), []
    try:
        params, step = checkpoint.load_params(workdir, state_of(0).params, report=reports.append)
    except (ConfigError, RunError) as error:
        assert_clear(str(error))
    else:
        assert_one_that_was_saved(step, params)
    assert contents(workdir) == before
    try:
        with open_checkpoints(workdir, config, report=reports.append) as checkpoints:
            found = checkpoints.restore(state_of(0))
    except (ConfigError, RunError) as error:
        assert_clear(str(error))
        assert contents(workdir) == before
    else:
        assert found is None or (assert_one_that_was_saved(found[0], found[2].params) is None)
    return reports


@pytest.mark.slow
@tries(60)
@given(
    harms=st.lists(st.tuples(st.integers(0, 60), st.fixed_dictionaries(HARM)), max_size=3),
    strays=st.lists(
        st.tuples(st.sampled_from(STRAYS), st.sampled_from(["file", "dir"])), max_size=2
    ),
)
def test_harmed_checkpoints(harms, strays, two, tmp_path, config):
    workdir = Path(shutil.copytree(two, tmp_path / "harmed"))
    files = sorted(p for p in workdir.rglob("*") if p.is_file())
    for number, how in harms:
        path = files[number % len(files)]
        if path.is_file() and not path.is_symlink():
            harm(path, **how)
    for name, kind in strays:
        path = workdir / "checkpoints" / name
        if not path.exists():
            path.mkdir() if kind == "dir" else path.write_text("x")
    check_checkpoints("checkpoints", workdir, config)
    shutil.rmtree(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "state", "extra", "metrics", "state/d", "state/_METADATA"])
@pytest.mark.parametrize("how", ["delete", "file", "folder", "dangling", "loop", "moved"])
def test_parts_of_a_checkpoint_replaced(part, how, two, tmp_path, config):
    path = two / "checkpoints" / "5" / part
    path.rename(tmp_path / "moved")
    if how == "file":
        path.write_text("x")
    elif how == "folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to("/no/such")
    elif how == "loop":
        path.symlink_to(path)
    elif how == "moved":  # A link to what was there is as good.
        path.symlink_to(tmp_path / "moved")
    reports = check_checkpoints("checkpoints", two, config)
    if how == "moved":
        assert reports == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["9", "007", "-1", "abc"])
def test_a_renamed_checkpoint_is_not_taken_for_another_step(name, two, config):
    (two / "checkpoints" / "5").rename(two / "checkpoints" / name)
    TRIED["checkpoints"] += 1
    with open_checkpoints(two, config) as checkpoints:
        assert checkpoints.restore(state_of(0))[0] == 3


@pytest.mark.slow
def test_a_checkpoint_of_other_shapes_is_refused_by_name(two, config):
    before = contents(two)
    state = state_of(0)
    other = state.replace(params=state.params | {"a": state.params["b"]["c"]})
    message = r"params/a is \(2, 3\) in checkpoint \d and \(4,\) by the config"
    TRIED["checkpoints"] += 2
    with open_checkpoints(two, config) as checkpoints, pytest.raises(ConfigError, match=message):
        checkpoints.restore(other)
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_params(two, other.params)
    assert contents(two) == before


@pytest.mark.slow
def test_a_text_with_a_new_character_is_told_from_a_damaged_checkpoint(
    trained, workdir, tmp_path, cache_dir
):
    config = configs.load(trained / "config.json")
    config.data.path = str(tmp_path / "changed.txt")
    (tmp_path / "changed.txt").write_text(TEXT + "é")
    before = contents(workdir)
    with pytest.raises(
        ConfigError, match="no longer gives the tokens that this workdir was trained"
    ):
        train(config, workdir)
    assert contents(workdir) == before


# A workdir or a cache from a stranger runs no code.


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def payloads(marker: Path) -> list[bytes]:
    array = io.BytesIO()
    np.save(array, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    code = f"__import__('os').mkdir({str(marker)!r})"
    tag = json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": [str(marker)]}]})
    return [pickle.dumps(Payload(marker)), array.getvalue(), code.encode(), tag.encode()]


def test_the_payloads_work(tmp_path):
    plain, array, code, _ = payloads(tmp_path / "marker")
    for run in (
        lambda: pickle.loads(plain),
        lambda: np.load(io.BytesIO(array), allow_pickle=True),
        lambda: eval(code),
    ):
        run()
        (tmp_path / "marker").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_strangers_files_run_no_code(number, trained, two, tmp_path, config, no_compiling):
    marker = tmp_path / "marker"
    payload = payloads(marker)[number]
    config.data.cache_dir = str(tmp_path / "cache")
    cache = open_cache(config)
    for path in sorted(cache.folder.iterdir()):
        TRIED["payloads"] += 1
        path.unlink()
        path.write_bytes(payload)
        open_cache(config)
    saved = configs.load(trained / "config.json")
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        TRIED["payloads"] += 1
        workdir = renewed(tmp_path / "run", trained)
        (workdir / name).write_bytes(payload)
        with contextlib.suppress(ConfigError, Reached):
            train(saved, workdir)
        with contextlib.suppress(ConfigError):
            generate(workdir, ["1"], num_tokens=2)
        metrics.MetricsWriter(workdir, config, 1).__exit__()
    files = [p.relative_to(two) for p in (two / "checkpoints" / "5").rglob("*") if p.is_file()]
    for name in files:
        workdir = renewed(tmp_path / "harmed", two)
        (workdir / name).write_bytes(payload)
        check_checkpoints("payloads", workdir, config)
    for name in ("params.pkl", "state.npy", "treedef.pkl", "__init__.py", "checkpoint"):
        for folder in ("checkpoints/5/state", "checkpoints/5", ""):
            (two / folder / name).write_bytes(payload)
        # Orbax takes a file of the last name for all of the state, in a format of its own.
        assert bool(check_checkpoints("payloads", two, config)) == (name == "checkpoint")
    assert not marker.exists()


RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}


@pytest.mark.parametrize(
    "path",
    sorted((REPOSITORY / "jaxdp").rglob("*.py")),
    ids=lambda p: str(p.relative_to(REPOSITORY)),
)
def test_the_source_reads_nothing_that_could_run(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not RUN_CODE & {part for name in modules for part in name.split(".")}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # numpy.load doesn't unpickle unless it is told to; what doesn't read can't be told.
            assert (node.value.id, node.attr) not in {("np", "load"), ("yaml", "load")}
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"


# What has to be said before anything is compiled.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.path": "tfds:lm1b"}, "data.path='tfds:lm1b' can't be prepared"),
        ({"data.path": "tfds:no_such_dataset"}, "is not known to TFDS"),
        ({"tokenizer": "hf:gpt2"}, "tokenizer='hf:gpt2' can't be had"),
        ({"data.eval_fraction": 1e-6}, "gives 1 validation tokens, too few for one sequence of"),
        ({"global_batch_size": 7}, "global_batch_size=7 can't be split equally over 2 devices"),
        ({"sample.prompt": "é"}, "sample.prompt='é': the character 'é' is not among those"),
        (
            {"model.embed_dim": 2**20, "model.num_layers": 100},
            "model is too large: model.num_layers",
        ),
        ({"num_epochs": 2**31 - 1}, "num_epochs=2147483647 are"),
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
    monkeypatch.setattr(Path, "read_bytes", refuse)
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


# Real commands.


@pytest.mark.slow
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


@pytest.mark.slow
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
