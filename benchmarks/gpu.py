"""Measures correctness, speed and limits on one GPU, and compares them with compiled nanoGPT.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch numpy
    python benchmarks/gpu.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python > gpu.md
    python benchmarks/gpu.py --rehearse     # all of it on a CPU, tiny: the figures mean nothing

First it checks results: attention by the GPU's kernel against XLA's in float32, and a run's losses
in bfloat16 against float32; if they are wrong, it ends. Then it trains GPT-2 in three sizes, in
bfloat16, on random tokens. Each contestant is a warm process of its own, and they train in turns; a
ratio is the median over turns. Then it sweeps over batch size and remat, head width, loss chunks
and XLA flags, and looks for the largest sizes that fit. Our steps are those of a real run without
the input pipeline: batches are in the host's memory. If time is short, choose some of --parts.
"""

import datetime
import functools
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import steps
import turns
from absl import flags
from gpu_checks import attention_errors, attention_rows, loss_rows
from gpu_models import (
    LARGER,
    MODELS,
    REHEARSE,
    REMAT,
    SEQUENCES,
    environment,
    model_config,
    some,
    this,
    variants,
    vocab,
)
from ml_collections import ConfigDict
from turns import Contestant, OutOfMemory

from jaxdp.common import cli
from jaxdp.estimate import scaling
from jaxdp.parallel.replicas import Replicas
from jaxdp.run import figures

NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; without it, no comparison.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
STEPS = flags.DEFINE_integer("steps", 20, "Number of steps in a turn.")
TURNS = flags.DEFINE_integer("turns", 7, "Number of turns.")
SERVE = flags.DEFINE_string("serve", None, "Be a contestant with these keys, JSON (internal).")
PARTS = flags.DEFINE_list(
    "parts",
    ["checks", *(x for name in MODELS for x in (name, f"{name} sweep")), "limits"],
    "The parts to run; all of them by default.",
)
ASK = flags.DEFINE_bool(
    "ask", False, "Print kind, peak and attention errors of the GPU, JSON (internal)."
)


def main() -> int:
    """Prints the document, or answers its parent process."""
    if SERVE.value:
        turns.run(serve)
        return 0
    if ASK.value:
        gpu, errors = jax.local_devices()[0], attention_errors()
        peak = figures.peak_flops(gpu)
        print(json.dumps({"kind": gpu.device_kind, "peak": peak, "errors": errors}))
        return 0
    jax.config.update("jax_platforms", "cpu")  # Child processes use the GPU.
    print(introduction())
    for line in itertools.chain.from_iterable(parts()):
        print(line, flush=True)
    return 0


@functools.cache
def device() -> dict[str, Any]:
    """Returns the GPU's kind, peak (FLOP/s), and errors of attention, from a child process."""
    answer = subprocess.check_output([*this(), "--ask"], text=True, env=environment())
    return json.loads(answer)


def introduction() -> str:
    """Returns the head of the document: how it was made."""
    unmeasured = "\n**A rehearsal on a CPU: no figure here means anything.**\n"
    return f"""# On a GPU
{unmeasured * REHEARSE.value}
Made by `python benchmarks/gpu.py {" ".join(sys.argv[1:])}` on {datetime.date.today():%d %B %Y}: \
{device()["kind"]}, JAX {jax.__version__}, Python {platform.python_version()}."""


def serve() -> None:
    """Runs our contestant: trains as many steps as each line of stdin says."""
    cli.prepare_jax()
    keys = json.loads(SERVE.value)
    batch = keys.pop("batch")
    config = model_config(keys, batch)
    shape = (batch, config.seq_len)
    draw = np.random.default_rng(0)
    arrays = {key: draw.integers(0, vocab(), shape, np.int32) for key in ("inputs", "targets")}
    arrays["weights"] = np.ones(shape, np.float32)
    gpu = jax.local_devices()[0]

    def peak() -> int:
        return (gpu.memory_stats() or {}).get("peak_bytes_in_use", 0)

    train = steps.trainer(config, vocab(), Replicas([gpu]), itertools.repeat(arrays))
    turns.serve(train, peak)


def ours(keys: dict, batch: int, xla_flags: str = "") -> Contestant:
    """Starts our contestant."""
    served = f"--serve={json.dumps(keys | {'batch': batch})}"
    return Contestant(*this(), served, **environment(xla_flags))


def theirs(keys: dict, batch: int, tokens: Path) -> Contestant:
    """Starts nanoGPT's contestant, compiled."""
    settings = steps.peer_settings(model_config(keys, batch), vocab()) | {
        "nanogpt": NANOGPT.value,
        "tokens": str(tokens),
        "device": "cpu" if REHEARSE.value else "cuda",
        "compile": True,
    }
    peer = str(Path(__file__).with_name("nanogpt_steps.py"))
    return Contestant(TORCH_PYTHON.value, peer, json.dumps(settings), **environment())


