"""The files in the folder of a token cache, and the checksums that detect damage."""

import hashlib
import json
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation")
INDEX = np.dtype("<i8")
MARKS = np.dtype("u1")
LEARNT, BEGINS = 1, 2  # Marks of a chat's token: it is a target; the chat begins with it.


class DamagedError(ValueError):
    """A token cache has changed since it was built."""


def files(dtype: np.dtype, meta: dict) -> dict[str, tuple[np.dtype, int]]:
    """Returns the array files of a cache: {name: (dtype, number of elements)}."""
    files = {}
    for split in (split for split in SPLITS if split in meta):
        files[f"{split}.bin"] = dtype, meta[split]["tokens"]
        if "examples" in meta[split]:
            files[f"{split}.examples.bin"] = INDEX, 2 * meta[split]["examples"]
        if meta[split].get("marked"):
            files[f"{split}.marks.bin"] = MARKS, meta[split]["tokens"]
    return files


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(meta: dict) -> str:
    """Returns the SHA-256 of a cache's metadata, without its own checksum."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest(folder: Path, dtype: np.dtype, meta: dict) -> str:
    """Returns the SHA-256 of a cache's arrays; raises DamagedError if an id is out of range."""
    digest = hashlib.sha256()
    for split in SPLITS:
        with open(folder / f"{split}.bin", "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
                if np.frombuffer(piece, dtype).max() >= meta["vocab_size"]:
                    raise DamagedError(f"{split}.bin has ids beyond the vocabulary")
        digest.update(split.encode())
        if "examples" in meta[split]:
            digest.update((folder / f"{split}.examples.bin").read_bytes())
        if meta[split].get("marked"):
            digest.update((folder / f"{split}.marks.bin").read_bytes())
    return digest.hexdigest()
