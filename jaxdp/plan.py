"""The command `python -m jaxdp.plan --config=FILE.py [--config.key=value ...]`: what a run takes.

Memory per device, time per step, and how well each sync.method scales; nothing is allocated but for
a matrix product that is timed, unless --tflops says what devices do.

Exit status: 0; 2 the config or a flag is wrong; anything else is a fault.
"""

import itertools
import re
import sys
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxdp.common import cli, png
from jaxdp.common import config as configs
from jaxdp.common.choices import MOST
from jaxdp.common.errors import ConfigError
from jaxdp.common.terminal import Display, in_bytes, quantity
from jaxdp.data.cache import open_cache
from jaxdp.estimate import memory, scaling
from jaxdp.estimate.scaling import COUNTS
from jaxdp.model.transformer import ModelConfig, Transformer, parameter_shapes
from jaxdp.parallel.replicas import device_memory
from jaxdp.step.setup import splits, validate
from jaxdp.sync import traffic
from jaxdp.sync.traffic import Collective

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices of the run; by default this host's.", 1, MOST
)
BANDWIDTH = flags.DEFINE_float("bandwidth_gbps", 100.0, "Gbit/s that a device can send.", 1e-6)
LATENCY = flags.DEFINE_float("latency_us", 10.0, "Microseconds that a message takes.", 0.0)
TFLOPS = flags.DEFINE_float("tflops", None, "10^12 FLOP/s that a device reaches; or timed.", 1e-6)
MEMORY = flags.DEFINE_float("memory_gib", None, "GiB of a device; or this host's devices'.", 1e-6)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "If the tokenizer need not be asked.", 1, MOST
)
PNG = flags.DEFINE_string("png", None, "File for a plot of efficiency over devices.")
CHECK = flags.DEFINE_bool("check", False, "Also compile the step, and compare XLA's figures.")


def main() -> int:
    """Prints the plan; returns the exit status."""
    config, display = cli.given_config(CONFIG), Display()
    cli.check_finite(BANDWIDTH, LATENCY, TFLOPS, MEMORY)
    if PNG.value:
        png.check(PNG.name, PNG.value)
    vocab = vocabulary(config, VOCAB_SIZE.value, display.line)
    count = DEVICES.value or jax.local_device_count()
    if CHECK.value and count > jax.local_device_count():
        raise ConfigError(
            f"--check compiles for {jax.local_device_count()} local devices, not --devices={count}:"
            " lower it, or on a CPU set JAX_NUM_CPU_DEVICES"
        )
    display.table("Memory per device", memory_rows(config, vocab, count))
    if CHECK.value:
        display.table("XLA", check_rows(config, vocab, count))
    rate = TFLOPS.value * 1e12 if TFLOPS.value else scaling.measure_rate(config)
    display.table("Time per step", time_rows(config, vocab, count, rate))
    table = scaling.efficiencies(
        config, vocab, count, rate, BANDWIDTH.value * 1e9 / 8, LATENCY.value / 1e6
    )
    title = "Efficiency: compute / (compute + communication), no overlap, the same batch per device"
    display.table(title, efficiency_rows(table))
    if PNG.value:
        plot(table, PNG.value)
    return 0


def vocabulary(config: ConfigDict, given: int | None, report: Callable[[str], None]) -> int:
    """The number of tokens, from the config alone where possible; validates the config.

    Raises:
      ConfigError: the config is wrong, or the tokenizer has to be made and can't be.
    """
    configs.check_values(config)
    size = re.fullmatch(r"train:bpe:(\d{3,7})", config.tokenizer)
    if size:
        given = given or int(size[1])
    elif config.tokenizer == "byte":  # 256 bytes, the end of a text, and a mask.
        given = given or 257 + (config.objective == "masked")
    if given and not config.data.path:
        config = ConfigDict(config.to_dict())
        config.data.path = "unused"
    validate(config)
    return given or open_cache(config, report).vocab_size


