"""The token cache: a corpus as token ids on disk, tokenised once, memory-mapped ever after.

A cache is a folder, named by a fingerprint of all that it depends on, with `train.bin`,
`validation.bin` (little-endian uint16 or uint32), `tokenizer.json` and `meta.json`. It appears
under its name by one rename, whole; whoever finds it there can use it without asking.
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
from jaxdp.config import ConfigError
from jaxdp.data.sources import Source, get_source

FORMAT = 1  # Raise it when the same config would give other tokens than before.
SPLITS = ("train", "validation")


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
    leaves an unnamed folder that the next one removes.

    Args:
      config: a valid config.
      report: is told in a line what takes time.

    Raises:
      ConfigError: there is no such data or tokenizer.
    """
    source = get_source(config)
    root = Path(config.data.cache_dir or "~/.cache/jaxdp/tokens").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(root)!r} can't be made ({error.strerror}): choose another folder"
        ) from None
    folder = root / _fingerprint(config, source)
    if not folder.exists():
        try:
            _build_once(config, source, folder, report)
        except OSError as error:
            if error.errno not in disk.FULL:
                raise
            raise ConfigError(
                f"data.cache_dir={str(root)!r} can't be written ({error.strerror}): make room, or "
                "choose another folder"
            ) from None
    return _load(folder)


def _build_once(
    config: ConfigDict, source: Source, folder: Path, report: Callable[[str], None]
) -> None:
    """Builds the cache unless another process has; nothing is left of one that fails."""
    with filelock.FileLock(f"{folder}.lock"):
        if folder.exists():
            return
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


def _fingerprint(config: ConfigDict, source: Source) -> str:
    """Names the cache by everything its content depends on."""
    tokenizer: list = [config.tokenizer, config.objective]
    path = Path(config.tokenizer).expanduser()
    if path.is_file():
        tokenizer[0] = hashlib.sha256(path.read_bytes()).hexdigest()
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
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


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

    def tokens(split: str) -> np.ndarray:
        # numpy can't map an empty file.
        if meta[split]["tokens"] == 0:
            return np.zeros(0, meta["dtype"])
        return np.memmap(folder / f"{split}.bin", meta["dtype"], "r")

    return TokenCache(
        folder=folder,
        train=tokens("train"),
        validation=tokens("validation"),
        tokenizer=tokenizers.load_file(folder / "tokenizer.json"),
        vocab_size=meta["vocab_size"],
        validation_bytes=meta["validation"]["bytes"],
        digest=meta["digest"],
    )
