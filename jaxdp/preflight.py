"""What can be found wrong before anything is compiled, beyond the config itself."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from jaxdp import disk, parallel, tokenizer
from jaxdp.config import ConfigError
from jaxdp.data.cache import TokenCache
from jaxdp.display import quantity


def check_data(config: ConfigDict, cache: TokenCache) -> None:
    """Refuses splits that hold not even one sequence, and a sample prompt that can't be read."""
    for split, tokens in (("training", cache.train), ("validation", cache.validation)):
        if len(tokens) <= config.seq_len:
            raise ConfigError(
                f"data.path={config.data.path!r} gives {len(tokens)} {split} tokens, too few for "
                f"one sequence of seq_len={config.seq_len} and a next token: give more text, or a "
                "smaller seq_len"
            )
    if config.objective == "causal" and config.sample.num_tokens:
        [prompt] = tokenizer.encode(cache.tokenizer, [config.sample.prompt])
        if len(prompt) == 0:
            raise ConfigError(
                f"sample.prompt={config.sample.prompt!r} is empty: give at least one character, or "
                "sample.num_tokens=0"
            )


def check_same_tokens(config: ConfigDict, cache: TokenCache, digest: str) -> None:
    """Refuses other data than that of a checkpoint, of which `digest` is the token cache's."""
    if cache.digest != digest:
        raise ConfigError(
            f"data.path={config.data.path!r} no longer gives the tokens that this workdir was "
            "trained on: restore the data, or use another --workdir"
        )


def create_workdir(workdir: Path) -> None:
    """Makes the workdir where there is none yet, and makes sure that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} can't be written ({error.strerror}): choose another folder"
        ) from None


def check_devices() -> None:
    """Refuses a platform that was asked for and isn't there."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # The latter where no plugin is installed.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or ["JAX has no such platform here"])[0]
        raise ConfigError(
            f"JAX_PLATFORMS={platforms!r} can't be used ({reason}): install the "
            "drivers and pip install -e '.[cuda]', or leave JAX_PLATFORMS empty"
        ) from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a workdir; the lock of a process that died is free.

    Process 0 holds it for all of a run's processes.
    """
    if not parallel.is_main():
        yield
        return
    lock = filelock.FileLock(workdir / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"--workdir={workdir} is in use by another run: wait until it has ended, or use "
            "another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_disk(workdir: Path, state: Any) -> None:
    """Refuses a disk that hasn't room for a checkpoint; the old one stays while one is written.

    Args:
      workdir: exists.
      state: what a checkpoint holds, or its shapes and dtypes.
    """
    needed = disk.num_bytes(state)
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise ConfigError(
            f"--workdir={workdir} has {quantity(free)}B free and a checkpoint takes "
            f"{quantity(needed)}B: make room, or use another folder"
        )
