"""Makes and loads tokenizers, all of them Hugging Face's `tokenizers.Tokenizer`.

Character and byte tokenizers are BPE models without merges, so that every run has a
`tokenizer.json` that other programs can read.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import bpe, sentencepiece, special_tokens
from jaxdp.data.special_tokens import AUTO, END_OF_TEXT, MASK_NAMES, SETTINGS

LARGEST_VOCABULARY = 2**24  # Well-known tokenizers have up to 2**18 tokens.
TEMPLATE = "chat_template.jinja"  # Beside a tokenizer, as transformers writes it.


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
            tokenizer = Tokenizer.from_pretrained(name)
        else:
            path = found[0]
            of_spm = path.suffix == ".model" and os.path.isfile(path)
            tokenizer = sentencepiece.load(path) if of_spm else load_file(path)
        settings = settings_for(spec)
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
    own = _beside(spec, TEMPLATE)
    if own is not None and os.path.isfile(own):
        return own.read_text(encoding="utf-8")
    found = settings_for(spec).get("chat_template") or ""
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


def settings_for(spec: str) -> dict[str, Any]:
    """Returns the tokenizer_config.json of a tokenizer; {} where it has none."""
    path = _beside(spec, SETTINGS)
    return special_tokens.settings_of(path) if path else {}


def _beside(spec: str, file: str) -> Path | None:
    """Returns the path of a file beside a tokenizer's own, which need not exist; None without."""
    if files := files_of(spec):
        return files[1].with_name(file)
    return _file_on_hub(spec.removeprefix("hf:"), file) if spec.startswith("hf:") else None


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
