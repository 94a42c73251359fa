"""The models, batches and variants that `gpu.py` measures, and the environment of its processes."""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxdp.configs import gpt2_124m
from jaxdp.data.batch import Batch
from jaxdp.data.sequences import Windows
from jaxdp.estimate.gpus import PEAK_FLOPS

REHEARSE = flags.DEFINE_bool("rehearse", False, "Run on a CPU, with tiny models.")
CHILD = flags.DEFINE_string("child", None, "What a child process does, as JSON (internal).")

VOCAB = 50304  # GPT-2's, padded as in nanoGPT.
DOCUMENT = 500  # Mean number of tokens in a document; web pages have about as many.
BATCHES = 8  # Different batches, used in turn.
# Config keys, and the values that replace the defaults of configs/gpt2_124m.py.
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2 124M": {},
    "GPT-2 350M": {"model.num_layers": 24, "model.num_heads": 16, "model.embed_dim": 1024},
}
# Replaces every model in a rehearsal, which only tries the code.
TINY = {"model.num_layers": 1, "model.num_heads": 2, "model.embed_dim": 16, "seq_len": 32}


class Variant(NamedTuple):
    """A way to run the step of GPT-2 124M other than the default.

    Attributes:
      keys: config keys and their values.
      environment: environment variables.
      xla_flags: flags added to XLA_FLAGS.
    """

    keys: Mapping[str, Any] = MappingProxyType({})
    environment: Mapping[str, str] = MappingProxyType({})
    xla_flags: str = ""


DEFAULT = Variant()


# Each group is trained in turns with the default; its variants fit into 80 GB together.
VARIANT_BATCH = 16
VARIANTS: tuple[dict[str, Variant], ...] = (
    {
        "loss_chunks=8": Variant({"loss_chunks": 8}),
        "data.packing=documents": Variant({"data.packing": "documents"}),
        "XLA's norms": Variant(environment={"PLAIN": "norms"}),
    },
    {
        "XLA's loss": Variant(environment={"PLAIN": "loss"}),
        "activations stored": Variant(environment={"PLAIN": "activations"}),
        "deterministic": Variant(xla_flags="--xla_gpu_deterministic_ops=true"),
        # Products that also compute the GELU and add the residuals: 85.4 GB a step with 32
        # sequences, as compiled, where it is 88.5.
        "all products by cuBLASLt": Variant(
            xla_flags="--xla_gpu_enable_cublaslt=true --xla_gpu_enable_triton_gemm=false"
        ),
    },
)


def model_config(keys: Mapping[str, Any], batch: int) -> ConfigDict:
    """Returns GPT-2's config with some keys replaced, and one micro-batch per step."""
    config = gpt2_124m.get_config()
    config.update({"global_batch_size": batch, "grad_accum_steps": 1, "num_train_steps": 10**9})
    config.update_from_flattened_dict({**keys} | (TINY if REHEARSE.value else {}))
    return config


def batch_size(batch: int) -> int:
    """Returns the number of sequences in a step; 2 in a rehearsal."""
    return 2 if REHEARSE.value else batch


def vocab() -> int:
    """Returns the vocabulary size of the models."""
    return 256 if REHEARSE.value else VOCAB


def tokens(count: int, size: int) -> np.ndarray:
    """Draws [count] uint16 tokens by Zipf's law, as in text: the n-th one's share is ~ 1 / n.

    The embedding's gradient of random tokens would be much faster: it adds to each row once. The
    last token ends a document.

    Args:
      count: number of tokens.
      size: size of the vocabulary.
    """
    draw, shares = np.random.default_rng(0), 1 / np.arange(1, size + 1)
    found = draw.choice(size, count, p=shares / shares.sum())
    return np.where(draw.random(count) < 1 / DOCUMENT, size - 1, found).astype(np.uint16)


def batches(config: ConfigDict, size: int) -> Iterator[Batch]:
    """Yields training batches without end, packed as in a run with this config.

    Args:
      config: a config.
      size: size of the vocabulary.
    """
    rows, length = config.global_batch_size, config.seq_len
    drawn = tokens(BATCHES * rows * length + 1, size)
    end = size - 1 if config.data.packing == "documents" else None
    windows = Windows(drawn, length, config.objective, end=end)
    starts = np.arange(BATCHES * rows).reshape(BATCHES, rows) * length
    return itertools.cycle([windows.take(row) for row in starts])


def this(task: dict[str, Any]) -> list[str]:
    """Returns the command line of a child process that does a task."""
    return [sys.executable, *sys.argv, f"--child={json.dumps(task)}"]


def environment(variant: Variant = DEFAULT) -> dict[str, str]:
    """Returns the environment of child processes: one device, memory allocated on demand."""
    given = f"{os.environ.get('XLA_FLAGS', '')} {variant.xla_flags}".strip()
    own = {"XLA_FLAGS": given} if given else {}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "CUDA_VISIBLE_DEVICES": "0"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    rehearsed = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} if REHEARSE.value else {}
    return os.environ | own | rehearsed | {**variant.environment}


def output(suffix: str) -> Path:
    """Returns a file beside --output, named as it but for its suffix."""
    document = Path(flags.FLAGS.output)
    return document.with_name(document.stem + suffix)


def some(things: Any) -> list[Any]:
    """Returns the elements of a tuple, or items of a dict; in a rehearsal only the first."""
    found = list(things.items() if isinstance(things, dict) else things)
    return found[:1] if REHEARSE.value else found


@functools.cache
def gpu() -> tuple[str, str]:
    """Returns name and driver of the GPU, without starting JAX on it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.check_output(command, text=True, timeout=20).splitlines()
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA GPU", "none"
    name, _, driver = lines[0].partition(", ")
    return name, driver


def peak_flops() -> float:
    """Returns the GPU's bfloat16 peak in FLOP/s; 0 where it isn't known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu()[0]), 0.0)
