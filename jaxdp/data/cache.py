"""The token cache: a corpus as token ids on disk, tokenised once, memory-mapped ever after.

A cache is a folder, named by a fingerprint of all that it depends on, with `train.bin`,
`validation.bin` (little-endian uint16 or uint32), `tokenizer.json` and `meta.json`, and of examples
with prompts `train.examples.bin`, `validation.examples.bin` (int64), where each begins. It appears
under its name by one rename, whole. Whoever opens it looks whether it still is: at the sizes of
its files, and up to WHOLE bytes at all that is in them. One that is damaged is built anew.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp import disk
from jaxdp import tokenizer as tokenizers
from jaxdp.config import ConfigError, shown
from jaxdp.data.sources import Source, get_source

FORMAT = 2  # Raise it when the same config would give other tokens than before.
SPLITS = ("train", "validation")
INDEX = np.dtype("<i8")
WHOLE = 2**30  # To read so much takes a second or two.


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A tokenised corpus.

    Attributes:
      folder: where it lies.
      train: [tokens] uint16 or uint32, memory-mapped; documents in a row.
      validation: likewise.
      tokenizer: what made them.
      vocab_size: one more than the highest id.
      validation_bytes: of the validation text, prompts apart, in UTF-8, for bits per byte.
      digest: SHA-256 over both splits; equal digests, equal data.
      examples: only of data.packing="padded": for each split [examples, 2] int64, at which token
        an example begins, and at which what follows its prompt.
    """

    folder: Path
    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int
    validation_bytes: int
    digest: str
    examples: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_byte(self) -> float:
        """Of the validation split, prompts apart."""
        tokens = len(self.validation)
        if self.examples:
            start, text = self.examples["validation"].T
            tokens -= int((text - start).sum())
        return tokens / self.validation_bytes


