"""Builds a token cache and records its progress, so that a killed process loses little."""

import contextlib
import copy
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxdp.common.files import write_whole
from jaxdp.data import layout
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.layout import INDEX, SPLITS, DamagedError
from jaxdp.data.sources import Example, Source

PROGRESS = "progress.json"
RECORD_EVERY = 10  # Seconds of work that a kill can cost.


def begin(building: Path) -> None:
    """Prepares the folder: keeps what a killed process has recorded there, or empties it."""
    try:
        progress = json.loads((building / PROGRESS).read_text())
        if progress["checksum"] != layout.checksum(progress):
            raise DamagedError(f"{PROGRESS} has changed")
        for name, (kind, count) in layout.files(np.dtype(progress["dtype"]), progress).items():
            with open(building / name, "r+b" if count else "w+b") as file:
                if file.seek(0, os.SEEK_END) < count * kind.itemsize:
                    raise DamagedError(f"{name} is too short")
                file.truncate(count * kind.itemsize)
        tokenizers.load_file(building / "tokenizer.json")
        if layout.file_digest(building / "tokenizer.json") != progress["tokenizer"]:
            raise DamagedError("tokenizer.json has changed")
    except Exception:  # A damaged folder can raise anything.
        if building.is_dir() and not building.is_symlink():
            shutil.rmtree(building)
        else:
            building.unlink(missing_ok=True)
        building.mkdir()


def build(
    config: ConfigDict, sources: list[Source], folder: Path, report: Callable[[str], None]
) -> None:
    """Builds a cache in a folder, or completes the one begun there.

    Args:
      config: a valid config.
      sources: the corpora that data.path names.
      folder: prepared by `begin`.
      report: called with a line about progress.
    """
    if (folder / PROGRESS).exists():
        meta = json.loads((folder / PROGRESS).read_text())
        tokenizer = tokenizers.load_file(folder / "tokenizer.json")
        done = sum(meta[split]["tokens"] for split in SPLITS)
        report(f"Continuing to tokenise {config.data.path} after {done:,} tokens ...")
    else:
        tokenizer, meta = _start(config, sources, folder, report)
        _record(folder / PROGRESS, meta)
        report(f"Tokenising {config.data.path} ...")
    for split in SPLITS:
        _write(tokenizer, sources, split, folder, meta, report)
    meta["digest"] = layout.digest(folder, np.dtype(meta["dtype"]), meta)
    _record(folder / "meta.json", meta)
    (folder / PROGRESS).unlink()


def _start(
    config: ConfigDict, sources: list[Source], folder: Path, report: Callable[[str], None]
) -> tuple[Tokenizer, dict]:
    """Makes the tokenizer, and the metadata of a cache without tokens."""

    def documents(with_validation: bool) -> Iterator[str]:
        said, size = time.monotonic(), 0
        splits = SPLITS if with_validation else SPLITS[:1]
        texts = (source.documents(split) for split in splits for source in sources)
        for document in itertools.chain.from_iterable(texts):
            yield document
            size += len(document)
            if time.monotonic() - said > RECORD_EVERY:
                said = time.monotonic()
                report(f"making the tokenizer: {size:,} characters read")

    report(tokenizers.making(config.tokenizer))
    tokenizer = tokenizers.get_tokenizer(config.tokenizer, config.objective, documents)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    vocab_size = tokenizers.vocab_size(tokenizer)
    padded = config.data.packing == "padded"
    # borders: the token at which each finished source ends. pieces: how many documents, or pieces
    # of long ones, of the current source are written.
    none: dict = {"tokens": 0, "bytes": 0, "documents": 0, "borders": [], "pieces": 0}
    none |= {"examples": 0} if padded else {}
    return tokenizer, {
        "vocab_size": vocab_size,
        "dtype": "<u2" if vocab_size <= 2**16 else "<u4",
        "data": config.data.path,
        "tokenizer": layout.file_digest(folder / "tokenizer.json"),
    } | {split: copy.deepcopy(none) for split in SPLITS}


def _record(path: Path, meta: dict, files: Sequence[BinaryIO] = ()) -> None:
    """Writes the metadata after the files that it describes are safely on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    meta["checksum"] = layout.checksum(meta)
    write_whole(path, json.dumps(meta, indent=2) + "\n")


def _write(
    tokenizer: Tokenizer,
    sources: list[Source],
    split: str,
    folder: Path,
    meta: dict,
    report: Callable[[str], None],
) -> None:
    """Writes the missing tokens of a split; reports progress and records it for a restart."""
    part, dtype, padded = meta[split], np.dtype(meta["dtype"]), "examples" in meta[split]
    before, began = part["tokens"], time.monotonic()
    recorded = began
    with contextlib.ExitStack() as stack:
        names = layout.files(dtype, {split: part})
        files = [stack.enter_context(open(folder / name, "ab")) for name in names]
        for source in sources[len(part["borders"]) :]:
            counter = _Counter(source.examples(split))
            for prompt, ids in encode(tokenizer, counter, part["pieces"], padded):
                files[0].write(ids.astype(dtype).tobytes())
                if padded:
                    index = part["tokens"], part["tokens"] + prompt
                    files[1].write(np.array(index, INDEX).tobytes())
                    part["examples"] += 1
                part["tokens"] += len(ids)
                part["pieces"] += 1
                if (now := time.monotonic()) - recorded >= RECORD_EVERY:
                    recorded = now
                    _record(folder / PROGRESS, meta, files)
                    speed = (part["tokens"] - before) / (now - began)
                    report(f"{split}: {part['tokens']:,} tokens, {speed:,.0f} tokens/s")
            part["bytes"] += counter.bytes
            part["documents"] += counter.documents
            part["borders"].append(part["tokens"])
            part["pieces"] = 0
            _record(folder / PROGRESS, meta, files)


def encode(
    tokenizer: Tokenizer, examples: Iterable[Example], done: int, padded: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of prompt tokens, all tokens) of each example, or piece of a document."""
    if padded:
        for prompt, text in tokenizers.encode_examples(tokenizer, examples, done):
            yield len(prompt), np.concatenate([prompt, text])
    else:
        texts = (text for _, text in examples)
        for ids in tokenizers.encode_documents(tokenizer, texts, done):
            yield 0, ids


class _Counter:
    """Iterates over examples; counts them and the UTF-8 bytes of their texts on the way."""

    def __init__(self, examples: Iterator[Example]):
        self._examples = examples
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[Example]:
        for prompt, text in self._examples:
            self.documents += 1
            self.bytes += len(text.encode())
            yield prompt, text
