"""Time of a training step by group of GPU kernels, from a trace of JAX's profiler, for `gpu.py`."""

import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from gpu_models import REHEARSE, batch_size, batches, model_config, output, vocab

from jaxdp.common import cli
from jaxdp.data.batch import with_process
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.program import pmapped
from jaxdp.step.setup import make_setup
from jaxdp.step.state import create_state

STEPS = 5  # Traced steps.
LISTED = 60  # Kernels in the list of the largest.
GROUPS = {
    "products": "matrix products",
    "attention": "cuDNN's kernels, or the softmax of masked attention",
    "loss": "softmax and cross-entropy over the vocabulary, without products",
    "embedding": "lookups and their gradients",
    "norms": "layer norms, with the residual sums fused into them",
    "activation": "GELU, forward and backward, with what is fused into it",
    "optimizer": "AdamW, clipping, the choice of skipped updates",
    "other": "casts, copies, dropout",
}
# Libraries' kernels whose instruction the trace doesn't name.
PRODUCT_KERNEL = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk", re.IGNORECASE)
ATTENTION_KERNEL = re.compile(r"fmha|flash|sdpa|cudnn", re.IGNORECASE)


class Instruction(NamedTuple):
    """An instruction of a compiled program.

    Attributes:
      op_name: JAX's name for the operation that it computes last.
      is_product: whether it contains a matrix product.
      is_attention: whether it is cuDNN's attention.
    """

    op_name: str
    is_product: bool = False
    is_attention: bool = False


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"\n%?(\S+) \([^\n]*?\) -> [^\n]* \{\n(.*?)\n\}", re.DOTALL)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def instructions(program: str) -> dict[str, Instruction]:
    """Reads the instructions of a compiled program's text, by name as kernels are named.

    A fusion without an op_name of its own gets the last one inside of it.
    """
    bodies, found = dict(_COMPUTATION.findall(program)), {}
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        body = bodies.get(called[1], "") if called else ""
        names = _OP_NAME.findall(line) or _OP_NAME.findall(body) or [""]
        head = line.partition("metadata=")[0]
        found[_plain(match[1])] = Instruction(
            names[-1],
            is_product="__cublas" in head or " dot(" in body or " dot(" in head,
            is_attention="fmha" in head,
        )
    return found


def _plain(name: str) -> str:
    """Returns a name in the form that instructions and their kernels have in common."""
    return re.sub(r"\W", "_", name)


def group(kernel: str, instruction: Instruction | None) -> str:
    """Returns the group of a kernel; see `GROUPS`.

    Args:
      kernel: its name.
      instruction: the instruction that it belongs to, if known.
    """
    op = instruction.op_name if instruction else ""
    if instruction and instruction.is_attention:
        return "attention"
    if instruction and instruction.is_product:
        return "products"
    if not op:
        if ATTENTION_KERNEL.search(kernel):
            return "attention"
        return "products" if PRODUCT_KERNEL.search(kernel) else "other"
    if "_norm/" in op:
        return "norms"
    if "embed/" in op:
        return "embedding"
    if re.search("/mlp/(?!up|down|gate)", op):
        return "activation"
    if "dot_product_attention" in op or re.search("/attention/(reduce|exp|max|sum|div|sub)", op):
        return "attention"
    if "jvp(" not in op and "transpose(" not in op:
        return "optimizer"
    return "other" if re.search(r"Transformer\.(?!logits)|layer", op) else "loss"


class Kernel(NamedTuple):
    """All executions of a kernel: its name, the instruction's name, seconds in all, and count."""

    name: str
    instruction: str
    seconds: float
    count: int


