"""Sets up fast training on CPUs before JAX starts: the number of devices, and malloc."""

import ctypes
import os

import jax
from ml_collections import ConfigDict

from jaxdp.common import nvidia

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
HEAP_MAX = 64 * 2**20  # Bytes; glibc puts larger blocks into the first arena only.


def prepare(config: ConfigDict, *, two_devices: bool) -> None:
    """Sets up this process for a run on CPUs, except for what the user has set.

    Call it before JAX looks for devices.

    Args:
      config: a valid config.
      two_devices: whether two devices may train the run; see `setup.same_on_two_devices`.
    """
    if two_devices:
        be_two_devices()
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ)
    set_by_user = set_by_user or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not (nvidia.device_files() or set_by_user):
        _keep_memory(activation_bytes(config))


def be_two_devices() -> None:
    """Splits a CPU into two devices, unless it has one core or the user has set a number.

    XLA doesn't split much of a small model's step over cores: a device for each of two cores is up
    to 1.5 times as fast as one device for both (benchmarks/RESULTS.md). A process that is one of
    several stays one device.
    """
    alone = not jax.distributed.is_initialized()
    if len(os.sched_getaffinity(0)) > 1 and alone:
        be_devices(2)


def be_devices(count: int) -> None:
    """Splits a CPU into devices, unless the user has set a number."""
    is_set = jax.config.values["jax_num_cpu_devices"] > 0 or "device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    if not is_set:
        jax.config.update("jax_num_cpu_devices", count)


def _keep_memory(step_bytes: int) -> None:
    """Makes glibc keep the memory that a step frees, for the next step.

    By default it returns large blocks to the kernel, which clears every page before the next step:
    up to a third of the time (benchmarks/RESULTS.md). Blocks too large for a thread's arena are
    kept only if all threads share one arena, which costs small models a tenth of their speed.

    Args:
      step_bytes: approximate bytes that a device needs for a step.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    if step_bytes > HEAP_MAX // 2:
        libc.mallopt(ARENA_MAX, 1)


def activation_bytes(config: ConfigDict) -> int:
    """Estimates the bytes a device stores between forward and backward pass, without the logits.

    It counts 16 arrays of the model's width and 3 of attention weights per layer, in float32. The
    exact figure comes with the compiled step, and this one is needed before it.
    """
    model = config.model
    devices = max(1, jax.config.values["jax_num_cpu_devices"])
    rows = config.global_batch_size // config.grad_accum_steps // devices
    width = 16 * model.embed_dim + 3 * model.num_heads * config.seq_len
    return 4 * rows * config.seq_len * model.num_layers * width
