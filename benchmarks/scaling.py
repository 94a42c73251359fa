"""Shows what keeps each sync method from perfect scaling: its collectives on H100s, and their cost.

    pip install -c constraints.txt -e '.[plan-gpu]'
    JAX_PLATFORMS=cpu python benchmarks/scaling.py > benchmarks/scaling.md

Needs no GPU, and nothing is trained: each method's step is compiled for 8 H100s, and for 2 machines
with 8 each. Its collectives are read from the optimized program: how many there are, of how many
bytes, which must agree with `methods.traffic`, and what they hide behind. Then the formula of
`jaxdp plan` gives their cost.
"""

import collections
import datetime
import os
import platform
import sys
from collections.abc import Iterator

import jax
from absl import flags
from ml_collections import ConfigDict

from jaxdp.common import cli
from jaxdp.common.terminal import in_bytes
from jaxdp.configs import gpt2_124m
from jaxdp.estimate import compiled, scaling
from jaxdp.estimate.scaling import Network
from jaxdp.estimate.schedule import Schedule, covered_share
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.transformer import Transformer, parameter_shapes
from jaxdp.step.optimizer import get_optimizer, get_schedule
from jaxdp.sync import methods, traffic
from jaxdp.sync.methods import METHODS

TFLOPS = flags.DEFINE_float("tflops", 445.0, "10^12 FLOP/s that a GPU reaches.")
LATENCY = flags.DEFINE_float("latency_us", 10.0, "Microseconds per message.")
LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the model that is compiled.")

VOCAB_SIZE = 50257
SEQUENCES = 4  # Per device, in the compiled programs.
MACHINES = {"8 H100s": (8, 1), "2 x 8 H100s": (16, 2)}  # Devices and hosts.
# What is compiled: by name, keys of the config.
PROGRAMS = {name: {"sync.method": name} for name in METHODS} | {
    f"{name}, int8": {"sync.method": name, "sync.dtype": "int8"}
    for name in ("gradient_mean", "sharded")
}
# Metrics (loss, tokens, a norm) travel with the arrays or alone; any array has more bytes.
FIGURES = 4000
# Bytes per second that a device sends.
NETWORKS = {"NVLink (H100: 900 GB/s, half of it each way)": 450e9, "400 Gbit/s": 400e9 / 8}
MODELS = {
    "GPT-2 124M, 60 sequences x 1,024 per device": {},
    "GPT-2 124M, 4 sequences x 1,024 per device": {
        "global_batch_size": 4 * 8,
        "grad_accum_steps": 1,
    },
    "GPT-2 1.3B, 16 sequences x 2,048 per device": {
        "model.num_layers": 24,
        "model.num_heads": 16,
        "model.embed_dim": 2048,
        "seq_len": 2048,
        "global_batch_size": 16 * 8,
        "grad_accum_steps": 1,
    },
}

EXPLANATION = f"""*Bytes* is the size of all buffers that the collectives send, per round of \
`sync.every` steps. The prediction
counts a method's arrays; up to {FIGURES:,} bytes of metrics (loss, tokens) travel with them, or
alone. *Covered* is the share of these bytes that is under way while products of the backward pass
run; the step waits for the rest. parameter_mean and diloco send at the end of a round, after its
last backward pass. Few bits take two exchanges, of which the second needs the first one's \
result."""


def main() -> int:
    """Prints the document."""
    print("# What scaling costs\n")
    print(introduction())
    covered = {}
    for name, (devices, hosts) in MACHINES.items():
        print(f"\n## Compiled for {name}\n")
        covered[name] = print_collectives(devices, hosts)
    print(f"\n{EXPLANATION}")
    hidden = covered["8 H100s"]["gradient_mean"]
    for name, keys in MODELS.items():
        print(f"\n## {name}")
        for network, bandwidth in NETWORKS.items():
            print(f"\n{network}:\n")
            print("\n".join(efficiency_rows(model_config(keys), bandwidth, hidden)))
    return 0


