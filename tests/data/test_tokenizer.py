import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxdp.common.errors import ConfigError
from jaxdp.data import bpe, encoding, special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.encoding import encode, encode_documents, encode_examples
from jaxdp.data.example import Example
from jaxdp.data.tokenizer import (
    END_OF_TEXT,
    get_tokenizer,
)
from support.sequences import FEW
from support.texts import TEXT, unused

MASK = "<|mask|>"
BYTE = get_tokenizer("byte", "causal", lambda _: [])
BPE = get_tokenizer("train:bpe:400", "causal", lambda _: [TEXT])
ANY_TEXT = given(st.text())


def trained_on(train: str, validation: str = ""):
    return lambda with_validation: [train, validation] if with_validation else [train]


def whole(documents) -> list[Example]:
    """Documents that aren't cut."""
    return [Example("", document) for document in documents]


def decode(tokenizer: Tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def word_tokenizer(path, *words: str, special=(), length: int | None = None) -> str:
    """Writes a tokenizer.json that splits at spaces, and returns its path.

    With a length it truncates and pads every text, as those of many BERTs do.
    """
    vocab = {word: i for i, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    if length is not None:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    tokenizer.save(str(path))
    return str(path)


@FEW
@ANY_TEXT
@example(f"a{END_OF_TEXT}b\x00\r\n ")
def test_byte_ids_are_the_bytes_in_utf8_and_come_back(text):
    [ids] = encode(BYTE, [text])
    assert ids.tolist() == list(text.encode())
    assert decode(BYTE, ids) == text


@FEW
@ANY_TEXT
@example(f"a{END_OF_TEXT}b\x00\r\n ")
def test_bpe_comes_back_whatever_the_text(text):
    [ids] = encode(BPE, [text])
    assert decode(BPE, ids) == text


@FEW
@given(st.text(alphabet="abcé\n 😀\x00"))
def test_characters_come_back_one_token_each(text):
    tokenizer = get_tokenizer("char", "causal", trained_on("abcé\n ", "😀\x00"))
    [ids] = encode(tokenizer, [text])
    assert len(ids) == len(text)
    assert decode(tokenizer, ids) == text


def test_a_character_that_the_tokenizer_lacks_is_refused_by_name():
    tokenizer = get_tokenizer("char", "causal", trained_on("abc"))
    with pytest.raises(ConfigError, match=r"'é'.*tokenizer='byte'"):
        encode(tokenizer, ["abc", "abéc"])


def test_character_ids_are_in_the_order_of_the_characters():
    tokenizer = get_tokenizer("char", "causal", trained_on("zbabz"))
    assert encode(tokenizer, ["abz"])[0].tolist() == [0, 1, 2]
    assert tokenizers.vocab_size(tokenizer) == 3
    assert special_tokens.end_id(tokenizer) is None


def test_the_byte_vocabulary_has_256_bytes_and_the_end():
    assert tokenizers.vocab_size(BYTE) == 257
    assert special_tokens.end_id(BYTE) == 256


def test_a_vocabulary_may_have_holes():
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 7}, unk_token="?"))
    assert tokenizers.vocab_size(tokenizer) == 8


def test_bpe_has_the_size_asked_for_and_shortens_text():
    assert tokenizers.vocab_size(BPE) == 400
    [ids] = encode(BPE, [TEXT])
    assert len(ids) < len(TEXT) / 2


def test_bpe_training_is_deterministic():
    again = get_tokenizer("train:bpe:400", "causal", lambda _: [TEXT])
    assert again.to_str() == BPE.to_str()


def test_bpe_is_trained_on_the_training_text_only():
    with_other = get_tokenizer("train:bpe:400", "causal", trained_on(TEXT, "zzzz" * 10_000))
    assert with_other.to_str() == BPE.to_str()


@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
def test_the_masked_objective_adds_one_mask_token(spec):
    causal, masked = (get_tokenizer(spec, o, trained_on(TEXT)) for o in ("causal", "masked"))
    assert special_tokens.mask_id(causal) is None
    assert special_tokens.mask_id(masked) is not None
    assert set(masked.get_vocab()) - set(causal.get_vocab()) == {MASK}
    assert special_tokens.mask_id(masked) < tokenizers.vocab_size(masked)


@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
def test_a_special_tokens_name_in_a_document_is_plain_text(spec):
    text = f"{END_OF_TEXT}{MASK}"
    tokenizer = get_tokenizer(spec, "masked", trained_on(text))
    end = special_tokens.end_id(tokenizer)
    ids = np.concatenate(list(encode_documents(tokenizer, whole([text])))).tolist()
    assert special_tokens.mask_id(tokenizer) not in ids
    assert ids.count(end) == (end is not None)
    assert decode(tokenizer, ids) == text + (END_OF_TEXT if end is not None else "")


def test_a_prompt_may_name_a_special_token():
    assert encode(BYTE, [f"a{END_OF_TEXT}"], special=True)[0].tolist() == [97, 256]


