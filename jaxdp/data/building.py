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

from jaxdp.common.files import write_atomically
from jaxdp.data import chat, encoding, layout, quality, special_tokens
from jaxdp.data import tokenizer as tokenizers
from jaxdp.data.example import Example, texts
from jaxdp.data.layout import INDEX, SPLITS, DamagedError
from jaxdp.data.sources import Source

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
        _write(config, tokenizer, sources, split, folder, meta, report)
    meta["digest"] = layout.digest(folder, np.dtype(meta["dtype"]), meta)
    _record(folder / "meta.json", meta)
    (folder / PROGRESS).unlink()


def _start(
    config: ConfigDict, sources: list[Source], folder: Path, report: Callable[[str], None]
) -> tuple[Tokenizer, dict]:
    """Makes the tokenizer, and the metadata of a cache without tokens."""
    begun, size = time.monotonic(), 0
    said = begun

    def tell() -> None:
        nonlocal said
        if (now := time.monotonic()) - said > RECORD_EVERY:
            said = now
            report(f"making the tokenizer: {size:,} characters read, {now - begun:.0f} seconds")

    def documents(with_validation: bool) -> Iterator[str]:
        nonlocal size
        splits = SPLITS if with_validation else SPLITS[:1]
        examples = (source.examples(split) for split in splits for source in sources)
        for text in texts(itertools.chain.from_iterable(examples)):
            yield text
            size += len(text)
            tell()

    report(tokenizers.progress_line(config.tokenizer))
    tokenizer = tokenizers.get_tokenizer(
        config.tokenizer,
        config.objective,
        documents,
        bos=config.data.bos,
        eos=config.data.eos,
        while_waiting=tell,
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    vocab_size = tokenizers.vocab_size(tokenizer)
    padded = config.data.packing == "padded"
    # borders: the token at which each finished source ends. pieces: how many documents, or pieces
    # of long ones, of the current source are written. unknown: tokens for unknown text.
    none: dict = {"tokens": 0, "borders": [], "pieces": 0, "unknown": 0}
    none |= dict.fromkeys(Counter.KEYS, 0)
    none |= {"examples": 0} if padded else {}
    if config.data.messages_key:
        template = chat.Template(chat.source_of(config), tokenizer)
        (folder / tokenizers.TEMPLATE).write_text(template.source, encoding="utf-8")
        none["marked"] = True
    lost, notes = quality.look_at(config, sources, tokenizer)
    return tokenizer, {
        "vocab_size": vocab_size,
        "dtype": "<u2" if vocab_size <= 2**16 else "<u4",
        "data": config.data.path,
        "tokenizer": layout.file_digest(folder / "tokenizer.json"),
        "lost": lost,
        "notes": notes,
    } | {split: copy.deepcopy(none) for split in SPLITS}


def _record(path: Path, meta: dict, files: Sequence[BinaryIO] = ()) -> None:
    """Writes the metadata after the files that it describes are safely on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    meta["checksum"] = layout.checksum(meta)
    write_atomically(path, json.dumps(meta, indent=2) + "\n")


def _write(
    config: ConfigDict,
    tokenizer: Tokenizer,
    sources: list[Source],
    split: str,
    folder: Path,
    meta: dict,
    report: Callable[[str], None],
) -> None:
    """Writes the missing tokens of a split; reports progress and records it for a restart."""
    part, dtype, padded = meta[split], np.dtype(meta["dtype"]), "examples" in meta[split]
    before, began, unknown = part["tokens"], time.monotonic(), special_tokens.unknown_id(tokenizer)
    recorded = began
    with contextlib.ExitStack() as stack:
        names = layout.files(dtype, {split: part})
        files = [stack.enter_context(open(folder / name, "ab")) for name in names]
        for source in sources[len(part["borders"]) :]:
            counter = Counter(source.examples(split))
            for prompt, ids, marks in encode(config, tokenizer, counter, part["pieces"]):
                files[0].write(ids.astype(dtype).tobytes())
                if marks is not None:
                    files[-1].write(marks.tobytes())
                if padded:
                    index = part["tokens"], part["tokens"] + prompt
                    files[1].write(np.array(index, INDEX).tobytes())
                    part["examples"] += 1
                part["tokens"] += len(ids)
                part["unknown"] += 0 if unknown is None else int((ids == unknown).sum())
                part["pieces"] += 1
                if (now := time.monotonic()) - recorded >= RECORD_EVERY:
                    recorded = now
                    _record(folder / PROGRESS, meta, files)
                    speed = (part["tokens"] - before) / (now - began)
                    report(f"{split}: {part['tokens']:,} tokens, {speed:,.0f} tokens/s")
            for key in Counter.KEYS:
                part[key] += getattr(counter, key)
            part["borders"].append(part["tokens"])
            part["pieces"] = 0
            _record(folder / PROGRESS, meta, files)


def encode(
    config: ConfigDict, tokenizer: Tokenizer, examples: Iterable[Example], done: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yields (number of prompt tokens, all tokens, marks) of each example, or piece of a document.

    Only the tokens of chats have marks; see `chat.encode_chats`.
    """
    special = config.data.special_tokens
    if config.data.messages_key:
        template = chat.Template(chat.source_of(config), tokenizer)
        for ids, marks in chat.encode_chats(template, examples, done):
            learnt = np.flatnonzero(marks & layout.LEARNT)
            yield int(learnt[0]) if len(learnt) else len(ids), ids, marks
    elif config.data.packing == "padded":
        for prompt, text in encoding.encode_examples(tokenizer, examples, done, special=special):
            yield len(prompt), np.concatenate([prompt, text]), None
    else:
        for ids in encoding.encode_documents(tokenizer, examples, done, special=special):
            yield 0, ids, None


class Counter:
    """Iterates over the examples of a split, and counts what is in their texts on the way.

    Attributes:
      documents: documents with a text.
      bytes: the size of the texts in UTF-8.
      characters: the length of the texts.
      replaced: characters that stand for undecodable bytes, U+FFFD.
      skipped: records without a text (data.skip_missing).
    """

    KEYS = ("documents", "bytes", "characters", "replaced", "skipped")

    def __init__(self, examples: Iterable[Example | None]):
        """Counts nothing yet."""
        self._examples = examples
        self.documents = self.bytes = self.characters = self.replaced = self.skipped = 0

    def __iter__(self) -> Iterator[Example]:
        """Yields the examples that aren't skipped."""
        has_text = False
        for example in self._examples:
            if example is None:
                self.skipped += 1
                continue
            has_text = has_text or bool(example.text)
            self.documents += has_text and example.ends
            has_text = has_text and not example.ends
            self.bytes += len(example.text.encode())
            self.characters += len(example.text)
            self.replaced += example.text.count("\ufffd")
            yield example
