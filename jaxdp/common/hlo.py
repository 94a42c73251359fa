"""Reads the text (HLO) of a compiled program, whose instructions stand in the order they run in."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# "%name = f32[2,3]{1,0} fusion(%a, %b), attributes"; the shape of several results is a tuple.
# Operands may have their shapes before them, and these parentheses of their own.
_OPERANDS = r"(?:[^()]|\([^()]*\)|\((?:[^()]|\([^()]*\))*\))*"
_INSTRUCTION = re.compile(rf"\s*(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\(({_OPERANDS})\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_BUFFER = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|body|branch_computations|called_computations)=\{?%?([\w.-]+)")
_APPLIED = re.compile(r"to_apply=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """An instruction of a program.

    Attributes:
      name: unique in its computation.
      shape: of its result.
      kind: what it does, such as "fusion" or "all-reduce-start".
      operands: names of the instructions whose results it takes.
      attributes: the rest of the line.
      is_root: whether its result is that of the computation.
    """

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def result(self) -> str:
        """The shape of the result. For a -start: what its -done will return, without the operands.

        A -start gives (operand, result, ...), with tuples for several; all-reduce-start only the
        results, in most versions of XLA.
        """
        if not self.kind.endswith("-start"):
            return self.shape
        parts = elements(self.shape)
        bare = not parts or (len(parts) == len(self.operands) and parts[0][0] != "(")
        return self.shape if self.kind == "all-reduce-start" and bare else parts[1]

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        applied = _APPLIED.findall(self.attributes) if self.kind == "call" else []
        return _CALLED.findall(self.attributes) + applied

    @property
    def trips(self) -> int:
        """How often a loop runs its body; 1 where the compiler doesn't know."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else 1

    @property
    def op_name(self) -> str:
        """The path of JAX's functions that it comes from; empty where the compiler made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


class Program(NamedTuple):
    """A program: its computations, each a list of instructions, and the name of the first."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(text: str) -> Program:
    """Reads a whole program."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computations[head[2]] = current = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found))
    return Program(computations, entry)


def instructions(lines: Iterable[str]) -> Iterable[Instruction]:
    """Yields the instructions among the lines of a program."""
    return (_instruction(found) for line in lines if (found := _INSTRUCTION.match(line)))


def _instruction(found: re.Match) -> Instruction:
    root, name, shape, kind, operands, attributes = found.groups()
    return Instruction(name, shape, kind, tuple(_NAME.findall(operands)), attributes, bool(root))


def elements(shape: str) -> list[str]:
    """Splits a tuple's shape into its elements' shapes; an array's shape has no elements.

    Examples:
      >>> elements("((f32[2,3]{1,0}), /*index=1*/bf16[], u32[])")
      ['(f32[2,3]{1,0})', 'bf16[]', 'u32[]']
    """
    if not shape.startswith("("):
        return []
    found, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def num_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape.

    Examples:
      >>> num_bytes("(f32[2,3]{1,0}, bf16[], pred[5])")
      31
    """
    bits = 0
    for dtype, width, dimensions in _BUFFER.findall(shape):
        size = 8 if dtype == "pred" else int(width)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        bits += size
    return bits // 8
