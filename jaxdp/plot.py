"""Plots loss, speed and learning rate of runs as a PNG.

    jaxdp plot WORKDIR [WORKDIR ...] [--output=plot.png]

`python -m jaxdp.plot` is the same. The runs may be finished or under way. It needs matplotlib:
pip install 'jaxdp[plot]'.

Exit status: 0; 2 a workdir or a flag is wrong; anything else is a fault.
"""

import sys
from collections.abc import Sequence

from absl import flags

from jaxdp.common import cli, png
from jaxdp.common.errors import ConfigError

OUTPUT = flags.DEFINE_string("output", "plot.png", "PNG file for the plot.")


def main(workdirs: Sequence[str]) -> int:
    """Draws the plot and prints its path; returns the exit status."""
    if not workdirs:
        raise ConfigError("WORKDIR is missing: give the folder of a training run, or of several")
    png.check(OUTPUT.name, OUTPUT.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.workdir import curves

    runs = dict(zip(curves.names(workdirs), map(curves.curves, workdirs), strict=True))
    png.save(curves.draw(runs), OUTPUT.name, OUTPUT.value)
    print(OUTPUT.value)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, operands=True))
