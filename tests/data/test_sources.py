import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.configs import default
from jaxdp.data.sources import get_source
from jaxdp.data.tensorflow import tf
from jaxdp.data.tfds import tfds

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
    return list(get_source(config).documents(split))


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
        assert list(source.documents("train")) == DOCUMENTS["train"]
        assert list(source.documents("validation")) == DOCUMENTS["test"]


def test_tfds_splits_may_be_slices(tfds_config):
    tfds_config.data.train_split = "train[:80%]"
    tfds_config.data.eval_split = "train[80%:]"
    source = get_source(tfds_config)
    assert list(source.documents("train")) == DOCUMENTS["train"][:8]
    assert list(source.documents("validation")) == DOCUMENTS["train"][8:]


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
        list(get_source(tfds_config).documents(split))
    assert str(error.value).startswith(f"data.{key}={spec!r} is no split of tfds:jaxdp_test_docs")
    assert str(error.value).endswith(": it has train, test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["content", "", "label", "tags"])
def test_a_feature_that_is_no_text_is_refused_with_those_that_are(key, tfds_config):
    tfds_config.data.text_key = key
    with pytest.raises(ConfigError) as error:
        list(get_source(tfds_config).documents("train"))
    assert str(error.value).startswith(f"data.text_key={key!r} is no text feature")
    choices = str(error.value).rpartition("choose one of ")[2]
    assert set(choices.split(", ")) == {"text", "raw"}


def test_a_tfds_feature_that_is_not_utf8_is_refused(tfds_config):
    tfds_config.data.text_key = "raw"
    with pytest.raises(ConfigError, match=r"^data\.text_key='raw' .* not UTF-8 .*'train': choose"):
        list(get_source(tfds_config).documents("train"))


def test_a_download_that_fails_points_to_data_dir(tfds_config):
    tfds_config.data.path = "tfds:lm1b"
    with pytest.raises(ConfigError, match=r"can't be prepared \(no network.*: .*data\.data_dir"):
        list(get_source(tfds_config).documents("train"))


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
            texts = list(source.documents(split))
            assert len(texts) == 3
            assert all(type(text) is str and text for text in texts)


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
    assert list(source.documents("train")) == ["a\u2028b"]
    assert list(source.examples("validation")) == [("", "\u2028é")]
    config.data.prompt_key = "q"
    source = get_source(config)
    assert list(source.examples("train")) == [("Q: ", "a\u2028b")]
    assert list(source.documents("train")) == ["Q: a\u2028b"]
    with pytest.raises(
        ConfigError, match=r"a\.jsonl, line 3 is no JSON object .*'q', 'text' \('q'\)"
    ):
        list(source.examples("validation"))


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"3", b'{"text": 3}', b'{"text": "\\ud800"}', b"{}", b"[" * 10**5, b"1" * 9999],
)
def test_a_line_that_is_no_example_is_refused_by_its_place(line, tmp_path):
    config = json_lines(tmp_path, b'{"text": "a"}', line)
    with pytest.raises(
        ConfigError, match=r"\Adata\.path: .*a\.jsonl, line 2 is no JSON .*: corr"
    ) as e:
        list(get_source(config).documents("validation"))
    assert "\n" not in str(e.value)


def test_prompts_of_a_tfds_dataset(tfds_config):
    tfds_config.data.update({"prompt_key": "text", "text_key": "text"})
    text = DOCUMENTS["test"][0]
    assert next(get_source(tfds_config).examples("validation")) == (text, text)
    tfds_config.data.prompt_key = "label"
    with pytest.raises(ConfigError, match=r"data\.prompt_key='label' is no text feature"):
        next(get_source(tfds_config).examples("validation"))


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
        [text] = source.documents("train")
        assert text == "Title\n\nHistory\n\nOne.\nTwo.\n\nThree_START_"
        tfds_config.data.eval_split = "validation"
        assert list(get_source(tfds_config).documents("validation")) == ["no markup"]
    assert "_NEWLINE_" in str(source.identity())


def test_other_datasets_keep_what_looks_like_it(corpus):
    (corpus / "d.txt").write_text(WIKI40B)
    assert documents(corpus / "d.txt", "train", 1e-6) == [WIKI40B[:-1]]


def test_a_built_dataset_trains(tfds_config, config, tmp_path):
    """From the files that TFDS wrote, through all of the pipeline; TFDS text is bytes."""
    from jaxdp.data.cache import open_cache
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
