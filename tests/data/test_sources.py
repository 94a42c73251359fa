import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import tracemalloc

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from jaxdp.common.errors import ConfigError
from jaxdp.configs import default
from jaxdp.data import files
from jaxdp.data.cache import open_cache
from jaxdp.data.example import Example, texts
from jaxdp.data.sources import get_source, get_sources, separated
from jaxdp.data.tensorflow import tf
from jaxdp.data.tfds import tfds
from support.texts import FEW

DOCUMENTS = {"train": [f"document {i}, é" for i in range(10)], "test": ["one", "two"]}


class JaxdpTestDocs(tfds.core.GeneratorBasedBuilder):
    """Ten documents and two, known to TFDS as jaxdp_test_docs."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {
            "text": text,
            "raw": tf.string,
            "label": tf.int32,
            "tags": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(texts) for name, texts in DOCUMENTS.items()}

    def _generate_examples(self, texts):
        for i, text in enumerate(texts):
            yield i, {"text": text, "raw": text.encode("latin-1"), "label": i, "tags": [text]}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fails at once, and by name, where a test would otherwise wait for a server."""

    def refuse(*args, **kwargs):
        raise RuntimeError("no network in tests")  # An OSError would be tried again.

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def tfds_config(data_dir):
    config = default.get_config()
    config.data.path = "tfds:jaxdp_test_docs"
    config.data.data_dir = str(data_dir)
    config.data.eval_split = "test"
    return config


@pytest.fixture
def corpus(tmp_path):
    """Three files of 30, 100 and 70 characters, more of them bytes; a fourth in a folder below."""
    for name, text in {"b.txt": "é" * 30, "a.txt": "ab" * 50, "c.md": "c" * 70}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.txt").write_text("d" * 10)
    return tmp_path


def documents(path, split, eval_fraction=0.1) -> list[str]:
    config = default.get_config()
    config.data.path = str(path)
    config.data.eval_fraction = eval_fraction
    return list(texts(get_source(config).examples(split)))


@pytest.mark.parametrize("eval_fraction", [0.001, 0.1, 0.35, 0.5, 0.77, 0.99])
def test_the_splits_are_the_start_and_the_end_of_all_text(corpus, eval_fraction):
    train, validation = (
        "".join(documents(f"text:{corpus}/*.*", split, eval_fraction))
        for split in ("train", "validation")
    )
    whole = "ab" * 50 + "é" * 30 + "c" * 70
    assert train + validation == whole
    assert len(train) == int(len(whole) * (1 - eval_fraction))


def test_each_file_is_a_document_and_the_border_cuts_one(corpus):
    assert documents(f"{corpus}/*.*", "train", 0.4) == ["ab" * 50, "é" * 20]
    assert documents(f"{corpus}/*.*", "validation", 0.4) == ["é" * 10, "c" * 70]


def test_a_glob_takes_the_files_that_match(corpus):
    assert "".join(documents(f"text:{corpus}/*.txt", "train", 1e-6)).count("c") == 0
    assert "".join(documents(f"text:{corpus}/**/*.txt", "validation", 0.01)).endswith("d")


def test_a_file_may_have_a_name_with_the_signs_of_a_glob(tmp_path):
    (tmp_path / "notes[1].txt").write_text("x" * 10)
    assert documents(tmp_path / "notes[1].txt", "train") == ["x" * 9]


def test_text_is_taken_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\r\nb\rc\x00\n")
    assert "".join(documents(path, "train", 0.5) + documents(path, "validation", 0.5)) == (
        "a\r\nb\rc\x00\n"
    )


@pytest.mark.parametrize(
    "path", ["no/such/file.txt", "text:*.nothing", "text:", "~no-such-user/x", "."]
)
def test_a_path_without_a_file_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.path='.*' matches no file: give .*tfds:NAME$"):
        documents(path, "train")


def test_bytes_that_are_not_utf8_are_refused_by_file_and_place(corpus):
    (corpus / "d.txt").write_bytes(b"12345\xff78")
    with pytest.raises(ConfigError, match=r"d\.txt is not UTF-8 text \(byte 5\): convert it"):
        documents(f"{corpus}/*.txt", "train")


def test_a_changed_text_or_border_has_another_identity(corpus):
    config = default.get_config()
    config.data.path = f"{corpus}/*.txt"
    before = get_source(config).identity()
    assert get_source(config).identity() == before
    config.data.eval_fraction = 0.2
    assert get_source(config).identity() != before
    config.data.eval_fraction = 0.1
    (corpus / "b.txt").write_text("other")
    assert get_source(config).identity() != before


