"""The training curves of runs, read from their metrics, and a figure of them."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdp.common import paths, png
from jaxdp.common.choices import MAX_INT32
from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.terminal import quantity
from jaxdp.data.eval_sets import NAME
from jaxdp.workdir.metrics import JSONL, read_jsonl

# The panels from top to bottom: label of the axis, share of the height, metrics.
PANELS = (
    ("loss, nats per token", 3, ("train/loss", "eval/loss")),  # And the losses of eval_sets.
    ("tokens per second", 1, ("tokens_per_second",)),
    ("learning rate", 1, ("train/learning_rate",)),
)
EVAL_SET = re.compile(f"eval/({NAME})/loss")
MARKERS = "o^sDvPX*"  # For the validation split, then eval_sets in the order of their names.
SMOOTH = 50  # A training loss with more points than this is smoothed.

MOST_FLOAT = float(np.finfo(np.float32).max)

Curve = tuple[np.ndarray, np.ndarray]


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


def curves(workdir: str) -> dict[str, Curve]:
    """Reads a run's curves from its metrics.jsonl.

    Lines that are cut off or damaged, and values that are no numbers, are left out.

    Args:
      workdir: the folder of a run, which may be in progress.

    Returns:
      {metric: (steps [points] int64, values [points] float64)}, in the order of steps; where a step
      has several values, the last one.

    Raises:
      ConfigError: there is no such run, or it has logged nothing yet.
    """
    folder = paths.local("WORKDIR", workdir)
    if not folder.is_dir():
        raise ConfigError(f"{shown(workdir)} is no folder: give the --workdir of a training run")
    try:
        records = read_jsonl(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder / JSONL} can't be read ({error.strerror}): give the --workdir of a training "
            "run"
        ) from None
    wanted = [name for _, _, figures in PANELS for name in figures]
    logged = set().union(*records)
    wanted += sorted(name for name in logged if EVAL_SET.fullmatch(name))
    found = {name: curve for name in wanted if len((curve := _curve(records, name))[0])}
    if not found:
        raise ConfigError(
            f"{folder / JSONL} has no figures yet: wait until the run has logged some, or give "
            "another workdir"
        )
    return found


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    points = {r["step"]: r[name] for r in records if _plottable(r["step"]) and _number(r.get(name))}
    steps = sorted(points)
    return np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64)


def _plottable(step: int) -> bool:
    return 0 <= step <= MAX_INT32


def _number(value: Any) -> bool:
    # Metrics are computed in float32; an axis can't show larger numbers.
    return type(value) in (int, float) and abs(value) <= MOST_FLOAT


def draw(runs: dict[str, dict[str, Curve]]) -> Any:
    """Draws a figure of the `curves` of each run, by the run's name."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = png.new(8, 8)
    rows = figure.subplots(
        len(PANELS), sharex=True, height_ratios=[share for _, share, _ in PANELS]
    )
    few = len(runs) <= 10
    palette = matplotlib.colormaps["tab10" if few else "turbo"]
    colours = [palette(i if few else i / (len(runs) - 1)) for i in range(len(runs))]
    styles = _styles(runs)
    for axes, (label, _, wanted) in zip(rows, PANELS, strict=True):
        shown = (*wanted, *(styles if "eval/loss" in wanted else ()))
        for (name, run), colour in zip(runs.items(), colours, strict=True):
            for figures in [figures for figures in dict.fromkeys(shown) if figures in run]:
                _line(axes, figures, run[figures], colour, name, styles.get(figures))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss, speed, _ = rows
    if all((line.get_ydata() > 0).all() for line in loss.lines):
        # On a linear scale, the high losses of the first steps would flatten the rest.
        loss.set_yscale("log")
    loss.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    loss.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    speed.set_ylim(bottom=0)
    speed.set_xlim(left=0)
    speed.yaxis.set_major_formatter(lambda value, _: quantity(value))
    rows[-1].set_xlabel("optimizer steps")
    rows[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    rows[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.align_ylabels()
    _legends(figure, loss, list(runs), colours, styles)
    return figure


def _styles(runs: dict[str, dict[str, Curve]]) -> dict[str, dict[str, Any]]:
    """Returns {metric: line style} for the validation loss and the loss of each eval set."""
    sets = sorted({name for run in runs.values() for name in run if EVAL_SET.fullmatch(name)})
    return {
        figures: {"linestyle": "--" if figures == "eval/loss" else ":", "marker": marker}
        for figures, marker in zip(("eval/loss", *sets), itertools.cycle(MARKERS), strict=False)
    }


def _line(
    axes: Any, figures: str, curve: Curve, colour: Any, name: str, style: dict[str, Any] | None
) -> None:
    """Draws a curve; a training loss with many points is smoothed, with its points behind."""
    steps, values = curve
    if style:
        axes.plot(steps, values, color=colour, markersize=4, label=name, **style)
        return
    if figures == "train/loss" and len(steps) > SMOOTH:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        values = smooth(values, len(steps) // 30)
    # A line through a single point would be invisible.
    axes.plot(steps, values, "." if len(steps) == 1 else "-", color=colour, lw=1.5, label=name)


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Takes the mean over up to `reach` neighbours on either side, [points] -> [points].

    At the steep beginning there are as many before as after; at the end that would be noisy.
    """
    at = np.arange(len(values))
    first = at - np.minimum(at, reach)
    last = np.minimum(2 * at - first, len(values) - 1)
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _legends(
    figure: Any, loss: Any, runs: list[str], colours: list[Any], styles: dict[str, dict[str, Any]]
) -> None:
    """Adds legends: runs by colour above the figure, line styles in the panel of the loss."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=3) for colour in colours]
    columns = max(1, 90 // (max(map(len, runs)) + 8))
    legend = figure.legend(lines, runs, loc="outside upper center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # A name may hold a $.
    kinds = {"training": Line2D([], [], color="0.3")}
    for figures, style in styles.items():
        found = EVAL_SET.fullmatch(figures)
        line = Line2D([], [], color="0.3", markersize=4, **style)
        kinds[f"on {found[1]}" if found else "validation"] = line
    legend = loss.legend(list(kinds.values()), list(kinds), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
