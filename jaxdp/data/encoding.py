"""Makes tokens of texts: of prompts, and of streams of documents and examples."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import special_tokens
from jaxdp.data.example import Example, whole
from jaxdp.data.tokenizer import vocab_size

PIECE = 1_000_000  # Characters that are encoded at a time.
BATCH = 1_500_000  # Tokens, about, that are made together; each takes 110 bytes of memory.


def encode(tokenizer: Tokenizer, texts: list[str], *, special: bool = False) -> list[np.ndarray]:
    """Encodes texts on all cores, without adding tokens before or after them.

    Args:
      tokenizer: any tokenizer.
      texts: the texts to encode.
      special: whether the name of a special token in a text, such as <|endoftext|>, is that token
        rather than plain text (data.special_tokens).

    Returns:
      Token ids of each text, [n] int64.

    Raises:
      ConfigError: the tokenizer can't encode a text, as "char" a character that it doesn't know.
    """
    tokenizer.encode_special_tokens = not special
    encodings = _encodings(tokenizer, tokenizer.encode_batch_fast, texts)
    return [np.asarray(encoding.ids, np.int64) for encoding in encodings]


def encode_placed(
    tokenizer: Tokenizer, texts: list[str], *, special: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes texts as `encode` does, and tells which characters each token stands for.

    Characters are those of the text as it is given, also where the tokenizer normalises it. Tokens
    that share a character, as the bytes of one do, have the same characters.

    Args:
      tokenizer: any tokenizer.
      texts: the texts to encode.
      special: as for `encode`.

    Returns:
      For each text its token ids, [n] int64, and its tokens' places, [n, 2] int64: the first of a
      token's characters, and the one after its last. The first ones never decrease.

    Raises:
      ConfigError: as for `encode`; or the tokenizer doesn't tell the places.
    """
    tokenizer.encode_special_tokens = not special
    # A post-processor adds no tokens here, but it can leave spaces out of the places.
    processor, tokenizer.post_processor = tokenizer.post_processor, None
    try:
        encodings = _encodings(tokenizer, tokenizer.encode_batch, texts)
    finally:
        tokenizer.post_processor = processor
    found = [
        (np.asarray(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2))
        for e in encodings
    ]
    for text, (_, places) in zip(texts, found, strict=True):
        _check_places(text, places)
    return found


def _encodings(
    tokenizer: Tokenizer, encode_batch: Callable[..., list[Encoding]], texts: list[str]
) -> list[Encoding]:
    # A character tokenizer would silently drop characters that it doesn't know.
    if tokenizer.pre_tokenizer is None and isinstance(tokenizer.decoder, decoders.Fuse):
        unknown = {c for c in set().union(*texts) if tokenizer.token_to_id(c) is None}
        if unknown:
            raise ConfigError(
                f"the character {min(unknown)!r} is not among those of the training text: remove "
                "it, or train with tokenizer='byte'"
            )
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # A bare Exception, for example if there is no unknown token.
        raise ConfigError(
            f"the tokenizer can't encode the text ({shown(error, as_text=str)}): use another one, "
            "such as tokenizer='byte'"
        ) from None


def _check_places(text: str, places: np.ndarray) -> None:
    """Raises ConfigError where the places of tokens, [n, 2], can't be those in the text."""
    first, after = places.T
    nothing = first >= after  # One may be: what a normaliser puts before a text.
    if (np.diff(first) < 0).any() or (nothing[1:] & nothing[:-1]).any():
        raise ConfigError(
            f"the tokenizer doesn't tell which characters of {shown(text)} its tokens stand for, "
            "so that what the assistant says can't be told apart: use another tokenizer"
        )


def encode_prompts(tokenizer: Tokenizer, prompts: list[str], *, special: bool) -> list[np.ndarray]:
    """Encodes the beginnings of documents, each with the token that begins one, if any."""
    before, _ = _ends(tokenizer)
    return [np.concatenate([before, ids]) for ids in encode(tokenizer, prompts, special=special)]


