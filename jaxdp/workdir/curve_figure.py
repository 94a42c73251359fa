"""Draws the curves of runs: loss, speed and learning rate below each other."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from jaxdp.common import pictures
from jaxdp.common.terminal import quantity
from jaxdp.workdir.curves import AXES, EVAL_SET, PANELS, Curve, band, smooth

MARKERS = "o^sDvPX*"  # For the validation split, then eval_sets in the order of their names.
SMOOTH = 50  # A training loss with more points than this is smoothed.

Run = Mapping[str, Curve]  # By metric, as `curves` returns them.


def draw(groups: Mapping[str, Sequence[Run]], x: str = "steps") -> Any:
    """Draws a figure of runs; runs in one group as their mean, in a band from lowest to highest.

    Args:
      groups: {label: the runs of a group}.
      x: what the curves have as x, a key of AXES.
    """
    figure = pictures.new(8, 8)
    rows = figure.subplots(
        len(PANELS), sharex=True, height_ratios=[share for _, share, _ in PANELS]
    )
    few = len(groups) <= 10
    palette = matplotlib.colormaps["tab10" if few else "turbo"]
    colours = [palette(i if few else i / (len(groups) - 1)) for i in range(len(groups))]
    styles = _styles(groups)
    for axes, (label, _, wanted) in zip(rows, PANELS, strict=True):
        shown = dict.fromkeys((*wanted, *(styles if "eval/loss" in wanted else ())))
        for (name, runs), colour in zip(groups.items(), colours, strict=True):
            for metric in shown:
                found = [run[metric] for run in runs if metric in run]
                if found:
                    _line(axes, metric, found, colour, name, styles.get(metric))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss, speed, rate = rows
    _scales(loss, speed, rate, x)
    figure.align_ylabels()
    _legends(figure, loss, groups, colours, styles)
    return figure


def _scales(loss: Any, speed: Any, rate: Any, x: str) -> None:
    if all((line.get_ydata() > 0).all() for line in loss.lines):
        # On a linear scale, the high losses of the first steps would flatten the rest.
        loss.set_yscale("log")
    loss.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    loss.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    speed.set_ylim(bottom=0)
    speed.set_xlim(left=0)
    speed.yaxis.set_major_formatter(lambda value, _: quantity(value))
    rate.set_xlabel(AXES[x])
    rate.xaxis.set_major_locator(MaxNLocator(8, integer=x != "hours", steps=[1, 2, 2.5, 5, 10]))
    numbers = {"steps": "{:,.0f}".format, "tokens": quantity, "hours": "{:g}".format}
    rate.xaxis.set_major_formatter(lambda value, _: numbers[x](value))


def _styles(groups: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Returns {metric: line style} for the validation loss and the loss of each eval set."""
    logged = {name for runs in groups.values() for run in runs for name in run}
    sets = sorted(filter(EVAL_SET.fullmatch, logged))
    return {
        metric: {"linestyle": "--" if metric == "eval/loss" else ":", "marker": marker}
        for metric, marker in zip(("eval/loss", *sets), itertools.cycle(MARKERS), strict=False)
    }


def _line(
    axes: Any,
    metric: str,
    curves: list[Curve],
    colour: Any,
    name: str,
    style: dict[str, Any] | None,
) -> None:
    """Draws a metric of a group; a training loss with many points is smoothed."""
    if metric == "train/loss" and len(curves[0].steps) > SMOOTH:
        if len(curves) == 1:
            axes.plot(curves[0].x, curves[0].values, color=colour, linewidth=0.7, alpha=0.25)
        curves = [
            curve._replace(values=smooth(curve.values, len(curve.steps) // 30)) for curve in curves
        ]
    x, mean, low, high = band(curves)
    if style:
        axes.plot(x, mean, color=colour, markersize=4, label=name, **style)
    else:
        # A line through a single point would be invisible.
        axes.plot(x, mean, "." if len(x) == 1 else "-", color=colour, lw=1.5, label=name)
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def _legends(
    figure: Any,
    loss: Any,
    groups: Mapping[str, Sequence[Run]],
    colours: list[Any],
    styles: dict[str, dict[str, Any]],
) -> None:
    """Adds legends: runs by colour above the figure, line styles in the panel of the loss."""
    lines = [Line2D([], [], color=colour, linewidth=3) for colour in colours]
    columns = max(1, 90 // (max(map(len, groups)) + 8))
    above = figure.legend(
        lines, list(groups), loc="outside upper center", ncols=columns, frameon=False
    )
    kinds: dict[str, Any] = {"training": Line2D([], [], color="0.3")}
    for metric, style in styles.items():
        found = EVAL_SET.fullmatch(metric)
        line = Line2D([], [], color="0.3", markersize=4, **style)
        kinds[f"on {found[1]}" if found else "validation"] = line
    if any(len(runs) > 1 for runs in groups.values()):
        kinds["of seeds: mean, lowest to highest"] = Patch(color="0.3", alpha=0.25, linewidth=0)
    inside = loss.legend(list(kinds.values()), list(kinds), frameon=False)
    for text in (*above.get_texts(), *inside.get_texts()):
        text.set_parse_math(False)  # A name may hold a $.
