"""Says what a run will take: memory, time, and how it scales.

    jaxdp plan --config=FILE.py [--gpu=h100 --devices=N ...] [--config.KEY=VALUE ...]

`python -m jaxdp.plan` is the same. It compiles the training step, for this machine's devices or for
NVIDIA GPUs that it needn't have (pip install 'jaxdp[plan-gpu]'). It prints the memory that a device
needs, the largest batch that fits, time per step, and how well each sync.method scales. No model is
allocated. Without --gpu and --tflops, it times a matrix product to learn the speed of a device.
With --hours=2 it proposes what to train in 2 hours, as keys to paste behind `jaxdp train`, and for
this machine trains models of some sizes for a few seconds to time their steps.

Exit status: 0; 2 the config or a flag is wrong; anything else is a fault.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli, pictures
from jaxdp.common.choices import OPTIONS
from jaxdp.common.terminal import Display

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
GPU = flags.DEFINE_string(
    "gpu", None, "Compile for h100, h200, a100, l4 or rtx4090; by default for this machine's."
)
DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "Number of devices; by default one GPU, or this machine's.",
    *OPTIONS["devices"],
)
HOSTS = flags.DEFINE_integer(
    "hosts", 1, "Machines that the GPUs are in, together.", *OPTIONS["hosts"]
)
BANDWIDTH = flags.DEFINE_float(
    "bandwidth_gbps",
    None,
    "Gbit/s that a device can send; by default by NVLink, or 100.",
    *OPTIONS["bandwidth_gbps"],
)
INSIDE = flags.DEFINE_float(
    "inside_bandwidth_gbps",
    None,
    "Gbit/s within an island; by default by NVLink.",
    *OPTIONS["inside_bandwidth_gbps"],
)
LATENCY = flags.DEFINE_float(
    "latency_us", 10.0, "Latency of a message in microseconds.", *OPTIONS["latency_us"]
)
TFLOPS = flags.DEFINE_float(
    "tflops",
    None,
    "10^12 FLOP/s that a device reaches; by default by --mfu, or measured.",
    *OPTIONS["tflops"],
)
MFU = flags.DEFINE_float(
    "mfu",
    0.4,
    "Share of the GPU's bfloat16 peak that a step reaches, without remat.",
    *OPTIONS["mfu"],
)
MEMORY = flags.DEFINE_float(
    "memory_gib",
    None,
    "GiB of a device for programs; by default what JAX takes of it.",
    *OPTIONS["memory_gib"],
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    None,
    "Size of the vocabulary; by default taken from the tokenizer.",
    *OPTIONS["vocab_size"],
)
HOURS = flags.DEFINE_float(
    "hours", None, "Plan the best model that can be trained in this time, on these devices."
)
PNG = flags.DEFINE_string(
    "png", None, "PNG, SVG or PDF file for a plot of efficiency over devices."
)


def main() -> int:
    """Prints the plan; returns the exit status."""
    config, display = cli.config_of_flag(CONFIG), Display()
    cli.check_finite(BANDWIDTH, INSIDE, LATENCY, TFLOPS, MFU, MEMORY, HOURS)
    png = pictures.check(PNG.name, PNG.value) if PNG.value else None
    # XLA warns where a program needs most of a GPU's memory; the plan says it better.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.common.config import check_values
    from jaxdp.estimate.plan import plan
    from jaxdp.estimate.tables import draw
    from jaxdp.parallel import cpu
    from jaxdp.run.preflight import check_devices
    from jaxdp.step.setup import same_on_two_devices

    cli.prepare_jax()
    check_values(config)
    if DEVICES.value:
        cpu.be_devices(DEVICES.value)
    elif same_on_two_devices(config):
        cpu.be_two_devices()
    check_devices()
    found = plan(
        config,
        gpu=GPU.value,
        devices=DEVICES.value,
        hosts=HOSTS.value,
        bandwidth_gbps=BANDWIDTH.value,
        inside_bandwidth_gbps=INSIDE.value,
        latency_us=LATENCY.value,
        tflops=TFLOPS.value,
        mfu=MFU.value,
        memory_gib=MEMORY.value,
        vocab_size=VOCAB_SIZE.value,
        hours=HOURS.value,
        report=display.line,
    )
    for title, rows in found.tables.items():
        display.table(title, rows)
    if png:
        pictures.save(draw(found.efficiency, found.assumptions), PNG.name, png)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_config))
