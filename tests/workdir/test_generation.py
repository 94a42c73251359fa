"""Prompts with their continuations, as text; model/test_sampling.py tests what draws them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxdp.data import encoding, special_tokens, tokenizer
from jaxdp.data.cache import open_cache
from jaxdp.run import sampled
from jaxdp.workdir.generation import continued
from support.texts import unused


@pytest.fixture
def spaced() -> Tokenizer:
    """As SentencePiece's: a space before the text, which the decoder takes away again."""
    words = Tokenizer(models.WordLevel({"?": 0, "▁the": 1, "▁fox": 2, "x": 3}, unk_token="?"))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return words


def test_a_continuation_keeps_its_first_space(spaced):
    [ids] = encoding.encode_prompts(spaced, ["the"], special=False)
    assert ids.tolist() == [1]
    assert continued(spaced, "the", ids, [2, 3]) == "the foxx"


def test_a_prompt_stays_as_it_was_given(spaced):
    """Though its second word is unknown."""
    [ids] = encoding.encode_prompts(spaced, ["the Cat"], special=False)
    assert continued(spaced, "the Cat", ids, [2]) == "the Cat fox"


def test_a_character_that_the_continuation_completes_is_whole():
    byte = tokenizer.get_tokenizer("byte", "causal", unused)
    first, second = "é".encode()
    assert continued(byte, "", np.array([97, first]), [second, 98]) == "aéb"


@pytest.mark.parametrize(("special", "first"), [([], "the"), (["[SEP]"], "[SEP]")])
def test_a_prompt_that_the_tokenizer_drops_is_the_beginning_of_a_document(
    special, first, config, tmp_path
):
    """The default prompt is a line break, which BERT's tokenizer takes for nothing."""
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.add_special_tokens(special)
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("the cat " * 200)
    config.tokenizer, config.data.path = str(tmp_path / "tokenizer.json"), f"{tmp_path}/text.txt"
    cache = open_cache(config)
    [number] = sampled.prompt_tokens(config, cache)
    assert cache.tokenizer.id_to_token(int(number)) == first
    config.sample.prompt = "cat"
    assert sampled.prompt_tokens(config, cache).tolist() == [2]
    assert special_tokens.begin_id(cache.tokenizer) is None