def test_a_tfds_dataset_gives_its_documents_in_order(tfds_config):
    for _ in range(2):
        source = get_source(tfds_config)
        assert list(texts(source.examples("train"))) == DOCUMENTS["train"]
        assert list(texts(source.examples("validation"))) == DOCUMENTS["test"]


def test_tfds_splits_may_be_slices(tfds_config):
    tfds_config.data.train_split = "train[:80%]"
    tfds_config.data.eval_split = "train[80%:]"
    source = get_source(tfds_config)
    assert list(texts(source.examples("train"))) == DOCUMENTS["train"][:8]
    assert list(texts(source.examples("validation"))) == DOCUMENTS["train"][8:]


def test_the_identity_of_a_tfds_dataset_has_version_splits_and_feature(tfds_config):
    identity = get_source(tfds_config).identity()
    assert "jaxdp_test_docs/1.0.0" in str(identity)
    for key in ("train_split", "eval_split", "text_key"):
        other = tfds_config.copy_and_resolve_references()
        other.data[key] = "other"
        assert get_source(other).identity() != identity


@pytest.mark.parametrize(
    "name",
    [
        "no_such_dataset",
        "no such dataset",
        "no_space:no_such_dataset",
        "",
        "jaxdp_test_docs:9.9.9",
        "jaxdp_test_docs/no_such_config",
        "jaxdp_test_docs/no_such_option=3",
    ],
)
def test_a_name_that_tfds_does_not_know_is_refused(name, tfds_config):
    tfds_config.data.path = f"tfds:{name}"
    with pytest.raises(ConfigError) as error:
        get_source(tfds_config)
    assert str(error.value).startswith(f"data.path='tfds:{name}' is not known to TFDS")
    assert "catalog" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", ["validation", "valid[:10%]", "train[:", "train[5:5]", "train[99:]"]
)
@pytest.mark.parametrize(("split", "key"), [("train", "train_split"), ("validation", "eval_split")])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(split, key, spec, tfds_config):
    tfds_config.data[key] = spec
    with pytest.raises(ConfigError) as error:
        list(texts(get_source(tfds_config).examples(split)))
    assert str(error.value).startswith(f"data.{key}={spec!r} is no split of tfds:jaxdp_test_docs")
    assert str(error.value).endswith(": it has train, test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["content", "", "label", "tags"])
def test_a_feature_that_is_no_text_is_refused_with_those_that_are(key, tfds_config):
    tfds_config.data.text_key = key
    with pytest.raises(ConfigError) as error:
        list(texts(get_source(tfds_config).examples("train")))
    assert str(error.value).startswith(f"data.text_key={key!r} is no text feature")
    choices = str(error.value).rpartition("choose one of ")[2]
    assert set(choices.split(", ")) == {"text", "raw"}


def test_a_tfds_feature_that_is_not_utf8_is_refused(tfds_config):
    tfds_config.data.text_key = "raw"
    with pytest.raises(ConfigError, match=r"^data\.text_key='raw' .* not UTF-8 .*'train': choose"):
        list(texts(get_source(tfds_config).examples("train")))


def test_a_download_that_fails_points_to_data_dir(tfds_config):
    tfds_config.data.path = "tfds:lm1b"
    with pytest.raises(ConfigError, match=r"can't be prepared \(.*no network.*: .*data\.data_dir"):
        list(texts(get_source(tfds_config).examples("train")))


@pytest.mark.parametrize(
    ("name", "eval_split"),
    [
        ("lm1b", "test"),
        ("tiny_shakespeare", "validation"),
        ("wiki40b/en", "validation"),
        ("c4/en", "validation"),
        ("wikipedia/20230601.en", "train[99%:]"),
    ],
)
def test_datasets_of_the_catalog_are_read_by_their_usual_keys(name, eval_split, tfds_config):
    tfds_config.data.path = f"tfds:{name}"
    tfds_config.data.eval_split = eval_split
    with tfds.testing.mock_data(num_examples=3):
        source = get_source(tfds_config)
        for split in ("train", "validation"):
            found = list(texts(source.examples(split)))
            assert len(found) == 3
            assert all(type(text) is str and text for text in found)


def json_lines(tmp_path, *lines: bytes):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = default.get_config()
    config.data.path = f"jsonl:{tmp_path}/a.jsonl"
    return config


def test_json_lines_give_texts_and_prompts(tmp_path):
    lines = [
        b'{"text": "a\\u2028b", "q": "Q: ", "other": 3}',
        b"  ",
        '{"text": "\u2028é"}'.encode(),
    ]
    config = json_lines(tmp_path, *lines)
    config.data.eval_fraction = 0.5
    source = get_source(config)
    assert list(texts(source.examples("train"))) == ["a\u2028b"]
    assert list(source.examples("validation")) == [Example("", "\u2028é")]
    config.data.prompt_key = "q"
    source = get_source(config)
    assert list(source.examples("train")) == [Example("Q: ", "a\u2028b")]
    assert list(texts(source.examples("train"))) == ["Q: a\u2028b"]
    with pytest.raises(
        ConfigError, match=r"a\.jsonl, line 3 has no 'q' but 'text': set data\.text_key"
    ):
        list(source.examples("validation"))


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"3", b'{"text": 3}', b'{"text": "\\ud800"}', b"{}", b"[" * 10**5, b"1" * 9999],
)
def test_a_line_that_is_no_example_is_refused_by_its_place(line, tmp_path):
    config = json_lines(tmp_path, b'{"text": "a"}', line)
    with pytest.raises(
        ConfigError,
        match=r"\Adata\.path: .*a\.jsonl, line 2 (is no JSON|holds no|has no) .*: (corr|set)",
    ) as e:
        list(texts(get_source(config).examples("validation")))
    assert "\n" not in str(e.value)