@FEW
@given(st.lists(st.text(max_size=20), max_size=8), st.integers(1, 6), st.integers(1, 12))
def test_each_document_ends_with_the_end_token_once(documents, piece, batch):
    pieces = itertools.chain.from_iterable(encoding.batches(whole(documents), piece, batch))
    text, begins, ends = "", [], []
    for part, first, last in pieces:
        assert 0 < len(part) <= piece
        begins += [len(text)] if first else []
        text += part
        ends += [len(text)] if last else []
    written = [document for document in documents if document]
    assert text == "".join(written)
    assert ends == list(itertools.accumulate(map(len, written)))
    assert begins == [0, *ends][: len(ends)]


@FEW
@given(st.lists(st.lists(st.text(max_size=9), min_size=1, max_size=4), max_size=5))
def test_documents_that_come_in_parts_are_cut_as_if_they_came_whole(documents):
    parts = [
        Example("", part, ends=number == len(document))
        for document in documents
        for number, part in enumerate(document, 1)
    ]
    joined = whole("".join(document) for document in documents)
    assert list(encoding.pieces_of(parts, 4)) == list(encoding.pieces_of(joined, 4))


def test_batches_of_text_are_about_as_large_as_asked():
    batches = list(encoding.batches(whole(["x" * 25] * 10), piece=10, batch=40))
    sizes = [sum(len(piece.text) for piece in batch) for batch in batches]
    assert sum(sizes) == 250
    assert all(40 <= size < 40 + 10 for size in sizes[:-1])


def test_a_document_longer_than_a_piece_ends_once(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 7)
    monkeypatch.setattr(encoding, "BATCH", 20)
    documents = ["a" * 30, "", "b", "cd" * 7]
    ids = np.concatenate(list(encode_documents(BYTE, whole(documents))))
    expected = [[*document.encode(), 256] for document in documents if document]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))


def test_a_million_characters_and_one_are_two_pieces_of_one_document():
    ids = list(encode_documents(BYTE, whole(["x" * 1_000_001])))
    assert [len(part) for part in ids] == [1_000_000, 2]
    assert ids[1].tolist() == [ord("x"), 256]


