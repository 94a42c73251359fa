"""Sources of documents: TFDS datasets, text files and JSON lines, each split in two."""

import contextlib
import dataclasses
import glob
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data import mixture

Example = tuple[str, str]
Report = Callable[[str], None]  # Called with a line before anything that takes time.
# Markup to remove from TFDS datasets: {dataset: (pattern, replacement) pairs}.
CLEANED = {
    "wiki40b": (
        (r"\A\n?_START_ARTICLE_\n", ""),
        (r"\n_START_(ARTICLE|SECTION|PARAGRAPH)_\n", "\n\n"),
        (r"_NEWLINE_", "\n"),
    )
}


class Source(Protocol):
    """A corpus: `train` and `validation` texts, always in the same order."""

    def identity(self) -> dict:
        """Returns what the texts depend on, as JSON: equal identities mean equal texts."""

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of "train" or "validation"."""

    def examples(self, split: str) -> Iterator[Example]:
        """Yields documents in two parts: prompt ("" without data.prompt_key) and text."""


@dataclasses.dataclass(frozen=True)
class ValidationOnly:
    """A source reduced to its validation split; its training split is empty."""

    source: Source

    def identity(self) -> dict:
        """Returns the source's identity, marked as without training split."""
        return self.source.identity() | {"train": None}

    def documents(self, split: str) -> Iterator[str]:
        """Yields the source's documents of "validation", and none of "train"."""
        return iter(()) if split == "train" else self.source.documents(split)

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the source's examples of "validation", and none of "train"."""
        return iter(()) if split == "train" else self.source.examples(split)


def get_sources(config: ConfigDict, report: Report = print) -> list[Source]:
    """Opens all sources that data.path names; raises ConfigError where one can't be found."""
    sources = []
    for path in mixture.parse(config.data.path):
        one = ConfigDict(config.to_dict())
        one.data.path = path
        sources.append(get_source(one, report))
    return sources


def get_source(config: ConfigDict, report: Report = print) -> Source:
    """Opens the one source that a data.path without weights names.

    Raises:
      ConfigError: the source can't be found.
    """
    kind, colon, rest = config.data.path.partition(":")
    if colon and kind == "tfds":
        return TfdsSource(rest, config, report)
    if colon and kind == "jsonl":
        return JsonSource(rest, config)
    if config.data.prompt_key:
        raise ConfigError(
            f"data.prompt_key={shown(config.data.prompt_key)} does not work with text files: use "
            "jsonl:GLOB or tfds:NAME, or leave it empty"
        )
    return TextSource(rest if colon and kind == "text" else config.data.path, config)


def share_files(one: str, other: str) -> bool:
    """Returns whether two values of data.path have a file in common, under whatever name."""
    return not _files(one).isdisjoint(_files(other))


def _files(path: str) -> set[str]:
    """Returns the real paths of the files that data.path names; TFDS datasets have none."""
    found = set()
    for source in mixture.parse(path):
        kind, _, rest = source.partition(":")
        if kind != "tfds":
            pattern = rest if kind in ("text", "jsonl") else source
            found |= {str(file.resolve()) for file in _matching(pattern)}
    return found


def _matching(pattern: str) -> list[Path]:
    """Returns the files of a glob, in the order of their paths."""
    pattern = os.path.expanduser(pattern)
    # The name of a file may look like a glob, such as "notes[1].txt".
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return sorted(path for path in map(Path, found) if path.is_file())


class _Files:
    """Local files in the order of their paths."""

    def __init__(self, pattern: str, config: ConfigDict):
        """Finds the files that match a pattern; raises ConfigError where there are none."""
        self.paths = _matching(pattern)
        self.eval_fraction = config.data.eval_fraction
        if not self.paths:
            raise ConfigError(
                f"data.path={shown(config.data.path)} matches no file: give the path of a text "
                "file, a quoted glob, or tfds:NAME"
            )

    def identity(self) -> dict:
        """Returns paths, sizes and modification times, because hashing content takes minutes."""
        stats = [(str(path.resolve()), path.stat()) for path in self.paths]
        files = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return {"files": files, "eval_fraction": self.eval_fraction}

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8")
        except OSError as error:
            raise ConfigError(
                f"data.path: {path} can't be read ({error.strerror}): check its permissions, or "
                "leave it out"
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.path: {path} is not UTF-8 text (byte {error.start}): convert it, for "
                "example with iconv"
            ) from None


class TextSource(_Files):
    """Text files (UTF-8), one document each; the last part of the text is the validation split."""

    def documents(self, split: str) -> Iterator[str]:
        """Yields one document per file; a file on the border is divided between the splits."""
        border = self._border()
        position = 0
        for path in self.paths:
            text = self._read(path)
            cut = min(max(border - position, 0), len(text))
            position += len(text)
            part = text[:cut] if split == "train" else text[cut:]
            if part:
                yield part

    def _border(self) -> int:
        """Returns how many characters of the concatenated files are training text."""
        total = sum(len(self._read(path)) for path in self.paths)
        return int(total * (1 - self.eval_fraction))

    def examples(self, split: str) -> Iterator[Example]:
        """Yields documents with empty prompts."""
        return (("", document) for document in self.documents(split))


