"""Reads records, which are dictionaries, from files: JSON lines, JSON, CSV and Parquet.

Each kind has a function to count the records of a file and one to read those after the first few.
"""

import contextlib
import csv
import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.files import no_temporary_files, temporary_file
from jaxdp.data import files

BLANK = re.compile(r"[\s,]*")
ROWS = 256  # Of a Parquet file, that are in memory at a time.


class Record(NamedTuple):
    """A record, or whatever is in its place, and where it is: the file with a line or a number."""

    place: str
    value: Any


class Reader(NamedTuple):
    """How to count and read the records of a kind of files.

    Attributes:
      count: called with a path; returns its number of records.
      read: called with a path, the records to skip and the keys that are wanted.
    """

    count: Callable[[Path], int]
    read: Callable[[Path, int, list[str]], Iterator[Record]]


def _count_lines(path: Path) -> int:
    return sum(1 for _ in files.lines(path))


def _read_lines(path: Path, skip: int, keys: list[str]) -> Iterator[Record]:
    del keys
    for number, line in itertools.islice(files.lines(path), skip, None):
        place = f"{path}, line {number}"
        yield Record(place, _parsed(place, files.decode_line(path, number, line)))


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an int of 5000 digits.
        raise no_json(place, error) from None


def no_json(place: str, error: Exception) -> ConfigError:
    """Returns the error for something that is no JSON object."""
    return ConfigError(
        f"data.path: {place} is no JSON object ({shown(error, as_text=str)}): correct it, or "
        "write text: before the path if it is plain text"
    )


def is_json_lines(text: str) -> bool:
    """Returns whether the first lines of a text, up to ten, are JSON objects.

    Examples:
      >>> is_json_lines('{"a": 1}'), is_json_lines("a: 1")
      (True, False)
    """
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        found = [json.loads(line) for line in (lines[:-1] or lines)[:10]]
    except (ValueError, RecursionError):
        return False
    return bool(found) and all(isinstance(value, dict) for value in found)


def _is_array(path: Path) -> bool:
    for piece in files.text(path):
        if piece.strip():
            return piece.lstrip().startswith("[")
    return False


def _count_json(path: Path) -> int:
    return sum(1 for _ in _items(path)) if _is_array(path) else _count_lines(path)


def _read_json(path: Path, skip: int, keys: list[str]) -> Iterator[Record]:
    """Reads a JSON array of objects; anything else as JSON lines, which .json files often hold."""
    if not _is_array(path):
        yield from _read_lines(path, skip, keys)
        return
    for number, value in enumerate(itertools.islice(_items(path), skip, None), skip + 1):
        yield Record(f"{path}, element {number}", value)


