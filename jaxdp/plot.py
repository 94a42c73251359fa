"""Plots loss, speed and learning rate of runs as a PNG, SVG or PDF.

    jaxdp plot WORKDIR [WORKDIR ...] [--output=plot.svg] [--x=hours]

`python -m jaxdp.plot` is the same. A folder that is no run stands for all runs in it. The runs may
be finished or under way. Those that differ only in their seed are drawn as one line, their mean, in
a band from the lowest to the highest of them. It needs matplotlib: pip install 'jaxdp[plot]'.

Exit status: 0; 2 a workdir or a flag is wrong; anything else is a fault.
"""

import sys
from collections.abc import Sequence

from absl import flags

from jaxdp.common import cli, pictures
from jaxdp.common.errors import ConfigError

OUTPUT = flags.DEFINE_string("output", "plot.png", "The file of the plot: .png, .svg or .pdf.")
X = flags.DEFINE_enum(
    "x",
    "steps",
    ["steps", "tokens", "hours"],
    "What to plot over: optimizer steps, tokens, or hours of training, in which evaluations and "
    "the pauses of a resumed run don't count.",
)


def main(given: Sequence[str]) -> int:
    """Draws the plot and prints its path; returns the exit status."""
    if not given:
        raise ConfigError("WORKDIR is missing: give the folder of a training run, or of several")
    output = pictures.check(OUTPUT.name, OUTPUT.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.workdir import curve_figure, curves

    found = curves.workdirs(given)
    runs, drawn = dict(zip(curves.names(found), found, strict=True)), {}
    for name, workdir in runs.items():
        try:
            drawn[name] = curves.curves(workdir, X.value)
        except ConfigError as error:
            if workdir in given:
                raise
            cli.warn(f"left out: {error}")  # One of many that has just begun.
    if not drawn:
        raise ConfigError("no run has figures yet: wait until one has logged some")
    groups = {
        label: [drawn[name] for name in members]
        for label, members in curves.seeds({name: runs[name] for name in drawn}).items()
    }
    pictures.save(curve_figure.draw(groups, X.value), OUTPUT.name, output)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, operands=True))