def without_begin(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Returns a prompt's tokens without the one that `encode_prompts` has put first, if any."""
    return ids[int(len(ids) > 0 and ids[0] == special_tokens.begin_id(tokenizer)) :]


def _ends(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that begin and end a document, [0 or 1] int64 each."""
    ids = special_tokens.begin_id(tokenizer), special_tokens.end_id(tokenizer)
    before, after = (np.array([] if i is None else [i], np.int64) for i in ids)
    return before, after


def encode_documents(
    tokenizer: Tokenizer, examples: Iterable[Example], done: int = 0, *, special: bool = False
) -> Iterator[np.ndarray]:
    """Encodes a stream of documents, each between the tokens that begin and end one, if any.

    Empty documents yield nothing. A few MB at a time are encoded, which bounds memory and uses all
    cores. Documents are cut into pieces of a million characters, which can change the tokens at
    the cuts. The first `done` pieces are skipped.

    Yields:
      Token ids of one document, or of one piece of a long one, [n] int64.
    """
    before, after = _ends(tokenizer)
    nothing = np.array([], np.int64)
    for pieces in batches(examples, PIECE, _batch_size(tokenizer), done):
        texts = [piece.text for piece in pieces]
        for ids, piece in zip(encode(tokenizer, texts, special=special), pieces, strict=True):
            around = before if piece.begins else nothing, after if piece.ends else nothing
            yield np.concatenate([around[0], ids, around[1]])


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[Example], done: int = 0, *, special: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes a stream of (prompt, text) examples; prompts separately, as in generation.

    The first `done` examples are skipped.

    Yields:
      Token ids of the prompt, with the token that begins a document, if any, [m] int64; and of the
      text with the end token, if any, [n] int64.
    """
    before, after = _ends(tokenizer)
    rest = itertools.islice(whole(examples), done, None)
    while some := list(_about(rest, _batch_size(tokenizer))):
        texts = list(itertools.chain.from_iterable((e.prompt, e.text) for e in some))
        ids = iter(encode(tokenizer, texts, special=special))
        for prompt, text in zip(ids, ids, strict=True):
            yield np.concatenate([before, prompt]), np.concatenate([text, after])


def _batch_size(tokenizer: Tokenizer) -> int:
    """Returns the characters of a batch; a token of a large vocabulary is about 4 of them."""
    return BATCH * (4 if vocab_size(tokenizer) > 1000 else 1)


def _about(examples: Iterator[Example], size: int) -> Iterator[Example]:
    """Yields the next examples until they have `size` characters together."""
    for example in examples:
        yield example
        size -= len(example.prompt) + len(example.text) + 100  # Short ones take memory, too.
        if size <= 0:
            return


class Piece(NamedTuple):
    """A part of a document, and whether the document begins and ends with it."""

    text: str
    begins: bool
    ends: bool


def pieces_of(examples: Iterable[Example], size: int) -> Iterator[Piece]:
    """Cuts documents into pieces of `size` characters, but for the last of each."""
    rest, begins = "", True
    for example in examples:
        text, at = rest + example.text, 0
        # The last piece is known as such only once the document ends.
        while at + size < len(text) or (example.ends and at < len(text)):
            yield Piece(text[at : at + size], begins, example.ends and at + size >= len(text))
            at, begins = at + size, False
        rest = text[at:]
        begins = begins or example.ends


def batches(
    examples: Iterable[Example], piece: int, batch: int, done: int = 0
) -> Iterator[list[Piece]]:
    """Cuts documents into pieces, and collects these into batches.

    Args:
      examples: documents, or pieces of them of any size.
      piece: characters of a piece, at most.
      batch: characters of a batch, at least, but for the last.
      done: the first so many pieces are left out.

    Yields:
      The pieces of a batch.
    """
    pending: list[Piece] = []
    size = 0
    for found in itertools.islice(pieces_of(examples, piece), done, None):
        pending.append(found)
        size += len(found.text)
        if size >= batch:
            yield pending
            pending, size = [], 0
    if pending:
        yield pending
