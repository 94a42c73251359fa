"""Opens the sources of documents that data.path names; sources of local files, split in two."""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import files, mixture, records
from jaxdp.data.example import Example
from jaxdp.data.fields import Fields
from jaxdp.data.hf_source import HfSource
from jaxdp.data.tfds_source import TfdsSource

Report = Callable[[str], None]  # Called with a line before anything that takes time.


class Source(Protocol):
    """A corpus: `train` and `validation` texts, always in the same order."""

    def identity(self) -> dict:
        """Returns what the texts depend on, as JSON: equal identities mean equal texts."""

    def examples(self, split: str) -> Iterator[Example | None]:
        """Yields the examples of "train" or "validation", and None for each that is skipped."""


class ValidationOnly:
    """A source reduced to its validation split; its training split is empty."""

    def __init__(self, source: Source):
        """Wraps a source."""
        self.source = source

    def identity(self) -> dict:
        """Returns the source's identity, marked as without training split."""
        return self.source.identity() | {"train": None}

    def examples(self, split: str) -> Iterator[Example | None]:
        """Yields the source's examples of "validation", and none of "train"."""
        return iter(()) if split == "train" else self.source.examples(split)


def get_sources(config: ConfigDict, report: Report = print) -> list[Source]:
    """Opens all sources that data.path names; raises ConfigError where one can't be found."""
    sources = []
    for path in mixture.parse(config.data.path):
        one = ConfigDict(config.to_dict())
        one.data.path = path
        sources.append(get_source(one, report))
    if config.data.separator and not any(isinstance(s, TextSource) for s in sources):
        raise ConfigError(
            f"data.separator={shown(config.data.separator)} has no meaning without text files: "
            "leave it empty"
        )
    return sources


def get_source(config: ConfigDict, report: Report = print) -> Source:
    """Opens the one source that a data.path without weights names.

    Raises:
      ConfigError: the source can't be found.
    """
    prefix, colon, rest = config.data.path.partition(":")
    if colon and prefix == "tfds":
        if config.data.messages_key:
            raise _no_chats(config)
        return TfdsSource(rest, config, report)
    if colon and prefix == "hf":
        return HfSource(rest, config, report)
    given, kind, paths = _find(config.data.path, report)
    if kind != "text":
        return RecordSource(kind, paths, config)
    if config.data.messages_key:
        raise _no_chats(config)
    if config.data.prompt_key:
        raise ConfigError(
            f"data.prompt_key={shown(config.data.prompt_key)} does not work with text files: use "
            "jsonl:GLOB or tfds:NAME, or leave it empty"
        )
    if not given and records.is_json_lines(next(files.text(paths[0]), "")):
        raise ConfigError(
            f"data.path={shown(config.data.path)}: {paths[0]} looks like JSON lines: write jsonl: "
            "before the path to train on the texts in them, or text: to train on it as it is"
        )
    return TextSource(paths, config)


def has_splits(path: str) -> bool:
    """Returns whether a source that data.path names has splits of its own; files have none.

    Examples:
      >>> has_splits("0.7*tfds:lm1b+0.3*text:books/*.txt"), has_splits("books/*.txt")
      (True, False)
    """
    return any(source.startswith(("tfds:", "hf:")) for source in mixture.parse(path))


def kinds(path: str) -> set[str]:
    """Returns the kinds of the sources that a data.path names: "text", "jsonl", "tfds", "hf" ...

    Raises:
      ConfigError: a file can't be found.
    """
    found = set()
    for source in mixture.parse(path):
        prefix = source.partition(":")[0]
        found.add(prefix if has_splits(source) else _find(source, lambda _: None)[1])
    return found


def contents(path: str) -> dict[str, tuple[str, list[str]]]:
    """Returns what the sources are that a data.path names, by whatever names.

    Returns:
      {source: (its kind, the real paths of its files)}; a dataset of TFDS or the hub has its name
      in place of files, and files that aren't there are left out.
    """
    return {source: _content(source) for source in mixture.parse(path)}


def _content(source: str) -> tuple[str, list[str]]:
    if has_splits(source):
        kind, _, name = source.partition(":")
        return kind, [f"{kind}:{os.path.realpath(name) if os.path.isdir(name) else name}"]
    with contextlib.suppress(ConfigError):
        _, kind, paths = _find(source, lambda _: None)
        return kind, [str(path.resolve()) for path in paths]
    return "", []


def _find(path: str, report: Report) -> tuple[str | None, str, list[Path]]:
    """Returns the kind that a data.path names in front, if it does, the files' kind, and them."""
    prefix, colon, rest = path.partition(":")
    given = prefix if colon and prefix in files.KINDS else None
    return given, *files.find(rest if given else path, given, report)


