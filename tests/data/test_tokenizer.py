import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxdp.common.errors import ConfigError
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.tokenizer import END_OF_TEXT, encode, encode_documents, get_tokenizer
from support.sequences import FEW
from support.texts import TEXT, unused

MASK = "<|mask|>"
BYTE = get_tokenizer("byte", "causal", lambda _: [])
BPE = get_tokenizer("train:bpe:400", "causal", lambda _: [TEXT])
ANY_TEXT = given(st.text())


def trained_on(train: str, validation: str = ""):
    return lambda with_validation: [train, validation] if with_validation else [train]


def decode(tokenizer: Tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def word_tokenizer(path, *words: str, length: int | None = None) -> str:
    """Writes a tokenizer.json that splits at spaces, and returns its path.

    With a length it truncates and pads every text, as those of many BERTs do.
    """
    vocab = {word: i for i, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if length is not None:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    tokenizer.save(str(path))
    return str(path)


@FEW
@ANY_TEXT
@example(f"a{END_OF_TEXT}b\x00\r\n ")
def test_byte_ids_are_the_bytes_in_utf8_and_come_back(text):
    [ids] = encode(BYTE, [text], plain=True)
    assert ids.tolist() == list(text.encode())
    assert decode(BYTE, ids) == text


@FEW
@ANY_TEXT
@example(f"a{END_OF_TEXT}b\x00\r\n ")
def test_bpe_comes_back_whatever_the_text(text):
    [ids] = encode(BPE, [text], plain=True)
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
    assert tokenizers.end_id(tokenizer) is None


def test_the_byte_vocabulary_has_256_bytes_and_the_end():
    assert tokenizers.vocab_size(BYTE) == 257
    assert tokenizers.end_id(BYTE) == 256


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
    assert tokenizers.mask_id(causal) is None
    assert tokenizers.mask_id(masked) is not None
    assert set(masked.get_vocab()) - set(causal.get_vocab()) == {MASK}
    assert tokenizers.mask_id(masked) < tokenizers.vocab_size(masked)


@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
def test_a_special_tokens_name_in_a_document_is_plain_text(spec):
    text = f"{END_OF_TEXT}{MASK}"
    tokenizer = get_tokenizer(spec, "masked", trained_on(text))
    end = tokenizers.end_id(tokenizer)
    ids = np.concatenate(list(encode_documents(tokenizer, [text]))).tolist()
    assert tokenizers.mask_id(tokenizer) not in ids
    assert ids.count(end) == (end is not None)
    assert decode(tokenizer, ids) == text + (END_OF_TEXT if end is not None else "")


def test_a_prompt_may_name_a_special_token():
    assert encode(BYTE, [f"a{END_OF_TEXT}"])[0].tolist() == [97, 256]


@FEW
@given(st.lists(st.text(max_size=20), max_size=8), st.integers(1, 6), st.integers(1, 12))
def test_each_document_ends_with_the_end_token_once(documents, piece, batch):
    pieces = itertools.chain.from_iterable(tokenizers.batches(documents, piece, batch))
    text, ends = "", []
    for part, last in pieces:
        assert 0 < len(part) <= piece
        text += part
        if last:
            ends.append(len(text))
    written = [document for document in documents if document]
    assert text == "".join(written)
    assert ends == list(itertools.accumulate(map(len, written)))


def test_batches_of_text_are_about_as_large_as_asked():
    batches = list(tokenizers.batches(["x" * 25] * 10, piece=10, batch=40))
    sizes = [sum(len(text) for text, _ in batch) for batch in batches]
    assert sum(sizes) == 250
    assert all(40 <= size < 40 + 10 for size in sizes[:-1])


def test_a_document_longer_than_a_piece_ends_once(monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 7)
    monkeypatch.setattr(tokenizers, "BATCH", 20)
    documents = ["a" * 30, "", "b", "cd" * 7]
    ids = np.concatenate(list(encode_documents(BYTE, documents)))
    expected = [[*document.encode(), 256] for document in documents if document]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))


def test_a_million_characters_and_one_are_two_pieces_of_one_document():
    ids = list(encode_documents(BYTE, ["x" * 1_000_001]))
    assert [len(part) for part in ids] == [1_000_000, 2]
    assert ids[1].tolist() == [ord("x"), 256]


def test_characters_have_no_end_token():
    tokenizer = get_tokenizer("char", "causal", trained_on("ab"))
    assert [ids.tolist() for ids in encode_documents(tokenizer, ["ab", "a"])] == [[0, 1], [0]]


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "[SEP]"])
def test_the_end_token_of_well_known_tokenizers_is_found(name, tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", "a", name)
    tokenizer = get_tokenizer(path, "causal", unused)
    [ids] = encode_documents(tokenizer, ["a a"])
    assert ids.tolist() == [1, 1, 2]


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("spec", ["char", "byte", "train:bpe:300"])
def test_a_saved_tokenizer_gives_the_same_tokens(spec, objective, tmp_path):
    made = get_tokenizer(spec, objective, trained_on(TEXT))
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = get_tokenizer(str(tmp_path / "tokenizer.json"), objective, unused)
    assert loaded.to_str() == made.to_str()
    text = TEXT[:500]
    [ids], [again] = (list(encode_documents(tokenizer, [text])) for tokenizer in (made, loaded))
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
    assert tokenizers.mask_id(get_tokenizer(path, "masked", unused)) == 2


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
