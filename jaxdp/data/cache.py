"""The token cache: a corpus as token ids on disk, tokenised once, then memory-mapped.

A cache is a folder named by a fingerprint of everything that it depends on. It holds `train.bin`
and `validation.bin` (little-endian uint16 or uint32), `tokenizer.json` and `meta.json`; for padded
examples also `train.examples.bin` and `validation.examples.bin` (int64), the tokens where each
begins. One atomic rename makes it visible when it is complete. Every opening checks it for damage:
the sizes of its files, and up to VERIFY_UP_TO bytes their content. A damaged cache is built again.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common import files, locks, paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import building, chat, layout, quality
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.layout import SPLITS, DamagedError
from jaxdp.data.sources import Source, ValidationOnly, get_sources
from jaxdp.data.tfds_source import TfdsSource

FORMAT = 3  # Raise it when the same config would give other tokens than before.
CHATS = 2  # The same for chats only.
# The largest cache whose content is checked: reading it takes a second or two.
VERIFY_UP_TO = 2**30
# Errors of a file that is missing, or of something else in its place.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A tokenised corpus.

    Attributes:
      folder: the folder of the cache.
      train: training tokens, [tokens] uint16 or uint32, memory-mapped; all documents in a row.
      validation: validation tokens, in the same form.
      tokenizer: the tokenizer that made the tokens.
      vocab_size: one more than the highest token id.
      validation_bytes: size of the validation text in UTF-8, without prompts, for bits per byte.
      digest: SHA-256 over both splits; equal digests mean equal data.
      train_borders: the training tokens at which the sources end.
      lossy: whether the tokens lack much of the text, so that bits per byte mean nothing.
      warnings: what a run has to say about the text and its tokens.
      examples: only for data.packing="padded": for each split [examples, 2] int64, the token where
        an example begins, and the token where its prompt ends.
      marks: only for chats: for each split [tokens] uint8, which tokens are learnt, and which begin
        a chat; see `chat.encode_chats`.
    """

    folder: Path
    train: np.ndarray = dataclasses.field(repr=False)
    validation: np.ndarray = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    vocab_size: int
    validation_bytes: int
    digest: str
    train_borders: tuple[int, ...]
    lossy: bool = False
    warnings: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    examples: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    marks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def chat_template(self) -> str:
        """The template of the chats that the corpus consists of; "" where it is none."""
        return tokenizers.chat_template(str(self.folder / "tokenizer.json"))

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per UTF-8 byte of the validation split, without prompts; None if lossy."""
        if self.lossy or self.marks:  # Of a chat, only a part is predicted.
            return None
        tokens = len(self.validation)
        if self.examples:
            start, text = self.examples["validation"].T
            tokens -= int((text - start).sum())
        return tokens / self.validation_bytes


def open_cache(
    config: ConfigDict, report: Callable[[str], None] = print, train: bool = True
) -> TokenCache:
    """Opens the token cache of a config; builds it first if it is missing.

    One process builds while others wait. If it dies, the next one continues from what is on disk.
    A damaged cache is reported and replaced.

    Args:
      config: a valid config.
      report: called with a line before anything that takes time.
      train: whether to include the training split; without it, only validation is tokenised.

    Raises:
      ConfigError: the data or the tokenizer can't be found, or the folder can't be written.
    """
    sources = get_sources(config, report)
    _prepare(config, sources, report)
    if not train:
        sources = [ValidationOnly(source) for source in sources]
    folder = _root(config) / _fingerprint(config, sources)
    try:
        if (cache := _find(folder)) is not None:
            return cache
    except DamagedError:
        pass

    with _held(folder, "tokenising", config, report):
        return _build_once(config, sources, folder, report)


@contextlib.contextmanager
def _held(
    folder: Path, doing: str, config: ConfigDict, report: Callable[[str], None]
) -> Iterator[None]:
    """Holds the lock of a folder in data.cache_dir; ConfigError where that can't be written."""

    def busy(lock: str) -> None:
        dead = f"; if it has died on another machine, remove {lock}" if lock else ""
        report(f"Another process is {doing} {config.data.path}; waiting for it{dead} ...")

    try:
        with locks.held(_lock(folder), busy, report):
            yield
    except OSError as error:
        full = error.errno in files.DISK_FULL_ERRORS
        if not full and folder.name not in str(error.filename):
            raise
        where = "" if full else f": {error.filename}"
        way_out = (
            files.way_out(files.reason(error)) if full else "ask its owner for permission to write"
        )
        raise ConfigError(
            f"data.cache_dir={str(folder.parent)!r} can't be written ({error.strerror}{where}): "
            f"{way_out}, or choose another folder"
        ) from None


