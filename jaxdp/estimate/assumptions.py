"""The hardware that a plan assumes: devices, their rate, their memory, the network."""

import dataclasses
import os

import jax
from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError
from jaxdp.common.terminal import in_gib
from jaxdp.estimate import compiled, scaling
from jaxdp.estimate.compiled import Machine
from jaxdp.estimate.gpus import GPUS, Gpu, peak_flops
from jaxdp.estimate.scaling import Network
from jaxdp.parallel.replicas import device_memory

# The share of a GPU's memory that JAX's allocator takes, unless one of these variables says
# otherwise; the rest is for CUDA, cuDNN, NCCL and other programs.
ALLOCATED = 0.75
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
MFU = 0.4  # An H100 reached 0.43 to 0.47 with models of 124M and 350M parameters.

NETWORK_GBPS = 100.0


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The hardware that a plan assumes.

    Attributes:
      devices: number of devices.
      kind: their kind, in words.
      bandwidth_gbps: Gbit/s that a device can send, to other islands if there are some.
      inside_gbps: Gbit/s that it can send within its island.
      hosts: machines that the devices are in.
      latency_us: microseconds per message.
      flop_rate: FLOP/s that a device reaches.
      rate_from: where flop_rate comes from, in words.
      room: bytes of memory per device that programs can have.
      room_from: where that comes from, in words.
    """

    devices: int
    kind: str
    bandwidth_gbps: float
    inside_gbps: float
    hosts: int
    latency_us: float
    flop_rate: float
    rate_from: str
    room: int
    room_from: str

    @property
    def network(self) -> Network:
        """The links between the devices."""
        between, inside = (x * 1e9 / 8 for x in (self.bandwidth_gbps, self.inside_gbps))
        return Network(between, self.latency_us / 1e6, inside, self.devices // self.hosts)


def machine_of(gpu: str | None, count: int, hosts: int) -> Machine:
    """Returns the devices to compile for; raises ConfigError if there are none such."""
    if gpu:
        if gpu not in GPUS:
            raise ConfigError(f"--gpu={gpu!r} is unknown: choose from {', '.join(GPUS)}")
        if count % hosts:
            raise ConfigError(
                f"--devices={count} can't be split equally over --hosts={hosts}: change one of them"
            )
        return compiled.absent_machine(gpu, count, hosts)
    if hosts > 1:
        raise ConfigError(f"--hosts={hosts} goes with --gpu, for machines that aren't this one")
    if count > jax.local_device_count():
        raise ConfigError(
            f"--devices={count} is more than this machine has, {jax.local_device_count()}: lower "
            "it, name a --gpu, or on a CPU set JAX_NUM_CPU_DEVICES"
        )
    return compiled.local_machine(count)


def gbps_of(
    gpu: str | None, hosts: int, given: float | None, inside: float | None
) -> tuple[float, float]:
    """Returns the Gbit/s that a device sends to all others, or other islands, and within its own.

    Args:
      gpu: a key of `GPUS`, whose own links connect those of one machine; None: another device.
      hosts: machines.
      given: the first of the results, if the user gave it.
      inside: the second, if the user gave it.
    """
    own = GPUS[gpu].link * 8 / 1e9 if gpu else NETWORK_GBPS
    between = given or (own if hosts == 1 else NETWORK_GBPS)
    return between, inside or (own if gpu else between)


def rate_of(
    config: ConfigDict, gpu: str | None, tflops: float | None, mfu: float
) -> tuple[float, str]:
    """Returns the FLOP/s that a device is assumed to reach, and where they come from."""
    if tflops:
        return tflops * 1e12, "given"
    if gpu:
        # Products of float32 are in TF32, at half the rate of bfloat16.
        peak = peak_flops(GPUS[gpu]) / (2 if config.model.dtype == "float32" else 1)
        return (
            mfu * peak,
            f"an MFU of {mfu:.0%} of {peak / 1e12:.0f}e12, assumed (small models reach less)",
        )
    return scaling.measure_rate(config), "reached by a matrix product of this model, timed here"


def room_of(gpu: str | None, memory_gib: float | None) -> tuple[int, str]:
    """Returns the bytes that programs can have on a device, and where they come from."""
    if memory_gib:
        return int(memory_gib * 2**30), "given"
    if gpu:
        return allocated(GPUS[gpu])
    return device_memory(), "this machine's"


def allocated(gpu: Gpu) -> tuple[int, str]:
    """Returns the bytes of a GPU that JAX's allocator takes, and where they come from."""
    given = [(name, os.environ[name]) for name in VARIABLES if os.environ.get(name)]
    name, text = given[0] if given else ("JAX's default", str(ALLOCATED))
    try:
        share = float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no number: write 0.9, or unset it") from None
    return int(share * gpu.memory), f"{share:.0%} of {in_gib(gpu.memory)}, by {name}"
