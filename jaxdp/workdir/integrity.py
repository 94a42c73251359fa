"""Checks that a checkpoint is intact and holds the expected model."""

import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdp.common.errors import ConfigError, RunError, check_step
from jaxdp.common.files import first_line, write_atomically
from jaxdp.sync.fingerprints import fingerprints
from jaxdp.workdir.reading import ending_reads, is_io_error

METRIC, TOKENS = "eval/loss", "eval/tokens"
# Keys of a checkpoint's JSON.
FINGERPRINTS, CHECKSUM, GOOD = "fingerprints", "checksum", "good"


class DamagedError(ValueError):
    """A part of a checkpoint isn't what was saved."""


class OtherModelError(ValueError):
    """A checkpoint holds other arrays than the model needs."""


def sealed(extra: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a checkpoint with a checksum."""
    return extra | {CHECKSUM: _checksum(extra)}


def read_extra(folder: Path) -> dict[str, Any]:
    """Reads the JSON of a checkpoint; what older versions wrote has no checksum.

    Raises:
      DamagedError: it isn't what was saved.
      OSError: it can't be read.
    """
    try:
        extra = json.loads((folder / "extra" / "metadata").read_bytes())
        same = extra.get(CHECKSUM, _checksum(extra)) == _checksum(extra)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"its JSON can't be read, {first_line(error)}") from None
    if not same:
        raise DamagedError("its JSON is not what was saved")
    return extra


def _checksum(extra: dict[str, Any]) -> int:
    rest = {key: value for key, value in extra.items() if key != CHECKSUM}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def is_good(step: int, extra: dict[str, Any], every: int) -> bool:
    """Returns whether a run that diverges may go back to a checkpoint.

    That is whether checkpoint.every asked for it, and no update was skipped just before.

    Args:
      step: the checkpoint's step.
      extra: its JSON, which says so; what older versions wrote doesn't.
      every: today's checkpoint.every, which these are taken to be of.
    """
    skipped = extra.get("divergence", {}).get("in_a_row", 0)
    return extra.get(GOOD, step % every == 0 and not skipped)


def check_arrays(folder: Path, wanted: Any, extra: dict[str, Any], field: str = "") -> None:
    """Checks the names and shapes of the arrays in a checkpoint.

    Args:
      folder: the checkpoint.
      wanted: {field of the state: arrays, or their shapes}.
      extra: the JSON of the checkpoint.
      field: the only field to compare; by default all, and there must be no others.

    Raises:
      DamagedError: it doesn't hold the arrays that were saved.
      OtherModelError: other ones were saved; names the first that differs.
    """
    with ending_reads():
        metadata = ocp.PyTreeCheckpointHandler().metadata(folder / "state")
    saved, ours = _shapes_by_name(metadata.tree), _shapes_by_name(wanted)
    if saved.keys() != extra[FINGERPRINTS].keys():
        raise DamagedError("its arrays are not those that were saved")
    for name in sorted(saved.keys() | ours.keys(), key=_parameters_first):
        if name.startswith(field) and saved.get(name) != ours.get(name):
            raise OtherModelError(
                f"{name} is {saved.get(name, 'absent')} in checkpoint {folder.name} and "
                f"{ours.get(name, 'absent')} by the config and the tokenizer"
            )


def has_field(extra: dict[str, Any], field: str) -> bool:
    """Returns whether a checkpoint's state has a field such as "ema"."""
    return any(name.startswith(f"{field}/") for name in extra[FINGERPRINTS])


def _parameters_first(name: str) -> tuple[bool, str]:
    return not name.startswith("params/"), name


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in jax.tree.leaves_with_path(tree)
    }