def _prepare(config: ConfigDict, sources: list[Source], report: Callable[[str], None]) -> None:
    """Has TFDS prepare what isn't yet, as a fingerprint has its files; other processes wait."""
    for source in sources:
        if not isinstance(source, TfdsSource) or source.prepared:
            continue
        name = hashlib.sha256(str(source.builder.data_path).encode()).hexdigest()[:16]
        with _held(_root(config) / f"tfds-{name}", "preparing", config, report):
            source.prepare()


def _root(config: ConfigDict) -> Path:
    """Returns the folder of all token caches, and makes it."""
    given = config.data.cache_dir
    root = paths.local("data.cache_dir", given) if given else paths.cache_folder() / "tokens"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={shown(str(root))} can't be made ({error.strerror}): choose another "
            "folder"
        ) from None
    return root


def _build_once(
    config: ConfigDict, sources: list[Source], folder: Path, report: Callable[[str], None]
) -> TokenCache:
    """Builds the cache unless another process has built it; on failure nothing is left behind."""
    try:
        if (cache := _find(folder)) is not None:
            return cache
    except DamagedError as error:
        report(f"The token cache {folder} is damaged ({error}); it is built again.")
        _put_away(folder)
    for abandoned in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # It may belong to another user.
    temporary = Path(f"{folder}.building")
    building.begin(temporary)
    try:
        building.build(config, sources, temporary, report)
        temporary.rename(folder)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _load(folder)


def _find(folder: Path) -> TokenCache | None:
    """Loads a cache; None where there is none; raises DamagedError for a damaged one.

    One that can't be read, like that of a user who gives nobody permission, is not damaged.
    """
    if not os.path.lexists(folder):
        return None
    try:
        return _load(folder)
    except DamagedError:
        raise
    except OSError as error:
        if error.errno not in NO_FILE:
            raise ConfigError(
                f"data.cache_dir: {error.filename or folder} can't be read ({error.strerror}): ask "
                "its owner for permission, or choose another folder"
            ) from None
        raise DamagedError(files.first_line(error)) from None
    except Exception as error:  # A damaged cache can raise anything.
        raise DamagedError(f"{type(error).__name__}: {shown(error, as_text=str)}") from None


def _lock(folder: Path) -> Path:
    path = Path(f"{folder}.lock")
    if os.path.isdir(path):
        raise ConfigError(f"data.cache_dir: {path} is no file: remove it")
    return path


def _put_away(folder: Path) -> None:
    """Renames a damaged cache, to be removed later: other processes may still be reading it."""
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


def _fingerprint(config: ConfigDict, sources: list[Source]) -> str:
    """Returns the name of a cache: a hash of everything its content depends on."""
    c = config.data
    tokenizer: list = [config.tokenizer, config.objective, c.bos, c.eos, c.special_tokens]
    paths = [p for p in tokenizers.files_of(config.tokenizer) or () if os.path.isfile(p)]
    if paths:
        tokenizer[0] = [layout.file_digest(path) for path in paths]
    padded = ["padded"] if config.data.packing == "padded" else []
    data: Any = [source.identity() for source in sources]
    data = data if len(data) > 1 else data[0]
    chats = [CHATS, chat.source_of(config)] if c.messages_key else []
    identity = json.dumps([FORMAT, tokenizer, data, *padded, *chats], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _load(folder: Path) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text())
    if meta["checksum"] != layout.checksum(meta):
        raise DamagedError("meta.json has changed")
    dtype = np.dtype(meta["dtype"])
    files = layout.files(dtype, meta)
    for name, (kind, count) in files.items():
        path, size = folder / name, count * kind.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise DamagedError(f"{name} does not have {size} bytes")
    tokenizer = tokenizers.load_file(folder / "tokenizer.json")
    if layout.file_digest(folder / "tokenizer.json") != meta["tokenizer"]:
        raise DamagedError("tokenizer.json has changed")
    if tokenizers.vocab_size(tokenizer) != meta["vocab_size"]:
        raise DamagedError(f"tokenizer.json does not have {meta['vocab_size']} tokens")
    small = sum(count * kind.itemsize for kind, count in files.values()) <= VERIFY_UP_TO
    if small and layout.digest(folder, dtype, meta) != meta["digest"]:
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
        lossy=quality.is_lossy(meta),
        warnings=tuple(quality.warnings(meta, tokenizer)),
        train_borders=tuple(meta["train"].get("borders", [meta["train"]["tokens"]])),
        examples={
            split: array(f"{split}.examples.bin").reshape(-1, 2)
            for split in SPLITS
            if "examples" in meta[split]
        },
        marks={split: array(f"{split}.marks.bin") for split in SPLITS if meta[split].get("marked")},
    )
