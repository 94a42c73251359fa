"""What `gpu.py` trains, and in what kind of process; in a rehearsal, on a CPU and tiny."""

import os
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from jaxdp.configs import gpt2_124m

REHEARSE = flags.DEFINE_bool("rehearse", False, "On a CPU, with tiny models.")

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


def this() -> list[str]:
    """The command that this is, for a process that has the GPU to itself."""
    return [sys.executable, *sys.argv]


def environment() -> dict[str, str]:
    """Of all processes: they share the device's memory as they need it, and one device."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_VISIBLE_DEVICES": "0"}
    rehearsed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return os.environ | own | (rehearsed if REHEARSE.value else {})


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
