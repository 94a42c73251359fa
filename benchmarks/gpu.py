"""Measures correctness and speed on one GPU, in turns with compiled nanoGPT, in 8 minutes.

    git clone https://github.com/karpathy/nanoGPT
    python -m venv torch-venv && torch-venv/bin/pip install torch numpy
    python benchmarks/gpu.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python
    python benchmarks/gpu.py --rehearse     # all of it on a CPU, tiny: the figures mean nothing

Prints a document in Markdown, and writes it to --output line by line; beside that file come a log
and a list of the largest kernels. Parts are ordered by value. Each is a process of its own with a
time limit, so that one that dies or hangs costs no other part; what no longer fits into --minutes
is named as skipped. Our step is that of a real run without the input pipeline: batches are in the
host's memory. Their tokens are drawn by Zipf's law, because random ones hide the cost of the
embedding. It needs JAX, Flax, Optax, Orbax and ml-collections; no TensorFlow.
"""

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
from absl import flags
from gpu_models import CHILD, DEFAULT, REHEARSE, Variant, environment, gpu, output, this

from jaxdp.common import cli
from jaxdp.configs import default
from jaxdp.parallel import gpu as xla

flags.DEFINE_string("nanogpt", None, "A folder with nanoGPT's model.py, to compare with.")
flags.DEFINE_string(
    "torch_python", None, "A Python that has PyTorch; by default the one that runs this."
)
flags.DEFINE_string("output", "gpu.md", "The file for the document.")
MINUTES = flags.DEFINE_float("minutes", 8, "Time for everything; parts that don't fit are skipped.")
PARTS_CHOSEN = flags.DEFINE_list("parts", None, "Names of the parts to run, by default all.")
COMMIT = flags.DEFINE_string("commit", None, "The commit, for a copy without its git repository.")


class Part(NamedTuple):
    """A part of the document, which has a process of its own.

    Attributes:
      title: its heading.
      module: the module with the function that yields its lines.
      function: the name of that function.
      arguments: its arguments.
      expected: seconds that it takes on an H100; it is skipped if fewer than 60% of them are left.
      limit: seconds after which it is ended.
      on_gpu: whether its own process computes on the GPU, rather than child processes of it.
      variant: the environment of its process.
    """

    title: str
    module: str
    function: str
    arguments: tuple
    expected: float
    limit: float
    on_gpu: bool = False
    variant: Variant = DEFAULT


def _comparison(model: str, batch: int, expected: float, limit: float) -> Part:
    title = f"{model}, {batch} x 1,024 tokens"
    return Part(title, "gpu_speed", "comparison", (model, batch), expected, limit)


# In separate launches each kernel is traced under its own instruction.
SEPARATE = Variant(xla_flags="--xla_gpu_enable_command_buffer=")
PARTS = {
    "checks": Part("Gradients and attention", "gpu_checks", "part", (), 120, 150, True),
    "124M-32": _comparison("GPT-2 124M", 32, 80, 150),
    "350M-16": _comparison("GPT-2 350M", 16, 120, 180),
    "kernels": Part(
        "Kernels of GPT-2 124M, 32 x 1,024 tokens",
        "gpu_kernels",
        "part",
        (),
        55,
        80,
        True,
        SEPARATE,
    ),
    "characters": Part("shakespeare_char.py", "gpu_speed", "characters", (), 45, 100, True),
    "resume": Part("Stopped and resumed", "gpu_resume", "part", (), 60, 110),
    "124M-16": _comparison("GPT-2 124M", 16, 50, 120),
    "variants": Part("Other settings", "gpu_speed", "variants", (), 105, 160),
    "124M-64": Part("GPT-2 124M, 64 x 1,024 tokens", "gpu_speed", "largest", (), 30, 60),
}


def main() -> int:
    """Prints the document, or does the task of a child process."""
    if CHILD.value:
        return child(**json.loads(CHILD.value))
    deadline = time.monotonic() + 60 * MINUTES.value
    with output(".md").open("w") as document, tempfile.TemporaryDirectory() as programs:
        # An empty compilation cache, so that every run of this script takes the same time.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
        output(".log").write_text("")
        say(introduction(), document)
        for name in PARTS_CHOSEN.value or PARTS:
            run_part(name, deadline, document)
    return 0


def child(task: str, **given) -> int:
    """Does the task of a child process: a part, or what a part starts processes for."""
    xla.prepare(default.get_config())
    if task == "train":
        importlib.import_module("gpu_speed").train(**given)
    elif task == "run":
        importlib.import_module("gpu_resume").run(**given)
    else:
        part = PARTS[given["name"]]
        if not part.on_gpu:
            jax.config.update("jax_platforms", "cpu")  # Its child processes use the GPU.
        function = getattr(importlib.import_module(part.module), part.function)
        for line in function(*part.arguments):
            print(line, flush=True)
    return 0


def say(line: str, document: TextIO) -> None:
    """Prints a line of the document, and writes it to its file at once."""
    for place in (sys.stdout, document):
        print(line, file=place, flush=True)


def introduction() -> str:
    """Returns the head of the document: on what it was made."""
    name, driver = gpu()
    versions = []
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    unmeasured = "\n**A rehearsal on a CPU: no figure here means anything.**\n"
    return f"""# jaxdp on a GPU
{unmeasured * REHEARSE.value}
{name}, driver {driver}, {os.cpu_count()} CPU cores; Python {platform.python_version()}, \
{", ".join(versions)}; {datetime.date.today():%d %B %Y}, commit {commit()}.

MFU is against the GPU's dense bfloat16 peak, as jaxdp.model.flops.flops_per_token counts.
Contestants of a table train in turns; a time is the median over turns, a ratio the median of the
ratios within a turn. Tokens are drawn by Zipf's law."""


def commit() -> str:
    """Returns the name of the commit."""
    if COMMIT.value:
        return COMMIT.value
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        return subprocess.check_output(
            command, text=True, cwd=folder, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_part(name: str, deadline: float, document: TextIO) -> None:
    """Runs a part in a child process, and says its lines as they come."""
    part, began = PARTS[name], time.monotonic()
    left = deadline - began
    say(f"\n## {part.title}\n", document)
    if left < 0.6 * part.expected:
        say(
            f"Skipped: {max(left, 0):.0f} s are left, and it takes about {part.expected:.0f}.",
            document,
        )
        return
    limit = left if REHEARSE.value else min(part.limit, left)
    with output(".log").open("a") as log:
        print(f"\n--- {name}", file=log, flush=True)
        process = subprocess.Popen(
            this({"task": "part", "name": name}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(part.variant),
            process_group=0,
        )
        timer = threading.Timer(limit, end, [process])
        timer.start()
        try:
            for line in process.stdout or ():
                say(line.rstrip("\n"), document)
            status = process.wait()
        finally:
            timer.cancel()
            end(process)
    took = time.monotonic() - began
    if took >= limit:
        say(f"\n**Ended after {took:.0f} s, its time limit: the part is not complete.**", document)
    elif status:
        last = output(".log").read_text().strip().splitlines()[-1]
        say(f"\n**Died with status {status} after {took:.0f} s: {last[:300]}**", document)
    else:
        say(f"\nThis part took {took:.0f} s.", document)


def end(process: subprocess.Popen) -> None:
    """Ends a process and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(cli.run(main))
