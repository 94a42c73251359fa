"""The plan of a run, as numbers and tables: memory, time per step, efficiency on more devices.

Nothing is allocated, except for a matrix product that is timed if no FLOP rate is given.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common import png
from jaxdp.common.errors import ConfigError
from jaxdp.common.terminal import in_bytes, quantity
from jaxdp.data.cache import open_cache
from jaxdp.estimate import memory, scaling
from jaxdp.estimate.memory import Memory
from jaxdp.estimate.scaling import COUNTS
from jaxdp.model.transformer import ModelConfig, Transformer, parameter_shapes
from jaxdp.parallel.replicas import device_memory
from jaxdp.step.setup import splits, validate
from jaxdp.sync import traffic
from jaxdp.sync.traffic import Collective

EFFICIENCY = (
    "Efficiency: compute / (compute + communication), no overlap, the same batch per device"
)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The hardware that a plan assumes.

    Attributes:
      devices: number of devices.
      bandwidth_gbps: Gbit/s that a device can send.
      latency_us: microseconds per message.
      flop_rate: FLOP/s that a device reaches.
      measured: whether flop_rate was timed on this host.
      memory: bytes of memory per device.
    """

    devices: int
    bandwidth_gbps: float
    latency_us: float
    flop_rate: float
    measured: bool
    memory: int

    @property
    def link(self) -> tuple[float, float]:
        """The bytes per second that a device sends, and the seconds per message."""
        return self.bandwidth_gbps * 1e9 / 8, self.latency_us / 1e6


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predictions about a run; a notebook shows them as tables.

    Attributes:
      assumptions: the hardware.
      memory: bytes per device.
      largest_batch: the most sequences per device that fit.
      seconds: computing time per step.
      efficiency: {method: {devices: compute / (compute + communication)}}.
      tables: {title: {row: text}}, all of the above as text.
    """

    assumptions: Assumptions
    memory: Memory
    largest_batch: int
    seconds: float
    efficiency: dict[str, dict[int, float]]
    tables: dict[str, dict[str, str]]

    def __repr__(self) -> str:
        """Returns the tables as text, as the command prints them to a file."""
        lines = []
        for title, rows in self.tables.items():
            width = max(map(len, rows))
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
        return "\n".join(lines)


def plan(
    config: ConfigDict,
    *,
    devices: int | None = None,
    bandwidth_gbps: float = 100.0,
    latency_us: float = 10.0,
    tflops: float | None = None,
    memory_gib: float | None = None,
    vocab_size: int | None = None,
    check: bool = False,
    report: Callable[[str], None] = print,
) -> Plan:
    """Predicts a run's memory per device, time per step, and efficiency on more devices.

    Args:
      config: a config with the keys of configs/default.py.
      devices: number of devices; by default those of this host.
      bandwidth_gbps: Gbit/s that a device can send.
      latency_us: microseconds per message.
      tflops: 10^12 FLOP/s that a device reaches; by default a matrix product is timed here.
      memory_gib: GiB of memory per device; by default that of this host's devices.
      vocab_size: vocabulary size; if given, the tokenizer is not opened.
      check: whether to compile the step as well, and compare the memory that XLA reports.
      report: called with a line of text before something slow.

    Raises:
      ConfigError: the config is wrong, or can't be planned on this host.
    """
    vocab = vocabulary(config, vocab_size, report)
    count = devices or jax.local_device_count()
    if check and count > jax.local_device_count():
        raise ConfigError(
            f"--check compiles for {jax.local_device_count()} local devices, not --devices={count}:"
            " lower it, or on a CPU set JAX_NUM_CPU_DEVICES"
        )
    limit = int(memory_gib * 2**30) if memory_gib else device_memory()
    remat = {
        on: memory.predict_memory(memory.changed(config, "model.remat", on), vocab, count)
        for on in (False, True)
    }
    batch = memory.largest_batch(memory.effective(config), vocab, count, limit)
    compiled = {"XLA": check_rows(config, vocab, count)} if check else {}
    rate = tflops * 1e12 if tflops else scaling.measure_rate(config)
    given = Assumptions(count, bandwidth_gbps, latency_us, rate, not tflops, limit)
    efficiency = scaling.efficiencies(config, vocab, count, rate, *given.link)
    tables = {
        "Memory per device": memory_rows(config, given, remat, batch),
        **compiled,
        "Time per step": time_rows(config, vocab, given),
        EFFICIENCY: efficiency_rows(efficiency),
    }
    seconds = scaling.compute_seconds(config, vocab, count, rate)
    predicted = remat[memory.remat_saves(config)]
    return Plan(given, predicted, batch, seconds, efficiency, tables)


def vocabulary(config: ConfigDict, given: int | None, report: Callable[[str], None]) -> int:
    """Returns the vocabulary size, from the config alone if possible; validates the config.

    Raises:
      ConfigError: the config is wrong, or the tokenizer is needed and can't be opened.
    """
    configs.check_values(config)
    size = re.fullmatch(r"train:bpe:(\d{3,7})", config.tokenizer)
    if size:
        given = given or int(size[1])
    elif config.tokenizer == "byte":  # 256 bytes, an end-of-text token, and a mask token.
        given = given or 257 + (config.objective == "masked")
    if given and not config.data.path:
        config = ConfigDict(config.to_dict())
        config.data.path = "unused"
    validate(config)
    return given or open_cache(config, report).vocab_size


def memory_rows(
    config: ConfigDict, given: Assumptions, remat: dict[bool, Memory], batch: int
) -> dict[str, str]:
    """Returns rows about parameters, memory with and without remat, and the largest batch."""
    predicted = remat[memory.remat_saves(config)]
    activations = [in_bytes(remat[on].activations) for on in (False, True)]
    parameters = predicted.parameters // 4  # float32
    useless = not memory.remat_saves(memory.changed(config, "model.remat", True))
    note = " (on this XLA only with model.scan_layers)" if useless else ""
    bad = [str(n) for n in COUNTS if not splits(config, n)]
    return {
        "parameters": f"{quantity(parameters)} in {in_bytes(predicted.parameters)}",
        **({"their EMA": in_bytes(predicted.average)} if config.ema.decay else {}),
        "optimizer state": in_bytes(predicted.optimizer),
        "gradients": in_bytes(predicted.gradients),
        "activations": f"{activations[0]}, with remat {activations[1]}{note}",
        "total": f"{in_bytes(predicted.total)}, model.remat={config.model.remat}, "
        f"loss_chunks={config.loss_chunks}",
        "devices": f"{given.devices}, {config.global_batch_size // given.devices} sequences each, "
        f"grad_accum_steps={config.grad_accum_steps}, sync.method={config.sync.method}",
        "largest batch": f"{batch} sequences per device in {given.memory / 2**30:.3g} GiB",
        "can't split": f"global_batch_size={config.global_batch_size} over "
        f"{', '.join(bad) or 'none'} of 1 to {COUNTS[-1]} devices",
    }


def check_rows(config: ConfigDict, vocab: int, count: int) -> dict[str, str]:
    """Compiles the step; returns rows that compare the prediction with XLA's memory."""
    actual = memory.compiled_memory(config, vocab, count)
    predicted = memory.predict_memory(memory.effective(config), vocab, count).total
    return {
        "compiled": f"{actual} bytes",
        "predicted": f"{predicted} bytes",
        "error": f"{predicted / actual - 1:+.1%}",
    }