def _no_chats(config: ConfigDict) -> ConfigError:
    return ConfigError(
        f"data.messages_key={shown(config.data.messages_key)} does not work with data.path="
        f"{shown(config.data.path)}: use jsonl:GLOB, json:GLOB, parquet:GLOB or hf:NAME"
    )


class TextSource:
    """Text files (UTF-8), a document each, or several that are separated by data.separator.

    The last part of the text is the validation split; a document on the border is divided.
    """

    def __init__(self, paths: list[Path], config: ConfigDict):
        """Takes the files of a corpus, in their order; reads nothing yet."""
        self.paths = paths
        self.eval_fraction, self.separator = config.data.eval_fraction, config.data.separator

    def identity(self) -> dict:
        """Returns the identity of the files, where they are split, and what separates documents."""
        found = {"files": files.identity(self.paths), "eval_fraction": self.eval_fraction}
        return found | ({"separator": self.separator} if self.separator else {})

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """The number of characters in each file."""
        return [sum(map(len, files.text(path))) for path in self.paths]

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the documents, long ones in pieces."""
        for path, length, cut in zip(self.paths, self._lengths, self._cuts(), strict=True):
            if cut if split == "train" else cut < length:
                for text, ends in separated(_part(path, cut, split), self.separator):
                    yield Example("", text, ends)

    def _cuts(self) -> list[int]:
        """Returns how many characters of each file are training text."""
        return _cuts(self._lengths, self.eval_fraction)


def _cuts(sizes: list[int], eval_fraction: float) -> list[int]:
    """Returns how much of each file belongs to the first part of all.

    Examples:
      >>> _cuts([10, 10, 20], 0.4)
      [10, 10, 4]
    """
    border = int(sum(sizes) * (1 - eval_fraction))
    starts = itertools.accumulate(sizes, initial=0)
    return [min(max(border - start, 0), size) for start, size in zip(starts, sizes, strict=False)]


def _part(path: Path, cut: int, split: str) -> Iterator[str]:
    """Yields the text of a file up to a number of characters (split "train"), or after it."""
    at = 0
    for piece in files.text(path):
        here = max(cut - at, 0)
        at += len(piece)
        if part := piece[:here] if split == "train" else piece[here:]:
            yield part
        if split == "train" and at >= cut:
            return


def separated(pieces: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Cuts text at a separator, and drops it with the line breaks directly before and after it.

    Args:
      pieces: the text in pieces of any length.
      separator: what stands between documents; "": the whole text is one.

    Yields:
      (text, whether its document ends here).
    """
    pattern = re.compile(rf"(?:\r?\n)?{re.escape(separator)}(?:\r?\n)?")
    held = len(separator) + 6  # Characters that may belong to a separator or a line break by it.
    text = ""
    for piece in itertools.chain(pieces, [None]):
        text += piece or ""
        at, end = 0, len(text)
        for match in pattern.finditer(text) if separator else ():
            if piece is not None and match.end() > end - 2:
                break
            yield text[at : match.start()], True
            at = match.end()
        # Without a separator, this piece waits for the next: it may be the last.
        waiting = held if separator else len(piece or "")
        kept = end if piece is None else max(at, end - waiting)
        yield text[at:kept], piece is None
        text = text[kept:]


class RecordSource:
    """Records of JSON, CSV or Parquet files; the last of them are the validation split."""

    def __init__(self, kind: str, paths: list[Path], config: ConfigDict):
        """Takes the files of a corpus, in their order; reads nothing yet."""
        self.reader, self.kind, self.paths = records.READERS[kind], kind, paths
        self.eval_fraction = config.data.eval_fraction
        self.fields = Fields(config)

    def identity(self) -> dict:
        """Returns the identity of the files, where they are split, and the keys that are read."""
        found = {"files": files.identity(self.paths), "eval_fraction": self.eval_fraction}
        return found | {"kind": self.kind} | self.fields.identity()

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """The number of records in each file."""
        return [self.reader.count(path) for path in self.paths]

    def examples(self, split: str) -> Iterator[Example | None]:
        """Yields the prompt, if any, and the text of each record."""
        cuts = _cuts(self._lengths, self.eval_fraction)
        for path, length, cut in zip(self.paths, self._lengths, cuts, strict=True):
            first, last = (0, cut) if split == "train" else (cut, length)
            if first < last:
                found = self.reader.read(path, first, self.fields.keys)
                for record in itertools.islice(found, last - first):
                    yield self.fields.example(*record)
