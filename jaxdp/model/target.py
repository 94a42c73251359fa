"""The device that a program is compiled for: this machine's, or a GPU that isn't there."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """What the model has to know of a device.

    Attributes:
      platform: JAX's name for its kind: "cpu", "gpu", "tpu".
      capability: CUDA's compute capability, such as 9.0 for an H100; 0 where it isn't NVIDIA's.
    """

    platform: str
    capability: float = 0.0

    @property
    def has_kernels(self) -> bool:
        """Whether it runs cuDNN's attention and Triton kernels: NVIDIA's GPUs, from Ampere on."""
        return self.capability >= 8.0


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """Returns the device that this thread compiles for: `compiling_for`'s, or the local one."""
    chosen = _target.get()
    return chosen or target_of(jax.local_devices()[0])


def target_of(device: jax.Device) -> Target:
    """Returns what the model has to know of a device of this process."""
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return Target(device.platform, float(device.compute_capability) if nvidia else 0.0)


@contextlib.contextmanager
def compiling_for(other: Target) -> Iterator[None]:
    """Makes functions traced in this context be programs for another device."""
    token = _target.set(other)
    try:
        yield
    finally:
        _target.reset(token)