class JsonSource(_Files):
    """JSON objects, one per line; the last lines are the validation split."""

    def __init__(self, pattern: str, config: ConfigDict):
        """Finds the files; raises ConfigError where there are none."""
        super().__init__(pattern, config)
        self.keys = [key for key in (config.data.prompt_key, config.data.text_key) if key]

    def identity(self) -> dict:
        """Returns the identity of the files, and the keys that are read."""
        return super().identity() | {"keys": self.keys}

    def documents(self, split: str) -> Iterator[str]:
        """Yields the text of each line, with its prompt before it."""
        return ("".join(example) for example in self.examples(split))

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the prompt, if any, and the text of each line."""
        border = int(sum(1 for _ in self._lines()) * (1 - self.eval_fraction))
        part = (0, border) if split == "train" else (border, None)
        for place, line in itertools.islice(self._lines(), *part):
            *prompt, text = self._texts(place, line)
            yield "".join(prompt), text

    def _lines(self) -> Iterator[tuple[str, str]]:
        for path in self.paths:
            # splitlines would also split at characters that a JSON string may contain, as U+2028.
            for number, line in enumerate(self._read(path).split("\n"), 1):
                if line.strip():
                    yield f"{path}, line {number}", line

    def _texts(self, place: str, line: str) -> list[str]:
        try:
            values = json.loads(line)
            texts = [values[key] for key in self.keys]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a value is no string")
            "".join(texts).encode()  # JSON can hold half a surrogate pair.
            return texts
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"data.path: {place} is no JSON object with a text for each of "
                f"{', '.join(map(repr, self.keys))} ({shown(error, as_text=str)}): correct it, or "
                "change data.text_key and data.prompt_key"
            ) from None


class TfdsSource:
    """A TensorFlow dataset with a text feature, prepared on first use."""

    def __init__(self, name: str, config: ConfigDict, report: Report):
        """Finds the builder; raises ConfigError where TFDS has none, or can't be imported."""
        if not config.data.data_dir:
            paths.check_home(f"data.path={shown(config.data.path)}", "TFDS_DATA_DIR")
        from jaxdp.data import python_stdlib
        from jaxdp.data.tensorflow import tf
        from jaxdp.data.tfds import tfds

        self._tf, self._tfds, self._report = tf, tfds, report
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        self.splits = {"train": config.data.train_split, "validation": config.data.eval_split}
        self.keys = {"prompt_key": config.data.prompt_key, "text_key": config.data.text_key}
        self.keys = {key: name for key, name in self.keys.items() if name or key == "text_key"}
        self.path = config.data.path
        data_dir = os.path.expanduser(config.data.data_dir) or None
        try:
            if name == "python_stdlib":
                self.builder = python_stdlib.PythonStdlib(data_dir=data_dir)
            else:
                self.builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # TFDS raises many types for a wrong name, version or option.
            raise ConfigError(
                f"data.path={shown(self.path)} is not known to TFDS ({_first_line(error)}): see "
                "tensorflow.org/datasets/catalog for names, or check data.data_dir"
            ) from None

    def identity(self) -> dict:
        """Returns the dataset's full name with its version, the splits and the features."""
        name = self.builder.info.full_name
        cleaned = {"cleaned": CLEANED[self.builder.name]} if self.builder.name in CLEANED else {}
        return {"tfds": name, "splits": self.splits} | self.keys | cleaned

    def documents(self, split: str) -> Iterator[str]:
        """Prepares the dataset if needed; yields each example's text with its prompt before it."""
        return ("".join(example) for example in self.examples(split))

    def examples(self, split: str) -> Iterator[Example]:
        """Prepares the dataset if needed; yields each example's prompt ("" if none) and text."""
        self._prepare()
        spec = self.splits[split]
        try:
            dataset = self.builder.as_dataset(split=spec, shuffle_files=False)
        except (ValueError, KeyError) as error:
            key = "data.train_split" if split == "train" else "data.eval_split"
            raise ConfigError(
                f"{key}={shown(spec)} is no split of {self.path} ({_first_line(error)}): "
                f"it has {', '.join(self.builder.info.splits)}"
            ) from None
        text = self._tf.TensorSpec((), self._tf.string)
        texts = [name for name, feature in dataset.element_spec.items() if feature == text]
        for key, name in self.keys.items():
            if name not in texts:
                raise ConfigError(
                    f"data.{key}={shown(name)} is no text feature of {self.path}: choose one of "
                    f"{', '.join(texts)}"
                )
        chosen = dataset.map(lambda example: [example[name] for name in self.keys.values()])
        for values in self._tfds.as_numpy(chosen):
            *prompt, text = [
                self._decoded(key, value, spec)
                for key, value in zip(self.keys, values, strict=True)
            ]
            yield "".join(prompt), text

    def _decoded(self, key: str, value: bytes, spec: str) -> str:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(
                f"data.{key}={shown(self.keys[key])} of {self.path} is not UTF-8 text in split "
                f"{spec!r}: choose another feature or dataset"
            ) from None
        for pattern, replacement in CLEANED.get(self.builder.name, ()):
            text = re.sub(pattern, replacement, text)
        return text

    def _prepare(self) -> None:
        if not self.builder.data_path.exists():
            size = self.builder.info.download_size  # 0 also where it is unknown.
            self._report(f"Preparing {self.path}{f' (a download of {size})' if size else ''} ...")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints "Unknown size".
                self.builder.download_and_prepare()
        except Exception as error:  # Downloads fail in as many ways as there are servers.
            raise ConfigError(
                f"data.path={shown(self.path)} can't be prepared ({_first_line(error)}): "
                "download it where there is a network and point data.data_dir there"
            ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
