"""NVIDIA's GPUs, found without starting JAX: their device files, and JAX's plugins for them."""

import glob
import importlib.util
from pathlib import Path


def device_files() -> list[str]:
    """Returns the device files of this machine's GPUs, which JAX looks for, too."""
    return glob.glob("/dev/nvidia[0-9]*")


def plugins() -> list[Path]:
    """Returns the folders of JAX's CUDA plugins that are installed."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations or [] if spec else []
    return [path for folder in folders for path in Path(folder).glob("xla_cuda*")]
