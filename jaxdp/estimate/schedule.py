"""What a compiled program spends its time on: the bytes that its kernels move, and its collectives.

It is read from the order of the program's instructions, without running it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from jaxdp.common import hlo
from jaxdp.common.hlo import Instruction, num_bytes
from jaxdp.sync import traffic

GROUPS = ("products", "attention", "collectives", "other")
# Instructions that only name a part of memory, and the ends of others.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "iota")
_CALLS = ("while", "call", "conditional")
_SLICES = ("slice", "dynamic-slice", "gather")  # They read only what they return ...
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # ... and write only this operand.
_LIBRARIES = ("__cublas", "__cudnn", "__onednn")  # Their calls are matrix products.


class Kernel(NamedTuple):
    """Something that a program makes a device run.

    Attributes:
      instruction: as the program has it.
      group: one of `GROUPS`; attention is that by a kernel of its own.
      bytes: what it reads and writes; of an array of which it reads a slice, or writes one in
        place, the slice.
      times: how often it runs; more than once in a loop.
    """

    instruction: Instruction
    group: str
    bytes: int
    times: int


class Transfer(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: see `traffic.Collective`.
      bytes: size of the whole buffer.
      covered: whether products of the backward pass run between its start and its end.
    """

    kind: str
    bytes: int
    covered: bool


class Schedule:
    """A compiled program, with its instructions in the order in which they run."""

    def __init__(self, text: str, device_count: int):
        """Reads the HLO text of a program for N devices."""
        self._program = hlo.parse(text)
        self._collectives = traffic.collectives(text, device_count)

    def kernels(self) -> Iterator[Kernel]:
        """Yields what the devices run, one by one, without what is inside of fusions."""
        return self._kernels(self._program.entry, 1)

    def _kernels(self, name: str, times: int) -> Iterator[Kernel]:
        instructions = self._program.computations[name]
        shapes = {x.name: x.shape for x in instructions}
        for x in instructions:
            if x.kind in _CALLS:
                for called in x.called:
                    yield from self._kernels(called, times * x.trips)
            elif x.kind not in _FREE and not x.kind.endswith("-done"):
                yield Kernel(x, self._group(x), self._bytes(x, shapes), times)

    def moved(self) -> dict[str, int]:
        """Returns the bytes that kernels read and write, by group of kernels."""
        moved = Counter(dict.fromkeys(GROUPS, 0))
        for kernel in self.kernels():
            moved[kernel.group] += kernel.times * kernel.bytes
        return dict(moved)

    def transfers(self) -> list[Transfer]:
        """Returns the collectives; one in a loop counts once."""
        found = []
        for instructions in self._program.computations.values():
            started: dict[str, bool] = {}
            for x in instructions:
                if x.kind.endswith("-done") and x.operands[0] in started:
                    covered = started.pop(x.operands[0])
                    found.append(self._transfer(x.operands[0], covered))
                elif x.name in self._collectives and _is_started(x):
                    started[x.name] = False
                elif x.name in self._collectives:
                    found.append(self._transfer(x.name, False))
                elif started and self._is_backward(x):
                    started = dict.fromkeys(started, True)
        return found

    def _transfer(self, name: str, covered: bool) -> Transfer:
        collective = self._collectives[name]
        return Transfer(collective.kind, collective.bytes, covered)

    def _group(self, x: Instruction) -> str:
        if x.name in self._collectives:
            return "collectives"
        if _is_attention(x):
            return "attention"
        return "products" if self._products(x) else "other"

    def _bytes(self, x: Instruction, shapes: dict[str, str]) -> int:
        """Returns the bytes that an instruction reads and writes."""
        if x.name in self._collectives:
            return 2 * self._collectives[x.name].bytes
        if x.kind == "fusion":
            return self._fused(x.called[0])
        if x.kind in _SLICES:
            return 2 * num_bytes(x.shape)
        if x.kind in _UPDATES:
            return 2 * num_bytes(shapes[x.operands[_UPDATES[x.kind]]])
        return num_bytes(x.shape) + sum(num_bytes(shapes[name]) for name in x.operands)

    def _fused(self, name: str) -> int:
        """Returns the bytes that a fused computation reads and writes."""
        instructions = self._program.computations[name]
        shapes = {x.name: x.shape for x in instructions}
        # What is read: whole parameters, or the slices that are all that is used of them.
        total = 0
        for x in instructions:
            if x.kind == "parameter":
                users = [y for y in instructions if x.name in y.operands]
                parts = [self._read(x.name, y) for y in users]
                total += min(num_bytes(x.shape), sum(parts)) if users else 0
        [root] = [x for x in instructions if x.is_root]
        results = root.operands if root.kind == "tuple" else [root.name]
        by_name = {x.name: x for x in instructions}
        for result in map(by_name.__getitem__, results):
            while result.kind == "bitcast":
                result = by_name[result.operands[0]]
            update = _UPDATES.get(result.kind)
            total += num_bytes(shapes[result.operands[update]] if update else result.shape)
        return total

    def _read(self, name: str, user: Instruction) -> int:
        """Returns an upper bound of what an instruction of a fusion reads of a parameter."""
        if user.operands[0] != name or user.kind not in (*_SLICES, *_UPDATES):
            return 2**63
        return num_bytes(user.shape) if user.kind in _SLICES else 0

    def _products(self, x: Instruction) -> tuple[str, ...]:
        """Returns the op_names of the matrix products that an instruction consists of."""
        of_library = x.kind == "custom-call" and any(y in x.attributes for y in _LIBRARIES)
        if x.kind == "dot" or of_library or _is_attention(x):
            return (x.op_name,)
        inner = [y for name in x.called for y in self._program.computations[name]]
        return tuple(name for y in inner for name in self._products(y))

    def _is_backward(self, x: Instruction) -> bool:
        return any("transpose(jvp" in name for name in self._products(x))


def _is_started(x: Instruction) -> bool:
    """Returns whether an instruction begins something that ends at another, later instruction."""
    return x.kind.endswith("-start") and '"is_sync":true' not in x.attributes


def _is_attention(x: Instruction) -> bool:
    """Returns whether an instruction is a kernel for attention, of cuDNN or of this package."""
    own = "triton" in x.attributes and "/attention/" in x.op_name
    return x.kind == "custom-call" and ("__cudnn$fmha" in x.attributes or own)


def covered_share(transfers: list[Transfer]) -> float:
    """Returns the share of the transfers' bytes that products of the backward pass cover."""
    total = sum(x.bytes for x in transfers)
    return sum(x.bytes for x in transfers if x.covered) / total if total else 0.0
