"""What agreement costs: bytes, collectives, and the time that devices spend on them."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program, and how often it happens.

    Attributes:
      kind: all-reduce, reduce-scatter, all-gather or collective-permute.
      bytes: of the whole buffer that it is about, on each device.
      steps: it happens once in so many optimizer steps.
    """

    kind: str
    bytes: int
    steps: float = 1

    def sent(self, device_count: int) -> float:
        """Bytes that a device sends, on a ring (Thakur et al. 2005).

        Examples:
          >>> Collective("all-reduce", 1000).sent(4), Collective("all-gather", 1000).sent(4)
          (1500.0, 750.0)
        """
        if self.kind == "collective-permute":
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (device_count - 1) / device_count * self.bytes

    def hops(self, device_count: int) -> int:
        """Messages that wait for one another, on a ring."""
        if self.kind == "collective-permute":
            return 1
        return (2 if self.kind == "all-reduce" else 1) * (device_count - 1)


def sent_per_step(round_: Iterable[Collective], device_count: int) -> float:
    """Bytes that a device sends per optimizer step.

    Examples:
      >>> sent_per_step([Collective("all-reduce", 1000, steps=10)], device_count=4)
      150.0
    """
    return sum(c.sent(device_count) / c.steps for c in round_)


def num_bytes(tree: Any, dtype: str | None = None) -> int:
    """Of all floating-point leaves, in `dtype` or their own."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(x.size * jnp.dtype(dtype or x.dtype).itemsize for x in floats)


# The operations that make devices wait for each other, as compiled programs name them; on GPUs
# each is split into a -start, which is counted, and a -done.
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")
_CALL = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_INSTRUCTION = re.compile(rf"%?(\S+) = (.+?){_CALL.pattern}")
_BUFFER = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(program: str, device_count: int) -> dict[str, Collective]:
    """Those in a compiled program.

    Args:
      program: its HLO text.
      device_count: N.

    Returns:
      {instruction name: collective}; those in a loop are there once, whatever its length.
    """
    found = {}
    # Most lines are of other instructions, which are told by their call much faster.
    lines = filter(_CALL.search, program.splitlines())
    for name, shape, kind, start in _INSTRUCTION.findall("\n".join(lines)):
        buffers = [
            int(bits) // 8 * _product(dimensions) for _, bits, dimensions in _BUFFER.findall(shape)
        ]
        # What an instruction's text gives is its result: for a -start operands, too, and for a
        # reduce-scatter a device's part.
        parts = device_count if kind == "reduce-scatter" else 1
        found[name] = Collective(kind, parts * sum(buffers) // (2 if start else 1))
    return found


def _product(dimensions: str) -> int:
    size = 1
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


class Trace:
    """Measures which share of the devices' time goes into collectives, waiting included.

    Until `stop` JAX's profiler records what every device executes; the share is the
    time in collectives, summed over this process's devices, through the time on the clock. What a
    device waits for a slower one is in it, for a collective ends when all have joined.
    """

    def __init__(self, names: Iterable[str], device_count: int):
        """Begins to record.

        Args:
          names: of the collectives' instructions.
          device_count: of this process.
        """
        self._names, self._devices = set(names), device_count
        self._folder = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder.name, profiler_options=options)
        self._began = time.perf_counter()

    def stop(self) -> float | None:
        """Ends; returns the share of time, or None where the backend records no collectives.

        Raises:
          RuntimeError: the record can't be written; the disk is full, say.
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
