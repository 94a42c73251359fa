"""Predicts the memory, the time and the scaling of a run.

    jaxdp plan --config=FILE.py [--devices=N --bandwidth_gbps=B ...] [--config.KEY=VALUE ...]

`python -m jaxdp.plan` is the same. It prints memory per device, time per step, and how well each
sync.method scales. It doesn't allocate the model. It times a matrix product to learn the speed of a
device, unless --tflops gives it.

Exit status: 0; 2 the config or a flag is wrong; anything else is a fault.
"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli, png
from jaxdp.common.choices import MOST
from jaxdp.common.terminal import Display

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
DEVICES = flags.DEFINE_integer(
    "devices", None, "Number of devices; by default this machine's.", 1, MOST
)
BANDWIDTH = flags.DEFINE_float("bandwidth_gbps", 100.0, "Gbit/s that a device can send.", 1e-6)
LATENCY = flags.DEFINE_float("latency_us", 10.0, "Latency of a message in microseconds.", 0.0)
TFLOPS = flags.DEFINE_float(
    "tflops", None, "10^12 FLOP/s that a device reaches; by default measured here.", 1e-6
)
MEMORY = flags.DEFINE_float(
    "memory_gib", None, "Memory of a device in GiB; by default as on this machine.", 1e-6
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "Size of the vocabulary; by default taken from the tokenizer.", 1, MOST
)
PNG = flags.DEFINE_string("png", None, "PNG file for a plot of efficiency over devices.")
CHECK = flags.DEFINE_bool("check", False, "Also compile the step, to compare with XLA's figures.")


def main() -> int:
    """Prints the plan; returns the exit status."""
    config, display = cli.given_config(CONFIG), Display()
    cli.check_finite(BANDWIDTH, LATENCY, TFLOPS, MEMORY)
    if PNG.value:
        png.check(PNG.name, PNG.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.estimate.plan import draw, plan

    found = plan(
        config,
        devices=DEVICES.value,
        bandwidth_gbps=BANDWIDTH.value,
        latency_us=LATENCY.value,
        tflops=TFLOPS.value,
        memory_gib=MEMORY.value,
        vocab_size=VOCAB_SIZE.value,
        check=CHECK.value,
        report=display.line,
    )
    for title, rows in found.tables.items():
        display.table(title, rows)
    if PNG.value:
        png.save(draw(found), PNG.name, PNG.value)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_config))
