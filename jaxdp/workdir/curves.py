"""The training curves of runs, read from their metrics; which runs differ only in their seed."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdp.common import paths
from jaxdp.common.choices import MAX_INT32
from jaxdp.common.errors import ConfigError, shown
from jaxdp.data.eval_sets import NAME
from jaxdp.workdir.metrics import JSONL, read_jsonl

# The panels from top to bottom: label of the axis, share of the height, metrics.
PANELS = (
    ("loss, nats per token", 3, ("train/loss", "eval/loss")),  # And the losses of eval_sets.
    ("tokens per second", 1, ("tokens_per_second",)),
    ("learning rate", 1, ("train/learning_rate",)),
)
# What the horizontal axis may be, and its label.
AXES = {
    "steps": "optimizer steps",
    "tokens": "tokens",
    "hours": "hours of training, without evaluations and pauses",
}
EVAL_SET = re.compile(f"eval/({NAME})/loss")
MOST_FLOAT = float(np.finfo(np.float32).max)


class Curve(NamedTuple):
    """A metric over a run.

    Attributes:
      steps: at which it was logged, [points] int64, ascending.
      x: where they are on the horizontal axis, [points] float64.
      values: of the metric, [points] float64.
    """

    steps: np.ndarray
    x: np.ndarray
    values: np.ndarray


class Band(NamedTuple):
    """Mean, lowest and highest of several curves, over the steps that all of them have.

    All are [points] float64; x is the mean, too.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(curves: Sequence[Curve]) -> Band:
    """Takes the mean, the lowest and the highest value of several curves."""
    steps = reduce(np.intersect1d, [curve.steps for curve in curves])
    at = [np.searchsorted(curve.steps, steps) for curve in curves]
    values = np.stack([curve.values[i] for curve, i in zip(curves, at, strict=True)])
    x = np.stack([curve.x[i] for curve, i in zip(curves, at, strict=True)])
    return Band(x.mean(0), values.mean(0), values.min(0), values.max(0))


def workdirs(given: Iterable[str]) -> list[str]:
    """Replaces each folder that is no run by all runs in it and in its folders, sorted.

    Raises:
      ConfigError: a folder doesn't exist, or there is no run in it.
    """
    found: list[str] = []
    for folder in given:
        path = paths.local("WORKDIR", folder)
        if not path.is_dir():
            raise ConfigError(f"{shown(folder)} is no folder: give the --workdir of a training run")
        inside = sorted(_runs(path))
        if not inside:
            raise ConfigError(
                f"{shown(folder)} holds no {JSONL}, nor do its folders: give the --workdir of a "
                "training run, or a folder of several"
            )
        found += [folder] if inside == [str(path)] else inside
    return found


def _runs(path: Path) -> Iterable[str]:
    for folder, below, files in os.walk(path):
        if JSONL in files:
            below.clear()  # What is in a run is no run.
            yield folder


def names(workdirs: Sequence[str]) -> list[str]:
    """Names runs by the last parts of their paths, as many as tell them apart.

    Examples:
      >>> names(["runs/a", "runs/b/"]), names(["x/run", "y/run"])
      (['a', 'b'], ['x/run', 'y/run'])
    """
    parts = [Path(os.path.abspath(os.path.expanduser(path))).parts for path in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise ConfigError("WORKDIR is given twice: give each once")


def seeds(runs: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups runs whose configs differ in their `seed`, and in nothing else.

    Args:
      runs: {name: workdir}. A run whose config.json can't be read is a group of its own.

    Returns:
      {label: names of the runs}, in the given order; a single run's label is its name.
    """
    groups: dict[str, dict[Any, list[str]]] = {}
    for name, workdir in runs.items():
        config, seed = _config(Path(workdir).expanduser(), name)
        groups.setdefault(config, {}).setdefault(seed, []).append(name)
    found = {}
    for group in groups.values():
        members = [name for same in group.values() for name in same]
        if len(members) == len(group) > 1:
            found[f"{members[0]} ... {members[-1]} ({len(group)} seeds)"] = members
        else:  # A single run; or one seed twice, and their mean would say nothing.
            found |= {name: [name] for name in members}
    return found


def _config(workdir: Path, name: str) -> tuple[str, Any]:
    """Returns a run's config without its seed, as text, and the seed."""
    try:
        config = json.loads((workdir / "config.json").read_text("utf-8"))
        seed = config.pop("seed")
        return json.dumps(config, sort_keys=True), str(seed)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return f"config of {name}", None


def curves(workdir: str, x: str = "steps") -> dict[str, Curve]:
    """Reads a run's curves from its metrics.jsonl.

    Lines that are cut off or damaged, and values that are no numbers, are left out.

    Args:
      workdir: the folder of a run, which may be in progress.
      x: what the horizontal axis shows, a key of AXES.

    Returns:
      {metric: its curve}; where a step has several values, the last one.

    Raises:
      ConfigError: there is no such run, or it has logged nothing yet.
    """
    folder = paths.local("WORKDIR", workdir)
    records = read_jsonl(folder)
    wanted = [name for _, _, figures in PANELS for name in figures]
    logged = set().union(*records)
    wanted += sorted(name for name in logged if EVAL_SET.fullmatch(name))
    found = {name: points for name in wanted if len((points := _points(records, name))[0])}
    if not found:
        raise ConfigError(
            f"{folder / JSONL} has no figures yet: wait until the run has logged some, or give "
            "another workdir"
        )
    if x == "steps":
        return {name: Curve(steps, steps, values) for name, (steps, values) in found.items()}
    at, so_far = _progress(records, x)
    if not at.any():
        raise ConfigError(f"{folder / JSONL} has no speeds yet, as --x={x} needs: use --x=steps")
    return {
        name: Curve(steps, np.interp(steps, at, so_far), values)
        for name, (steps, values) in found.items()
    }


def _progress(records: list[dict[str, Any]], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps, and the tokens or hours of training up to each, from the logged speeds.

    The speeds leave out evaluations, and the time between the starts of a run that was resumed.
    """
    steps, each = _points(records, "step_time_ms")
    each = each / 3.6e6
    if x == "tokens":
        also, rate = _points(records, "tokens_per_second")
        steps, here, there = np.intersect1d(steps, also, return_indices=True)
        each = each[here] * rate[there] * 3600
    last = max((record["step"] for record in records if _plottable(record["step"])), default=0)
    if len(steps) and last > steps[-1]:  # As fast as before, up to the last evaluation.
        steps, each = np.append(steps, last), np.append(each, each[-1])
    steps = np.concatenate([[0], steps])
    return steps, np.concatenate([[0.0], np.cumsum(np.diff(steps) * each)])


def _points(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = {r["step"]: r[name] for r in records if _plottable(r["step"]) and _number(r.get(name))}
    steps = sorted(points)
    return np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64)


def _plottable(step: int) -> bool:
    return 0 <= step <= MAX_INT32


def _number(value: Any) -> bool:
    # Metrics are computed in float32; an axis can't show larger numbers.
    return type(value) in (int, float) and abs(value) <= MOST_FLOAT


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Takes the mean over up to `reach` neighbours on either side, [points] -> [points].

    At the steep beginning there are as many before as after; at the end that would be noisy.
    """
    at = np.arange(len(values))
    first = at - np.minimum(at, reach)
    last = np.minimum(2 * at - first, len(values) - 1)
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)
