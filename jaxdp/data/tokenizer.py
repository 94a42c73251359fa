"""Makes, loads and applies tokenizers, all of them Hugging Face's `tokenizers.Tokenizer`.

Character and byte tokenizers are BPE models without merges, so that every run has a
`tokenizer.json` that other programs can read.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import sentencepiece

END_OF_TEXT = "<|endoftext|>"
# Names of the token that ends a document in well-known tokenizers; the first one found is used.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
LARGEST_VOCABULARY = 2**24  # Well-known tokenizers have up to 2**18 tokens.
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
PIECE, BATCH = 1_000_000, 8_000_000  # Characters that are encoded at a time, and together.


def get_tokenizer(
    spec: str, objective: str, documents: Callable[[bool], Iterable[str]]
) -> Tokenizer:
    """Makes, trains or loads the tokenizer that `config.tokenizer` asks for.

    Examples:
      >>> get_tokenizer("byte", "causal", documents=lambda all: []).encode("hi <|endoftext|>").ids
      [104, 105, 32, 256]

    Args:
      spec: "char", "byte", "train:bpe:SIZE", "hf:NAME", "hf:FOLDER", or the path of a
        tokenizer.json or a SentencePiece .model.
      objective: "masked" adds a mask token to "char", "byte" and "train:" tokenizers.
      documents: returns the training texts, with True also validation texts; called if needed.

    Raises:
      ConfigError: the spec is none of these, or names something that can't be loaded.
    """
    specials = [END_OF_TEXT] + (["<|mask|>"] if objective == "masked" else [])
    if spec == "char":
        tokenizer = _characters(documents(True))
        if objective == "masked":
            tokenizer.add_special_tokens(["<|mask|>"])
    elif spec == "byte":
        tokenizer = _bytes()
        tokenizer.add_special_tokens(specials)
    elif spec.startswith("train:"):
        tokenizer = _train_bpe(_bpe_size(spec), specials, documents(False))
    else:
        tokenizer = _load(spec)
    if objective == "masked" and mask_id(tokenizer) is None:
        raise ConfigError(
            f"tokenizer={shown(spec)} has no mask token ({', '.join(MASK_NAMES)}), which "
            "objective='masked' needs: use another tokenizer, or objective='causal'"
        )
    return tokenizer


def progress_line(spec: str) -> str:
    """Returns a line to print before `get_tokenizer`, which can take time."""
    if spec.startswith("train:"):
        return f"Training a tokenizer of {_bpe_size(spec):,} tokens ..."
    return f"Making the tokenizer {spec} ..."


def _characters(texts: Iterable[str]) -> Tokenizer:
    alphabet: set[str] = set()
    for text in texts:
        alphabet |= set(text)
    if not alphabet:
        raise ConfigError(
            "tokenizer='char' finds no character in the data: give data.path a text with characters"
        )
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(_byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """Returns GPT-2's printable character for each byte 0..255: itself, or one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(b if b in printable else next(stand_ins)) for b in range(256)]


def _bpe_size(spec: str) -> int:
    kind, _, size = spec.removeprefix("train:").partition(":")
    if kind != "bpe" or not size.isdecimal() or len(size) > 7 or int(size) < 258:
        raise ConfigError(
            f"tokenizer={shown(spec)} can't be trained: write train:bpe:SIZE with SIZE from 258 "
            "(256 bytes and two special tokens) to 9999999"
        )
    return int(size)