def test_characters_have_no_end_token():
    tokenizer = get_tokenizer("char", "causal", trained_on("ab"))
    assert [ids.tolist() for ids in encode_documents(tokenizer, whole(["ab", "a"]))] == [
        [0, 1],
        [0],
    ]


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "[SEP]"])
def test_the_end_token_of_well_known_tokenizers_is_found(name, tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", special=[name])
    tokenizer = get_tokenizer(path, "causal", unused)
    [ids] = encode_documents(tokenizer, whole(["a a"]))
    assert ids.tolist() == [1, 1, 2]


def test_an_ordinary_token_ends_no_document_unless_it_is_named(tmp_path):
    """To Gemma, </s> is a tag of HTML, and <eos> the end."""
    path = word_tokenizer(tmp_path / "tokenizer.json", "</s>", special=["<eos>"])
    assert special_tokens.end_id(get_tokenizer(path, "causal", unused)) == 2
    path = word_tokenizer(tmp_path / "tokenizer.json", "</s>")
    assert special_tokens.end_id(get_tokenizer(path, "causal", unused)) is None
    assert special_tokens.end_id(get_tokenizer(path, "causal", unused, eos="</s>")) == 1
    with pytest.raises(ConfigError, match=r"data\.eos='<e>' is no token .* special ones: none"):
        get_tokenizer(path, "causal", unused, eos="<e>")


SETTINGS = [
    ({}, None, "</s>"),
    ({"eos_token": "<end>"}, None, "<end>"),
    (
        {"eos_token": {"content": "<end>"}, "add_bos_token": True, "bos_token": "<s>"},
        "<s>",
        "<end>",
    ),
    ({"eos_token": None, "add_bos_token": False}, None, "</s>"),
    ({"eos_token": "not there"}, None, "</s>"),
]


@pytest.mark.parametrize(("settings", "begin", "end"), SETTINGS)
def test_the_settings_beside_a_tokenizer_say_what_begins_and_ends_a_document(
    settings, begin, end, tmp_path
):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", special=["<s>", "</s>", "<end>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for spec in (path, f"hf:{tmp_path}"):
        tokenizer = get_tokenizer(spec, "causal", unused)
        # A run's tokenizer.json alone says the same.
        again = Tokenizer.from_str(tokenizer.to_str())
        for words in (tokenizer, again):
            begin_id, end_id = special_tokens.begin_id(words), special_tokens.end_id(words)
            assert begin_id == (None if begin is None else words.token_to_id(begin))
            assert words.id_to_token(end_id) == end
        [ids] = encode_documents(again, whole(["a a"]))
        assert ids.tolist() == [*([2] if begin else []), 1, 1, again.token_to_id(end)]


def test_documents_begin_with_what_the_tokenizer_puts_first(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", special=["[CLS]", "[SEP]"])
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(path)
    tokenizer = get_tokenizer(path, "causal", unused)
    assert [ids.tolist() for ids in encode_documents(tokenizer, whole(["a", "a a"]))] == [
        [2, 1, 3],
        [2, 1, 1, 3],
    ]
    examples = encode_examples(tokenizer, [Example("a", "a a")])
    assert [[part.tolist() for part in pair] for pair in examples] == [[[2, 1], [1, 1, 3]]]
    assert encoding.encode_prompts(tokenizer, ["a"], special=False)[0].tolist() == [2, 1]
    without = get_tokenizer(path, "causal", unused, bos="")
    assert next(encode_documents(without, whole(["a"]))).tolist() == [1, 3]


def test_only_the_first_piece_of_a_document_begins_it(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 2)
    tokenizer = get_tokenizer("byte", "causal", unused, bos=END_OF_TEXT)
    parts = [Example("", "abc", ends=False), Example("", "de"), Example("", "f")]
    assert [ids.tolist() for ids in encode_documents(tokenizer, parts)] == [
        [256, 97, 98],
        [99, 100],
        [101, 256],
        [256, 102, 256],
    ]


def test_a_settings_file_that_is_no_json_is_refused(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json can't be read .*: correct it"):
        get_tokenizer(path, "causal", unused)


def test_training_a_bpe_takes_a_time_in_proportion_to_the_text_and_can_be_ended():
    """Without cuts, the 300,000 letters below would be one word, which takes minutes."""
    dna = "".join(np.random.default_rng(0).choice(list("ACGT"), 300_000))
    tokenizer = bpe.train(400, [END_OF_TEXT], [dna])
    assert tokenizer.get_vocab_size() == 400
    assert len(encode(tokenizer, [dna])[0]) < len(dna) / 2

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bpe.train(400, [END_OF_TEXT], itertools.repeat("a b c "), stop)


@FEW
@given(st.lists(st.text(alphabet="ab \n1.", max_size=700), max_size=3))
def test_texts_are_cut_in_long_words_only(texts):
    cut = list(bpe.short_words(texts))
    assert "".join(cut) == "".join(texts)
    assert len(cut) - len(texts) <= sum(len(text) // bpe.LONGEST_WORD for text in texts)


def test_a_long_word_is_cut():
    for letter in "a1 .":
        parts = list(bpe.short_words([f"x{letter * 1000}y"]))
        assert max(map(len, parts)) <= bpe.LONGEST_WORD + 1


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
def test_a_saved_tokenizer_gives_the_same_tokens(spec, objective, tmp_path):
    made = get_tokenizer(spec, objective, trained_on(TEXT))
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = get_tokenizer(str(tmp_path / "tokenizer.json"), objective, unused)
    assert loaded.to_str() == made.to_str()
    text = TEXT[:500]
    [ids], [again] = (
        list(encode_documents(tokenizer, whole([text]))) for tokenizer in (made, loaded)
    )
    assert ids.tolist() == again.tolist()


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", length=4)
    tokenizer = get_tokenizer(path, "causal", unused)
    assert [len(ids) for ids in encode(tokenizer, ["a " * 9, "a"])] == [9, 1]


def test_a_tokenizer_without_a_mask_token_is_refused_for_the_masked_objective(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a")
    with pytest.raises(ConfigError, match=r"\[MASK\].*objective='causal'"):
        get_tokenizer(path, "masked", unused)
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", "[MASK]")
    assert special_tokens.mask_id(get_tokenizer(path, "masked", unused)) == 2


@pytest.mark.parametrize(
    "spec",
    [
        "train:bpe:257",
        "train:bpe:",
        "train:bpe:-300",
        "train:bpe:1e3",
        "train:bpe:99999999999999999999",
        "train:wordpiece:300",
        "train:",
        "bytes",
        "no/such/tokenizer.json",
        ".",
    ],
)
def test_a_wrong_spec_is_refused_with_the_right_ones(spec):
    with pytest.raises(ConfigError) as error:
        get_tokenizer(spec, "causal", trained_on(TEXT))
    assert f"tokenizer={spec!r}" in str(error.value)
    assert "train:bpe:SIZE" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"version": "9"}'])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"\Atokenizer='{path}' can't be read .*: give .*\Z"):
        get_tokenizer(str(path), "causal", unused)


def test_characters_of_an_empty_text_are_refused():
    with pytest.raises(ConfigError, match=r"tokenizer='char'.*data\.path"):
        get_tokenizer("char", "causal", lambda _: [])


@pytest.mark.parametrize("said", ["No route\nto host", "  \n", ""])
def test_a_hub_that_is_out_of_reach_is_one_line_with_the_way_out(said, monkeypatch):
    def fail(name):
        assert name == "gpt2"
        raise Exception(said)

    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", fail, raising=True)
    with pytest.raises(ConfigError) as error:
        get_tokenizer("hf:gpt2", "causal", unused)
    assert "\n" not in str(error.value)
    assert "tokenizer='hf:gpt2'" in str(error.value)
    assert "tokenizer.json" in str(error.value)