def introduction() -> str:
    """Returns how the document was made, and what its columns assume."""
    return f"""Made by `JAX_PLATFORMS=cpu python benchmarks/scaling.py` on \
{datetime.date.today():%d %B %Y}, JAX {jax.__version__},
Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores of \
{platform.machine()}, no GPU. The programs are what XLA's compiler for NVIDIA GPUs makes
of GPT-2 124M with {SEQUENCES} sequences of 1,024 tokens per device. **Nothing here was measured \
on several GPUs**: the
efficiencies are computed by the formula of [docs/plan.md](../docs/plan.md), for GPUs that reach \
{TFLOPS.value:g} TFLOP/s, as one
H100 did ([RESULTS.md](RESULTS.md)), and messages that take {LATENCY.value:g} us, on one ring of \
equal links, with a
batch that grows with the number of devices."""


def compiled_config(devices: int, keys: dict) -> ConfigDict:
    """Returns the config whose step is compiled for a program with these keys."""
    sizes = {"global_batch_size": SEQUENCES * devices, "grad_accum_steps": 1}
    config = model_config(sizes | keys)
    config.model.num_layers = LAYERS.value
    config.data.path = "unused"
    return config


def print_collectives(devices: int, hosts: int) -> dict[str, float]:
    """Prints a row for each kind of collective of each program; returns their covered shares.

    Raises:
      AssertionError: the collectives are not those that `methods.traffic` predicts.
    """
    print("| sync.method | collectives | bytes | predicted | covered |")
    print("|---|---|---|---|---|")
    machine = compiled.absent_machine("h100", devices, hosts)
    shares = {}
    for name, keys in PROGRAMS.items():
        config = compiled_config(devices, keys)
        config.sync.virtual_replicas = max(config.sync.virtual_replicas, devices)
        config.global_batch_size = max(config.global_batch_size, config.sync.virtual_replicas)
        schedule = Schedule(compiled.compile_step(config, VOCAB_SIZE, machine).text, devices)
        transfers = schedule.transfers()
        shares[name] = covered_share(transfers)
        expected = collections.Counter()
        for collective in predicted_traffic(config, devices):
            expected[collective.kind] += collective.bytes
        for kind in dict.fromkeys(x.kind for x in transfers):
            own = [x for x in transfers if x.kind == kind]
            size, wanted = sum(x.bytes for x in own), expected.pop(kind, 0)
            assert 0 <= size - wanted <= FIGURES, (name, kind, size, wanted)
            print(
                f"| {name} | {len(own)} {kind} | {in_bytes(size)} | {in_bytes(wanted)} | "
                f"{covered_share(own):.0%} |",
                flush=True,
            )
        assert not expected, (name, expected)
    return shares


def predicted_traffic(config: ConfigDict, devices: int) -> list[traffic.Collective]:
    """Returns the collectives that `methods.traffic` predicts for a config."""
    params = parameter_shapes(Transformer(ModelConfig.from_config(config, VOCAB_SIZE)))
    opt_state = jax.eval_shape(get_optimizer(config, get_schedule(config)).init, params)
    return methods.traffic(config, params, opt_state, devices)


def model_config(keys: dict) -> ConfigDict:
    """Returns GPT-2's config with some keys replaced."""
    config = gpt2_124m.get_config()
    config.update_from_flattened_dict(keys)
    return config


def efficiency_rows(config: ConfigDict, bandwidth: float, hidden: float) -> Iterator[str]:
    """Yields efficiencies by number of devices, and gradient_mean's with a share hidden."""
    rate, latency = TFLOPS.value * 1e12, LATENCY.value / 1e6
    table = scaling.efficiencies(config, VOCAB_SIZE, 8, rate, Network(bandwidth, latency))
    yield f"| devices | {' | '.join(table)} | gradient_mean, {hidden:.0%} covered |"
    yield "|---|" + "---|" * (len(table) + 1)
    for count in scaling.COUNTS[3:]:
        cells = [f"{row[count]:.1%}" if count in row else "" for row in table.values()]
        # In units of the step's computing time; the backward pass is two thirds of it.
        communication = 1 / table["gradient_mean"][count] - 1
        exposed = (1 - hidden) * communication + max(0.0, hidden * communication - 2 / 3)
        yield f"| {count:,} | {' | '.join(cells)} | {1 / (1 + exposed):.1%} |"


if __name__ == "__main__":
    sys.exit(cli.run(main))
