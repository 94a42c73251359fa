import io
import sys

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from jaxdp.common.errors import ConfigError
from jaxdp.data import special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.encoding import encode
from jaxdp.data.tokenizer import get_tokenizer
from support.texts import FEW, REPOSITORY, TEXT, unused

# Prose, code, and characters that are in no piece. A combining mark behind a character that NFKC
# replaces is left out: `tokenizers` loses it, in every such conversion.
PIECES = st.sampled_from(
    [
        "the ",
        "def",
        "é",
        "  ",
        " ",
        "\n",
        "x",
        "ing",
        "😀",
        "\uff21",
        "①",
        "ﬁ",
        "\t",
        "model",
        "(",
        "é",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "▁",
        "\u200b",
        "1 is",
        "odd, ",
        "क्षि",
    ]
)
KINDS = [
    {"model_type": "unigram"},
    {"model_type": "bpe"},
    {"model_type": "unigram", "byte_fallback": True},
    # As Llama's and Gemma's.
    {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    {"model_type": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": False},
    {"model_type": "unigram", "normalization_rule_name": "nfkc_cf"},
]


def model(path, **options):
    lines = [*TEXT.splitlines()[:200], *(REPOSITORY / "README.md").read_text().splitlines()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    path.write_bytes(written.getvalue())
    return str(path), sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_tokens_and_text_are_those_of_sentencepiece(options, tmp_path):
    path, original = model(tmp_path / "spm.model", **options)
    tokenizer = get_tokenizer(path, "causal", unused)
    assert tokenizers.vocab_size(tokenizer) == original.vocab_size()
    assert special_tokens.end_id(tokenizer) == original.eos_id()
    saved = tmp_path / "tokenizer.json"
    tokenizer.save(str(saved))
    again = get_tokenizer(str(saved), "causal", unused)

    @FEW
    @given(st.lists(PIECES, max_size=15).map("".join))
    @example("")
    @example(" ")
    @example(TEXT[:3000])
    def same(text):
        expected = original.encode(text)
        for made in (tokenizer, again):
            assert encode(made, [text])[0].tolist() == expected
        if original.unk_id() not in expected:
            assert tokenizer.decode(expected, skip_special_tokens=False) == original.decode(
                expected
            )

    same()


def test_a_model_without_the_package_is_refused_with_its_name(tmp_path, monkeypatch):
    path, _ = model(tmp_path / "spm.model", model_type="bpe")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"\Atokenizer='.*\.model' needs .*: pip install 'jax"):
        get_tokenizer(path, "causal", unused)


@pytest.mark.parametrize("content", [b"", b"no model", b"\n\x05"])
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "spm.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\Atokenizer='.*spm\.model' can't be .*: give .*\Z"):
        get_tokenizer(str(tmp_path / "spm.model"), "causal", unused)


@pytest.mark.parametrize(
    "options",
    [{"model_type": "char"}, {"model_type": "unigram", "treat_whitespace_as_suffix": True}],
)
def test_a_model_that_can_not_be_converted_exactly_is_refused(options, tmp_path):
    path, _ = model(tmp_path / "spm.model", **options)
    with pytest.raises(ConfigError, match=r"can't be converted exactly \(.*\): give a tokenizer\."):
        get_tokenizer(path, "causal", unused)
