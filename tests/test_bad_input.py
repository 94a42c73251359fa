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
    st.sampled_from(["", "\0", SURROGATE, "~nobody-of-that-name/x", "x" * 5000, "..", "/", "[", "😀"]),
    st.text(st.characters(), max_size=20),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**5000, 2**31, 2**63, -1, 0, 2**31 - 1, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0]),
    st.floats(),
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
            st.sampled_from(["", "nan", "inf", "-1", "1e999", "9" * 5000, "[1]", "None", SURROGATE]),
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

PIECES = ["\0", "\ufeff", "\r\n", "\n", " ", "\t", "a", "é", "e\u0301", "😀", "👩‍👩‍👧", "\u202e", "<|endoftext|>"]
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
    changed = {"truncate": data[:at], "flip": flipped, "append": data + noise}
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
    meta.write_text(replace_in(meta.read_text(), number, value))
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