def test_a_tfds_dataset_of_the_same_name_with_other_files_has_another_cache(
    tfds_config, tmp_path, monkeypatch
):
    """In another folder, or made again there; the same texts are the same tokens to a run."""
    tfds_config.data.cache_dir, tfds_config.tokenizer = str(tmp_path / "cache"), "byte"
    found, told = {}, []
    for name in ("one", "two", "one"):
        monkeypatch.setitem(DOCUMENTS, "test", [name, "three"])
        tfds_config.data.data_dir = str(tmp_path / name)
        cache = open_cache(tfds_config, told.append)
        assert bytes((cache.validation % 256).astype("u1")).startswith(name.encode())
        assert found.setdefault(name, cache.folder) == cache.folder
    assert sum("Tokenising" in line for line in told) == 2
    [file] = (tmp_path / "one").rglob("*test.tfrecord*")
    os.utime(file, (1, 1))
    again = open_cache(tfds_config)
    assert again.folder not in found.values() and again.digest == cache.digest


def test_a_process_that_waited_while_another_prepared_reads_what_that_has_made(
    tfds_config, tmp_path
):
    tfds_config.data.data_dir = str(tmp_path)
    first, second = get_source(tfds_config), get_source(tfds_config)
    first.prepare()
    assert first.identity() == second.identity()
    assert list(texts(second.examples("train"))) == DOCUMENTS["train"]


def test_prompts_of_a_tfds_dataset(tfds_config):
    tfds_config.data.update({"prompt_key": "text", "text_key": "text"})
    text = DOCUMENTS["test"][0]
    assert next(get_source(tfds_config).examples("validation")) == Example(text, text)
    tfds_config.data.prompt_key = "label"
    with pytest.raises(ConfigError, match=r"data\.prompt_key='label' is no text feature"):
        next(get_source(tfds_config).examples("validation"))


def test_a_file_of_several_names_is_read_once(tmp_path, monkeypatch):
    """Else its end, which is validation text, would also be trained on."""
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.txt").write_text(name * 10)
    (tmp_path / "set" / "z.txt").symlink_to("a.txt")
    for path in (f"{tmp_path}/set", f"{tmp_path}/set/a.txt,{tmp_path}/set/../set/*.txt"):
        told: list[str] = []
        kind, found = files.find(path, None, told.append)
        assert (kind, [file.name for file in found]) == ("text", ["a.txt", "b.txt"])
        assert len(told) == 1 and "by another name, and is read once" in told[0]
        assert "".join(documents(path, "train", 0.5)) == "a" * 10


def test_a_text_file_has_no_prompts(corpus):
    config = default.get_config()
    config.data.update({"path": f"{corpus}/a.txt", "prompt_key": "q"})
    with pytest.raises(ConfigError, match=r"data\.prompt_key='q' does not work with text files"):
        get_source(config)


WIKI40B = (
    "\n_START_ARTICLE_\nTitle\n_START_SECTION_\nHistory\n_START_PARAGRAPH_\nOne._NEWLINE_Two."
    "\n_START_PARAGRAPH_\nThree_START_"
)


