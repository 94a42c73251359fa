"""Times each way to synchronise on links as slow as those between houses, by the clock.

    sudo python benchmarks/slow_link.py --config=configs/quickstart.py --mbit=100 --delay_ms=20

Two to four processes of one CPU device each are joined by links that `tc` slows down (see
`network`). Each choice of sync keys trains for some steps, one after the other. Printed are the
median over logged steps of tokens per second, its ratio to gradient_mean's, milliseconds of a step,
those that jaxdp.plan predicts, and the bytes that a process sends in a step: as its network
interface counts them, start and end of the run included, and as the method's definition has them.

The prediction adds what the links take to the milliseconds of computing, which are measured first:
a step of processes that are synchronised only every 27 steps, over links without a limit.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from network import Network, missing

from jaxdp.common import cli
from jaxdp.estimate import scaling
from jaxdp.estimate.plan import vocabulary
from jaxdp.sync import methods
from jaxdp.sync.traffic import sent_per_step
from jaxdp.workdir.metrics import read_jsonl

CONFIG = config_flags.DEFINE_config_file("config", "configs/quickstart.py", "Its get_config().")
PROCESSES = flags.DEFINE_integer("processes", 2, "Processes, each an island of one device.", 2, 4)
MBIT = flags.DEFINE_float("mbit", 100.0, "Mbit/s that each process can send.", 1e-3)
DELAY = flags.DEFINE_float("delay_ms", 0.0, "Milliseconds until it arrives.", 0.0)
STEPS = flags.DEFINE_integer("steps", 100, "Steps of each run, and what fills its last round.", 54)

CHOICES = {
    "gradient_mean": {"method": "gradient_mean"},
    "gradient_mean, int8": {"method": "gradient_mean", "dtype": "int8"},
    "gradient_mean, int4": {"method": "gradient_mean", "dtype": "int4"},
    "sharded": {"method": "sharded"},
    "parameter_mean, every 10": {"method": "parameter_mean", "every": 10},
    "diloco, every 10": {"method": "diloco", "every": 10},
    "diloco, every 3, int4": {"method": "diloco", "every": 3, "dtype": "int4"},
    "diloco, every 4, int1": {"method": "diloco", "every": 4, "dtype": "int1"},
    "diloco, every 27, int2": {"method": "diloco", "every": 27, "dtype": "int2"},
}
COMPUTING = CHOICES["diloco, every 27, int2"]
TCP = 1448 / 1538  # What Ethernet, IP and TCP leave of a link's rate, with usual packets.
COLUMNS = (
    "sync",
    "tokens/s",
    "ratio to gradient_mean",
    "step, ms",
    "predicted",
    "MB sent",
    "defined",
)


class Measured(NamedTuple):
    """Medians over the logged steps of a run; bytes that process 0 sent per step."""

    speed: float
    milliseconds: float
    sent: float


def main() -> int:
    """Prints a table."""
    if why := missing():
        print(f"jaxdp: {why}", file=sys.stderr)
        return cli.WRONG_INPUT
    cli.prepare_jax()
    count, prediction = PROCESSES.value, Prediction(CONFIG.value)
    with Network(count) as network:
        computing = measured(network, COMPUTING).milliseconds
    with Network(count, MBIT.value, DELAY.value) as network:
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        print(f"{count} processes, {network.shape}, {name}, {computing:.1f} ms of computing\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        base = 0.0
        for name, keys in CHOICES.items():
            found = measured(network, keys)
            base = base or found.speed
            waiting, sent = prediction(keys)
            print(
                f"| {name} | {found.speed:,.0f} | {found.speed / base:.2f} | "
                f"{found.milliseconds:.1f} | {computing + waiting:.1f} | {found.sent / 1e6:.3f} | "
                f"{sent / 1e6:.3f} |",
                flush=True,
            )
    return 0


class Prediction:
    """What jaxdp.plan predicts of the links."""

    def __init__(self, config: ConfigDict):
        """Takes the config of all runs, but for the keys of sync."""
        vocab = vocabulary(config, None, print)
        self._config = config
        self._params, self._opt_state = scaling.shapes(config, vocab)
        self._links = scaling.Network(TCP * MBIT.value * 1e6 / 8, DELAY.value / 1e3)

    def __call__(self, keys: dict) -> tuple[float, float]:
        """Returns milliseconds that a step takes for its messages, and bytes that it sends."""
        config, count = self._config.copy_and_resolve_references(), PROCESSES.value
        config.sync.update(keys)
        found = methods.traffic(config, self._params, self._opt_state, count, count)
        seconds = scaling.communication(found, count, self._links)
        return 1000 * seconds, sent_per_step(found, count)


def measured(network: Network, keys: dict) -> Measured:
    """Trains with some keys of sync."""
    every = keys.get("every", 10)
    steps = -(-STEPS.value // every) * every
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    before = network.sent(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}",
            f"--workdir={folder}/run",
            *(f"--config.sync.{key}={value}" for key, value in keys.items()),
            *(f"--config.{key}={value}" for key, value in overrides.items()),
            f"--config.num_train_steps={steps}",
            f"--config.log_every={every}",
            f"--config.eval_every={steps}",
            "--config.eval_max_batches=1",
            f"--config.checkpoint.every={steps}",
            "--config.sample.num_tokens=0",
        ]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
        with open(Path(folder) / "log", "w") as log:
            running = [
                network.start(i, *arguments, env=environment, stdout=log, stderr=log)
                for i in range(PROCESSES.value)
            ]
            codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(Path(folder, "log").read_text())
        logged = [r for r in read_jsonl(f"{folder}/run") if r.get("tokens_per_second")]
    later = logged[1:] or logged  # The first have begun while the links' buffers were empty.
    medians = (
        float(np.median([r[x] for r in later])) for x in ("tokens_per_second", "step_time_ms")
    )
    return Measured(*medians, (network.sent(0) - before) / steps)


if __name__ == "__main__":
    sys.exit(cli.run(main))
