"""Finds the files that data.path names, and reads them in pieces, compressed or not."""

import bz2
import codecs
import collections
import glob
import gzip
import itertools
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxdp.common.errors import ConfigError, shown

# Kind of file -> endings of names. A file with another ending that is named by itself is text.
KINDS = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")
CHUNK = 2**22  # Bytes that are read at a time.
# How compressed files begin, whatever their names.
SIGNATURES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
BOM = "\ufeff"


def ending(path: str | Path) -> str:
    """Returns the ending of a file's name in small letters, leaving out .gz and its like.

    Examples:
      >>> ending("a/Books.TXT.gz"), ending("LICENSE")
      ('.txt', '')
    """
    name = Path(path).name.lower()
    stem, last = os.path.splitext(name)
    return os.path.splitext(stem)[1] if last in COMPRESSED else last


def kind_of(path: str | Path) -> str | None:
    """Returns the kind of a file by its name; None where its ending is none of `KINDS`."""
    return next((kind for kind, ends in KINDS.items() if ending(path) in ends), None)


def find(
    path: str, kind: str | None, report: Callable[[str], None] = print
) -> tuple[str, list[Path]]:
    """Finds the files of a data.path without its prefix: files, folders, globs, a comma list.

    Args:
      path: what follows the prefix; parts of a list are taken in their order, the files of a glob
        or a folder in the order of their names. A file that has several names there is taken once.
      kind: the prefix, if there is one: a key of `KINDS`.
      report: called with a line about files that are left out.

    Returns:
      The kind of all files, and their paths.

    Raises:
      ConfigError: a part names no file, or the files are of several kinds.
    """
    key = f"data.path={shown(f'{kind}:{path}' if kind else path)}"
    parts = [path] if _match(path) else [part.strip() for part in path.split(",")]
    by_file: dict[Path, Path] = {}
    again: list[Path] = []
    for part in parts:
        part = part.removeprefix(f"{kind}:")
        paths = _match(part)
        if os.path.isdir(os.path.expanduser(part)):
            paths = _in_folder(paths, part, kind, report)
        if not paths:
            where = f" for {shown(part)}" if len(parts) > 1 else ""
            raise ConfigError(
                f"{key} matches no file{where}: give the path of a text file, a folder, a quoted "
                "glob, or tfds:NAME"
            )
        again += [p for p in paths if by_file.setdefault(p.resolve(), p) != p]
    found = by_file.values()
    if again:
        report(
            f"data.path: {again[0]} is {by_file[again[0].resolve()]} by another name, and is read "
            f"once{f'; so are {len(again) - 1:,} more' if again[1:] else ''}."
        )
    kinds = collections.Counter(kind or kind_of(path) or "text" for path in found)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
        raise ConfigError(
            f"{key} has files of several kinds ({counts}): name one, as in "
            f"{next(iter(kinds))}:FOLDER or {next(iter(kinds))}:GLOB, or mix them by weight"
        )
    for file in found:
        if ending(file) in ARCHIVES or file.suffix.lower() in ARCHIVES:
            raise ConfigError(f"{key}: {file} is an archive: unpack it, and give its files")
    return next(iter(kinds)), list(found)


def _match(part: str) -> list[Path]:
    """Returns the files that a path, a folder or a glob stands for, in the order of their names."""
    part = os.path.expanduser(part)
    # The name of a file may look like a glob, such as "notes[1].txt".
    if os.path.isfile(part):
        return [Path(part)]
    if os.path.isdir(part):
        every = (Path(root, name) for root, _, names in os.walk(part) for name in names)
        return sorted(p for p in every if not _hidden(p.relative_to(part)))
    return sorted(path for path in map(Path, glob.glob(part, recursive=True)) if path.is_file())


def _hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _in_folder(
    paths: list[Path], folder: str, kind: str | None, report: Callable[[str], None]
) -> list[Path]:
    """Keeps the files of a folder whose endings say their kind; says which endings it leaves."""
    kept = [path for path in paths if kind_of(path) and kind in (None, kind_of(path))]
    left = sorted({ending(path) or path.name for path in paths} - set(map(ending, kept)))
    if kept and left:
        report(
            f"data.path: of the folder {folder}, files that end in {', '.join(left[:8])} are left "
            "out; a glob such as 'text:FOLDER/**/*.py' reads others."
        )
    return kept


def identity(paths: list[Path]) -> list[list]:
    """Returns paths, sizes and modification times, because hashing content takes minutes."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def opened(path: Path) -> Any:
    """Opens a file to read its bytes, decompressed as its name says; OSError where it can't."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow  # Takes a moment, and only this needs it.

            return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def chunks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, decompressed, a few MB at a time.

    Raises:
      ConfigError: the file can't be read or decompressed.
    """
    try:
        with opened(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None)
        raise ConfigError(
            f"data.path: {path} can't be read ({reason}): check its permissions, or leave it out"
            if reason
            else f"data.path: {path} can't be decompressed ({shown(error, as_text=str)}): its "
            "ending names another compression than it has, or it is damaged: fetch it again"
        ) from None


def text(path: Path) -> Iterator[str]:
    """Yields the text of a UTF-8 file in pieces of a few MB, without a byte-order mark.

    Raises:
      ConfigError: the file can't be read, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, first = 0, b""
    for chunk in itertools.chain(chunks(path), [b""]):
        first, pending = first or chunk, len(decoder.getstate()[0])
        try:
            piece = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _no_utf8(path, done - pending + error.start, first) from None
        piece = piece.removeprefix(BOM) if not done else piece
        done += len(chunk)
        if piece:
            yield piece


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file that aren't blank, with their numbers from 1.

    Only a line feed ends a line: JSON strings may contain other separators, as U+2028.
    """
    rest, number = b"", 0
    for chunk in itertools.chain(chunks(path), [b"\n"]):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if number == 1:
                line = line.removeprefix(BOM.encode())
            if line and not line.isspace():
                yield number, line


def decode_line(path: Path, number: int, line: bytes) -> str:
    """Decodes a line of a file; raises ConfigError where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error.start, line, f"line {number}, ") from None


def _no_utf8(path: Path, position: int, first: bytes, where: str = "") -> ConfigError:
    compressed = next((end for sign, end in SIGNATURES.items() if first.startswith(sign)), None)
    advice = "convert it, for example with iconv"
    if compressed:
        advice = f"it is compressed, so let its name end in {compressed}"
    return ConfigError(f"data.path: {path} is not UTF-8 text ({where}byte {position}): {advice}")
