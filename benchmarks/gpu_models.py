"""The models and settings that `gpu.py` measures, and the environment of its processes."""

import functools
import os
import subprocess
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from jaxdp.configs import gpt2_124m

REHEARSE = flags.DEFINE_bool("rehearse", False, "Run on a CPU, with tiny models.")

VOCAB = 50304  # GPT-2's, padded as in nanoGPT.
# Values that replace keys of configs/gpt2_124m.py, and sequences per batch.
MODELS = {
    "GPT-2 124M": ({}, (8, 16, 32, 64)),
    "GPT-2 350M": ({"num_layers": 24, "num_heads": 16, "embed_dim": 1024}, (4, 8, 16, 32)),
    "GPT-2 1.3B": (
        {"num_layers": 24, "num_heads": 16, "embed_dim": 2048, "seq_len": 2048},
        (1, 2, 4, 8),
    ),
}
REMAT = {
    "as it is": {},
    "remat": {"remat": True},
    "remat, scan": {"remat": True, "scan_layers": True},
}
# Tried one by one at the comparison's batch size, if the installed XLA knows them.
XLA_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_triton_gemm_any=true",
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_enable_command_buffer=",
)
SEQUENCES = tuple(1024 * 2**i for i in range(9))
LARGER = {
    f"{layers} x {width}": {"num_layers": layers, "num_heads": width // 64, "embed_dim": width}
    for layers, width in ((36, 1280), (48, 1600), (32, 2560), (32, 3200), (32, 4096), (40, 5120))
}
# Replaces every model in a rehearsal, which only tries the code.
TINY = {"num_layers": 1, "num_heads": 2, "embed_dim": 16, "seq_len": 32}


def this() -> list[str]:
    """Returns the command line of this process, to start a child that uses the GPU."""
    return [sys.executable, *sys.argv]


def environment(xla_flags: str = "") -> dict[str, str]:
    """Returns the environment of child processes: one device, memory allocated on demand.

    Args:
      xla_flags: XLA flags to add to those in the environment.
    """
    given = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
    own = {"XLA_FLAGS": given} if given else {}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_VISIBLE_DEVICES": "0"}
    rehearsed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return os.environ | own | (rehearsed if REHEARSE.value else {})


def model_config(keys: dict, batch: int) -> ConfigDict:
    """Returns GPT-2's config with some keys replaced, and one micro-batch per step."""
    config = gpt2_124m.get_config()
    keys = keys | (TINY if REHEARSE.value else {})
    for key in ("seq_len", "loss_chunks"):
        config[key] = keys.pop(key, config[key])
    config.model.update(keys)
    config.update({"global_batch_size": batch, "grad_accum_steps": 1, "num_train_steps": 10**9})
    return config


def variants(keys: dict) -> dict[str, tuple[dict, str]]:
    """Returns settings that may be faster, by name: keys to replace, and XLA flags."""
    width = model_config(keys, 1).model.embed_dim
    known = [flag for flag in some(XLA_FLAGS) if _known(flag)]
    return {
        "heads of 128": ({"num_heads": max(1, width // 128)}, ""),
        "loss_chunks=8": ({"loss_chunks": 8}, ""),
    } | {flag: ({}, flag) for flag in known}


@functools.cache
def _known(flag: str) -> bool:
    """Returns whether the installed XLA knows a flag; an unknown one ends the process."""
    start = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    return subprocess.run(start, env=environment(flag), capture_output=True).returncode == 0


def some(things: Any) -> list[Any]:
    """Returns the elements of a tuple, or items of a dict; in a rehearsal only the first."""
    found = list(things.items() if isinstance(things, dict) else things)
    return found[:1] if REHEARSE.value else found


def vocab() -> int:
    """Returns the vocabulary size of the models."""
    return 256 if REHEARSE.value else VOCAB