def test_the_markup_of_wiki40b_is_taken_out(tfds_config):
    def dataset(self, split, **_):
        text = WIKI40B if split == "train" else "no markup"
        return tf.data.Dataset.from_tensors({"text": text, "version_id": "1", "wikidata_id": "Q1"})

    tfds_config.data.path = "tfds:wiki40b/en"
    with tfds.testing.mock_data(as_dataset_fn=dataset):
        source = get_source(tfds_config)
        [text] = texts(source.examples("train"))
        assert text == "Title\n\nHistory\n\nOne.\nTwo.\n\nThree_START_"
        tfds_config.data.eval_split = "validation"
        assert list(texts(get_source(tfds_config).examples("validation"))) == ["no markup"]
    assert "_NEWLINE_" in str(source.identity())


def test_other_datasets_keep_what_looks_like_it(corpus):
    (corpus / "d.txt").write_text(WIKI40B)
    assert documents(corpus / "d.txt", "train", 1e-6) == [WIKI40B[:-1]]


def test_a_built_dataset_trains(tfds_config, config, tmp_path):
    """From the files that TFDS wrote, through all of the pipeline; TFDS text is bytes."""
    from jaxdp.data.feed import Feed

    config.data.update(tfds_config.data)
    config.data.update({"cache_dir": str(tmp_path), "eval_split": "train[:20%]"})
    config.data.train_split, config.data.packing, config.seq_len = "train[20%:]", "documents", 8
    config.tokenizer = "byte"
    cache = open_cache(config)
    text = "".join(f"{document}\0" for document in DOCUMENTS["train"][2:])
    assert (cache.train % 256).astype("u1").tobytes().decode() == text
    batch = next(Feed(config, cache).train(0))
    assert batch["segments"].max() == 1


TABLE = [("one", 1), ("zwei, é", 2), ('"three"\nlines', 3), ("four", 4)]


def csv_of(rows, separator: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([("text", "n"), *rows])
    return text.getvalue().encode()


def parquet_of(rows) -> bytes:
    file = io.BytesIO()
    columns = {"text": [text for text, _ in rows], "n": [n for _, n in rows]}
    parquet.write_table(pyarrow.table(columns), file, row_group_size=3)
    return file.getvalue()


OBJECTS = [{"text": text, "n": n} for text, n in TABLE]
CONTENTS = {
    ".jsonl": "\n".join(map(json.dumps, OBJECTS)).encode(),
    ".ndjson": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, OBJECTS)).encode(),
    ".json": json.dumps(OBJECTS, indent=2).encode(),
    ".JSON": "\n".join(map(json.dumps, OBJECTS)).encode(),
    ".csv": b"\xef\xbb\xbf" + csv_of(TABLE, ","),
    ".tsv": csv_of(TABLE, "\t"),
    ".parquet": parquet_of(TABLE),
}


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".zst":  # In two frames, as zstd's tools may write them.
        codec = pyarrow.Codec("zstd")
        return b"".join(codec.compress(half, asbytes=True) for half in (data[:9], data[9:]))
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending](
        data
    )


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("ending", CONTENTS)
def test_the_name_of_a_file_says_how_to_read_it(ending, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 7)  # No matter how it is cut.
    path = tmp_path / f"data{ending}{packed}"
    path.write_bytes(compressed(CONTENTS[ending], packed))
    assert documents(path, "train", 0.5) == [text for text, _ in TABLE[:2]]
    assert documents(path, "validation", 0.5) == [text for text, _ in TABLE[2:]]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_a_text_loses_its_byte_order_mark_and_nothing_else(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 5)
    text = "\ufeffé\ufeff 😀 a\r\nb" * 9
    (tmp_path / f"a.txt{packed}").write_bytes(compressed(text.encode(), packed))
    for split, part in (("train", text[1:45]), ("validation", text[45:])):
        assert "".join(documents(tmp_path / f"a.txt{packed}", split, 0.5)) == part


@pytest.mark.parametrize("ending", [e for e in CONTENTS if e != ".JSON"])
def test_without_the_text_key_the_keys_that_are_there_are_listed(ending, tmp_path):
    config = default.get_config()
    config.data.path, config.data.text_key = str(tmp_path / f"a{ending}"), "content"
    (tmp_path / f"a{ending}").write_bytes(CONTENTS[ending])
    with pytest.raises(ConfigError, match=r"has no 'content' but 'text', 'n': set data\.text_key"):
        list(get_source(config).examples("train"))


