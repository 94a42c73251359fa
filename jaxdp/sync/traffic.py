"""What synchronisation costs: collectives, their bytes, and the time devices spend on them."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdp.common import hlo


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, and how often it happens.

    Attributes:
      kind: all-reduce, reduce-scatter, all-gather, all-to-all or collective-permute.
      bytes: size of the whole buffer, before or after it is split over devices.
      steps: optimizer steps from one such operation to the next.
      members: devices that take part, of several equal groups; 0: all.
      inside: whether they belong to one island.
    """

    kind: str
    bytes: int
    steps: float = 1
    members: int = 0
    inside: bool = False

    def sent(self, device_count: int) -> float:
        """Returns the bytes that each device sends, on a ring (Thakur et al. 2005).

        Examples:
          >>> Collective("all-reduce", 1000).sent(4), Collective("all-gather", 1000).sent(4)
          (1500.0, 750.0)
        """
        if self.kind == "collective-permute":
            return self.bytes
        rounds, count = 2 if self.kind == "all-reduce" else 1, self.members or device_count
        return rounds * (count - 1) / count * self.bytes

    def hops(self, device_count: int) -> int:
        """Returns the number of messages sent one after the other, on a ring."""
        if self.kind == "collective-permute":
            return 1
        count = self.members or device_count
        return (2 if self.kind == "all-reduce" else 1) * (count - 1)


def sent_per_step(round_: Iterable[Collective], device_count: int) -> float:
    """Returns the bytes that each device sends per optimizer step.

    Examples:
      >>> sent_per_step([Collective("all-reduce", 1000, steps=10)], device_count=4)
      150.0
    """
    return sum(c.sent(device_count) / c.steps for c in round_)


def num_bytes(tree: Any, dtype: str | None = None) -> int:
    """Returns the bytes of all floating-point leaves, in `dtype` or their own dtypes."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(x.size * jnp.dtype(dtype or x.dtype).itemsize for x in floats)


# The operations that make devices wait for each other, as compiled programs name them. On GPUs each
# is split into a -start, under whose name it is counted, and a -done.
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")
_CALL = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")


def collectives(program: str, device_count: int) -> dict[str, Collective]:
    """Finds the collectives of a compiled program.

    Args:
      program: its HLO text.
      device_count: N.

    Returns:
      {instruction name: collective}. A collective in a loop counts once.
    """
    found = {}
    # Searching for the call first is much faster, as most lines hold other instructions.
    for instruction in hlo.instructions(filter(_CALL.search, program.splitlines())):
        kind = instruction.kind.removesuffix("-start")
        # The result of a reduce-scatter is one device's part.
        parts = device_count if kind == "reduce-scatter" else 1
        found[instruction.name] = Collective(kind, parts * hlo.num_bytes(instruction.result))
    return found


class Trace:
    """Measures the share of the devices' time spent in collectives, waiting included.

    JAX's profiler records what every device executes, until `stop`. The share is the time in
    collectives, averaged over this process's devices, divided by wall-clock time. It includes
    waiting for slower devices, as a collective ends only when all have joined.
    """

    def __init__(self, names: Iterable[str], device_count: int):
        """Starts the profiler.

        Args:
          names: names of the collectives' instructions.
          device_count: number of this process's devices.
        """
        self._names, self._devices = set(names), device_count
        self._folder = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder.name, profiler_options=options)
        self._began = time.perf_counter()

    def stop(self) -> float | None:
        """Stops the profiler; returns the share of time, None if it recorded no collectives.

        Raises:
          RuntimeError: the profile can't be written, for example because the disk is full.
        """
        seconds = time.perf_counter() - self._began
        with self._folder:
            jax.profiler.stop_trace()
            files = list(Path(self._folder.name).rglob("*.xplane.pb"))
            events = [e for file in files for e in _events(file) if e.name in self._names]
            spent = sum(event.duration_ns for event in events) / 1e9
        return spent / (seconds * self._devices) if events else None


def _events(file: Path) -> Iterable[Any]:
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            yield from line.events
