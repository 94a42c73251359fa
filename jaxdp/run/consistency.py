"""The processes of a run compare what they are about to train, before anything is compiled."""

import collections
import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError, RunError, shown
from jaxdp.data import tokenizer
from jaxdp.parallel import messages, processes
from jaxdp.run import workdir_access
from jaxdp.step.setup import Setup
from jaxdp.workdir import integrity

# Each process may have a folder of its own for what it makes of the same data.
OWN_KEYS = ("data.cache_dir",)
# Flags of XLA that change no program; the number of devices is compared as such.
OWN_FLAGS = ("--xla_dump", "--xla_force_host_platform_device_count")
# Settings of JAX with which the same code gives other programs.
OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
SEEN_WITHIN = 15.0  # Seconds in which a shared disk shows a new file to all.


def check_devices() -> None:
    """Refuses processes with different numbers of devices."""
    found = collections.Counter(device.process_index for device in jax.devices())
    counts = {i: found[i] for i in range(jax.process_count())}
    for i, count in counts.items():
        if count != counts[0]:
            raise ConfigError(
                f"the processes have different numbers of devices, process 0 has {counts[0]} and "
                f"process {i} has {count}: give each the same (CUDA_VISIBLE_DEVICES, and on CPUs "
                "JAX_NUM_CPU_DEVICES)"
            )


def check(setup: Setup, workdir: Path) -> None:
    """Makes the workdir; refuses processes that differ in what they would train, or where.

    Each process has to call it.

    Args:
      setup: of the run that this process would train.
      workdir: its folder, which all have to share; process 0 creates it if it doesn't exist.

    Raises:
      ConfigError: in all processes; names what differs, with the values of two of them.
    """
    own = {
        "who": f"process {jax.process_index()} ({socket.gethostname()})",
        "workdir": str(workdir.absolute()),
        "marker": f".seen-by-all-{uuid.uuid4().hex}",
        **_facts(setup),
    }
    first = json.loads(messages.from_main(json.dumps(own)))
    _raise_first(difference(first, json.loads(json.dumps(own))))
    path = workdir / first["marker"]
    with _written(path) if processes.is_main() else contextlib.nullcontext():
        _raise_first(
            ""
            if _sees(path)
            else f"--workdir isn't shared by all processes: {first['who']} has written to "
            f"{first['workdir']}, and {own['who']} doesn't see it in {own['workdir']}: give a "
            "folder on a disk that all machines share"
        )


def _raise_first(problem: str) -> None:
    """Raises the first problem that a process has, in all of them; each has to call it."""
    if text := next(filter(None, messages.gather(problem)), ""):
        raise ConfigError(text)


def check_step(step: int) -> None:
    """Asserts that all processes go on from the same step; each has to call it."""
    for i, other in enumerate(messages.gather(str(step))):
        if int(other) != step:
            raise RunError(
                f"process {i} would go on after step {other}, and process {jax.process_index()} "
                f"after step {step}: check that all see the same --workdir, and run again"
            )


def check_weights(name: str, params: Any) -> None:
    """Refuses processes that have read different weights; each has to call it.

    Args:
      name: the value of init_from.
      params: the parameters that this process has read.
    """
    told = messages.gather(json.dumps(integrity.fingerprints_by_path(params)))
    first = json.loads(told[0])
    for i, other in enumerate(map(json.loads, told)):
        differing = [key for key in first if other.get(key) != first[key]]
        if differing:
            raise ConfigError(
                f"init_from={shown(name)} gives other weights in process {i} than in process 0 "
                f"({differing[0]} is the first of {len(differing)}): give all machines the same "
                "files"
            )


def difference(first: dict[str, Any], own: dict[str, Any]) -> str:
    """Returns what a process has else than process 0 (`first`); empty if nothing."""
    for kind, named in (("config", "configs"), ("environment", "settings")):
        differing = [
            f"{key}={shown(first[kind].get(key))} and {shown(own[kind].get(key))}"
            for key in first[kind] | own[kind]
            if first[kind].get(key) != own[kind].get(key)
        ]
        if differing:
            more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
            return (
                f"{first['who']} and {own['who']} have different {named}: "
                f"{', '.join(differing[:5])}{more}: give all the same"
            )
    for name, digest in first["data"].items():
        if own["data"].get(name) != digest:
            return (
                f"{name} gives other tokens in {own['who']} than in {first['who']}, with the same "
                "config: give all machines the same files"
            )
    return ""


def _facts(setup: Setup) -> dict[str, Any]:
    """Returns what has to be equal in all processes; JSON."""
    config = configs.flatten(setup.config)
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = sorted({flag for flag in given if not flag.startswith(OWN_FLAGS)})
    options = {name: str(jax.config.values.get(name)) for name in OPTIONS}
    cache = setup.feed.cache
    data = {"tokenizer": tokenizer.digest(cache.tokenizer), "data.path": cache.digest}
    data |= {f"eval_sets ({name})": x.cache.digest for name, x in setup.feeds.items() if name}
    return {
        "config": {key: config[key] for key in sorted(config) if key not in OWN_KEYS},
        "environment": {"XLA_FLAGS": " ".join(flags), **options},
        "data": data,
    }


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Makes a new workdir's folder, and a file in it for a moment."""
    workdir_access.create_workdir(path.parent)
    try:
        path.touch()
        yield
    finally:
        path.unlink(missing_ok=True)


def _sees(path: Path) -> bool:
    """Returns whether a file that another process has made is there; waits for a slow disk."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)  # NFS then asks for what is new.
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True