def _train_bpe(size: int, specials: list[str], texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _load(spec: str) -> Tokenizer:
    try:
        name = spec.removeprefix("hf:")
        path = Path(os.path.expanduser(name))
        if name != spec and path.is_dir():
            tokenizer = load_file(path / "tokenizer.json")
        elif name != spec:
            paths.check_hub(f"tokenizer={shown(spec)}")
            tokenizer = Tokenizer.from_pretrained(name)
        else:
            of_spm = path.suffix == ".model" and path.is_file()
            tokenizer = sentencepiece.load(path) if of_spm else load_file(path)
    except ConfigError:
        raise
    except Exception as error:  # The library raises bare Exceptions, also for network errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConfigError(
            f"tokenizer={shown(spec)} can't be loaded ({reason}): download its tokenizer.json and "
            "give that file's path"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_file(path: Path, way_out: str = "give one that the tokenizers library wrote") -> Tokenizer:
    """Reads a tokenizer.json.

    Args:
      path: the path of the file.
      way_out: the advice in the message about a damaged file.

    Raises:
      ConfigError: there is no such file, or it is no tokenizer.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"tokenizer={shown(str(path))} is no file: use char, byte, train:bpe:SIZE, hf:NAME or "
            "the path of a tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        _check_ids(tokenizer)
    except BaseException as error:  # A panic in Rust is not an Exception.
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(
            f"tokenizer={shown(str(path))} can't be read ({shown(error, as_text=str)}): {way_out}"
        ) from None
    return tokenizer


def _check_ids(tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.get_vocab(with_added_tokens=True).values())
    if not ids:
        raise ValueError("it has no tokens")
    if len(set(ids)) < len(ids):
        raise ValueError("two of its tokens have the same id")
    if max(ids) >= LARGEST_VOCABULARY:
        raise ValueError(f"it has {len(ids)} tokens and one with the id {max(ids)}")


def end_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token that ends a document; None where there is none, as in "char"."""
    return _first_id(tokenizer, END_NAMES)


def mask_id(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the mask token; None where there is none."""
    return _first_id(tokenizer, MASK_NAMES)


def _first_id(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Returns one more than the highest token id: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def digest(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of a tokenizer's JSON after a round trip; the same for equal ones."""
    again = Tokenizer.from_str(tokenizer.to_str())
    return hashlib.sha256(again.to_str().encode()).hexdigest()


def encode(tokenizer: Tokenizer, texts: list[str], *, plain: bool = False) -> list[np.ndarray]:
    """Encodes texts on all cores, without adding special tokens.

    Args:
      tokenizer: any tokenizer.
      texts: the texts to encode.
      plain: whether to encode the name of a special token in a text, such as <|endoftext|>, as
        plain text rather than as that token.

    Returns:
      Token ids of each text, [n] int64.

    Raises:
      ConfigError: the tokenizer can't encode a text, as "char" a character that it doesn't know.
    """
    # A character tokenizer would silently drop characters that it doesn't know.
    if tokenizer.pre_tokenizer is None and isinstance(tokenizer.decoder, decoders.Fuse):
        unknown = {c for c in set().union(*texts) if tokenizer.token_to_id(c) is None}
        if unknown:
            raise ConfigError(
                f"the character {min(unknown)!r} is not among those of the training text: remove "
                "it, or train with tokenizer='byte'"
            )
    tokenizer.encode_special_tokens = plain
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # A bare Exception, for example if there is no unknown token.
        raise ConfigError(
            f"the tokenizer can't encode the text ({shown(error, as_text=str)}): use another one, "
            "such as tokenizer='byte'"
        ) from None
    return [np.asarray(encoding.ids, np.int64) for encoding in encodings]


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[str], done: int = 0
) -> Iterator[np.ndarray]:
    """Encodes a stream of documents, each followed by the end token, if the tokenizer has one.

    Names of special tokens are plain text here; empty documents yield nothing. A few MB at a time
    are encoded, which bounds memory and uses all cores. Documents are cut into pieces of a million
    characters, which can change the tokens at the cuts. The first `done` pieces are skipped.

    Yields:
      Token ids of one document, or of one piece of a long one, [n] int64.
    """
    end = end_id(tokenizer)
    suffix = np.array([] if end is None else [end], np.int64)
    for pieces in batches(documents, PIECE, BATCH, done):
        texts = [text for text, _ in pieces]
        for ids, (_, last) in zip(encode(tokenizer, texts, plain=True), pieces, strict=True):
            yield np.concatenate([ids, suffix]) if last else ids


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[tuple[str, str]], done: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes a stream of (prompt, text) examples; prompts separately, as in generation.

    The first `done` examples are skipped.

    Yields:
      Token ids of the prompt, [m] int64, and of the text with the end token, if any, [n] int64.
    """
    end = end_id(tokenizer)
    suffix = np.array([] if end is None else [end], np.int64)
    rest = itertools.islice(examples, done, None)
    while some := list(itertools.islice(rest, 10_000)):
        ids = iter(encode(tokenizer, list(itertools.chain.from_iterable(some)), plain=True))
        for prompt, text in zip(ids, ids, strict=True):
            yield prompt, np.concatenate([text, suffix])


def batches(
    documents: Iterable[str], piece: int, batch: int, done: int = 0
) -> Iterator[list[tuple[str, bool]]]:
    """Cuts documents into pieces, and collects these into batches.

    Args:
      documents: texts.
      piece: characters of a piece, at most.
      batch: characters of a batch, at least, but for the last.
      done: the first so many pieces are left out.

    Yields:
      [(text of a piece, whether its document ends with it)].
    """
    pending: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for start in range(0, len(document), piece):
            if done:
                done -= 1
                continue
            text = document[start : start + piece]
            pending.append((text, start + piece >= len(document)))
            size += len(text)
            if size >= batch:
                yield pending
                pending, size = [], 0
    if pending:
        yield pending
