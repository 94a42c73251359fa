import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxdp.common import locks
from jaxdp.common.errors import ConfigError
from jaxdp.data import building, special_tokens
from jaxdp.data.cache import open_cache
from jaxdp.data.encoding import encode
from support.bad_input import contents
from support.processes import limited


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def open_it(config, tmp_path, reports):
    """Opens the config's cache in a folder of the test's own; `reports` tells of each building."""
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.path = str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("héllo wörld, " * 100, encoding="utf-8")
    return lambda: open_cache(config, reports.append)


def write(tmp_path, **texts: str) -> str:
    """Writes text files and returns the data.path of all."""
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return f"text:{tmp_path}/*.txt"


def word_tokenizer(path, size: int) -> str:
    """Writes a tokenizer.json of `size` words, the last of them "a", and returns its path."""
    vocab = {"?": 0, **{f"word{i}": i for i in range(1, size - 1)}, "a": size - 1}
    Tokenizer(models.WordLevel(vocab, unk_token="?")).save(str(path))
    return str(path)


def names(open_it) -> list[str]:
    """What lies in the cache's root, lock files apart."""
    root = open_it().folder.parent
    return [path.name for path in root.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("spec", ["byte", "char", "train:bpe:300"])
def test_the_tokens_are_those_of_the_documents(spec, config, open_it, tmp_path):
    documents = {"a": "first, " * 30, "b": "sécond. " * 30, "c": "third! " * 90}
    config.data.path = write(tmp_path, text="", **documents)
    config.data.eval_fraction = 0.3
    config.tokenizer = spec
    cache = open_it()
    border = int(sum(map(len, documents.values())) * 0.7)
    cut = border - len(documents["a"]) - len(documents["b"])
    expected = {
        "train": [documents["a"], documents["b"], documents["c"][:cut]],
        "validation": [documents["c"][cut:]],
    }
    end = [] if spec == "char" else [cache.tokenizer.token_to_id("<|endoftext|>")]
    for split, texts in expected.items():
        ids = [[*encode(cache.tokenizer, [text])[0].tolist(), *end] for text in texts]
        assert getattr(cache, split).tolist() == list(itertools.chain.from_iterable(ids))


def test_a_character_file_is_split_as_nanogpt_splits_it(config, open_it):
    for length in (1000, 1001, 1009, 1115):
        text = ("abcdefghij" * 200)[:length]
        with open(config.data.path, "w") as file:
            file.write(text)
        cache = open_it()
        assert len(cache.train) == int(0.9 * length)
        characters = sorted(set(text))
        ids = [characters.index(c) for c in text]
        assert [*cache.train.tolist(), *cache.validation.tolist()] == ids


def buildings(reports) -> int:
    """How often a text was tokenised."""
    return sum(line.startswith("Tokenising") for line in reports)


def test_a_corpus_is_tokenised_once(open_it, reports):
    first, second = open_it(), open_it()
    assert buildings(reports) == 1
    assert first.folder == second.folder
    assert first.digest == second.digest
    assert first.train.tolist() == second.train.tolist()
    assert first.tokenizer.to_str() == second.tokenizer.to_str()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "byte"),
        ("objective", "masked"),
        ("eval_fraction", 0.2),
        ("separator", ","),
        ("bos", "h"),
        ("eos", "h"),
        ("special_tokens", True),
    ],
)
def test_what_changes_the_tokens_makes_another_cache(key, value, config, open_it, reports):
    before = open_it().folder
    (config.data if key in config.data else config)[key] = value
    assert open_it().folder != before
    assert buildings(reports) == 2


def test_a_changed_text_makes_another_cache(config, open_it):
    before = open_it()
    with open(config.data.path, "a") as file:
        file.write("more")
    assert open_it().digest != before.digest


def test_a_changed_tokenizer_file_makes_another_cache(config, open_it, tmp_path):
    config.tokenizer = word_tokenizer(tmp_path / "tokenizer.json", 10)
    before = open_it()
    word_tokenizer(tmp_path / "tokenizer.json", 11)
    assert open_it().vocab_size == before.vocab_size + 1


