"""A plan as tables and as a plot."""

import itertools
from typing import Any

from jaxdp.common import pictures
from jaxdp.common.files import num_bytes
from jaxdp.common.terminal import duration, in_bytes, in_gib, quantity
from jaxdp.estimate import memory, scaling
from jaxdp.estimate.assumptions import Assumptions
from jaxdp.estimate.compiled import Compiled
from jaxdp.estimate.scaling import COUNTS
from jaxdp.estimate.schedule import Schedule, covered_share
from jaxdp.step.setup import Setup, can_split

DAY = 86_400  # Seconds.


def memory_rows(
    setup: Setup, given: Assumptions, step: Compiled, evaluation: int, largest: tuple[int, int]
) -> dict[str, str]:
    """Returns rows about the state, the compiled steps' memory, and the largest batch.

    Args:
      setup: the run's setup.
      given: the hardware.
      step: the compiled training step.
      evaluation: bytes that a device needs in an evaluation step.
      largest: the most sequences per device that fit, and the bytes that they take.
    """
    config, state = setup.config, memory.state_shapes(setup)
    parameters, rest = num_bytes(state.params), step.memory - step.sizes.arguments
    room = f"in {in_gib(given.room)} ({given.room_from})"
    fits = max(step.memory, evaluation) <= given.room
    batch, taken = largest
    bad = [str(n) for n in COUNTS if not can_split(config, n)]
    return {
        "devices": f"{given.devices} x {given.kind}, {setup.sizes.per_device} sequences each, "
        f"grad_accum_steps={config.grad_accum_steps}, sync.method={config.sync.method}",
        "parameters": f"{quantity(parameters // 4)} in {in_bytes(parameters)}",
        **({"their EMA": in_bytes(num_bytes(state.ema))} if config.ema.decay else {}),
        "optimizer state": in_bytes(num_bytes((state.opt_state, state.outer))),
        "arguments": f"{in_bytes(step.sizes.arguments)}: the state and the batch",
        "temporaries": f"{in_bytes(rest)}: gradients, activations and all else, model.remat="
        f"{config.model.remat}, loss_chunks={config.loss_chunks}",
        "total": f"{in_bytes(step.memory)}, {in_gib(step.memory)}, as compiled",
        "evaluation": f"{in_bytes(evaluation)}, the state included, as compiled",
        "verdict": f"FITS {room}" if fits else f"DOESN'T FIT {room}: {memory.way_out(setup)}",
        "largest batch": f"{batch} sequences per device take {in_gib(taken)}, as compiled"
        if batch
        else f"0 sequences per device: not even {config.grad_accum_steps} fit",
        "can't split": f"global_batch_size={config.global_batch_size} over "
        f"{', '.join(bad) or 'none'} of 1 to {COUNTS[-1]} devices",
    }


def step_rows(setup: Setup, schedule: Schedule) -> dict[str, str]:
    """Returns rows about the collectives of a step, and the bytes that its kernels move."""
    transfers, moved = schedule.transfers(), schedule.moved()
    every = setup.method.every
    rows = {}
    for kind in dict.fromkeys(x.kind for x in transfers):
        own = [x for x in transfers if x.kind == kind]
        rows[kind] = (
            f"{len(own)}, {in_bytes(sum(x.bytes for x in own))} together, {covered_share(own):.0%} "
            "of them while products of the backward pass run"
        )
    rows = rows or {"collectives": "none"}
    steps = f"for {every} steps" if every > 1 else "per step"
    rows["memory traffic"] = f"{in_bytes(sum(moved.values()))} {steps}: " + ", ".join(
        f"{group} {in_bytes(size)}" for group, size in moved.items() if size
    )
    return rows


def time_rows(setup: Setup, given: Assumptions, seconds: float) -> dict[str, str]:
    """Returns rows about FLOPs, computing time and speed, without communication."""
    config = setup.config
    per_token, per_step = scaling.step_flops(config, setup.vocab_size, given.devices)
    tokens = config.global_batch_size * config.seq_len
    whole = seconds * config.num_train_steps
    took = f"{whole / DAY:.1f} days" if whole > 2 * DAY else duration(whole)
    run = f"{took} for num_train_steps={config.num_train_steps:,}"
    return {
        "FLOPs per token": f"{per_token:.3g}",
        "FLOPs per step": f"{per_step:.3g} per device"
        + (", a third more for remat" if config.model.remat else ""),
        "FLOP rate": f"{given.flop_rate:.3g} per device and second, {given.rate_from}",
        "computing": f"{seconds:.3g} s for {tokens:,} tokens: {tokens / seconds:,.0f} tokens/s",
        "the run": "num_epochs decides, once the data are there" if config.num_epochs else run,
    }


def efficiency_title(given: Assumptions) -> str:
    """Returns the title of `efficiency_rows`."""
    return (
        f"Efficiency at {given.bandwidth_gbps:g} Gbit/s and {given.latency_us:g} us: compute / "
        "(compute + communication), no overlap, the same batch per device"
    )


def efficiency_rows(table: dict[str, dict[int, float]]) -> dict[str, str]:
    """Formats the result of `scaling.efficiencies`, a row per number of devices."""
    rows = {"devices": "  ".join(f"{name:>14}" for name in table)}
    for n in COUNTS:
        cells = (f"{by_count[n]:.1%}" if n in by_count else "-" for by_count in table.values())
        rows[str(n)] = "  ".join(f"{cell:>14}" for cell in cells)
    return rows


def draw(efficiency: dict[str, dict[int, float]], given: Assumptions) -> Any:
    """Draws the result of `scaling.efficiencies` with matplotlib, a line per sync.method."""
    figure = pictures.new(7, 4.5)
    axes = figure.subplots()
    # Small markers on large ones: the lines of gradient_mean and sharded coincide.
    sizes = itertools.chain([10], itertools.repeat(6))
    styles = zip(efficiency.items(), itertools.cycle("os^DvP*"), sizes, strict=False)
    for (name, by_count), marker, size in styles:
        x, y = list(by_count), list(by_count.values())
        axes.plot(x, y, marker=marker, markersize=size, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("devices, the same batch on each")
    axes.set_ylabel("compute / (compute + communication)")
    link = f"{given.bandwidth_gbps:g} Gbit/s, {given.latency_us:g} us"
    axes.set_title(f"Predicted: {link}, no overlap")
    axes.grid(alpha=0.3)
    axes.legend(title="sync.method", frameon=False)
    return figure
