"""The plan of a run, as numbers and tables: memory, collectives, time, efficiency on more devices.

The training step is compiled, for this machine's devices or for GPUs that it doesn't have. Nothing
is allocated, except for a matrix product that is timed if no rate is given.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common.choices import MAX_INT32, check_options
from jaxdp.common.files import num_bytes
from jaxdp.data import eval_sets
from jaxdp.data.cache import TokenCache, open_cache
from jaxdp.estimate import advice, assumptions, compiled, memory, scaling, tables
from jaxdp.estimate.assumptions import MFU, Assumptions
from jaxdp.estimate.budget import Budget, Proposal, propose
from jaxdp.estimate.compiled import Compiled
from jaxdp.estimate.schedule import Schedule, covered_share
from jaxdp.estimate.timing import timed
from jaxdp.huggingface import load
from jaxdp.step.setup import Setup, make_setup, validate
from jaxdp.sync.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predictions about a run; a notebook shows them as tables.

    Attributes:
      assumptions: the hardware.
      memory: bytes per device that the compiled training or evaluation step needs.
      fits: whether a device has them.
      largest_batch: the most sequences per device that fit.
      covered: share of the collectives' bytes that products of the backward pass cover.
      seconds: computing time per step.
      tokens_per_second: of all devices together.
      efficiency: {method: {devices: compute / (compute + communication)}}.
      proposal: what to train in the hours that were given; None without.
      tables: {title: {row: text}}, all of the above as text.
    """

    assumptions: Assumptions
    memory: int
    fits: bool
    largest_batch: int
    covered: float
    seconds: float
    tokens_per_second: float
    efficiency: dict[str, dict[int, float]]
    proposal: Proposal | None
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
    gpu: str | None = None,
    devices: int | None = None,
    hosts: int = 1,
    bandwidth_gbps: float | None = None,
    inside_bandwidth_gbps: float | None = None,
    latency_us: float = 10.0,
    tflops: float | None = None,
    mfu: float = MFU,
    memory_gib: float | None = None,
    vocab_size: int | None = None,
    hours: float | None = None,
    report: Callable[[str], None] = print,
) -> Plan:
    """Compiles a run's training step; says what it needs and predicts its speed.

    Args:
      config: a config with the keys of configs/default.py.
      gpu: a GPU to compile for, a key of `gpus.GPUS`; by default this host's devices.
      devices: number of devices; by default 1 such GPU, or all devices of this host.
      hosts: machines that the GPUs are in, with one process each.
      bandwidth_gbps: Gbit/s that a device can send; by default as GPUs of one host can, or else
        100. With sync.islands, this is to other islands.
      inside_bandwidth_gbps: Gbit/s that it can send within its island; by default as such GPUs can.
      latency_us: microseconds per message.
      tflops: 10^12 FLOP/s that a device reaches; by default `mfu` of the GPU's peak, or the rate of
        a matrix product that is timed here.
      mfu: share of the GPU's peak that a step without model.remat reaches.
      memory_gib: GiB per device that programs can have; by default what JAX takes of the GPU's, or
        of this host's.
      vocab_size: vocabulary size; if given, the tokenizer is not opened.
      hours: if given, the plan is of the best model that can be trained in this time; see `budget`.
      report: called with a line of text before something slow.

    Raises:
      ConfigError: the config or a number is wrong, or can't be planned on this host.
    """
    configs.check_values(config)
    options = {
        "devices": devices,
        "hosts": hosts,
        "bandwidth_gbps": bandwidth_gbps,
        "inside_bandwidth_gbps": inside_bandwidth_gbps,
        "latency_us": latency_us,
        "tflops": tflops,
        "mfu": mfu,
        "memory_gib": memory_gib,
        "vocab_size": vocab_size,
    }
    check_options(**{name: value for name, value in options.items() if value is not None})
    config = config.copy_and_resolve_references()
    vocab = vocabulary(config, vocab_size, report)
    count = devices or (1 if gpu else jax.local_device_count())
    machine = assumptions.machine_of(gpu, count, hosts)
    rate, room = assumptions.rate_of(config, gpu, tflops, mfu), assumptions.room_of(gpu, memory_gib)
    proposal = None
    if hours is not None:
        cache = open_cache(config, report) if config.data.path and not vocab_size else None
        text = (cache.train.size, evaluated_sizes(config, cache, report)) if cache else ()
        there = Budget(hours, vocab, machine.devices, *text)
        measure = functools.partial(
            timed, vocab=vocab, devices=machine.devices, room=room[0], report=report
        )
        proposal = propose(config, there, rate[0], None if gpu or tflops else measure)
        config = proposal.config
        if not (gpu or tflops):
            rate = proposal.rate, "reached by the compiled step, timed here"
    setup = make_setup(config, vocab, count, process_count=hosts, mask_id=0)
    kind = machine.devices[0].device_kind
    given = Assumptions(
        *(count, kind, *assumptions.gbps_of(gpu, hosts, bandwidth_gbps, inside_bandwidth_gbps)),
        *(hosts, latency_us),
        *rate,
        *room,
    )

    def compile_with(config: ConfigDict) -> Compiled:
        rows = config.global_batch_size // count
        report(f"Compiling for {count} x {kind}, {rows} sequences each ...")
        return compiled.compile_step(config, vocab, machine)

    step = compile_with(config)
    evaluation = evaluation_bytes(setup, compiled.compile_evaluation(config, vocab, machine))
    largest = largest_batch(setup, compile_with, step, given.room)
    needed = max(step.memory, evaluation)
    schedule = Schedule(step.text, count)
    efficiency = scaling.efficiencies(config, vocab, count, given.flop_rate, given.network)
    ways = advice.ways(config, vocab, count, hosts, given.flop_rate, given.network)
    seconds = scaling.compute_seconds(config, vocab, count, given.flop_rate)
    return Plan(
        assumptions=given,
        memory=needed,
        fits=needed <= given.room,
        largest_batch=largest[0],
        covered=covered_share(schedule.transfers()),
        seconds=seconds,
        tokens_per_second=config.global_batch_size * config.seq_len / seconds,
        efficiency=efficiency,
        proposal=proposal,
        tables=({f"For {hours:g} hours": proposal.rows()} if proposal else {})
        | {
            "Memory per device": tables.memory_rows(setup, given, step, evaluation, largest),
            "The compiled step": tables.step_rows(setup, schedule),
            "Time": tables.time_rows(setup, given, seconds),
            tables.efficiency_title(given): tables.efficiency_rows(efficiency),
        }
        | ({f"Ways to synchronise {count} devices": advice.rows(ways)} if count > 1 else {}),
    )


