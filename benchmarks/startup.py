"""Compares startup with nanoGPT's: seconds from starting the process to the end of step 1.

    python benchmarks/startup.py --nanogpt=nanoGPT --torch_python=torch-venv/bin/python \
        --config.data.path=tinyshakespeare.txt

Both are started as users start them, with the model of nanoGPT's character config for CPUs: `python
-m jaxdp.train`, and nanoGPT's `train.py`, whose evaluation before the first step takes only one
batch. The text is already tokenized. "Cold" means that the caches of compiled programs are empty.
Contestants take turns; the figures are medians.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nanogpt_copy
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.configs import shakespeare_char_cpu

CONFIG = config_flags.DEFINE_config_dict("config", shakespeare_char_cpu.get_config())
NANOGPT = flags.DEFINE_string("nanogpt", None, "A checkout of nanoGPT; it is not changed.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", None, "A Python that has PyTorch.")
TURNS = flags.DEFINE_integer("turns", 5, "Number of turns.")


def first_step(sign: str, *arguments: str, cwd: Path, **environ: str) -> float:
    """Kills a process once it prints a line that starts with `sign`; returns the seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        arguments,
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(sign):
            seconds = time.perf_counter() - began
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return seconds
    raise SystemExit("".join(printed))


def ours(folder: Path) -> Callable[[bool], float]:
    """Returns a function that times a start of jaxdp, cold or warm."""
    compiled, workdir = folder / "xla", folder / "run"
    given = [x for x in sys.argv[1:] if x.startswith("--config.")]
    arguments = ["--config=" + shakespeare_char_cpu.__file__, f"--workdir={workdir}", *given]

    def start(cold: bool) -> float:
        shutil.rmtree(workdir, ignore_errors=True)
        if cold:
            shutil.rmtree(compiled, ignore_errors=True)
        return first_step(
            "step ",
            *(sys.executable, "-m", "jaxdp.train", *arguments, "--config.log_every=1"),
            cwd=Path.cwd(),
            JAX_COMPILATION_CACHE_DIR=str(compiled),
        )

    return start


def theirs(folder: Path, config, compiling: bool) -> Callable[[bool], float]:
    """Returns a function that times a start of nanoGPT, cold or warm."""
    copy, caches = folder / f"nanoGPT{compiling:d}", folder / f"inductor{compiling:d}"
    arguments = nanogpt_copy.make(NANOGPT.value, copy, config)
    settings = (f"--compile={compiling}", "--eval_iters=1", "--log_interval=1")

    def start(cold: bool) -> float:
        if cold:
            shutil.rmtree(caches, ignore_errors=True)
        return first_step(
            "iter 0",
            *(TORCH_PYTHON.value, *arguments, *settings),
            cwd=copy,
            TORCHINDUCTOR_CACHE_DIR=str(caches),
        )

    return start


def main() -> int:
    """Times all contestants, and prints a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contestants = {
            "jaxdp": ours(folder),
            "nanoGPT eager": theirs(folder, CONFIG.value, False),
            "nanoGPT compiled": theirs(folder, CONFIG.value, True),
        }
        seconds: dict[tuple[str, bool], list[float]] = {}
        for _ in range(TURNS.value):
            for cold in (True, False):
                for name, start in contestants.items():
                    seconds.setdefault((name, cold), []).append(start(cold))
    print("| | cold: s | warm: s |\n|---|---|---|")
    for name in contestants:
        cold, warm = (statistics.median(seconds[name, cold]) for cold in (True, False))
        print(f"| {name} | {cold:.1f} | {warm:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, cli.check_overrides))