def test_records_without_a_text_are_skipped_where_that_is_meant(tmp_path):
    config = json_lines(tmp_path, b'{"text": "a"}', b'{"other": "b"}', b'{"text": null}', b"{}")
    config.data.eval_fraction = 0.25
    with pytest.raises(ConfigError, match=r"line 2 has no 'text' but 'other'.*skip_missing=True"):
        list(get_source(config).examples("train"))
    config.data.skip_missing = True
    assert list(get_source(config).examples("train")) == [Example("", "a"), None, None]
    config = json_lines(tmp_path, b'{"text": "a"}', b'{"text": 3}')
    config.data.skip_missing = True
    with pytest.raises(ConfigError, match=r"line 2 holds no text \('text' is of type int\)"):
        list(get_source(config).examples("validation"))


def test_a_parquet_file_without_the_column_can_be_skipped(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_of(TABLE))
    parquet.write_table(pyarrow.table({"body": ["x"] * 6, "n": [1] * 6}), tmp_path / "b.parquet")
    config = default.get_config()
    config.data.update({"path": str(tmp_path), "skip_missing": True, "eval_fraction": 0.5})
    kept = [Example("", text) for text, _ in TABLE]
    assert list(get_source(config).examples("train")) == [*kept, None]
    assert list(get_source(config).examples("validation")) == [None] * 5
    config.data.skip_missing = False
    with pytest.raises(ConfigError, match=r"row 1 has no 'text' but 'body', 'n'.*skip_missing="):
        list(get_source(config).examples("train"))


@pytest.mark.parametrize(
    ("ending", "content", "said"),
    [
        (".json", b'{"data":\n [1]}', "line 1 is no JSON object"),
        (".json", b'[{"text": "a"}, {"text"', "element 2 is no JSON object .*ends within"),
        (".json", b'[{"text": "a"}, 3]', "element 2 is no JSON object .*type int"),
        (".csv", b"text,n\na,1\nb,c,2\n", "row 2 has 3 fields and the header 2"),
        (".csv", b'text,n\n"a"b,1\n', "line 2 is no CSV"),
        (".parquet", b"PAR1", "can't be read as Parquet"),
        (".jsonl.gz", b'{"text": "a"}\n', "can't be decompressed .*another compression"),
        (".txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-9], "can't be decompressed"),
        (".txt.zst", b"(\xb5/\xfdabc", "can't be decompressed"),
        (".txt.xz", b"", "can't be decompressed"),
        (".txt", gzip.compress(b"abc", mtime=0), "it is compressed, so let its name end in .gz"),
        (".txt", b'{"text": "a"}\n{"text": "b"}\n', "looks like JSON lines: write jsonl:"),
        (".log", b'{"text": "a"}', "looks like JSON lines: write jsonl:"),
        (".tar.gz", b"", "is an archive: unpack it"),
        (".zip", b"", "is an archive: unpack it"),
    ],
)
def test_files_that_are_not_what_their_names_say(ending, content, said, tmp_path):
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        documents(tmp_path / f"a{ending}", "train")
        documents(tmp_path / f"a{ending}", "validation")
    assert "\n" not in str(error.value) and str(error.value).startswith("data.path")


def test_a_text_may_look_like_json_lines_if_it_is_called_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert documents(f"text:{tmp_path}/a.jsonl", "train", 1e-6) == ['{"text": "a"}']


def test_folders_lists_and_globs(corpus):
    assert documents(corpus, "train", 1e-6) == ["ab" * 50, "é" * 30, "d" * 10, "c" * 69]
    several = f"{corpus}/c.md, {corpus}/below,{corpus}/*.txt,{corpus}/c.md"
    assert documents(several, "train", 1e-6) == ["c" * 70, "d" * 10, "ab" * 50, "é" * 29]
    (corpus / "x,y.txt").write_text("comma")
    assert documents(f"{corpus}/x,y.txt", "train", 1e-6) == ["comm"]
    with pytest.raises(ConfigError, match=r"matches no file for '.*/n\.txt': give"):
        documents(f"{corpus}/a.txt,{corpus}/n.txt", "train")


def test_a_folder_of_several_kinds_needs_to_be_told_which(corpus):
    (corpus / "below" / "e.jsonl").write_text('{"text": "e"}\n{"text": "f"}\n')
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "f.csv").write_text("text\n")
    (corpus / "g.py").write_text("pass")
    with pytest.raises(ConfigError, match=r"several kinds \(4 text, 1 jsonl\): name one, as in"):
        documents(corpus, "train")
    assert documents(f"jsonl:{corpus}", "train", 0.5) == ["e"]
    said: list[str] = []
    config = default.get_config()
    config.data.path = f"text:{corpus}"
    get_source(config, said.append)
    assert len(said) == 1 and ".jsonl, .py are left out" in said[0]