def steps(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are named like a step; they may be files.

    Raises:
      OSError: the folder exists, and can't be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if re.fullmatch("0|[1-9][0-9]*", name)]


def steps_of(folder: Path) -> list[int]:
    """Returns the steps of a folder's checkpoints, newest first; see `steps`."""
    return sorted((int(path.name) for path in steps(folder) if path.is_dir()), reverse=True)


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
    """Raises DamagedError if an array's fingerprint is not the saved one."""
    for name, mark in fingerprints_by_path(tree).items():
        if expected[name] != mark:
            raise DamagedError(f"{name} is not what was saved")


def all_damaged(folder: Path, steps: list[int]) -> RunError:
    """Returns the error to raise when every checkpoint is damaged; it names their steps."""
    return RunError(
        f"all checkpoints in {folder} are damaged ({', '.join(map(str, steps))}): "
        "restore them from a copy, or use another --workdir; nothing was changed"
    )


def readable(checkpoint: Path) -> bool:
    """Returns whether Orbax can read a checkpoint's metrics; missing ones are fine.

    Raises:
      OSError: the disk doesn't answer, which says nothing about them.
    """
    return checkpoint.is_dir() and _metrics(checkpoint) is not None


def record_eval_loss(checkpoint: Path, loss: float, tokens: int | None = None) -> None:
    """Records the validation loss of a checkpoint in its folder, atomically.

    It is the file that Orbax would write if it knew the loss when it saves. A loss that isn't
    finite is recorded as infinity, which ranks worst.

    Args:
      checkpoint: its folder.
      loss: nats per token.
      tokens: how many it is the mean of; None: not known.

    Raises:
      ConfigError, OSError: it can't be written, for example on a full disk.
    """
    path = _metrics_file(checkpoint)
    path.parent.mkdir(exist_ok=True)
    known = {} if tokens is None else {TOKENS: tokens}
    loss = loss if math.isfinite(loss) else math.inf
    write_atomically(path, json.dumps({METRIC: loss} | known))


def evaluation(checkpoint: Path) -> tuple[float, int | None] | None:
    """Returns the recorded validation loss and its number of tokens; None if there is no loss.

    The loss is infinite if it isn't finite; the number is None if it isn't known.
    """
    return _evaluation(checkpoint) if _metrics_file(checkpoint).exists() else None


def _evaluation(checkpoint: Path) -> tuple[float, int | None]:
    """Returns what `evaluation` does; the loss is infinite, too, if there is none."""
    metrics = _metrics(checkpoint) or {}
    loss, tokens = metrics.get(METRIC, math.inf), metrics.get(TOKENS)
    finite = -math.inf < loss < math.inf
    return loss if finite else math.inf, tokens if type(tokens) is int else None


def _metrics_file(checkpoint: Path) -> Path:
    return checkpoint / "metrics" / "metrics"


def _metrics(checkpoint: Path) -> dict[str, Any] | None:
    """Reads the metrics of a checkpoint; the loss is infinite if missing. None if unreadable."""
    path = _metrics_file(checkpoint)
    try:
        metrics = json.loads(path.read_bytes()) if path.exists() else {METRIC: math.inf}
        return metrics if isinstance(metrics, dict) and _number(metrics.get(METRIC)) else None
    except (ValueError, RecursionError, OSError) as error:
        if is_io_error(error):
            raise
        return None


def best_steps(folder: Path, steps: list[int]) -> list[int]:
    """Returns the checkpoint with the lowest validation loss for each number of tokens in it.

    Losses over different text can't be compared, and after a change of eval_max_batches they are
    means of another number of tokens. The number of the newest loss comes first; of equal losses,
    the newest. Where the number isn't known, as in older versions, it is taken to be any.
    """
    found = [(step, *_evaluation(folder / str(step))) for step in sorted(steps, reverse=True)]
    finite = [(loss, -step, tokens) for step, loss, tokens in found if loss < math.inf]
    numbers = dict.fromkeys(tokens for *_, tokens in finite if tokens is not None) or [None]
    groups = [[one for one in finite if one[2] in (number, None)] for number in numbers]
    return [-min(group, key=lambda one: one[:2])[1] for group in groups if group]


def step_of(folder: Path, steps: list[int], which: str | int) -> int:
    """Returns the step that `which` means: "best" by validation loss, or a number of steps.

    Raises:
      ConfigError: there is no such checkpoint.
    """
    check_step(which)
    if which == "best":
        best = best_steps(folder, steps)
        if not best:
            raise ConfigError(
                f"--step=best: no checkpoint in {folder} has been evaluated: choose one of "
                f"{', '.join(map(str, steps))}"
            )
        return best[0]
    if int(which) not in steps:
        raise ConfigError(
            f"--step={int(which)} is no checkpoint in {folder}: choose one of "
            f"{', '.join(map(str, steps))}"
        )
    return int(which)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_fingerprints = jax.jit(fingerprints)
