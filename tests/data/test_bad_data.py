"""Bad texts, tokenizers and token caches: a right result, or one clear line."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from jaxdp.common.errors import ConfigError
from jaxdp.data import layout, special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.cache import open_cache
from support.bad_input import (
    HARM,
    IDS,
    JSON,
    TRIED,
    contents,
    harm,
    refusal,
    replace_in,
    train,
    tries,
)
from support.texts import TEXT

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
        end = special_tokens.end_id(cache.tokenizer)
        ids = [int(i) for i in (*cache.train, *cache.validation) if i != end]
        assert cache.tokenizer.decode(ids, skip_special_tokens=False) == text
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    shutil.rmtree(workdir, ignore_errors=True)


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
    whole = dataclasses.replace(
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
    meta["digest"] = hashlib.sha256(data).hexdigest()
    assert meta["digest"] != digest
    meta["checksum"] = layout.checksum(meta)
    path.write_text(json.dumps(meta))
    reports = []
    open_cache(config, reports.append)
    assert "train.bin has ids beyond the vocabulary" in reports[0]
    assert contents(whole.folder) == before
