"""Correctness, speed and limits on one GPU, side by side with nanoGPT compiled, in one command.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch numpy
    python benchmarks/gpu.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python > gpu.md
    python benchmarks/gpu.py --rehearse     # all of it on a CPU, tiny: no figure means anything

First whether what is fast is right: attention by the GPU's kernel against XLA's in float32, and a
run's losses in bfloat16 against float32; if they are not, it ends there. Then GPT-2 in three sizes,
in bfloat16, on random tokens: each contestant is a process of its own, warm, and they train in
turns; a ratio is the median over turns. Then sweeps over batch and remat, and what just fits. Our
steps are those of a real run but for the input pipeline: batches lie in the host's memory.
"""

import datetime
import functools
import itertools
import json
import os
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
from ml_collections import ConfigDict
from turns import Contestant, OutOfMemory

from jaxdp import attention, command, metrics, prediction
from jaxdp.configs import gpt2_124m
from jaxdp.metrics import read_jsonl
from jaxdp.parallel import Replicas

NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; None: no comparison.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps in a turn.")
TURNS = flags.DEFINE_integer("turns", 7, "Turns.")
REHEARSE = flags.DEFINE_bool("rehearse", False, "On a CPU, with tiny models.")
SERVE = flags.DEFINE_string("serve", None, "Be a contestant with these keys, JSON (internal).")
ASK = flags.DEFINE_bool("ask", False, "Print what the parent wants to know, JSON (internal).")

VOCAB = 50304  # GPT-2's, padded as in nanoGPT.
# What replaces the keys of configs/gpt2_124m.py, and sequences per batch.
MODELS = {
    "GPT-2 124M": ({}, (8, 16, 32, 64)),
    "GPT-2 350M": ({"num_layers": 24, "num_heads": 16, "embed_dim": 1024}, (4, 8, 16, 32)),
    "GPT-2 1.3B": (
        {"num_layers": 24, "num_heads": 16, "embed_dim": 2048, "seq_len": 2048},
        (1, 2, 4, 8),
    ),
}
REMAT = {
    "none": {},
    "remat": {"remat": True},
    "remat, scan": {"remat": True, "scan_layers": True},
}
SEQUENCES = tuple(1024 * 2**i for i in range(9))
LARGER = {
    f"{layers} x {width}": {"num_layers": layers, "num_heads": width // 64, "embed_dim": width}
    for layers, width in ((36, 1280), (48, 1600), (32, 2560), (32, 3200), (32, 4096), (40, 5120))
}
# In place of all of these, where only the way through is tried.
TINY = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "seq_len": 32}


def main() -> int:
    """Prints the document, or serves."""
    if SERVE.value:
        turns.run(serve)
        return 0
    if ASK.value:
        device = jax.local_devices()[0]
        peak = metrics.peak_flops(device)
        answer = {"kind": device.device_kind, "peak": peak, "errors": attention_errors()}
        print(json.dumps(answer))
        return 0
    jax.config.update("jax_platforms", "cpu")  # The GPU is for the others.
    print(introduction())
    for part in (attention_rows(), loss_rows(), *speed_tables(), *limits()):
        for line in part:
            print(line, flush=True)
    return 0


@functools.cache
def device() -> dict[str, Any]:
    """Of the GPU: kind, peak (FLOP/s) and errors (of attention)."""
    answer = subprocess.check_output([*this(), "--ask"], text=True, env=environment())
    return json.loads(answer)


def this() -> list[str]:
    """The command that this is, for a process that has the GPU to itself."""
    return [sys.executable, *sys.argv]


def environment() -> dict[str, str]:
    """Of all processes: they share the device's memory as they need it, and one device."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_VISIBLE_DEVICES": "0"}
    rehearsed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return os.environ | own | (rehearsed if REHEARSE.value else {})


def introduction() -> str:
    """How the document came about."""
    unmeasured = "\n**A rehearsal on a CPU: no figure here means anything.**\n"
    return f"""# On a GPU
{unmeasured * REHEARSE.value}
Made by `python benchmarks/gpu.py {" ".join(sys.argv[1:])}` on {datetime.date.today():%d %B %Y}: \
{device()["kind"]}, JAX {jax.__version__}, Python {platform.python_version()}."""


def model_config(keys: dict, batch: int) -> ConfigDict:
    """GPT-2's config with other keys, in steps of one micro-batch."""
    config = gpt2_124m.get_config()
    keys = keys | (TINY if REHEARSE.value else {})
    config.seq_len = keys.pop("seq_len", config.seq_len)
    config.model.update(keys)
    config.update({"global_batch_size": batch, "grad_accum_steps": 1, "num_train_steps": 10**9})
    return config


def some(things: Any) -> list[Any]:
    """Those of a tuple, or the items of a dict; for a rehearsal the first only."""
    found = list(things.items() if isinstance(things, dict) else things)
    return found[:1] if REHEARSE.value else found


def vocab() -> int:
    """The models' vocabulary size."""
    return 256 if REHEARSE.value else VOCAB


# Correctness.