def test_changed_settings_beside_a_tokenizer_make_another_cache(config, open_it, tmp_path):
    config.tokenizer = word_tokenizer(tmp_path / "tokenizer.json", 10)
    assert special_tokens.end_id(open_it().tokenizer) is None
    for name in ("word1", "word2"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        for config.tokenizer in (str(tmp_path / "tokenizer.json"), f"hf:{tmp_path}"):
            tokenizer = open_it().tokenizer
            assert tokenizer.id_to_token(special_tokens.end_id(tokenizer)) == name


def test_what_a_run_warns_about(config, open_it, tmp_path):
    """Much unknown or replaced text, names of special tokens, skipped records, JSON as text."""
    config.data.path = write(tmp_path, text="héllo, <|endoftext|> " * 50 + "\ufffd" * 50)
    config.tokenizer = "byte"
    cache = open_it()
    assert [warning.partition(": ")[0] for warning in cache.warnings] == [
        "the text has the name of the special token <|endoftext|> as plain text, 50 times at its "
        "beginning; data.special_tokens=True makes it that token, and data.separator="
        "'<|endoftext|>' cuts a text file into documents there",
        "4.5% of the characters are U+FFFD",
    ]
    assert cache.tokens_per_byte == 1 + 1 / cache.validation_bytes  # The end token.
    config.data.special_tokens = True
    assert len(open_it().warnings) == 1
    config.data.separator = "\\n"  # A shell gives it as two characters.
    assert open_it().warnings[0].startswith(r"data.separator='\\n' is not in the first 300,000")
    config.data.separator = "\ufffd"
    assert not any("separator" in warning for warning in open_it().warnings)
    config.data.separator = ""
    config.tokenizer = word_tokenizer(tmp_path / "tokenizer.json", 10)
    cache = open_it()
    assert cache.warnings[0].startswith("100.0% of the tokens are ?, which stands for text that")
    assert cache.tokens_per_byte is None

    lines = ['{"text": "abc"}', '{"text": null}', "{}"] * 20
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    config.tokenizer, config.data.path = "byte", f"text:{tmp_path}/lines.jsonl"
    assert open_it().warnings[0].startswith("the text looks like JSON lines")
    config.data.path, config.data.skip_missing = f"{tmp_path}/lines.jsonl", True
    cache = open_it()
    assert cache.warnings == ("40 records without a text are skipped (data.skip_missing)",)
    assert len(cache.train) + len(cache.validation) == 20 * 4


def test_a_tokenizer_that_drops_characters_is_lossy(config, open_it, tmp_path):
    """Without an unknown token, BPE leaves out what it doesn't know: "é", "w" and others."""
    tokenizer = Tokenizer(models.BPE({"h": 0, "l": 1, "o": 2}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config.tokenizer = str(tmp_path / "tokenizer.json")
    cache = open_it()
    assert cache.warnings[0].startswith("the tokenizer changes the text: 46.2% of its characters")
    assert cache.tokens_per_byte is None


def test_a_cache_for_one_objective_does_not_hide_that_the_other_is_impossible(
    config, open_it, tmp_path
):
    config.tokenizer = word_tokenizer(tmp_path / "tokenizer.json", 10)
    open_it()
    config.objective = "masked"
    with pytest.raises(ConfigError, match="no mask token"):
        open_it()


def test_equal_data_have_equal_digests_wherever_they_lie(config, open_it, tmp_path):
    digest = open_it().digest
    (tmp_path / "moved.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    config.data.path = str(tmp_path / "moved.txt")
    assert open_it().digest == digest


def test_data_that_differ_in_one_token_or_in_their_border_have_other_digests(
    config, open_it, tmp_path
):
    digests = set()
    text = "hello world " * 20
    for number, changed in enumerate([text, text[:-1] + "h", "w" + text[1:]]):
        config.data.path = str(tmp_path / f"{number}.txt")
        (tmp_path / f"{number}.txt").write_text(changed)
        digests.add(open_it().digest)
    config.data.eval_fraction = 0.2
    digests.add(open_it().digest)
    assert len(digests) == 4


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_token_ids_take_two_bytes_where_they_fit(size, dtype, config, open_it, tmp_path):
    config.data.path = write(tmp_path, text="a")
    config.data.eval_fraction = 1e-6  # The only character goes to validation.
    config.tokenizer = word_tokenizer(tmp_path / "tokenizer.json", size)
    cache = open_it()
    assert cache.validation.dtype == cache.train.dtype == np.dtype(dtype)
    assert cache.validation.tolist() == [size - 1]
    assert os.path.getsize(cache.folder / "validation.bin") == np.dtype(dtype).itemsize


def test_tokens_are_mapped_not_read(open_it):
    assert isinstance(open_it().train, np.memmap)


def test_validation_bytes_are_those_of_the_text_in_utf8(config, open_it, tmp_path):
    config.data.path = write(tmp_path, text="a" * 90 + "é" * 7 + "😀" * 3)
    cache = open_it()
    assert cache.validation_bytes == 7 * 2 + 3 * 4
    assert cache.tokens_per_byte == 10 / 26


def test_an_empty_validation_split_is_an_empty_array(config, open_it, tmp_path):
    config.data.path = write(tmp_path, text="")
    config.tokenizer = "byte"
    cache = open_it()
    assert len(cache.train) == len(cache.validation) == 0


def test_the_leavings_of_a_dead_process_are_removed_and_not_used(open_it, reports):
    folder = open_it().folder
    leavings = folder.rename(folder.with_name(f"{folder.name}.building-abc"))
    (leavings / "meta.json").write_text("{")
    assert names(open_it) == [folder.name]
    assert buildings(reports) == 2
    json.loads((folder / "meta.json").read_text())


def test_a_building_that_fails_leaves_no_cache(open_it, reports, monkeypatch):
    encode_documents = building.encoding.encode_documents

    def half(*args, **options):
        yield next(encode_documents(*args, **options))
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(building.encoding, "encode_documents", half)
        for _ in range(2):
            with pytest.raises(OSError, match="disk full"):
                open_it()
    assert len(names(open_it)) == 1
    assert buildings(reports) == 3
    assert len(open_it().train) == 1170


def test_a_cache_folder_that_cannot_be_made_is_refused(config, open_it, tmp_path):
    config.data.cache_dir = str(tmp_path / "text.txt")
    with pytest.raises(ConfigError, match=r"data\.cache_dir='.*text\.txt' can't be made"):
        open_it()


def _open_in_a_process(config, start, results) -> None:
    reports = []

    def report(line: str) -> None:
        reports.append(line)
        time.sleep(1)  # Long enough for the other to come, had it not to wait.

    start.wait(60)
    cache = open_cache(config, report)
    results.put((buildings(reports), cache.digest, int(cache.train.astype(np.int64).sum())))


def test_processes_that_start_at_once_share_one_building(config, open_it):
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_open_in_a_process, args=(config, start, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    (reports_0, *tokens_0), (reports_1, *tokens_1) = (results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted([reports_0, reports_1]) == [0, 1]
    assert tokens_0 == tokens_1
    assert len(names(open_it)) == 1


def _die_half_way(config, kill_after) -> None:
    """Builds the cache and is killed after so many documents."""
    original, building.RECORD_EVERY = building.encode, 0
    numbers = itertools.count()

    def some(*args):
        for encoded in original(*args):
            if next(numbers) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield encoded

    building.encode = some
    open_cache(config, lambda _: None)


@pytest.mark.parametrize("packing", ["stream", "padded"])
def test_a_killed_building_goes_on_where_it_was(packing, config, tmp_path, monkeypatch):
    """Also a longer document's pieces; nothing is encoded twice, and the cache is the same."""
    documents = {f"{i:02}": f"{i} " * (i + 1) for i in range(30)}
    config.data.path = write(tmp_path, text="", **documents)
    config.data.eval_fraction, config.tokenizer = 0.2, "train:bpe:300"
    config.data.packing = packing
    config.data.cache_dir = str(tmp_path / "whole")
    whole = open_cache(config)
    config.data.cache_dir = str(tmp_path / "parts")
    spawn = multiprocessing.get_context("spawn")
    # Of about 25 documents for training; so the second is killed in the validation split.
    for kill_after in (10, 18):
        process = spawn.Process(target=_die_half_way, args=(config, kill_after))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    [folder] = (tmp_path / "parts").glob("*.building")
    with open(folder / "train.bin", "ab") as file:
        file.write(b"what was written after the last record")
    encoded, reports = [], []
    original = building.encode

    def counted(*args):
        for ids in original(*args):
            encoded.append(ids)
            yield ids

    monkeypatch.setattr(building, "encode", counted)
    monkeypatch.setattr(building.tokenizers, "get_tokenizer", None)  # It is on disk.
    cache = open_cache(config, reports.append)
    assert "Continuing to tokenise" in reports[0]
    assert 0 < len(encoded) < 10
    assert cache.digest == whole.digest
    assert contents(cache.folder) == contents(whole.folder)
    assert not list((tmp_path / "parts").glob("*.building"))


@pytest.mark.parametrize("harm", ["progress.json", "train.bin", "tokenizer.json", "file"])
def test_a_damaged_half_of_a_cache_is_begun_anew(harm, config, open_it, reports):
    whole = open_it()
    before = contents(whole.folder)
    meta = json.loads((whole.folder / "meta.json").read_text())
    folder = whole.folder.rename(f"{whole.folder}.building")
    (folder / "progress.json").write_text(json.dumps(meta))
    if harm == "file":
        shutil.rmtree(folder)
        folder.write_text("x")
    else:
        (folder / harm).write_bytes((folder / harm).read_bytes()[:-10])
    assert open_it().digest == whole.digest
    assert contents(whole.folder) == before
    assert "Going on" not in reports[-1]


def test_progress_is_told_in_tokens_per_second(config, open_it, reports, monkeypatch):
    monkeypatch.setattr(building, "RECORD_EVERY", 0)
    config.tokenizer = "train:bpe:300"
    open_it()
    assert any(
        re.fullmatch(r"making the tokenizer: [\d,]+ characters read, \d+ seconds", r)
        for r in reports
    )
    assert any(re.fullmatch(r"train: [\d,]+ tokens, [\d,]+ tokens/s", r) for r in reports)


def test_half_a_token_cache_is_not_left(config, tmp_path):
    config.data.cache_dir = str(tmp_path / "tokens")
    with (
        limited(0, 1000),
        pytest.raises(
            ConfigError, match=r"data.cache_dir='.*' can't be written \(File too large\)"
        ),
    ):
        open_cache(config)
    assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".lock"]
    assert len(open_cache(config).train) > 1000


def test_a_cache_that_can_not_be_read_is_not_damaged(config, tmp_path, monkeypatch):
    """A colleague's, who gives nobody permission: it would be moved away and built again."""
    config.data.cache_dir = str(tmp_path)
    folder = open_cache(config).folder

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    message = r"data\.cache_dir: .*/meta\.json can't be read \(Permission denied\): ask its owner"
    with pytest.raises(ConfigError, match=message):
        open_cache(config)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_a_cache_that_can_not_be_written_is_refused(config, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    config.data.cache_dir = str(tmp_path)
    monkeypatch.setattr(locks, "held", refuse)
    message = r"data\.cache_dir=.* can't be written \(Permission denied: .*\.lock\): ask its owner"
    with pytest.raises(ConfigError, match=message):
        open_cache(config)


def test_waiting_for_another_process_is_told(config, tmp_path):
    """Once told, it is over here."""
    config.data.cache_dir = str(tmp_path / "first")
    name = open_cache(config).folder.name
    config.data.cache_dir = str(tmp_path)
    other, said = filelock.FileLock(tmp_path / f"{name}.lock"), []

    def report(line):
        said.append(line)
        other.release()

    with other:
        assert open_cache(config, report).folder.name == name
    assert said[0].startswith("Another process is tokenising ") and "waiting for it ..." in said[0]
