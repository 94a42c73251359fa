"""The token cache: a corpus as token ids on disk, tokenised once, memory-mapped ever after.

A cache is a folder, named by a fingerprint of all that it depends on, with `train.bin`,
`validation.bin` (little-endian uint16 or uint32), `tokenizer.json` and `meta.json`. It appears
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
      validation_bytes: of the validation text in UTF-8, for bits per byte.
      digest: SHA-256 over both splits; equal digests, equal data.
    """

    folder: Path
    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int
    validation_bytes: int
    digest: str

    @property
    def tokens_per_byte(self) -> float:
        """Of the validation split."""
        return len(self.validation) / self.validation_bytes


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
    identity = json.dumps([FORMAT, tokenizer, source.identity()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _build(config: ConfigDict, source: Source, folder: Path) -> None:
    def documents(with_validation: bool) -> Iterator[str]:
        for split in SPLITS if with_validation else SPLITS[:1]:
            yield from source.documents(split)

    tokenizer = tokenizers.get_tokenizer(config.tokenizer, config.objective, documents)
    vocab_size = tokenizers.vocab_size(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    meta: dict = {"vocab_size": vocab_size, "dtype": dtype.str, "data": config.data.path}
    digest = hashlib.sha256()
    for split in SPLITS:
        counter = _Counter(source.documents(split))
        with open(folder / f"{split}.bin", "wb") as file:
            for ids in tokenizers.encode_documents(tokenizer, counter):
                data = ids.astype(dtype).tobytes()
                digest.update(data)
                file.write(data)
            tokens = file.tell() // dtype.itemsize
            os.fsync(file.fileno())
        digest.update(split.encode())
        meta[split] = {"tokens": tokens, "bytes": counter.bytes, "documents": counter.documents}
    meta["digest"] = digest.hexdigest()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    meta["tokenizer"] = _file_digest(folder / "tokenizer.json")
    meta["checksum"] = _checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(meta: dict) -> str:
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
    sizes = {split: meta[split]["tokens"] * dtype.itemsize for split in SPLITS}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size != sizes[split]:
            raise DamagedError(f"{split}.bin is not of {sizes[split]} bytes")
    tokenizer = tokenizers.load_file(folder / "tokenizer.json")
    if _file_digest(folder / "tokenizer.json") != meta["tokenizer"]:
        raise DamagedError("tokenizer.json has changed")
    if tokenizers.vocab_size(tokenizer) != meta["vocab_size"]:
        raise DamagedError(f"tokenizer.json has no vocabulary of {meta['vocab_size']}")
    if sum(sizes.values()) <= WHOLE and _digest(folder, dtype, meta) != meta["digest"]:
        raise DamagedError("the tokens have changed")

    def tokens(split: str) -> np.ndarray:
        # numpy can't map an empty file.
        if sizes[split] == 0:
            return np.zeros(0, dtype)
        return np.memmap(folder / f"{split}.bin", dtype, "r")

    return TokenCache(
        folder=folder,
        train=tokens("train"),
        validation=tokens("validation"),
        tokenizer=tokenizer,
        vocab_size=meta["vocab_size"],
        validation_bytes=meta["validation"]["bytes"],
        digest=meta["digest"],
    )


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
    return digest.hexdigest()
