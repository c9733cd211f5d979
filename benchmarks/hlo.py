"""Reads the text of a compiled XLA program: its loops, and the bytes that they move.

The text is `as_text()` of a `jax.stages.Compiled`, of any platform. It is the program as it is
scheduled. A layout in it names the memory where an array lives, and how it is padded: `S(1)` is
the memory on a TPU's chip, no `S` the large memory beside it, HBM; `T(8,128)` are tiles.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# They name values and do nothing.
NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
# They run the computations that they call; others, as a fusion, are one kernel.
FLOW = {"while", "conditional", "call"}
# They read of their first operand only what they return.
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATE = "dynamic-update-slice"  # in place: it reads and writes its second operand only
HOST = re.compile(r"^(infeed|outfeed|send|recv)|S\(5\)|custom_call_target=\S*(callback|host)", re.I)
LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
OPENING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*):?([^}]*)\})?")


class Array(NamedTuple):
    """An array of a type."""

    bytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """`%name = type opcode(%operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", " ".join(CALLED.findall(self.attributes)))


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    root: str

    @property
    def parameters(self) -> list[str]:
        found = [i for i in self.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.attributes.partition(")")[0]))]


class Module:
    """A compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        for line in text.splitlines():
            if opening := OPENING.match(line):
                current = self.computations[opening[2]] = Computation()
                if opening[1]:
                    self.entry = opening[2]
            elif found := LINE.match(line):
                current[found[2]] = parse_instruction(found[2], found[3])
                if found[1]:
                    current.root = found[2]

    def walk(self, computation: str) -> Iterator[tuple[str, Instruction, int]]:
        """What one run of a computation does, and of the loops in it: where, what, how often."""
        for instruction in self.computations[computation].values():
            if instruction.opcode in FLOW:
                for called in instruction.called:
                    for where, inner, times in self.walk(called):
                        yield where, inner, times * self.trips(instruction)
            if instruction.opcode not in NAMES | FLOW - {"while"}:
                yield computation, instruction, 1

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs, 1 where the program does not say it."""
        if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(found[1])
        # A loop of JAX that counts from 0 goes on while `i < n`.
        if found := re.search(r"condition=%([\w.\-]+)", loop.attributes):
            condition = self.computations[found[1]]
            root = condition[condition.root]
            for operand in root.operands if "direction=LT" in root.attributes else ():
                if condition[operand].opcode == "constant":
                    return int(condition[operand].attributes.partition(")")[0])
        return 1

    def loops(self) -> list[Instruction]:
        return [i for _, i, _ in self.walk(self.entry) if i.opcode == "while"]

    def host_transfers(self) -> list[str]:
        """Names of instructions that talk to the host, or touch its memory."""
        every = (i for found in self.computations.values() for i in found.values())
        return [i.name for i in every if HOST.search(f"{i.opcode} {i.type} {i.attributes}")]

    def traffic(self, computation: str) -> list[tuple[int, Instruction]]:
        """The bytes to and from HBM of one run of a computation, by instruction, most first."""
        found = [
            (times * self._bytes(self.computations[where], i), i)
            for where, i, times in self.walk(computation)
            if i.opcode != "while"
        ]
        return sorted(found, key=lambda pair: -pair[0])

    def _bytes(self, within: Computation, instruction: Instruction) -> int:
        """Each operand is read once and each result written, as far as they are in HBM."""
        if instruction.opcode.endswith(("-start", "-update")):
            return 0  # counted when it is done
        if instruction.opcode.endswith("-done"):  # a copy, of a slice or of all
            (result,) = arrays(instruction.type)
            source = within[within[instruction.operands[0]].operands[0]]
            return result.bytes * (result.in_hbm + arrays(source.type)[0].in_hbm)
        read = 0
        for position, name in enumerate(instruction.operands):
            if all(array.in_hbm for array in arrays(within[name].type)):
                read += self._read(within[name].type, list(self._uses(instruction, position)))
        results = zip(arrays(instruction.type), self._written(within, instruction), strict=True)
        return read + sum(written for result, written in results if result.in_hbm)

    def _read(self, type: str, uses: list[tuple[Instruction, int]]) -> int:
        sliced = (use.opcode in {*SLICES, UPDATE} and position == 0 for use, position in uses)
        if uses and all(sliced):
            return sum(size(use.type) for use, _ in uses if use.opcode in SLICES)
        return size(type)

    def _uses(self, instruction: Instruction, position: int) -> Iterator[tuple[Instruction, int]]:
        """What becomes of an operand, inside a fusion too."""
        if instruction.opcode != "fusion":
            yield instruction, position
            return
        fused = self.computations[instruction.called[0]]
        names = [fused.parameters[position]]
        for name in names:
            for use in (use for use in fused.values() if name in use.operands):
                position = use.operands.index(name)
                if self._renames(use, position):
                    names.append(use.name)
                else:
                    yield from self._uses(use, position)

    def _renames(self, instruction: Instruction, position: int) -> bool:
        """Whether the result is the operand itself."""
        if instruction.opcode != "fusion":
            return instruction.opcode == "bitcast"
        fused = self.computations[instruction.called[0]]
        root = fused[fused.root]
        while root.opcode == "bitcast":
            root = fused[root.operands[0]]
        return root.name == fused.parameters[position]

    def _written(self, within: Computation, instruction: Instruction) -> Iterator[int]:
        """The bytes that each result of an instruction takes to write."""
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.called[0]]
            yield from self._written(fused, fused[fused.root])
        elif instruction.opcode in ("tuple", "bitcast"):
            for name in instruction.operands:
                yield from self._written(within, within[name])
        elif instruction.opcode == UPDATE:
            yield size(within[instruction.operands[1]].type)
        else:
            yield from (array.bytes for array in arrays(instruction.type))


def parse_instruction(name: str, text: str) -> Instruction:
    """Of the text after the equals sign. Types of tuples hold blanks and brackets."""
    cut = closing(text, 0) if text.startswith("(") else text.index(" ")
    type, (opcode, _, rest) = text[:cut], text[cut:].strip().partition("(")
    end = closing("(" + rest, 0) - 2
    if opcode in ("parameter", "constant"):
        return Instruction(name, type, opcode, [], rest)
    return Instruction(name, type, opcode, re.findall(r"%([\w.\-]+)", rest[:end]), rest[end:])


def closing(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    raise ValueError(f"A bracket is not closed: {text[:80]}")


def arrays(type: str) -> list[Array]:
    """The arrays of a type. The last dimensions in memory are padded to whole tiles."""
    found = []
    for kind, bits, dimensions, order, rest in ARRAY.findall(type):
        shape = [int(n) for n in dimensions.split(",") if n]
        shape = [shape[int(i)] for i in reversed([i for i in order.split(",") if i])] or shape
        tile = re.search(r"T\(([\d,]+)\)", rest)
        for i, n in enumerate(reversed(tile[1].split(",") if tile and shape else []), 1):
            shape[-i] = -(-shape[-i] // int(n)) * int(n)
        bytes = math.prod(shape) * (8 if kind == "pred" else int(bits)) // 8
        found.append(Array(bytes, not re.search(r"S\([1-9]", rest)))
    return found


def size(type: str) -> int:
    return sum(array.bytes for array in arrays(type))
