"""What makes a CPU fast, set before JAX starts: how many devices it is, and how it gets memory."""

import ctypes
import glob
import os

import jax
from ml_collections import ConfigDict

# mallopt's, of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
HEAP_MAX = 64 * 2**20  # Bytes; what is larger, glibc puts into no arena but the first.


def prepare(config: ConfigDict, *, two_devices: bool) -> None:
    """Sets up this process for a run on CPUs; what the user has set for it stays.

    Call it before JAX has devices.

    Args:
      config: a valid one.
      two_devices: whether two devices train the same run as one; see `setup.same_on_two_devices`.
    """
    if two_devices:
        _be_two_devices()
    if not (glob.glob("/dev/nvidia[0-9]*") or "MALLOC_" in "".join(os.environ)):
        _keep_memory(activation_bytes(config))


def _be_two_devices() -> None:
    """Makes two devices of a CPU, unless the user has said how many.

    Much of a small model's step is too small for XLA to split over cores, or isn't split at all: a
    device for each of two cores is up to 1.5 times as fast as one for both (benchmarks/RESULTS.md).
    Not so for one of several processes.
    """
    said = jax.config.values["jax_num_cpu_devices"] > 0 or "device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    alone = not jax.distributed.is_initialized()
    cores = len(os.sched_getaffinity(0))
    if cores > 1 and alone and not said:
        jax.config.update("jax_num_cpu_devices", 2)


def _keep_memory(step_bytes: int) -> None:
    """Has glibc keep the pages that a step has freed for the next one.

    It gives large blocks back to the kernel, which clears each page of the next step's anew: up to
    a third of the time (benchmarks/RESULTS.md). What doesn't fit into a thread's arena is kept only
    if there are no others, which costs small models a tenth of their speed.

    Args:
      step_bytes: what a device needs for a step, about.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    if step_bytes > HEAP_MAX // 2:
        libc.mallopt(ARENA_MAX, 1)


def activation_bytes(config: ConfigDict) -> int:
    """About what a device stores between forward and backward pass, without the logits.

    16 arrays of the model's width and 3 of attention's weights for each layer, in float32; what is
    exact is `liveness.peak_bytes`, which takes seconds.
    """
    model = config.model
    devices = max(1, jax.config.values["jax_num_cpu_devices"])
    rows = config.global_batch_size // config.grad_accum_steps // devices
    width = 16 * model.embed_dim + 3 * model.num_heads * config.seq_len
    return 4 * rows * config.seq_len * model.num_layers * width
