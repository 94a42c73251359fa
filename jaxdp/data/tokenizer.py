"""Makes, loads and applies tokenizers, all of them Hugging Face's `tokenizers.Tokenizer`.

Character and byte tokenizers are BPE models without merges, so that every run has a
`tokenizer.json` that other programs can read.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import bpe, sentencepiece, special_tokens
from jaxdp.data.example import Example, whole
from jaxdp.data.special_tokens import AUTO, END_OF_TEXT, MASK_NAMES, SETTINGS

LARGEST_VOCABULARY = 2**24  # Well-known tokenizers have up to 2**18 tokens.
TEMPLATE = "chat_template.jinja"  # Beside a tokenizer, as transformers writes it.
PIECE = 1_000_000  # Characters that are encoded at a time.
BATCH = 1_500_000  # Tokens, about, that are made together; each takes 110 bytes of memory.


def get_tokenizer(
    spec: str,
    objective: str,
    documents: Callable[[bool], Iterable[str]],
    *,
    bos: str = AUTO,
    eos: str = AUTO,
    while_waiting: Callable[[], None] = lambda: None,
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
      bos: data.bos, the token that begins a document; see `special_tokens.choose`.
      eos: data.eos, the token that ends a document.
      while_waiting: called every now and then while a BPE is trained; may raise to end it.

    Raises:
      ConfigError: the spec is none of these, or names something that can't be loaded.
    """
    specials = [END_OF_TEXT] + (["<|mask|>"] if objective == "masked" else [])
    settings: dict[str, Any] = {}
    if spec == "char":
        tokenizer = _characters(documents(True))
        if objective == "masked":
            tokenizer.add_special_tokens(["<|mask|>"])
    elif spec == "byte":
        tokenizer = _bytes()
        tokenizer.add_special_tokens(specials)
    elif spec.startswith("train:"):
        tokenizer = bpe.train(bpe.size_of(spec), specials, documents(False), while_waiting)
    else:
        tokenizer, settings = _load(spec)
    if objective == "masked" and special_tokens.mask_id(tokenizer) is None:
        raise ConfigError(
            f"tokenizer={shown(spec)} has no mask token ({', '.join(MASK_NAMES)}), which "
            "objective='masked' needs: use another tokenizer, or objective='causal'"
        )
    special_tokens.choose(tokenizer, settings, bos, eos)
    return tokenizer


def progress_line(spec: str) -> str:
    """Returns a line to print before `get_tokenizer`, which can take time."""
    if spec.startswith("train:"):
        return f"Training a tokenizer of {bpe.size_of(spec):,} tokens ..."
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


def _load(spec: str) -> tuple[Tokenizer, dict[str, Any]]:
    """Loads a tokenizer, and its tokenizer_config.json if there is one."""
    try:
        if (found := files_of(spec)) is None:
            paths.check_hub(f"tokenizer={shown(spec)}")
            name = spec.removeprefix("hf:")
            tokenizer, settings = Tokenizer.from_pretrained(name), _settings_on_hub(name)
        else:
            path, settings = found[0], special_tokens.settings_of(found[1])
            of_spm = path.suffix == ".model" and os.path.isfile(path)
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
    return tokenizer, settings


def files_of(spec: str) -> tuple[Path, Path] | None:
    """Returns the paths of a tokenizer and of its settings; None for one that isn't in files.

    The settings are in the tokenizer_config.json beside it. Neither file needs to exist.
    """
    name = spec.removeprefix("hf:")
    path = Path(os.path.expanduser(name))
    if name != spec:
        return (path / "tokenizer.json", path / SETTINGS) if os.path.isdir(path) else None
    made = spec in ("char", "byte") or spec.startswith("train:")
    return None if made else (path, path.parent / SETTINGS)


def chat_template(spec: str) -> str:
    """Returns the chat template of a tokenizer, in Jinja; "" where it has none."""
    files = files_of(spec)
    if files is None:
        if not spec.startswith("hf:"):
            return ""
        name = spec.removeprefix("hf:")
        own, settings = _file_on_hub(name, TEMPLATE), _settings_on_hub(name)
    else:
        own, settings = files[1].with_name(TEMPLATE), special_tokens.settings_of(files[1])
    if own is not None and os.path.isfile(own):
        return own.read_text(encoding="utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):  # Of several, each with a name.
        found = {template["name"]: template["template"] for template in found}.get("default", "")
    return found


def _file_on_hub(name: str, file: str) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except (errors.EntryNotFoundError, errors.LocalEntryNotFoundError):
        return None


def _settings_on_hub(name: str) -> dict[str, Any]:
    path = _file_on_hub(name, SETTINGS)
    return special_tokens.settings_of(path) if path else {}


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


def vocab_size(tokenizer: Tokenizer) -> int:
    """Returns one more than the highest token id: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def digest(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of a tokenizer's JSON after a round trip; the same for equal ones."""
    again = Tokenizer.from_str(tokenizer.to_str())
    return hashlib.sha256(again.to_str().encode()).hexdigest()


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
    # A character tokenizer would silently drop characters that it doesn't know.
    if tokenizer.pre_tokenizer is None and isinstance(tokenizer.decoder, decoders.Fuse):
        unknown = {c for c in set().union(*texts) if tokenizer.token_to_id(c) is None}
        if unknown:
            raise ConfigError(
                f"the character {min(unknown)!r} is not among those of the training text: remove "
                "it, or train with tokenizer='byte'"
            )
    tokenizer.encode_special_tokens = not special
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # A bare Exception, for example if there is no unknown token.
        raise ConfigError(
            f"the tokenizer can't encode the text ({shown(error, as_text=str)}): use another one, "
            "such as tokenizer='byte'"
        ) from None
    return [np.asarray(encoding.ids, np.int64) for encoding in encodings]


def encode_prompts(tokenizer: Tokenizer, prompts: list[str], *, special: bool) -> list[np.ndarray]:
    """Encodes the beginnings of documents, each with the token that begins one, if any."""
    before, _ = _ends(tokenizer)
    return [np.concatenate([before, ids]) for ids in encode(tokenizer, prompts, special=special)]


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
