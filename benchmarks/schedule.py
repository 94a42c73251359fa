"""Reads the order of a compiled program's instructions from its HLO text."""

import collections
import dataclasses
import math
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.-]+)")
_NAME = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Instructions that only name a part of memory.
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of an instruction in a schedule.

    Attributes:
      number: its position, counted from 1.
      flops_before: share of the program's matrix-product FLOPs before it.
      flops_free: share of these FLOPs that neither lead to it nor wait for it, and could hide it.
    """

    number: int
    flops_before: float
    flops_free: float


class Schedule:
    """The instructions of a program's entry computation, in the order of execution.

    Attributes:
      flops: FLOPs of all matrix products; a loop of unknown length counts once.
      length: number of instructions that do something.
    """

    def __init__(self, program: str):
        """Reads the HLO text of a compiled program, whose instructions are already scheduled."""
        assert "is_scheduled=true" in program.partition("\n")[0]
        self._computations: dict[str, dict[str, tuple[str, str, str]]] = {}
        for line in program.splitlines():
            if head := _COMPUTATION.match(line):
                entry, name = head.groups()
                current = self._computations[name] = {}
                if entry:
                    self._entry = current
            elif found := _INSTRUCTION.match(line):
                name, *rest = found.groups()
                current[name] = tuple(rest)
        self._flops = {name: self._flops_of(name, self._entry) for name in self._entry}
        self.flops = sum(self._flops.values())
        self._steps = [name for name, (_, kind, _) in self._entry.items() if kind not in FREE]
        self.length = len(self._steps)

    def place(self, name: str) -> Place:
        """Returns the place of an instruction of the entry computation."""
        number = self._steps.index(name)
        before = sum(self._flops[step] for step in self._steps[:number])
        users = collections.defaultdict(list)
        for user in self._entry:
            for operand in self._operands(user):
                users[operand].append(user)
        bound = self._reached(name, self._operands) | self._reached(name, users.__getitem__)
        free = sum(flops for step, flops in self._flops.items() if step not in bound)
        return Place(number + 1, before / self.flops, free / self.flops)

    def _operands(self, name):
        return [x for x in _NAME.findall(self._entry[name][2]) if x in self._entry]

    def _reached(self, name, neighbours):
        found, waiting = {name}, [name]
        while waiting:
            new = set(neighbours(waiting.pop())) - found
            found |= new
            waiting += new
        return found

    def _flops_of(self, name, computation):
        shape, kind, rest = computation[name]
        if kind == "dot":
            left = _dimensions(computation[_NAME.search(rest)[1]][0])
            [summed] = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            depth = math.prod(left[int(i)] for i in summed.split(","))
            return 2 * math.prod(_dimensions(shape)) * depth
        trips = int(_TRIPS.search(rest)[1]) if _TRIPS.search(rest) else 1
        inner = (self._computations[called] for called in _CALLED.findall(rest))
        return trips * sum(self._flops_of(x, called) for called in inner for x in called)


def _dimensions(shape):
    return [int(x) for x in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if x]
