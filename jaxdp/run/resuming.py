"""What a run goes on from: its place in the data, and what has changed since it last started."""

import contextlib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.errors import ConfigError, shown
from jaxdp.configs import default
from jaxdp.data import mixture
from jaxdp.data.pipeline import Position
from jaxdp.parallel import messages, processes
from jaxdp.step.optimizer import get_schedule
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import folder_of
from jaxdp.workdir.reading import patiently

# In a checkpoint's JSON: the sequences taken from each source, and how they are shuffled.
POSITION = "sequences"
SHUFFLE = "shuffle"

# Keys that decide the learning rate of a step.
SCHEDULE = (
    "num_train_steps",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.final_fraction",
    "optimizer.decay_fraction",
)


def newest_position(
    workdir: Path, config: ConfigDict, say: Callable[[str], None] = print
) -> Position:
    """Reads the position of the newest checkpoint, before the run's length is computed from it.

    Process 0 reads it for all. One that is damaged is passed over: `Checkpoints.restore` says so.

    Args:
      workdir: the folder of the run.
      config: the config with which it goes on.
      say: called with a line of text before a file is read again.

    Raises:
      RunError: a checkpoint can't be read, and isn't damaged.
    """
    found, folder = Position(), folder_of(workdir)
    if processes.is_main():
        for step in patiently(lambda: integrity.steps_of(folder), str(folder), say):
            read = functools.partial(integrity.read_extra, folder / str(step))
            with contextlib.suppress(integrity.DamagedError, OSError):  # OSError: it is missing.
                extra = patiently(read, str(folder / str(step)), say)
                found = position_of(workdir, config, step, extra)
                break
    told = json.dumps([found.step, found.taken, found.shuffle])
    step, taken, shuffle = json.loads(messages.from_main(told))
    return Position(step, tuple(taken), shuffle)


def position_of(workdir: Path, config: ConfigDict, step: int, extra: dict[str, Any]) -> Position:
    """Returns the position at which a checkpoint was saved.

    Args:
      workdir: the folder of the run.
      config: the config with which it goes on.
      step: the checkpoint's step.
      extra: the JSON saved with it; if an older version wrote it, it lacks the position.

    Raises:
      ConfigError: the data have another number of sources.
    """
    shares = mixture.parse(config.data.path)
    taken = extra[POSITION] if POSITION in extra else _taken_by_config(workdir, config, step)
    if len(taken) != len(shares):
        raise ConfigError(
            f"data.path={shown(config.data.path)} has {len(shares)} sources, and checkpoint {step} "
            f"was trained on {len(taken)}: use the old data.path, or another --workdir"
        )
    return Position(step, tuple(taken), extra.get(SHUFFLE, 1))


def _taken_by_config(workdir: Path, config: ConfigDict, step: int) -> list[int]:
    """Returns what a run of an older version took: all steps counted as those of its last start."""
    path = workdir / "config.json"
    flat = configs.flatten(config) | (configs.flatten(configs.load(path)) if path.exists() else {})
    batch, sources = flat["global_batch_size"], flat["data.path"]
    if type(batch) is not int or type(sources) is not str:
        batch, sources = config.global_batch_size, config.data.path
    turns = mixture.cycle(tuple(mixture.parse(sources).values()))
    return turns.taken(step * batch).tolist()


def changes(workdir: Path, config: ConfigDict, origin: Position, extra: dict[str, Any]) -> str:
    """Returns a line about what has changed since the run last started; empty if nothing has.

    Args:
      workdir: the folder of the run; its config.json is that of the last start.
      config: the config with which the run goes on.
      origin: the position from which it goes on.
      extra: the JSON of the checkpoint.
    """
    parts = []
    if POSITION not in extra:
        parts.append(
            f"checkpoint {origin.step} is of an older version, and doesn't hold its place in the "
            f"data: taken to be after {origin.total:,} sequences, by config.json's batch size"
        )
    if not (workdir / "config.json").exists():
        return "; ".join([*parts, "config.json is missing, so what has changed isn't known"])
    saved = configs.load(workdir / "config.json")
    found = differences(saved, config)
    if found:
        pairs = (
            f"{key} {shown(old, as_text=_short)} -> {shown(new, as_text=_short)}"
            for key, (old, new) in found.items()
        )
        parts.insert(0, f"changed: {', '.join(pairs)}")
    if found.keys() & {"global_batch_size", "data.path", "num_epochs"}:
        parts.append(f"the data go on with sequence {origin.total + 1:,}")
    if found.keys() & set(SCHEDULE):
        parts.append(rate_change(saved, config, origin.step))
    return "; ".join(filter(None, parts))


def differences(saved: ConfigDict, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} for the keys of two configs that differ.

    Keys that an older version's config lacks had their defaults.
    """
    old, new = (configs.flatten(default.get_config()) | configs.flatten(x) for x in (saved, config))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def rate_change(saved: ConfigDict, config: ConfigDict, step: int) -> str:
    """Says how the learning rate after a step differs from that of a saved config, if it does."""
    try:
        before = get_schedule(saved)
    except Exception:  # Only the keys that define a run are checked in a config.json.
        return "the former learning rates aren't known, as config.json lacks them"
    after, last = get_schedule(config), config.num_train_steps
    old, new = float(before(step)), float(after(step))
    if not math.isclose(old, new, rel_tol=1e-6):
        direction = "up" if new > old else "down"
        return f"the learning rate goes {direction} at step {step:,}, from {old:.3g} to {new:.3g}"
    old, new = float(before(last)), float(after(last))
    if math.isclose(old, new, rel_tol=1e-6):
        return ""
    return f"the learning rate goes on as before, but ends at {new:.3g} instead of {old:.3g}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