def open_cache(config: ConfigDict, report: Callable[[str], None] = print) -> TokenCache:
    """Opens the token cache for a config and builds it first if it isn't there.

    Processes that start at once wait for the one that builds. One that dies while it builds
    leaves an unnamed folder that the next one removes. A damaged cache is reported and replaced.

    Args:
      config: a valid config.
      report: is told in a line what takes time.

    Raises:
      ConfigError: there is no such data or tokenizer.
    """
    source = get_source(config)
    root = Path(os.path.expanduser(config.data.cache_dir or "~/.cache/jaxdp/tokens"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={shown(str(root))} can't be made ({error.strerror}): choose another "
            "folder"
        ) from None
    folder = root / _fingerprint(config, source)
    try:
        if (cache := _find(folder)) is not None:
            return cache
    except DamagedError:
        pass
    try:
        with filelock.FileLock(_lock(folder)):
            return _build_once(config, source, folder, report)
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        raise ConfigError(
            f"data.cache_dir={str(root)!r} can't be written ({error.strerror}): make room, or "
            "choose another folder"
        ) from None


def _build_once(
    config: ConfigDict, source: Source, folder: Path, report: Callable[[str], None]
) -> TokenCache:
    """Builds the cache unless another process has; nothing is left of one that fails."""
    try:
        if (cache := _find(folder)) is not None:
            return cache
    except DamagedError as error:
        report(f"The token cache {folder} is damaged ({error}); it is made anew.")
        _put_away(folder)
    for abandoned in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(abandoned)
    report(f"Tokenising {config.data.path} with tokenizer={config.tokenizer} ...")
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    try:
        _build(config, source, temporary)
        temporary.chmod(0o755)  # mkdtemp's folders are for one user, caches may be shared.
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(folder)


class DamagedError(ValueError):
    """A token cache isn't as it was made."""


def _find(folder: Path) -> TokenCache | None:
    """Loads a cache; None where there is none; raises DamagedError."""
    if not os.path.lexists(folder):
        return None
    try:
        return _load(folder)
    except DamagedError:
        raise
    except Exception as error:  # There are as many kinds of rubbish as there are errors.
        raise DamagedError(f"{type(error).__name__}: {shown(error, as_text=str)}") from None


def _lock(folder: Path) -> str:
    path = f"{folder}.lock"
    if os.path.isdir(path):
        raise ConfigError(f"data.cache_dir: {path} is no file: remove it")
    return path


def _put_away(folder: Path) -> None:
    """Gives a damaged cache a name under which it is removed; other processes may yet read it."""
    try:
        if folder.is_dir() and not folder.is_symlink():
            folder.rename(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
        else:
            folder.unlink()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {folder} is damaged and can't be removed ({error.strerror}): remove "
            "it, or choose another folder"
        ) from None


def _fingerprint(config: ConfigDict, source: Source) -> str:
    """Names the cache by everything its content depends on."""
    tokenizer: list = [config.tokenizer, config.objective]
    path = os.path.expanduser(config.tokenizer)
    if os.path.isfile(path):
        tokenizer[0] = _file_digest(Path(path))
    padded = ["padded"] if config.data.packing == "padded" else []
    identity = json.dumps([FORMAT, tokenizer, source.identity(), *padded], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _build(config: ConfigDict, source: Source, folder: Path) -> None:
    def documents(with_validation: bool) -> Iterator[str]:
        for split in SPLITS if with_validation else SPLITS[:1]:
            yield from source.documents(split)

    tokenizer = tokenizers.get_tokenizer(config.tokenizer, config.objective, documents)
    vocab_size = tokenizers.vocab_size(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    meta: dict = {"vocab_size": vocab_size, "dtype": dtype.str, "data": config.data.path}
    for split in SPLITS:
        write = _write_examples if config.data.packing == "padded" else _write_documents
        meta[split] = write(tokenizer, source, split, folder, dtype)
    meta["digest"] = _digest(folder, dtype, meta)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    meta["tokenizer"] = _file_digest(folder / "tokenizer.json")
    meta["checksum"] = _checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(meta: dict) -> str:
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_documents(
    tokenizer: Tokenizer, source: Source, split: str, folder: Path, dtype: np.dtype
) -> dict[str, int]:
    """Writes the tokens of a split; returns how much there is of it."""
    counter = _Counter(source.documents(split))
    with open(folder / f"{split}.bin", "wb") as file:
        for ids in tokenizers.encode_documents(tokenizer, counter):
            file.write(ids.astype(dtype).tobytes())
        tokens = _end(file) // dtype.itemsize
    return {"tokens": tokens, "bytes": counter.bytes, "documents": counter.documents}


def _write_examples(
    tokenizer: Tokenizer, source: Source, split: str, folder: Path, dtype: np.dtype
) -> dict[str, int]:
    """Likewise, and where each example, and what follows its prompt, begins."""
    size = 0

    def examples() -> Iterator[tuple[str, str]]:
        nonlocal size
        for prompt, text in source.examples(split):
            size += len(text.encode())
            yield prompt, text

    tokens = count = 0
    with (
        open(folder / f"{split}.bin", "wb") as file,
        open(folder / f"{split}.examples.bin", "wb") as index,
    ):
        for prompt, text in tokenizers.encode_examples(tokenizer, examples()):
            file.write(np.concatenate([prompt, text]).astype(dtype).tobytes())
            index.write(np.array([tokens, tokens + len(prompt)], INDEX).tobytes())
            tokens, count = tokens + len(prompt) + len(text), count + 1
        _end(file), _end(index)
    return {"tokens": tokens, "bytes": size, "documents": count, "examples": count}


def _end(file: BinaryIO) -> int:
    """Has what was written on disk; returns how many bytes it is."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


class _Counter:
    """Iterates over documents and counts them, and their bytes in UTF-8, on the way."""

    def __init__(self, documents: Iterator[str]):
        self._documents = documents
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.documents += 1
            self.bytes += len(document.encode())
            yield document


def _load(folder: Path) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text())
    if meta["checksum"] != _checksum(meta):
        raise DamagedError("meta.json has changed")
    dtype = np.dtype(meta["dtype"])
    files = _files(dtype, meta)
    for name, (kind, count) in files.items():
        path, size = folder / name, count * kind.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(f"{name} is not of {size} bytes")
    tokenizer = tokenizers.load_file(folder / "tokenizer.json")
    if _file_digest(folder / "tokenizer.json") != meta["tokenizer"]:
        raise DamagedError("tokenizer.json has changed")
    if tokenizers.vocab_size(tokenizer) != meta["vocab_size"]:
        raise DamagedError(f"tokenizer.json has no vocabulary of {meta['vocab_size']}")
    small = sum(count * kind.itemsize for kind, count in files.values()) <= WHOLE
    if small and _digest(folder, dtype, meta) != meta["digest"]:
        raise DamagedError("the tokens have changed")

    def array(name: str) -> np.ndarray:
        kind, count = files[name]
        # numpy can't map an empty file.
        return np.memmap(folder / name, kind, "r") if count else np.zeros(0, kind)

    return TokenCache(
        folder=folder,
        train=array("train.bin"),
        validation=array("validation.bin"),
        tokenizer=tokenizer,
        vocab_size=meta["vocab_size"],
        validation_bytes=meta["validation"]["bytes"],
        digest=meta["digest"],
        examples={
            split: array(f"{split}.examples.bin").reshape(-1, 2)
            for split in SPLITS
            if "examples" in meta[split]
        },
    )


def _files(dtype: np.dtype, meta: dict) -> dict[str, tuple[np.dtype, int]]:
    """The arrays of a cache: {name: (dtype, how many numbers)}."""
    files = {}
    for split in SPLITS:
        files[f"{split}.bin"] = dtype, meta[split]["tokens"]
        if "examples" in meta[split]:
            files[f"{split}.examples.bin"] = INDEX, 2 * meta[split]["examples"]
    return files


def _digest(folder: Path, dtype: np.dtype, meta: dict) -> str:
    """Of the tokens on disk; raises DamagedError for ids beyond the vocabulary."""
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(folder / f"{split}.bin", "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
                if np.frombuffer(piece, dtype).max() >= meta["vocab_size"]:
                    raise DamagedError(f"{split}.bin has ids beyond the vocabulary")
        digest.update(split.encode())
        if "examples" in meta[split]:
            digest.update((folder / f"{split}.examples.bin").read_bytes())
    return digest.hexdigest()