def measured(start: dict[str, Callable[[], Contestant]]) -> dict[str, tuple[np.ndarray, float]]:
    """Runs contestants in turns; returns seconds per step and peak bytes of those that fit."""
    running, seconds = {}, {}
    try:
        for name, begin in start.items():
            try:
                running[name], seconds[name] = begin(), []
            except OutOfMemory:
                print(f"{name}: out of memory", file=sys.stderr)
        for _ in range(TURNS.value):
            for name, contestant in running.items():
                seconds[name].append(contestant(STEPS.value))
    finally:
        for contestant in running.values():
            contestant.end()
    return {name: (np.array(seconds[name]), running[name].peak) for name in running}


def cells(config: ConfigDict, seconds: np.ndarray, peak: float) -> str:
    """Formats the cells of a table: tokens per second, MFU, memory."""
    rate = config.global_batch_size * config.seq_len / np.median(seconds)
    flops = rate * scaling.step_flops(config, vocab(), 1)[0]
    used = f"{flops / device()['peak']:.1%}" if device()["peak"] else "unknown"
    return f"{rate:,.0f} | {used} | {peak / 2**30:.2f}"


def parts() -> Iterator[Iterator[str]]:
    """Yields the lines of each part in --parts."""
    if "checks" in PARTS.value:
        yield from (attention_rows(device()["errors"]), loss_rows())
    for name, (keys, batches) in some(MODELS):
        if name in PARTS.value:
            yield peer_rows(name, keys, batches[1])
        if f"{name} sweep" in PARTS.value:
            yield sweep_rows(name, keys, batches)
    if "limits" in PARTS.value:
        yield from limits()


def peer_rows(name: str, keys: dict, batch: int) -> Iterator[str]:
    """Yields a table of both contestants at one batch size, in turns."""
    config = model_config(keys, batch)
    yield f"\n## {name}, context {config.seq_len}\n\nIn turns, {batch} sequences a step:\n"
    yield "| | tokens/s | MFU | GiB | speed / nanoGPT |\n|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, vocab(), 10**6).astype(np.uint16).tofile(tokens)
        start = {"jaxdp": lambda: ours(keys, batch)}
        if NANOGPT.value:
            start["nanoGPT, compiled"] = lambda: theirs(keys, batch, tokens)
        found = measured(start)
    for contestant, (seconds, peak) in found.items():
        ratio = ""
        if "nanoGPT, compiled" in found:
            ratio = f"{np.median(found['nanoGPT, compiled'][0] / seconds):.2f}"
        yield f"| {contestant} | {cells(config, seconds, peak)} | {ratio} |"
    for contestant in start.keys() - found.keys():
        yield f"| {contestant} | out of memory | | | |"


def sweep_rows(name: str, keys: dict, batches: tuple[int, ...]) -> Iterator[str]:
    """Yields a table of ours alone, by batch size and remat, and with other settings."""
    yield f"\n## {name}, other settings\n"
    yield "| sequences | | tokens/s | MFU | GiB |\n|---|---|---|---|---|"
    tried = [
        (batch, label, more, "")
        for batch, (label, more) in itertools.product(some(batches), some(REMAT))
    ]
    tried += [(batches[1], label, *variant) for label, variant in variants(keys).items()]
    for batch, label, more, given in tried:
        found = measured({"jaxdp": lambda: ours(keys | more, batch, given)})  # noqa: B023
        figures = "out of memory | |"
        if found:
            figures = cells(model_config(keys | more, batch), *found["jaxdp"])
        yield f"| {batch} | {label} | {figures} |"


def limits() -> Iterator[Iterator[str]]:
    """Yields tables up to the longest sequence and the largest model that fit."""
    saving = {"remat": True, "loss_chunks": 8}
    longer = {f"{n:,} tokens": saving | {"seq_len": n} for n in SEQUENCES}
    larger = {name: saving | keys for name, keys in LARGER.items()}
    yield fitting_rows("The longest sequence of GPT-2 124M", longer)
    yield fitting_rows("The largest model, context 1,024 (layers x width)", larger)


def fitting_rows(title: str, tried: dict[str, dict]) -> Iterator[str]:
    """Yields a table from the smallest size on, until memory runs out."""
    yield f"\n## {title}\n\nOne sequence a step, model.remat, loss_chunks=8.\n"
    yield "| | tokens/s | MFU | GiB |\n|---|---|---|---|"
    for name, keys in some(tried):
        found = measured({name: lambda: ours(keys, 1)})  # noqa: B023
        if not found:
            yield f"| {name} | out of memory | | |"
            return
        yield f"| {name} | {cells(model_config(keys, 1), *found[name])} |"


if __name__ == "__main__":
    sys.exit(cli.run(main))
