"""Correctness, speed and limits on one GPU, side by side with nanoGPT compiled, in one command.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch numpy
    python benchmarks/gpu.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python > gpu.md
    python benchmarks/gpu.py --rehearse     # all of it on a CPU, tiny: no figure means anything

First whether what is fast is right: attention by the GPU's kernel against XLA's in float32, and a
run's losses in bfloat16 against float32; if they are not, it ends there. Then GPT-2 in three sizes,
in bfloat16, on random tokens: each contestant is a process of its own, warm, and they train in
turns; a ratio is the median over turns. Then sweeps over batch and remat, width of heads, chunks of
the loss and XLA's flags, and what just fits. Our steps are those of a real run but for the input
pipeline: batches lie in the host's memory. Where time is short, --parts does some of it.
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

NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; None: no comparison.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps in a turn.")
TURNS = flags.DEFINE_integer("turns", 7, "Turns.")
SERVE = flags.DEFINE_string("serve", None, "Be a contestant with these keys, JSON (internal).")
PARTS = flags.DEFINE_list(
    "parts",
    ["checks", *(x for name in MODELS for x in (name, f"{name} sweep")), "limits"],
    "What to do of it, by the names that are the default.",
)
ASK = flags.DEFINE_bool("ask", False, "Print what the parent wants to know, JSON (internal).")


def main() -> int:
    """Prints the document, or serves."""
    if SERVE.value:
        turns.run(serve)
        return 0
    if ASK.value:
        gpu, errors = jax.local_devices()[0], attention_errors()
        peak = figures.peak_flops(gpu)
        print(json.dumps({"kind": gpu.device_kind, "peak": peak, "errors": errors}))
        return 0
    jax.config.update("jax_platforms", "cpu")  # The GPU is for the others.
    print(introduction())
    for line in itertools.chain.from_iterable(parts()):
        print(line, flush=True)
    return 0


@functools.cache
def device() -> dict[str, Any]:
    """Of the GPU: kind, peak (FLOP/s) and errors (of attention)."""
    answer = subprocess.check_output([*this(), "--ask"], text=True, env=environment())
    return json.loads(answer)


def introduction() -> str:
    """How the document came about."""
    unmeasured = "\n**A rehearsal on a CPU: no figure here means anything.**\n"
    return f"""# On a GPU
{unmeasured * REHEARSE.value}
Made by `python benchmarks/gpu.py {" ".join(sys.argv[1:])}` on {datetime.date.today():%d %B %Y}: \
{device()["kind"]}, JAX {jax.__version__}, Python {platform.python_version()}."""


def serve() -> None:
    """Our contestant: trains so many steps as each line of stdin says."""
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
    """Starts it."""
    served = f"--serve={json.dumps(keys | {'batch': batch})}"
    return Contestant(*this(), served, **environment(xla_flags))


def theirs(keys: dict, batch: int, tokens: Path) -> Contestant:
    """Starts nanoGPT, compiled."""
    settings = steps.peer_settings(model_config(keys, batch), vocab()) | {
        "nanogpt": NANOGPT.value,
        "tokens": str(tokens),
        "device": "cpu" if REHEARSE.value else "cuda",
        "compile": True,
    }
    peer = str(Path(__file__).with_name("nanogpt_steps.py"))
    return Contestant(TORCH_PYTHON.value, peer, json.dumps(settings), **environment())


def measured(start: dict[str, Callable[[], Contestant]]) -> dict[str, tuple[np.ndarray, float]]:
    """Seconds per step in each turn, and peak bytes, of those whose memory suffices."""
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
    """Tokens per second, MFU, memory."""
    rate = config.global_batch_size * config.seq_len / np.median(seconds)
    flops = rate * scaling.step_flops(config, vocab(), 1)[0]
    used = f"{flops / device()['peak']:.1%}" if device()["peak"] else "unknown"
    return f"{rate:,.0f} | {used} | {peak / 2**30:.2f}"


def parts() -> Iterator[Iterator[str]]:
    """Those that are asked for."""
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
    """Both at one batch, in turns."""
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
    """Ours alone: by batch and remat, and what else may be faster."""
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
    """The longest sequence and the largest model, one at a time, with what saves memory."""
    saving = {"remat": True, "loss_chunks": 8}
    longer = {f"{n:,} tokens": saving | {"seq_len": n} for n in SEQUENCES}
    larger = {name: saving | keys for name, keys in LARGER.items()}
    yield fitting_rows("The longest sequence of GPT-2 124M", longer)
    yield fitting_rows("The largest model, context 1,024 (layers x width)", larger)


def fitting_rows(title: str, tried: dict[str, dict]) -> Iterator[str]:
    """From the smallest on, until the memory does not suffice."""
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
