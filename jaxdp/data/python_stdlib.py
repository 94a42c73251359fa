"""A text corpus that every machine has: the source of the running Python's standard library.

Use it as `tfds:python_stdlib`: 9 to 10 MB, prepared by TFDS in seconds without a network.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxdp.data.tfds import tfds

# Folders. Tests are repetitive, pydoc_data is quoted prose, encodings are tables of characters; the
# others differ from machine to machine.
LEFT_OUT = (
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
)
# Files that a program wrote, and locale.py, which is mostly such a table.
TABLES = (
    "_opcode_metadata.py",
    "html/entities.py",
    "locale.py",
    "re/_casefix.py",
    "stringprep.py",
)
VALIDATION_SHARE = 0.02


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder of the standard library's Python files; its version is Python's version."""

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))
    # Names the choice of files: another choice needs another name, as TFDS keeps what it prepared.
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="code", description="Without tests and without tables."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "name": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/library/",
            disable_shuffling=True,  # Keeps the files in the order of their names.
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing to download.
        return {
            "train": self._generate_examples(False),
            "validation": self._generate_examples(True),
        }

    def _generate_examples(self, validation: bool):
        for number, (name, text) in enumerate(stdlib_files()):
            if is_validation(name) == validation:
                yield number, {"text": text, "name": name}


def stdlib_files() -> Iterator[tuple[str, str]]:
    """Yields (path below the library's root, text) of each non-empty UTF-8 file, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if set(LEFT_OUT).intersection(relative.parts) or relative.as_posix() in TABLES:
            continue
        if path.name.startswith("_sysconfigdata"):
            continue  # Differs from machine to machine, too.
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # A few files are in Latin-1 on purpose.
        if text:
            yield relative.as_posix(), text


def is_validation(name: str) -> bool:
    """Returns whether a file belongs to the validation split, which a hash of its name decides."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return fraction < VALIDATION_SHARE
