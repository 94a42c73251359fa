"""NVIDIA GPUs that a program can be compiled for on a machine without them.

XLA's compiler for GPUs needs no GPU, only a description of one. It comes with the extra
`plan-gpu`. What it makes is the program that a machine with such GPUs would run, but for the choice
among kernels of equal results that XLA times on the GPU itself.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxdp.common.errors import ConfigError
from jaxdp.model.target import Target, compiling_for

CUDNN = (9, 12)  # The version of cuDNN that programs are compiled for.


class Chip(NamedTuple):
    """What XLA's compiler wants to know of a GPU, apart from its memory.

    Attributes:
      capability: CUDA's compute capability.
      cores: number of streaming multiprocessors; the next three are of each.
      units: float32 units.
      threads: the most threads.
      shared: bytes of shared memory, of which a block can have all but 1 KiB.
      clock: GHz.
      cache: bytes of the L2 cache.
    """

    capability: float
    cores: int
    units: int
    threads: int
    shared: int
    clock: float
    cache: int


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
      device_kind: JAX's name for it.
      chip: its processor.
      memory: bytes of memory, as CUDA reports them.
      bandwidth: bytes per second between memory and cores.
      link: bytes per second that it can send to another one in its machine, by NVLink or PCIe.
    """

    device_kind: str
    chip: Chip
    memory: int
    bandwidth: float
    link: float

    def describe(self) -> str:
        """Returns XLA's description, a `GpuTargetConfigProto` as text."""
        chip = self.chip
        major, minor = str(chip.capability).split(".")
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth:.0f}
              core_count: {chip.cores} fpus_per_core: {chip.units}
              threads_per_core_limit: {chip.threads} shared_memory_per_core: {chip.shared}
              shared_memory_per_block_optin: {chip.shared - 1024}
              clock_rate_ghz: {chip.clock} l2_cache_size: {chip.cache}
              threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.device_kind}"
        """

    @property
    def target(self) -> Target:
        """What the model has to know of it."""
        return Target("gpu", self.chip.capability)


GH100 = Chip(9.0, 132, 128, 2048, 233_472, 1.98, 50 * 2**20)
GA100 = Chip(8.0, 108, 64, 2048, 167_936, 1.41, 40 * 2**20)
AD104 = Chip(8.9, 58, 128, 1536, 102_400, 2.04, 48 * 2**20)
AD102 = Chip(8.9, 128, 128, 1536, 102_400, 2.52, 72 * 2**20)
# The first three as XLA's own files describe them, the others from NVIDIA's documents.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", GH100, 84_942_979_072, 3352.32e9, 450e9),
    "h200": Gpu("NVIDIA H200", GH100, 151_397_597_184, 4800e9, 450e9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", GA100, 85_100_068_864, 2039.04e9, 300e9),
    "l4": Gpu("NVIDIA L4", AD104, 23_650_000_000, 300e9, 32e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", AD102, 25_250_000_000, 1008e9, 32e9),
}


# Dense bf16 peak per device in FLOP/s, from the vendors' data sheets (V100, T4: fp16).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: jax.Device | Gpu) -> float:
    """Returns a device's bfloat16 peak in FLOP/s; 0 where it isn't known (CPUs)."""
    kind = device.device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), 0.0)


def absent_devices(gpu: Gpu, count: int, hosts: int = 1) -> list[jax.Device]:
    """Returns devices that programs can be compiled for, and not run on.

    Args:
      gpu: their kind.
      count: how many, over all hosts.
      hosts: machines, each with one process and as many of the devices; divides count.

    Raises:
      ConfigError: the compiler is not installed.
    """
    assert count % hosts == 0
    # Machines (the GPUs inside are connected by NVLink), processes of each, devices of each.
    topology = f"{hosts}x1x{count // hosts}"

    def describe() -> list[jax.Device]:
        found = topologies.get_topology_desc(
            gpu.device_kind, "cuda", target_config=gpu.describe(), topology=topology
        )
        return list(found.devices)

    with contextlib.suppress(NotImplementedError):
        return describe()
    _register_compiler()
    with contextlib.suppress(NotImplementedError):
        return describe()
    raise ConfigError(
        f"to compile for {gpu.device_kind} takes XLA's compiler for NVIDIA GPUs, of the version of "
        f"jax {jax.__version__}: pip install 'jaxdp[plan-gpu]'"
    )


def _register_compiler() -> None:
    """Registers JAX's plugin for GPUs, if it is installed, on a machine without them.

    Before it looks for GPUs, JAX asks CUDA for its version, and where there is none, it leaves the
    plugin out, unless this variable is set or JAX_PLATFORMS=cpu is.
    """
    jax.devices()  # First: afterwards JAX would expect GPUs here.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name).initialize()
            return


@contextlib.contextmanager
def compiling_absent(gpu: Gpu) -> Iterator[None]:
    """Makes functions traced in this context programs for a GPU that this machine doesn't have.

    Before JAX calls cuDNN's attention, it asks the first local GPU for its compute capability and
    the installed cuDNN for its version. JAX has no public way to answer for another machine, so its
    questions are answered here.
    """
    # Imported here, so that a JAX without this module can train.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    answers = {
        "check_cudnn_version": lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100,
        "check_compute_capability": lambda least: gpu.chip.capability >= float(least),
        "is_cuda_compute_capability_equal": lambda other: gpu.chip.capability == float(other),
    }
    asked = {name: getattr(fused, name) for name in answers}
    try:
        vars(fused).update(answers)
        with compiling_for(gpu.target):
            yield
    finally:
        vars(fused).update(asked)