@FEW
@given(
    st.lists(st.lists(st.sampled_from(["a", "\n", "\r\n", "b b", "<", "|", "<|"])), max_size=4),
    st.integers(1, 5),
)
def test_documents_are_those_between_separators(parts, size):
    """However the text comes in pieces; a line break on either side is dropped."""
    texts_ = ["".join(part) for part in parts]
    text = "\n<|end|>\n".join(texts_)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = [""]
    for part, ends in separated(pieces, "<|end|>"):
        found[-1] += part
        found += [""] if ends else []
    assert found == [*(texts_ or [""]), ""]


def test_a_separator_makes_documents_and_only_of_text(corpus):
    (corpus / "s.txt").write_text("one\n<|endoftext|>\ntwo<|endoftext|>three\n")
    config = default.get_config()
    config.data.path, config.data.separator = f"{corpus}/s.txt", "<|endoftext|>"
    config.data.eval_fraction = 1e-6
    found = [e.text for e in get_source(config).examples("train") if e.text]
    assert found == ["one", "two", "three"]
    config.data.path = "jsonl:" + str(corpus / "s.txt")
    with pytest.raises(ConfigError, match=r"data\.separator='<\|endoftext\|>' has no meaning"):
        get_sources(config)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".json"])
def test_a_large_file_is_not_held_in_memory(ending, tmp_path, monkeypatch):
    """4 MB, of which 64 kB are read at a time."""
    monkeypatch.setattr(files, "CHUNK", 2**16)
    line = {".txt": "abc " * 250, ".jsonl": json.dumps({"text": "abc " * 250})}
    line |= {".csv": line[".txt"], ".json": line[".jsonl"] + ","}
    before, after = {".csv": ("text\n", ""), ".json": ("[", "{}]")}.get(ending, ("", ""))
    with open(tmp_path / f"a{ending}", "w") as file:
        file.write(before)
        for _ in range(4):
            file.write(f"{line[ending]}\n" * 1000)
        file.write(after)
    config = default.get_config()
    config.data.path, config.data.skip_missing = str(tmp_path / f"a{ending}"), True
    source = get_source(config)
    tracemalloc.start()
    try:
        assert sum(map(len, texts(source.examples("train")))) > 3_500_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = default.get_config()
    config.data.path = "hf:HuggingFaceFW/fineweb-edu:sample-10BT"
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'jaxdp\[data"):
        get_source(config)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder as the library datasets opens it, like FineWeb-Edu's: Parquet, one split."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = [(f"document {i}", i) for i in range(20)]
    for shard in (0, 1):
        path = tmp_path / "set" / "data" / f"train-0000{shard}-of-00002.parquet"
        path.write_bytes(parquet_of(rows[10 * shard : 10 * shard + 10]))
    return tmp_path / "set", [text for text, _ in rows]


def test_a_dataset_of_the_hub_is_streamed(hub_folder):
    folder, rows = hub_folder
    config = default.get_config()
    config.data.update({"path": f"hf:{folder}", "eval_split": "", "eval_fraction": 0.25})
    source = get_source(config)
    assert list(texts(source.examples("train"))) == [t for i, t in enumerate(rows, 1) if i % 4]
    assert list(texts(source.examples("validation"))) == rows[3::4]
    config.data.eval_split = "train"
    assert list(texts(get_source(config).examples("validation"))) == rows
    assert get_source(config).identity() != source.identity()
    before = get_source(config).identity()
    os.utime(folder / "data" / "train-00000-of-00002.parquet", (1, 1))
    assert get_source(config).identity() != before == json.loads(json.dumps(before))
    config.data.eval_split = "validation"
    with pytest.raises(
        ConfigError, match=r"eval_split='validation' is no split .*: it has train; ''"
    ):
        list(get_source(config).examples("validation"))
    config.data.text_key = "content"
    config.data.skip_missing = True  # It can't help: no record has the key.
    with pytest.raises(ConfigError, match=r"has no 'content' but 'text', 'n'") as refused:
        list(get_source(config).examples("train"))
    assert "skip_missing" not in str(refused.value)
    config.data.path = f"hf:{folder}:other"
    with pytest.raises(ConfigError, match="can't be opened by the library datasets"):
        get_source(config)