def evaluated_sizes(
    config: ConfigDict, cache: TokenCache, report: Callable[[str], None]
) -> list[int]:
    """Returns the number of tokens of the validation split and of each of eval_sets."""
    sizes = [cache.validation.size]
    for name in eval_sets.parse(config.eval_sets):
        with eval_sets.named(config, name):
            sizes.append(eval_sets.open_set(config, name, cache, report).cache.validation.size)
    return sizes


def evaluation_bytes(setup: Setup, step: Compiled) -> int:
    """Returns the bytes that a device needs in an evaluation step, the training state included."""
    state = memory.state_shapes(setup)
    return num_bytes(state) - num_bytes(state.params) + step.memory


def largest_batch(
    setup: Setup, compile_with: Callable[[ConfigDict], Compiled], step: Compiled, room: int
) -> tuple[int, int]:
    """Returns the most sequences per device that fit, and the bytes that they take.

    Args:
      setup: the run's setup.
      compile_with: compiles the step of a config.
      step: the step of the setup's own config, compiled.
      room: bytes that a device has.
    """
    config, count = setup.config, setup.device_count
    unit = METHODS[config.sync.method].batch_unit(config, count)

    def needed(units: int) -> int:
        if units * unit == setup.sizes.per_device:
            return step.memory
        other = configs.with_value(config, "global_batch_size", units * unit * count)
        return compile_with(other).memory

    state = memory.state_shapes(setup)
    units, found = memory.largest_batch(
        needed,
        room,
        first=setup.sizes.per_device // unit,
        least=num_bytes(state) + num_bytes(state.params),  # As the gradients are as large.
        most=MAX_INT32 // (unit * count),
    )
    return units * unit, found


def vocabulary(config: ConfigDict, given: int | None, report: Callable[[str], None]) -> int:
    """Returns the vocabulary size, from the config alone if possible; validates the config.

    With init_from it is that of the weights, which a run keeps: model.vocab_multiple becomes 1.

    Raises:
      ConfigError: the config is wrong, or the tokenizer or the weights are needed and can't be
        opened.
    """
    configs.check_values(config)
    if config.init_from and not given:
        validate(config)
        given, config.model.vocab_multiple = load.open_folder(config.init_from).vocab_size, 1
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