def time_rows(config: ConfigDict, vocab: int, given: Assumptions) -> dict[str, str]:
    """Returns rows about FLOPs, computing time, and a ring all-reduce of the gradient."""
    count, rate = given.devices, given.flop_rate
    per_token, per_step = scaling.step_flops(config, vocab, count)
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, vocab)))
    gradient = Collective("all-reduce", traffic.num_bytes(params, config.sync.dtype))
    ring = scaling.communication([gradient], count, *given.link)
    origin = "reached by a matrix product of this model, timed here" if given.measured else "given"
    return {
        "FLOPs per token": f"{per_token:.3g}",
        "FLOPs per step": f"{per_step:.3g} per device"
        + (", a third more for remat" if config.model.remat else ""),
        "FLOP rate": f"{rate:.3g} per device and second, {origin}",
        "computing": f"{scaling.compute_seconds(config, vocab, count, rate):.3g} s",
        "gradient all-reduce": f"{ring:.3g} s, a ring of {count} at {given.bandwidth_gbps:g} "
        f"Gbit/s with {given.latency_us:g} us",
    }


def efficiency_rows(table: dict[str, dict[int, float]]) -> dict[str, str]:
    """Formats the result of `scaling.efficiencies`, a row per number of devices."""
    rows = {"devices": "  ".join(f"{name:>14}" for name in table)}
    for n in COUNTS:
        cells = (f"{by_count[n]:.1%}" if n in by_count else "-" for by_count in table.values())
        rows[str(n)] = "  ".join(f"{cell:>14}" for cell in cells)
    return rows


def draw(found: Plan) -> Any:
    """Draws efficiency over devices with matplotlib, a line per sync.method."""
    figure = png.new(7, 4.5)
    axes = figure.subplots()
    # Small markers on large ones: the lines of gradient_mean and sharded coincide.
    sizes = itertools.chain([10], itertools.repeat(6))
    styles = zip(found.efficiency.items(), itertools.cycle("os^DvP*"), sizes, strict=False)
    for (name, by_count), marker, size in styles:
        x, y = list(by_count), list(by_count.values())
        axes.plot(x, y, marker=marker, markersize=size, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("devices, the same batch on each")
    axes.set_ylabel("compute / (compute + communication)")
    link = f"{found.assumptions.bandwidth_gbps:g} Gbit/s, {found.assumptions.latency_us:g} us"
    axes.set_title(f"Predicted: {link}, no overlap")
    axes.grid(alpha=0.3)
    axes.legend(title="sync.method", frameon=False)
    return figure
