"""Times each way to synchronise on links as slow as those between houses, by the clock.

    sudo python benchmarks/slow_link.py --config=configs/quickstart.py --mbit=100 --delay_ms=20

Two to four processes of one CPU device each are joined by links that `tc` slows down (see
`network`). Each choice of sync keys trains for some steps, one after the other; printed is the
median over logged steps of its tokens per second, and its ratio to gradient_mean's.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from network import Network, missing

from jaxdp.common import cli
from jaxdp.workdir.metrics import read_jsonl

CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "Python file with get_config().")
PROCESSES = flags.DEFINE_integer("processes", 2, "Processes, each an island of one device.", 2, 4)
MBIT = flags.DEFINE_float("mbit", 100.0, "Mbit/s that each process can send.", 1e-3)
DELAY = flags.DEFINE_float("delay_ms", 0.0, "Milliseconds until it arrives.", 0.0)
STEPS = flags.DEFINE_integer("steps", 100, "Steps of each run.", 20)
KEYS = flags.DEFINE_multi_string("key", [], "More keys, such as --key=model.num_layers=2.")

CHOICES = {
    "gradient_mean": {"method": "gradient_mean"},
    "gradient_mean, int8": {"method": "gradient_mean", "dtype": "int8"},
    "gradient_mean, int4": {"method": "gradient_mean", "dtype": "int4"},
    "sharded, int4": {"method": "sharded", "dtype": "int4"},
    "parameter_mean, every 10": {"method": "parameter_mean", "every": 10},
    "diloco, every 10": {"method": "diloco", "every": 10},
    "diloco, every 10, int4": {"method": "diloco", "every": 10, "dtype": "int4"},
    "diloco, every 50, int4": {"method": "diloco", "every": 50, "dtype": "int4"},
}


def main() -> int:
    """Prints a table."""
    if why := missing():
        print(f"jaxdp: {why}", file=sys.stderr)
        return cli.WRONG_INPUT
    with Network(PROCESSES.value, MBIT.value, DELAY.value) as network:
        print(f"{PROCESSES.value} processes, {network.shape}, {CONFIG.value}\n")
        print("| sync | tokens/s | ratio to gradient_mean | step, ms |")
        print("|---|---|---|---|")
        base = 0.0
        for name, keys in CHOICES.items():
            speed, milliseconds = measured(network, keys)
            base = base or speed
            row = f"| {name} | {speed:,.0f} | {speed / base:.2f} | {milliseconds:.1f} |"
            print(row, flush=True)
    return 0


def measured(network: Network, keys: dict) -> tuple[float, float]:
    """Trains with some keys of sync; returns tokens per second and milliseconds per step."""
    every, steps = keys.get("every", 10), STEPS.value
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--config={CONFIG.value}",
            f"--workdir={folder}/run",
            *(f"--config.sync.{key}={value}" for key, value in keys.items()),
            f"--config.num_train_steps={steps}",
            f"--config.log_every={every}",
            f"--config.eval_every={steps}",
            "--config.eval_max_batches=1",
            f"--config.checkpoint.every={steps}",
            "--config.sample.num_tokens=0",
            *(f"--config.{key}" for key in KEYS.value),
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
    return tuple(
        float(np.median([r[x] for r in later])) for x in ("tokens_per_second", "step_time_ms")
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
