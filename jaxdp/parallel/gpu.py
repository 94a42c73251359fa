"""Sets up XLA for NVIDIA GPUs before JAX starts."""

import importlib.util
import mmap
import os
from pathlib import Path

from ml_collections import ConfigDict

from jaxdp.common import nvidia
from jaxdp.common.choices import LEVELS

# By name: the value that is better than XLA's default for a training step. The first was timed
# (benchmarks/RESULTS.md); what those for several GPUs do was seen in compiled programs only
# (benchmarks/scaling.md).
FLAGS = {
    # Query, key and value from three products: merged into one, its result has to be copied apart.
    "xla_gpu_dot_merger_threshold_mb": "0",
    # How many collectives may be under way beside the backward pass; in effect, any number. With
    # XLA's 1 the largest gradients are left to the end.
    "xla_gpu_experimental_parallel_collective_overlap_limit": "1000",
    # sync.method="sharded" sends gradients in buckets (sync/buckets.py). XLA must not join them: a
    # joined one can't be sent before the last of its gradients is computed.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1",
}
# Gradients in few bits are divided by the number of all devices' tokens before they are sent. XLA
# would end the asynchronous all-reduce of this number only after the backward pass, and everything
# waits for it. Seen in compiled programs only, as well.
OF_FEW_BITS = {"xla_gpu_disable_async_collectives": "ALLREDUCE"}


def prepare(config: ConfigDict) -> None:
    """Adds flags to XLA_FLAGS where there are NVIDIA GPUs; call it before JAX looks for devices.

    A flag that the user has set stays as it is, and one that the installed XLA doesn't know, which
    would end the process, is left out.

    Args:
      config: a valid config; without xla_flags nothing is added.
    """
    if nvidia.device_files():
        flags = [f"--{name}={value}" for name, value in wanted(config).items()]
        os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags])


def wanted(config: ConfigDict) -> dict[str, str]:
    """Returns the flags that a run on NVIDIA GPUs adds to what the user has set."""
    given, flags = os.environ.get("XLA_FLAGS", ""), dict(FLAGS)
    if config.sync.dtype in LEVELS and config.sync.method in ("gradient_mean", "sharded"):
        flags |= OF_FEW_BITS
    names = [name for name in flags if config.xla_flags and name not in given]
    return {name: flags[name] for name in names if _is_known(name)}


def _is_known(flag: str) -> bool:
    """Returns whether all parts of XLA that are installed contain the name of a flag."""
    libraries = xla_libraries()
    return len(libraries) > 1 and all(_contains(file, flag.encode()) for file in libraries)


def xla_libraries() -> list[Path]:
    """Returns the libraries that contain XLA: jaxlib's, and JAX's CUDA plugins."""
    spec = importlib.util.find_spec("jaxlib")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / "libjax_common.so" for folder in folders]
    files += [folder / "xla_cuda_plugin.so" for folder in nvidia.plugins()]
    return [file for file in files if file.exists()]


def _contains(file: Path, text: bytes) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text) >= 0
