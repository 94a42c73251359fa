"""Shows what keeps each sync method from perfect scaling: its collectives, and their cost.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/scaling.py --config=configs/shakespeare_char.py \
        > benchmarks/scaling.md

Nothing is trained. Each method's step is compiled for 8 devices, and its collectives are read from
the optimized program: how many there are, where, and of how many bytes, which must agree with
`methods.traffic`. Then the formula of jaxdp.plan gives their cost for GPT-2.
"""

import datetime
import os
import platform
import sys
from collections.abc import Iterator

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from schedule import Schedule

from jaxdp.common import cli
from jaxdp.common.config import with_value
from jaxdp.common.terminal import quantity
from jaxdp.configs import gpt2_124m
from jaxdp.estimate import compiled, scaling
from jaxdp.model.transformer import ModelConfig, Transformer, parameter_shapes
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.sync import methods, traffic
from jaxdp.sync.methods import METHODS

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 65, "Size of the tokenizer's vocabulary.")
TFLOPS = flags.DEFINE_float("tflops", 400.0, "10^12 FLOP/s that a GPU reaches.")
LATENCY = flags.DEFINE_float("latency_us", 10.0, "Microseconds per message.")

DEVICES = 8
# Upper bound on the bytes of metrics (loss, tokens, a norm); any parameter array has more.
FIGURES = 1000
# Bytes per second that a device sends.
NETWORKS = {"NVLink (H100: 900 GB/s, half of it each way)": 450e9, "400 Gbit/s": 400e9 / 8}
MODELS = {
    "GPT-2 124M, 60 sequences x 1,024 per device": {},
    "GPT-2 124M, 4 sequences x 1,024 per device": {
        "global_batch_size": 4 * DEVICES,
        "grad_accum_steps": 1,
    },
    "GPT-2 1.3B, 16 sequences x 2,048 per device": {
        "model.num_layers": 24,
        "model.num_heads": 16,
        "model.embed_dim": 2048,
        "seq_len": 2048,
        "global_batch_size": 16 * DEVICES,
        "grad_accum_steps": 1,
    },
}


def main() -> int:
    """Prints the document."""
    assert jax.local_device_count() == DEVICES, "set JAX_NUM_CPU_DEVICES=8"
    print("# What scaling costs\n")
    print(introduction())
    print("\n## In the compiled program\n")
    print("\n".join(collective_rows(CONFIG.value)))
    for name, keys in MODELS.items():
        print(f"\n## {name}")
        for network, bandwidth in NETWORKS.items():
            print(f"\n{network}:\n")
            print("\n".join(efficiency_rows(model_config(keys), bandwidth)))
    return 0


def introduction() -> str:
    """Returns how the document was made, and what its columns assume."""
    arguments = " ".join(sys.argv[1:])
    return f"""Made by `JAX_NUM_CPU_DEVICES={DEVICES} python benchmarks/scaling.py {arguments}` on \
{datetime.date.today():%d %B %Y},
JAX {jax.__version__}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores of \
{platform.machine()}. **Nothing here is a measurement on GPUs**:
the programs come from XLA's CPU backend, and the efficiencies are computed by the formula of
[docs/plan.md](../docs/plan.md) for GPUs that reach {TFLOPS.value:g} TFLOP/s and \
messages that take {LATENCY.value:g} us,
on one ring of equal links, with a batch that grows with the number of devices. *Hidden*: the upper
bound if the all-reduce ran during the backward pass, two thirds of the computing, and did not slow
it down."""


def collective_rows(config: ConfigDict) -> Iterator[str]:
    """Yields a row for each large collective of each method's program.

    Raises:
      AssertionError: the collectives are not those that `methods.traffic` predicts.
    """
    yield "| sync.method | collective | bytes | predicted | place | products before | could hide |"
    yield "|---|---|---|---|---|---|---|"
    machine = compiled.local_machine(DEVICES)
    for name in METHODS:
        other = with_value(config, "sync.method", name)
        text = compiled.compile_step(other, VOCAB_SIZE.value, machine).text
        found = traffic.collectives(text, DEVICES)
        large = {key: c for key, c in found.items() if c.bytes > FIGURES}
        predicted = predicted_traffic(other, VOCAB_SIZE.value)
        assert [c.kind for c in large.values()] == [c.kind for c in predicted], (large, predicted)
        schedule = Schedule(text)
        for (key, collective), expected in zip(large.items(), predicted, strict=True):
            assert 0 <= collective.bytes - expected.bytes <= FIGURES, (key, collective, expected)
            place = schedule.place(key)
            yield (
                f"| {name} | {collective.kind} | {collective.bytes:,} | {expected.bytes:,} | "
                f"{place.number} of {schedule.length} | {place.flops_before:.1%} | "
                f"{place.flops_free:.1%} |"
            )
        small = [c.bytes for c in found.values() if c.bytes <= FIGURES]
        if small:
            yield f"| {name} | others: {len(small)} | {sum(small)} | | | | |"
    flops = scaling.step_flops(config, VOCAB_SIZE.value, DEVICES)[1]
    yield f"""
*Bytes*: of the collective's buffers; rows are in the order of the schedule. The prediction counts a
method's arrays; a collective may carry up to {FIGURES:,} bytes of metrics (loss, tokens) with them,
and *others* are collectives of such metrics alone. *Place*: its position among the instructions
that do something. *Products before*: the share of the program's matrix products that come before it
({quantity(schedule.flops / other.sync.every)} FLOPs per step; {quantity(flops)} by the formula of \
`mfu`, which counts masked attention, too).
*Could hide*: the share of the products that neither lead to the collective nor wait for it, behind
which it could hide if it were asynchronous."""


def predicted_traffic(config: ConfigDict, vocab: int) -> list[traffic.Collective]:
    """Returns the collectives that `methods.traffic` predicts for a config on 8 devices."""
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, vocab)))
    opt_state = jax.eval_shape(get_optimizer(config, get_schedule(config)).init, params)
    return methods.traffic(config, params, opt_state, DEVICES)


def model_config(keys: dict) -> ConfigDict:
    """Returns GPT-2's config with some keys replaced."""
    config = gpt2_124m.get_config()
    config.update_from_flattened_dict(keys)
    return config


def efficiency_rows(config: ConfigDict, bandwidth: float) -> Iterator[str]:
    """Yields efficiencies by number of devices, and the bound with a hidden all-reduce."""
    rate, latency = TFLOPS.value * 1e12, LATENCY.value / 1e6
    table = scaling.efficiencies(config, 50257, DEVICES, rate, bandwidth, latency)
    yield f"| devices | {' | '.join(table)} | gradient_mean, hidden |"
    yield "|---|" + "---|" * (len(table) + 1)
    for count in scaling.COUNTS[3:]:
        cells = [f"{row[count]:.1%}" if count in row else "" for row in table.values()]
        # In units of the step's computing time; the backward pass is two thirds of it.
        exposed = max(0.0, 1 / table["gradient_mean"][count] - 1 - 2 / 3)
        yield f"| {count:,} | {' | '.join(cells)} | {1 / (1 + exposed):.1%} |"


if __name__ == "__main__":
    sys.exit(cli.run(main))
