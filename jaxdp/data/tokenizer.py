"""Text to token ids and back, always by a Hugging Face `tokenizers.Tokenizer`.

Characters and bytes are BPE models without merges, so that every run, whatever its tokenizer,
has one `tokenizer.json` that other programs can read.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import sentencepiece

END_OF_TEXT = "<|endoftext|>"
# What well-known tokenizers call the token that ends a document, the likeliest first.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
LARGEST_VOCABULARY = 2**24  # Well-known ones have up to 2**18.
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
      spec: "char", "byte", "train:bpe:SIZE", "hf:NAME", "hf:FOLDER" or the path of a
        tokenizer.json or of a .model of SentencePiece.
      objective: "masked" adds a mask token to the tokenizers that are made here.
      documents: called with False gives the training texts, with True the validation texts too;
        only called by the tokenizers that are made from the data.

    Raises:
      ConfigError: the spec is none of these, or what it names can't be had.
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


def making(spec: str) -> str:
    """What takes time when the tokenizer of a spec is made, in a line."""
    if spec.startswith("train:"):
        return f"Training a tokenizer of {_bpe_size(spec):,} tokens ..."
    return f"Making the tokenizer {spec} ..."


def _characters(texts: Iterable[str]) -> Tokenizer:
    alphabet: set[str] = set()
    for text in texts:
        alphabet |= set(text)
    if not alphabet:
        raise ConfigError(
            "tokenizer='char' finds no character in the data: give data.path a text that has some"
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
    """GPT-2's printable stand-in for each byte 0..255: itself, or the next unused from U+0100."""
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
            tokenizer = Tokenizer.from_pretrained(name)
        else:
            of_spm = path.suffix == ".model" and path.is_file()
            tokenizer = sentencepiece.load(path) if of_spm else load_file(path)
    except ConfigError:
        raise
    except Exception as error:  # The library raises bare Exceptions, for network trouble too.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConfigError(
            f"tokenizer={shown(spec)} can't be had ({reason}): download its tokenizer.json and "
            "give that file's path"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_file(path: Path, way_out: str = "give one that the tokenizers library wrote") -> Tokenizer:
    """Reads a tokenizer.json.

    Args:
      path: of the file.
      way_out: what a message says to do where it is damaged.

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
    except BaseException as error:  # Bare Exceptions; and a panic of Rust's is no Exception.
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
    """The id of the token that ends a document; None where there is none, as for "char"."""
    return _first_id(tokenizer, END_NAMES)


def mask_id(tokenizer: Tokenizer) -> int | None:
    """The id of the mask token; None where there is none."""
    return _first_id(tokenizer, MASK_NAMES)


def _first_id(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id: vocabularies may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of its tokenizer.json as it is after one reading: equal digests, equal tokenizers."""
    again = Tokenizer.from_str(tokenizer.to_str())
    return hashlib.sha256(again.to_str().encode()).hexdigest()


def encode(tokenizer: Tokenizer, texts: list[str], *, plain: bool = False) -> list[np.ndarray]:
    """Encodes texts, using all cores; no special tokens are added.

    Args:
      tokenizer: any.
      texts: what to encode.
      plain: the name of a special token in a text, such as <|endoftext|>, is text like any other
        rather than that token.

    Returns:
      [n] int64 token ids of each text.

    Raises:
      ConfigError: a character tokenizer doesn't know a character (it would drop it silently).
    """
    if tokenizer.pre_tokenizer is None and isinstance(tokenizer.decoder, decoders.Fuse):
        unknown = {c for c in set().union(*texts) if tokenizer.token_to_id(c) is None}
        if unknown:
            raise ConfigError(
                f"the character {min(unknown)!r} is not among those of the training text: leave it "
                "out, or train with tokenizer='byte'"
            )
    tokenizer.encode_special_tokens = plain
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # Of the library's own, such as that it lacks an unknown token.
        raise ConfigError(
            f"the tokenizer can't read the text ({shown(error, as_text=str)}): use another one, "
            "such as tokenizer='byte'"
        ) from None
    return [np.asarray(encoding.ids, np.int64) for encoding in encodings]


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[str], done: int = 0
) -> Iterator[np.ndarray]:
    """Encodes a stream of documents, each followed by the end token where there is one.

    A document that says <|endoftext|> holds plain text there; an empty one leaves no trace.
    Works on a few MB at a time, so that memory stays flat and all cores have work. A document of
    more than a million characters is cut there, which can change the one token at the cut. The
    first `done` of what would be yielded are left out.

    Yields:
      [n] int64 token ids of one document, or of one piece of a long one.
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
    """Encodes a stream of prompts and texts, each part by itself, as a model is prompted, too.

    The first `done` are left out.

    Yields:
      [m], [n] int64 token ids of the prompt, and of the text with the end token, if there is one.
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