def memory_rows(config: ConfigDict, vocab: int, count: int) -> dict[str, str]:
    """Parameters, memory with and without remat, and the batch that fits."""
    remat = {
        on: memory.predict_memory(memory.changed(config, "model.remat", on), vocab, count)
        for on in (False, True)
    }
    predicted = remat[memory.remat_saves(config)]
    limit = int(MEMORY.value * 2**30) if MEMORY.value else device_memory()
    batch = memory.largest_batch(memory.effective(config), vocab, count, limit)
    parameters = predicted.parameters // 4  # float32
    useless = not memory.remat_saves(memory.changed(config, "model.remat", True))
    note = " (not by this XLA, but with model.scan_layers)" if useless else ""
    bad = [str(n) for n in COUNTS if not splits(config, n)]
    return {
        "parameters": f"{quantity(parameters)} in {in_bytes(predicted.parameters)}",
        **({"their average": in_bytes(predicted.average)} if config.ema.decay else {}),
        "optimizer state": in_bytes(predicted.optimizer),
        "gradients": in_bytes(predicted.gradients),
        "activations": f"{in_bytes(remat[False].activations)}, with remat "
        f"{in_bytes(remat[True].activations)}{note}",
        "total": f"{in_bytes(predicted.total)}, model.remat={config.model.remat}, "
        f"loss_chunks={config.loss_chunks}",
        "devices": f"{count}, {config.global_batch_size // count} sequences each, "
        f"grad_accum_steps={config.grad_accum_steps}, sync.method={config.sync.method}",
        "largest batch": f"{batch} sequences per device in {limit / 2**30:.3g} GiB",
        "can't split": f"global_batch_size={config.global_batch_size} over "
        f"{', '.join(bad) or 'none'} of 1 to {COUNTS[-1]} devices",
    }


def check_rows(config: ConfigDict, vocab: int, count: int) -> dict[str, str]:
    """Compiles the step, and compares XLA's figure with the prediction."""
    actual = memory.compiled_memory(config, vocab, count)
    predicted = memory.predict_memory(memory.effective(config), vocab, count).total
    return {
        "compiled": f"{actual} bytes",
        "predicted": f"{predicted} bytes",
        "error": f"{predicted / actual - 1:+.1%}",
    }


def time_rows(config: ConfigDict, vocab: int, count: int, rate: float) -> dict[str, str]:
    """FLOPs, and the seconds that they and a ring all-reduce of the gradient take."""
    per_token, per_step = scaling.step_flops(config, vocab, count)
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, vocab)))
    gradient = Collective("all-reduce", traffic.num_bytes(params, config.sync.dtype))
    ring = scaling.communication([gradient], count, BANDWIDTH.value * 1e9 / 8, LATENCY.value / 1e6)
    origin = "given" if TFLOPS.value else "reached by a matrix product of this model, timed here"
    return {
        "FLOPs per token": f"{per_token:.3g}",
        "FLOPs per step": f"{per_step:.3g} per device"
        + (", a third more for remat" if config.model.remat else ""),
        "FLOP rate": f"{rate:.3g} per device and second, {origin}",
        "computing": f"{scaling.compute_seconds(config, vocab, count, rate):.3g} s",
        "gradient all-reduce": f"{ring:.3g} s, a ring of {count} at {BANDWIDTH.value:g} Gbit/s "
        f"with {LATENCY.value:g} us",
    }


def efficiency_rows(table: dict[str, dict[int, float]]) -> dict[str, str]:
    """`efficiencies` as text, a row per number of devices."""
    rows = {"devices": "  ".join(f"{name:>14}" for name in table)}
    for n in COUNTS:
        cells = (f"{by_count[n]:.1%}" if n in by_count else "-" for by_count in table.values())
        rows[str(n)] = "  ".join(f"{cell:>14}" for cell in cells)
    return rows


def plot(table: dict[str, dict[int, float]], path: str) -> None:
    """Draws `efficiencies` into a PNG.

    Raises:
      ConfigError: the file can't be written.
    """
    figure = png.new(7, 4.5)
    axes = figure.subplots()
    # Small on top of large, for gradient_mean and sharded send the same.
    markers = itertools.cycle("os^DvPX*")
    for i, ((name, by_count), marker) in enumerate(zip(table.items(), markers, strict=False)):
        x, y = list(by_count), list(by_count.values())
        axes.plot(x, y, marker=marker, markersize=6 if i else 10, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("devices, the same batch on each")
    axes.set_ylabel("compute / (compute + communication)")
    axes.set_title(f"Predicted: {BANDWIDTH.value:g} Gbit/s, {LATENCY.value:g} us, no overlap")
    axes.grid(alpha=0.3)
    axes.legend(title="sync.method", frameon=False)
    png.save(figure, PNG.name, path)


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_overrides))
