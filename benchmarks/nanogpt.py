"""Training speed on CPUs, side by side with nanoGPT (PyTorch, eager and compiled).

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0 numpy
    python benchmarks/nanogpt.py --config=configs/shakespeare_char_cpu.py --nanogpt=nanoGPT \
        --torch_python=torch-venv/bin/python --config.data.path=tinyshakespeare.txt

The same model, batch, optimizer and text for both, in float32. Each contestant is a process of its
own, and they train in turns, a few steps each, so that what else the machine does hits all of them
alike; a ratio is the median over turns of the times within one. Ours are the steps of a real
run: fed by its data pipeline, metrics read a step behind.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import turns
from absl import flags
from ml_collections import config_flags

from jaxdp import command
from jaxdp.data.cache import open_cache

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps in a turn.")
TURNS = flags.DEFINE_integer("turns", 15, "Turns.")
SERVE = flags.DEFINE_integer("serve", 0, "Be a contestant with so many devices (internal).")


class Contestant:
    """A process that trains when it is told to."""

    def __init__(self, *arguments: str, **environ: str):
        """Starts it and waits until it is warm."""
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
        )
        for line in self._process.stdout:
            if line == "ready\n":
                return
        raise SystemExit(f"{arguments[:3]} has ended with {self._process.wait()}")

    def __call__(self) -> float:
        """Seconds per step of one turn."""
        self._process.stdin.write(f"{STEPS.value}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline()) / STEPS.value

    def end(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    """Times, prints a table."""
    if SERVE.value:
        return serve(CONFIG.value, SERVE.value)
    with tempfile.TemporaryDirectory() as folder:
        contestants = start(CONFIG.value, Path(folder))
        seconds = {name: [] for name in contestants}
        for _ in range(TURNS.value):
            for name, contestant in contestants.items():
                seconds[name].append(contestant())
        for contestant in contestants.values():
            contestant.end()
    tokens = CONFIG.value.global_batch_size * CONFIG.value.seq_len
    eager, compiled = (np.array(seconds[f"nanoGPT {kind}"]) for kind in ("eager", "compiled"))
    print("| | ms per step | tokens/s | speed / eager | speed / compiled |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        step = np.median(values)
        ratios = [f"{np.median(peer / np.array(values)):.2f}" for peer in (eager, compiled)]
        print(f"| {name} | {1e3 * step:.1f} | {tokens / step:,.0f} | {' | '.join(ratios)} |")
    return 0


def start(config, folder: Path) -> dict[str, Contestant]:
    """All contestants, by name."""
    cache = open_cache(config)
    np.asarray(cache.train, np.uint16).tofile(folder / "tokens.bin")
    settings = {
        "nanogpt": NANOGPT.value,
        "tokens": str(folder / "tokens.bin"),
        "batch_size": config.global_batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "weight_decay": config.optimizer.weight_decay,
        "betas": [config.optimizer.b1, config.optimizer.b2],
        "grad_clip": config.optimizer.clip_norm,
        "model": {
            "block_size": config.seq_len,
            "vocab_size": cache.vocab_size,
            "n_layer": config.model.num_layers,
            "n_head": config.model.num_heads,
            "n_embd": config.model.embed_dim,
            "dropout": config.model.dropout,
            "bias": config.model.bias,
        },
    }
    peer = str(Path(__file__).with_name("nanogpt_steps.py"))
    ours = [sys.executable, *sys.argv]
    return {
        f"jaxdp, {count} device{'s' * (count > 1)}": Contestant(
            *ours, f"--serve={count}", JAX_NUM_CPU_DEVICES=str(count)
        )
        for count in (1, 2)
    } | {
        f"nanoGPT {kind}": Contestant(
            TORCH_PYTHON.value, peer, json.dumps(settings | {"compile": kind == "compiled"})
        )
        for kind in ("eager", "compiled")
    }


def serve(config, devices: int) -> int:
    """Trains as many steps as each line of stdin says, and prints the seconds."""
    import jax

    from jaxdp import cpu, parallel
    from jaxdp.data.feed import Feed
    from jaxdp.model import ModelConfig, Transformer
    from jaxdp.optimizer import get_optimizer, get_schedule
    from jaxdp.parallel import Replicas
    from jaxdp.program import Program
    from jaxdp.step import create_state, plain

    command.prepare_jax()
    cpu.prepare(config)
    assert jax.device_count() == devices
    cache, replicas, schedule = open_cache(config), Replicas(), get_schedule(config)
    config.num_train_steps = 10**9
    program = Program(config, replicas, schedule, plain)
    model = Transformer(ModelConfig.from_config(config, cache.vocab_size))
    optimizer = get_optimizer(config, schedule)
    state = create_state(model, optimizer, config.seed, replicas, program.method)
    said = {name: np.zeros(config.global_batch_size, np.float32) for name in ("stop", "busy")}
    hosts = ([batch | said] for batch in Feed(config, cache).train(0))
    rounds, done = parallel.prefetch(hosts, replicas.shard_steps), 0

    def steps(count):
        nonlocal state, done
        before = None
        for _ in range(count):
            state, metrics = program(done, state, next(rounds))
            jax.device_get(before)
            before, done = metrics, done + 1
        jax.device_get(before)

    steps(3)
    turns.serve(steps)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
