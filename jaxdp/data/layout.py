"""What the folder of a token cache holds, and whether it still is what it was."""

import hashlib
import json
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation")
INDEX = np.dtype("<i8")


class DamagedError(ValueError):
    """A token cache isn't as it was made."""


def files(dtype: np.dtype, meta: dict) -> dict[str, tuple[np.dtype, int]]:
    """The arrays of a cache: {name: (dtype, how many numbers)}."""
    files = {}
    for split in (split for split in SPLITS if split in meta):
        files[f"{split}.bin"] = dtype, meta[split]["tokens"]
        if "examples" in meta[split]:
            files[f"{split}.examples.bin"] = INDEX, 2 * meta[split]["examples"]
    return files


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(meta: dict) -> str:
    """SHA-256 of what meta says, its own checksum apart."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest(folder: Path, dtype: np.dtype, meta: dict) -> str:
    """Of the tokens on disk; raises DamagedError for ids beyond the vocabulary."""
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
    return digest.hexdigest()
