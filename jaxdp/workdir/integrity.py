"""Checks that a checkpoint is intact and holds the expected model."""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdp.common.errors import ConfigError, RunError
from jaxdp.common.files import write_atomically
from jaxdp.sync.fingerprints import fingerprints

METRIC = "eval/loss"
FINGERPRINTS = "fingerprints"


@contextlib.contextmanager
def ending_reads() -> Iterator[None]:
    """Makes Orbax finish all reads of a checkpoint when one of them fails.

    Otherwise it closes the event loop that the others use, and each prints a traceback later.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientPolicy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


class _PatientPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


class _PatientLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        tasks = () if self.is_closed() else asyncio.all_tasks(self)
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class OtherModelError(ValueError):
    """A checkpoint holds other arrays than the model needs."""


def check_shapes(folder: Path, params: Any) -> set[str]:
    """Checks the parameters in a checkpoint; returns all saved fields: "params", ...

    Raises:
      OtherModelError: the checkpoint's parameters have other names or shapes.
    """
    with ending_reads():
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder / "state")
    saved = _shapes_by_name(metadata.tree["params"])
    wanted = _shapes_by_name(params)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise OtherModelError(
                f"params/{name} is {saved.get(name, 'absent')} in checkpoint {folder.name} and "
                f"{wanted.get(name, 'absent')} by the config and the tokenizer"
            )
    return set(metadata.tree)


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in jax.tree.leaves_with_path(tree)
    }


def steps(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are named like a step; they may be files."""
    return [path for path in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name)]


def fingerprints_by_path(tree: Any) -> dict[str, int]:
    """Computes a fingerprint of each array in a tree, by path; of replicated ones, the first copy.

    On any number of devices, this is the same program.
    """
    leaves = jax.tree.leaves_with_path(tree)
    on_devices = [x.addressable_data(0) for _, x in leaves if isinstance(x, jax.Array)]
    values = iter(np.asarray(_fingerprints(on_devices)) if on_devices else ())
    # Arrays on the host go to a device one by one: together they may be too large for it.
    found = [next(values) if isinstance(x, jax.Array) else _fingerprints([x])[0] for _, x in leaves]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: int(mark) for name, mark in zip(names, found, strict=True)}


def check_fingerprints(tree: Any, expected: dict[str, int]) -> None:
    """Raises ValueError if an array's fingerprint is not the saved one."""
    for name, mark in fingerprints_by_path(tree).items():
        if expected[name] != mark:
            raise ValueError(f"{name} is not what was saved")


def all_damaged(folder: Path, steps: list[int]) -> RunError:
    """Returns the error to raise when every checkpoint is damaged; it names their steps."""
    return RunError(
        f"all checkpoints in {folder} are damaged ({', '.join(map(str, steps))}): "
        "restore them from a copy, or use another --workdir; nothing was changed"
    )


def readable(checkpoint: Path) -> bool:
    """Returns whether Orbax can read a checkpoint's metrics; missing ones are fine."""
    return checkpoint.is_dir() and _metric(checkpoint) is not None


def record_eval_loss(checkpoint: Path, loss: float) -> None:
    """Records the validation loss of a checkpoint in its folder, atomically.

    It is the file that Orbax would write if it knew the loss when it saves. A loss that isn't
    finite is recorded as infinity, which ranks worst.

    Raises:
      ConfigError, OSError: it can't be written, for example on a full disk.
    """
    path = _metrics_file(checkpoint)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({METRIC: loss if math.isfinite(loss) else math.inf}))


def eval_loss(checkpoint: Path) -> float | None:
    """Returns the recorded validation loss, infinite if it isn't finite; None if there is none."""
    return _eval_loss(checkpoint) if _metrics_file(checkpoint).exists() else None


def _eval_loss(checkpoint: Path) -> float:
    """Returns the validation loss of a checkpoint; infinite if it has none."""
    found = _metric(checkpoint)
    return found if found is not None and -math.inf < found < math.inf else math.inf


def _metrics_file(checkpoint: Path) -> Path:
    return checkpoint / "metrics" / "metrics"


def _metric(checkpoint: Path) -> float | None:
    """Reads the validation loss of a checkpoint: infinite if missing, None if unreadable."""
    path = _metrics_file(checkpoint)
    try:
        metrics = json.loads(path.read_bytes()) if path.exists() else {METRIC: math.inf}
        value = metrics.get(METRIC) if isinstance(metrics, dict) else None
        return value if _number(value) else None
    except (ValueError, RecursionError, OSError):
        return None


def step_of(folder: Path, steps: list[int], which: str) -> int:
    """Returns the step that `which` means: "best" by validation loss, or a number of steps.

    Raises:
      ConfigError: there is no such checkpoint.
    """
    if which == "best":
        losses = {step: _eval_loss(folder / str(step)) for step in steps}
        if min(losses.values()) == math.inf:
            raise ConfigError(
                f"--step=best: no checkpoint in {folder} has been evaluated: choose one of "
                f"{', '.join(map(str, steps))}"
            )
        return min(steps, key=lambda step: losses[step])
    if int(which) not in steps:
        raise ConfigError(
            f"--step={int(which)} is no checkpoint in {folder}: choose one of "
            f"{', '.join(map(str, steps))}"
        )
    return int(which)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_fingerprints = jax.jit(fingerprints)