def attention_errors() -> dict[str, float]:
    """By model: the worst relative error of bfloat16 attention or one of its gradients."""
    found = {}
    for name, (keys, batches) in MODELS.items():
        config = model_config(keys, batches[0])
        heads, length = config.model.num_heads, config.seq_len
        shape = (batches[0], length, heads, config.model.embed_dim // heads)
        exact = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
        rounded = [x.astype("bfloat16") for x in exact]
        kernel = attention.kernel("bfloat16", shape[-1], masked=False)
        pairs = zip(
            attended(*rounded), attended(*[x.astype("float32") for x in rounded]), strict=True
        )
        errors = (np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
        found[f"{name} ({kernel})"] = float(max(errors))
    return found


@jax.jit
def _attended(query, key, value, weights):
    def loss(query, key, value):
        out = attention.attend(query, key, value, causal=True)
        return (out * weights).astype("float32").sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def attended(*arrays: jax.Array) -> list[np.ndarray]:
    """Attention, and the gradients of a weighted sum of it, as float32."""
    return [np.asarray(x, np.float32) for x in _attended(*arrays)]


def attention_rows() -> Iterator[str]:
    """Ends the benchmark where an error is more than rounding to 8 bits makes it."""
    yield "\n## Attention in bfloat16 against XLA's in float32\n"
    yield "| model (kernel) | relative error of results and gradients, the worst |\n|---|---|"
    for name, error in device()["errors"].items():
        yield f"| {name} | {error:.4f} |"
        if not error < 0.02:  # bfloat16 rounds to 2^-9; a handful of such roundings meet.
            raise SystemExit(f"attention is wrong: {name}, relative error {error}")


def loss_rows() -> Iterator[str]:
    """Trains the quickstart in both types; ends the benchmark where losses go apart."""
    count = 20 if REHEARSE.value else 400
    keys = [f"--config.num_train_steps={count}", f"--config.eval_every={count}"]
    keys += [f"--config.log_every={count // 20}", f"--config.checkpoint.every={count}"]
    if REHEARSE.value:
        keys += [f"--config.data.path={__file__}", "--config.tokenizer=char"]
        keys += ["--config.model.num_layers=1", "--config.model.embed_dim=16"]
        keys += ["--config.seq_len=16", "--config.sample.num_tokens=0"]
    curves = []
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"--workdir={folder}/run", f"--config.model.dtype={dtype}", *keys]
            arguments += [f"--config.data.cache_dir={folder}/tokens"]
            config = str(Path(__file__).parent.parent / "configs/quickstart.py")
            ours = [sys.executable, "-m", "jaxdp.train", f"--config={config}", *arguments]
            subprocess.run(ours, check=True, stdout=sys.stderr, env=environment())
            records = read_jsonl(Path(folder) / "run")
            curves.append({r["step"]: r["train/loss"] for r in records if "train/loss" in r})
    yield "\n## Losses of the quickstart\n"
    yield "| step | float32 | bfloat16 |\n|---|---|---|"
    for step in list(curves[0])[:: max(1, len(curves[0]) // 8)]:
        yield f"| {step} | {curves[0][step]:.4f} | {curves[1][step]:.4f} |"
    ends = [np.mean(list(curve.values())[-5:]) for curve in curves]
    if not abs(ends[1] - ends[0]) < 0.05:
        raise SystemExit(f"bfloat16 learns something else: {ends[0]:.3f}, {ends[1]:.3f}")


# Speed.


def serve() -> None:
    """Our contestant: trains so many steps as each line of stdin says."""
    command.prepare_jax()
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


def ours(keys: dict, batch: int) -> Contestant:
    """Starts it."""
    return Contestant(*this(), f"--serve={json.dumps(keys | {'batch': batch})}", **environment())


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
    flops = rate * prediction.step_flops(config, vocab(), 1)[0]
    used = f"{flops / device()['peak']:.1%}" if device()["peak"] else "unknown"
    return f"{rate:,.0f} | {used} | {peak / 2**30:.2f}"


def speed_tables() -> Iterator[Iterator[str]]:
    """Of each model: against nanoGPT, and by batch and remat."""
    for name, (keys, batches) in some(MODELS):
        yield peer_rows(name, keys, batches[1])
        yield sweep_rows(keys, batches)


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


def sweep_rows(keys: dict, batches: tuple[int, ...]) -> Iterator[str]:
    """Ours alone, by batch and remat."""
    yield "\n| sequences | remat | tokens/s | MFU | GiB |\n|---|---|---|---|---|"
    for batch, (policy, more) in itertools.product(some(batches), REMAT.items()):
        found = measured({"jaxdp": lambda: ours(keys | more, batch)})  # noqa: B023
        figures = "out of memory | |"
        if found:
            figures = cells(model_config(keys, batch), *found["jaxdp"])
        yield f"| {batch} | {policy} | {figures} |"


# Limits.


def limits() -> Iterator[Iterator[str]]:
    """The longest sequence and the largest model, one sequence at a time, with remat."""
    remat = {"remat": True}
    longer = {f"{n:,} tokens": remat | {"seq_len": n} for n in SEQUENCES}
    larger = {name: remat | keys for name, keys in LARGER.items()}
    yield fitting_rows("The longest sequence of GPT-2 124M", longer)
    yield fitting_rows("The largest model, context 1,024 (layers x width)", larger)


def fitting_rows(title: str, tried: dict[str, dict]) -> Iterator[str]:
    """From the smallest on, until the memory does not suffice."""
    yield f"\n## {title}\n\nOne sequence a step, model.remat.\n"
    yield "| | tokens/s | MFU | GiB |\n|---|---|---|---|"
    for name, keys in some(tried):
        found = measured({name: lambda: ours(keys, 1)})  # noqa: B023
        if not found:
            yield f"| {name} | out of memory | | |"
            return
        yield f"| {name} | {cells(model_config(keys, 1), *found[name])} |"


if __name__ == "__main__":
    sys.exit(command.run(main))