def kernels(folder: Path) -> list[Kernel]:
    """Reads the kernels in a trace, the longest first.

    Without a GPU, the operations that XLA's CPU backend executed take their place.
    """
    seconds: dict[tuple[str, str], float] = collections.Counter()
    counts: dict[tuple[str, str], int] = collections.Counter()
    for event in _events(folder):
        # A trace holds the name of the HLO instruction beside each kernel.
        stats = dict(event.stats)
        key = event.name, str(stats.get("hlo_op", ""))
        seconds[key] += event.duration_ns / 1e9
        counts[key] += 1
    found = [Kernel(*key, seconds[key], counts[key]) for key in seconds]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def _events(folder: Path) -> Iterator[Any]:
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            on_gpu = plane.name.startswith("/device:GPU")
            lines = list(plane.lines)
            # Other lines of a GPU repeat the streams' kernels, summed up by module or operation.
            streams = [line for line in lines if "Stream" in line.name] or lines
            for line in streams if on_gpu else lines if REHEARSE.value else []:
                for event in line.events:
                    if on_gpu or "hlo_op" in dict(event.stats):
                        yield event


def traced(keys: dict[str, Any], batch: int, folder: Path) -> tuple[str, float]:
    """Traces some steps; returns the compiled program's text, and GiB of its arrays."""
    config, replicas = model_config(keys, batch), Replicas(jax.local_devices()[:1])
    setup = make_setup(config, vocab(), 1)
    state = create_state(setup, replicas)
    drawn = batches(config, vocab())

    def placed():
        return replicas.shard_steps([with_process(next(drawn), busy=0.0)])

    step, given = pmapped(setup, replicas, state), [placed() for _ in range(STEPS)]
    compiled = step.lower(state, given[0]).compile()
    for one in given[:3]:
        state, metrics = step(state, one)
    jax.block_until_ready(metrics)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(folder), profiler_options=options)
    for one in given:
        state, metrics = step(state, one)
    jax.block_until_ready((state, metrics))
    jax.profiler.stop_trace()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return compiled.as_text(), held / 2**30


def part() -> Iterator[str]:
    """Yields the time of a step of 124M with 32 sequences by group of kernels."""
    cli.prepare_jax()
    with tempfile.TemporaryDirectory() as folder:
        program, held = traced({}, batch_size(32), Path(folder))
        found = kernels(Path(folder))
    known = instructions(program)
    by_kernel = {k: known.get(_plain(k.instruction)) or known.get(_plain(k.name)) for k in found}
    output("_kernels.tsv").write_text("\n".join(_list(by_kernel)) + "\n")
    totals: dict[str, list[float]] = {name: [0.0, 0] for name in GROUPS}
    for kernel, instruction in by_kernel.items():
        total = totals[group(kernel.name, instruction)]
        total[0] += kernel.seconds
        total[1] += kernel.count
    yield "| kernels | ms/step | number | |\n|---|---|---|---|"
    for name, (seconds, count) in totals.items():
        yield f"| {name} | {1e3 * seconds / STEPS:.2f} | {count / STEPS:.0f} | {GROUPS[name]} |"
    every = sum(seconds for seconds, _ in totals.values())
    yield f"| sum | {1e3 * every / STEPS:.2f} | | |\n"
    unknown = sum(k.seconds for k, instruction in by_kernel.items() if instruction is None)
    yield f"Kernels without a known instruction: {1e3 * unknown / STEPS:.2f} ms, by their names."
    yield f"Arguments and temporary arrays, as compiled: {held:.2f} GiB. The largest kernels:\n"
    yield "| ms/step | number | kernel | operation |\n|---|---|---|---|"
    for line in _list(by_kernel)[1:13]:
        yield f"| {' | '.join(line.split(chr(9))[:3])} | {line.split(chr(9))[-1][-70:]} |"


def _list(by_kernel: dict[Kernel, Instruction | None]) -> list[str]:
    """Returns the lines of a table of the largest kernels, with tabs between its columns."""
    lines = ["ms/step\tnumber\tkernel\tgroup\tinstruction\toperation"]
    for kernel, instruction in list(by_kernel.items())[:LISTED]:
        lines.append(
            f"{1e3 * kernel.seconds / STEPS:.3f}\t{kernel.count / STEPS:g}\t{kernel.name[:80]}\t"
            f"{group(kernel.name, instruction)}\t{kernel.instruction}\t"
            f"{instruction.op_name if instruction else ''}"
        )
    return lines
