"""Compares training speed on CPUs with nanoGPT (PyTorch, eager and compiled) and nanodo.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0 numpy
    python benchmarks/nanogpt.py --config=configs/shakespeare_char_cpu.py --nanogpt=nanoGPT \
        --torch_python=torch-venv/bin/python --config.data.path=tinyshakespeare.txt

--nanodo=CHECKOUT --nanodo_python=PYTHON adds nanodo; that Python needs nanodo's requirements. All
train the same model with the same batch size, optimizer and text, in float32. Each contestant is a
process of its own, and they train in turns of a few steps, so that other load on the machine
affects all of them alike. A ratio is the median over turns of the ratios within a turn. Our steps
are those of a real run: fed by its data pipeline, metrics fetched a step behind.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import steps
import turns
from absl import flags
from ml_collections import config_flags
from turns import Contestant

from jaxdp.common import cli
from jaxdp.data.cache import open_cache

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
NANODO = flags.DEFINE_string(
    "nanodo", None, "A checkout of nanodo; without it, nanodo is left out."
)
NANODO_PYTHON = flags.DEFINE_string("nanodo_python", None, "A Python with its requirements.")
STEPS = flags.DEFINE_integer("steps", 10, "Number of steps in a turn.")
TURNS = flags.DEFINE_integer("turns", 15, "Number of turns.")
SERVE = flags.DEFINE_integer("serve", 0, "Be a contestant with this many devices (internal).")


def main() -> int:
    """Times all contestants, and prints a table."""
    if SERVE.value:
        return serve(CONFIG.value, SERVE.value)
    with tempfile.TemporaryDirectory() as folder:
        contestants = start(CONFIG.value, Path(folder))
        seconds = {name: [] for name in contestants}
        for _ in range(TURNS.value):
            for name, contestant in contestants.items():
                seconds[name].append(contestant(STEPS.value))
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
    """Starts all contestants; returns them by name."""
    cache, tokens = open_cache(config), folder / "tokens.bin"
    np.asarray(cache.train, np.uint16).tofile(tokens)
    settings = steps.peer_settings(config, cache.vocab_size) | {
        "nanogpt": NANOGPT.value,
        "tokens": str(tokens),
        "device": "cpu",
    }
    folder = Path(__file__).parent
    peer, nanodo = str(folder / "nanogpt_steps.py"), str(folder / "nanodo_steps.py")
    ours = [sys.executable, *sys.argv]
    given = settings | {"nanodo": NANODO.value}
    return (
        {
            f"jaxdp, {count} device{'s' * (count > 1)}": Contestant(
                *ours, f"--serve={count}", JAX_NUM_CPU_DEVICES=str(count)
            )
            for count in (1, 2)
        }
        | {
            f"nanoGPT {kind}": Contestant(
                TORCH_PYTHON.value, peer, json.dumps(settings | {"compile": kind == "compiled"})
            )
            for kind in ("eager", "compiled")
        }
        | {
            f"nanodo, {count} device{'s' * (count > 1)}": Contestant(
                NANODO_PYTHON.value, nanodo, json.dumps(given | {"devices": count})
            )
            for count in ((1, 2) if NANODO.value else ())
        }
    )


def serve(config, devices: int) -> int:
    """Runs our contestant: trains as many steps as each line of stdin says."""
    import jax

    from jaxdp.data.feed import Feed
    from jaxdp.parallel import cpu
    from jaxdp.parallel.replicas import Replicas
    from jaxdp.step.setup import same_on_two_devices

    cli.prepare_jax()
    cpu.prepare(config, two_devices=same_on_two_devices(config))
    assert jax.device_count() == devices
    cache = open_cache(config)
    config.num_train_steps = 10**9
    batches = Feed(config, cache).train(0)
    turns.serve(steps.trainer(config, cache.vocab_size, Replicas(), batches))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