def _items(path: Path) -> Iterator[Any]:
    """Yields the elements of a JSON array; holds a few MB of the file in memory at a time."""
    pieces, decoder, number = files.text(path), json.JSONDecoder(), 0
    text, at = "", -1  # -1: the opening bracket is not found yet.
    for piece in pieces:
        text, at = text[max(at, 0) :] + piece, min(at, 0)
        if at < 0:
            if not text.strip():
                continue
            at = text.index("[") + 1
        while (at := BLANK.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            if text[at] == "]":
                return
            try:
                value, at = decoder.raw_decode(text, at)
            except ValueError:
                break  # It may go on in the next piece.
            except RecursionError as error:
                raise no_json(f"{path}, element {number + 1}", error) from None
            number += 1
            yield value
    raise no_json(f"{path}, element {number + 1}", ValueError("the file ends within the array"))


def _rows(path: Path) -> Iterator[list[str]]:
    """Yields the rows of a CSV file, its header first."""
    csv.field_size_limit(2**31 - 1)
    pieces, rest = files.text(path), ""

    def lines() -> Iterator[str]:
        nonlocal rest
        for piece in pieces:
            *whole, rest = (rest + piece).split("\n")
            yield from (f"{line}\n" for line in whole)
        yield rest

    rows = csv.reader(lines(), delimiter="\t" if files.ending(path) == ".tsv" else ",", strict=True)
    try:
        yield from (row for row in rows if row)
    except csv.Error as error:
        raise ConfigError(
            f"data.path: {path}, line {rows.line_num} is no CSV ({shown(error, as_text=str)}): "
            "correct it"
        ) from None


def _count_csv(path: Path) -> int:
    return max(sum(1 for _ in _rows(path)) - 1, 0)


def _read_csv(path: Path, skip: int, keys: list[str]) -> Iterator[Record]:
    del keys
    rows = _rows(path)
    header = next(rows, [])
    for number, row in enumerate(itertools.islice(rows, skip, None), skip + 1):
        place = f"{path}, row {number}"
        if len(row) > len(header):
            raise ConfigError(
                f"data.path: {place} has {len(row)} fields and the header {len(header)}: put "
                "fields with commas into quotation marks"
            )
        yield Record(place, dict(zip(header, row, strict=False)))


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Opens a Parquet file, also a compressed one: it is read from its end, so as a whole."""
    import pyarrow.parquet  # Takes a moment, and only Parquet files need it.

    with contextlib.ExitStack() as stack:
        try:
            file: Any = str(path)
            if path.suffix.lower() in files.COMPRESSED:
                file = stack.enter_context(temporary_file())
                with files.opened(path) as source:
                    shutil.copyfileobj(source, file)
                    file.flush()
            opened = stack.enter_context(pyarrow.parquet.ParquetFile(file))
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                with contextlib.suppress(OSError):  # It tries to write again.
                    file.close()
                raise no_temporary_files(error) from None
            raise ConfigError(
                f"data.path: {path} can't be read as Parquet ({shown(error, as_text=str)}): fetch "
                "it again, or leave it out"
            ) from None
        yield opened


def _count_parquet(path: Path) -> int:
    with _parquet(path) as file:
        return file.metadata.num_rows


def _read_parquet(path: Path, skip: int, keys: list[str]) -> Iterator[Record]:
    """Reads only the wanted columns, and no row group that is skipped."""
    import pyarrow

    with _parquet(path) as file:
        names, number = file.schema_arrow.names, 0
        if any(key not in names for key in keys):  # None of its rows has them.
            for row in range(skip + 1, file.metadata.num_rows + 1):
                yield Record(f"{path}, row {row}", dict.fromkeys(names, ""))
            return
        for group in range(file.num_row_groups):
            if number + file.metadata.row_group(group).num_rows <= skip:
                number += file.metadata.row_group(group).num_rows
                continue
            try:
                for rows in file.iter_batches(ROWS, row_groups=[group], columns=keys):
                    for value in rows.to_pylist():
                        number += 1
                        if number > skip:
                            yield Record(f"{path}, row {number}", value)
            except (OSError, pyarrow.ArrowException) as error:
                raise ConfigError(
                    f"data.path: {path}, row group {group} can't be read "
                    f"({shown(error, as_text=str)}): fetch the file again, or leave it out"
                ) from None


def no_key(place: str, key: str, found: list[str], some_have: bool = True) -> ConfigError:
    """Returns the error for a record without a key that is wanted; it lists those it has.

    With `some_have`, others may have the key, and it says how to skip this one.
    """
    skipping = ", or data.skip_missing=True to leave such records out" if some_have else ""
    return ConfigError(
        f"data.path: {place} has no {key!r} but {', '.join(map(repr, found)) or 'nothing'}: set "
        f"data.text_key (and data.prompt_key, if there are prompts) to one of these{skipping}"
    )


READERS = {
    "jsonl": Reader(_count_lines, _read_lines),
    "json": Reader(_count_json, _read_json),
    "csv": Reader(_count_csv, _read_csv),
    "parquet": Reader(_count_parquet, _read_parquet),
}
