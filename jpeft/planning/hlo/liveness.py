"""jpeft.planning.hlo.liveness."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jpeft.planning.hlo.parse import (
    ELEMENTWISE,
    Buffer,
    Computation,
    Instruction,
    Leaf,
    behind,
    index_of,
    line_of,
    read_leaves,
)

# ------------------------------------------------------------------------------------------------------------- memory

_Place = frozenset[int]  # numbers of the buffers that an array lies in


class Liveness:
    """One computation's buffers over its schedule. What its caller gives it and what it returns are the caller's."""

    def __init__(self, program: Any, computation: Computation, peak: Callable[[str], tuple[int, tuple[Buffer, ...]]]):
        self.program, self.computation, self._peak_of = program, computation, peak
        self.buffers: list[Buffer | None] = []  # None: not this computation's own
        self.places: dict[str, list[_Place]] = {}
        self.last: dict[int, int] = {}
        self.order = list(computation.instructions.values())
        self.peak = self._run()

    def _new(self, maker: Instruction, leaf: Leaf) -> _Place:
        if not leaf.hbm:
            return frozenset()
        self.buffers.append(self.program._buffer(maker, leaf))
        return frozenset([len(self.buffers) - 1])

    def _run(self) -> tuple[int, tuple[Buffer, ...]]:
        born: dict[int, int] = {}
        for step, instruction in enumerate(self.order):
            known = len(self.buffers)
            self.places[instruction.name] = self._place(instruction)
            born.update((number, step) for number in range(known, len(self.buffers)))
            for number in self._read_by(instruction):
                self.last[number] = step
            if not instruction.op_name:
                continue
            for number in {n for place in self.places[instruction.name] for n in place}:
                buffer = self.buffers[number]
                if buffer and not buffer.op_name:  # e.g. allocated bare, then written by this
                    stack = self.program.stack(instruction)
                    self.buffers[number] = buffer._replace(
                        op_name=instruction.op_name, source=line_of(stack), stack=stack
                    )
        for place in self.places[self.computation.root.name]:
            for number in place:
                self.buffers[number] = None
        return self._sweep(born)

    def _sweep(self, born: Mapping[int, int]) -> tuple[int, tuple[Buffer, ...]]:
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for number, step in born.items():
            if self.buffers[number]:
                starts.setdefault(step, []).append(number)
                ends.setdefault(max(step, self.last.get(number, step)), []).append(number)
        alive: dict[int, Buffer] = {}
        total, best, snapshot = 0, 0, ()
        for step, instruction in enumerate(self.order):
            for number in starts.get(step, ()):
                buffer = self.buffers[number]
                assert buffer
                alive[number] = buffer
                total += buffer.bytes
            shared = self._shared(instruction, [n for n in ends.get(step, ()) if born[n] < step], starts.get(step, ()))
            saved = sum(alive[number].bytes for number in shared)
            inner, inside = max((self._peak_of(name) for name in self._callees(instruction)), default=(0, ()))
            if total - saved + inner > best:
                best = total - saved + inner
                snapshot = (*(b for number, b in alive.items() if number not in shared), *inside)
            for number in ends.get(step, ()):
                total -= alive.pop(number).bytes
        return best, snapshot

    def _callees(self, instruction: Instruction) -> list[str]:
        if instruction.opcode == "while":
            return [instruction.attribute("body"), instruction.attribute("condition")]
        if instruction.opcode == "conditional":
            return instruction.branches
        return [] if instruction.opcode == "fusion" else self.program._callees(instruction)

    def _read_by(self, instruction: Instruction) -> Iterator[int]:
        if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast", "parameter"):
            for name in instruction.operands:
                for place in self.places.get(name, ()):
                    yield from place
        for place in self.places[instruction.name] if instruction.opcode.endswith("-done") else ():
            yield from place

    def _shared(self, instruction: Instruction, dying: Sequence[int], new: Sequence[int]) -> set[int]:
        """Buffers that end here and whose memory the result takes."""
        takes: set[int] = set()
        for number in new:
            for i, operand in enumerate(instruction.operands):
                ending = {n for place in self.places.get(operand, ()) if len(place) == 1 for n in place if n in dying}
                fits = [n for n in ending - takes if self._size(n) == self._size(number)]
                if fits and self._may_share(instruction, i):
                    takes.add(fits[0])
                    break
        return takes

    def _size(self, number: int) -> int:
        buffer = self.buffers[number]
        return buffer.bytes if buffer else 0

    def _may_share(self, instruction: Instruction, operand: int) -> bool:
        """Whether a result may be written over an operand while that is read: element by element."""
        if instruction.opcode in ELEMENTWISE or instruction.opcode == "all-reduce":
            return True
        if instruction.opcode != "fusion":
            return False
        inner = self.program.computations[instruction.attribute("calls")]
        return _pointwise(inner, inner.parameters[operand], instruction.array)

    def _place(self, instruction: Instruction) -> list[_Place]:
        opcode, leaves = instruction.opcode, instruction.leaves
        operands = self.computation.operands(instruction)
        given = [place for operand in operands for place in self.places[operand.name]]
        if opcode in ("parameter", "constant"):
            return [frozenset()] * len(leaves)
        if opcode == "get-tuple-element":
            parts = operands[0].shape
            assert isinstance(parts, tuple)
            start = sum(len(read_leaves(part)) for part in parts[: index_of(instruction)])
            return given[start : start + len(leaves)]
        if opcode in ("tuple", "bitcast", "while", "optimization-barrier", "add-dependency", "domain", "async-update"):
            return given[: len(leaves)]
        if opcode == "dynamic-update-slice" or opcode == "scatter":
            return given[: len(leaves)]
        if opcode == "custom-call" and instruction.target == "ConcatBitcast":
            return [frozenset().union(*given)]
        if opcode.endswith("-start"):
            return self._started(instruction, operands, given)
        if opcode.endswith("-done"):
            made = operands[0].shape
            if isinstance(made, Leaf):
                return given
            part = 0 if operands[0].opcode in ("copy-start", "all-reduce-start") else 1
            start = sum(len(read_leaves(each)) for each in made[:part])
            return given[start : start + len(leaves)]
        aliases = self._aliases(instruction, given)
        return [aliases[i] if i in aliases else self._new(instruction, leaf) for i, leaf in enumerate(leaves)]

    def _started(self, instruction: Instruction, operands: list[Instruction], given: list[_Place]) -> list[_Place]:
        """Of a tuple of operands, result and context: the copy's is of result, operand and context."""
        shape = instruction.shape
        if isinstance(shape, Leaf) or instruction.opcode == "all-reduce-start":
            return [self._new(instruction, leaf) for leaf in instruction.leaves]
        source, result = (1, 0) if instruction.opcode == "copy-start" else (0, 1)
        out: list[_Place] = []
        for i, part in enumerate(shape):
            leaves = read_leaves(part)
            if i == source:
                out += given[: len(leaves)] + [frozenset()] * (len(leaves) - len(given))
            elif i == result:
                out += [self._new(instruction, leaf) for leaf in leaves]
            else:
                out += [frozenset()] * len(leaves)
        return out

    def _aliases(self, instruction: Instruction, given: list[_Place]) -> dict[int, _Place]:
        """Results that lie where an operand does."""
        told = re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", instruction.attributes)
        pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", told[0]) if told else []
        out: dict[int, _Place] = {}
        starts = list(itertools.accumulate((len(o.leaves) for o in self.computation.operands(instruction)), initial=0))
        for result, operand, part in pairs:
            number = starts[int(operand)] + (int(part.split(",")[0]) if part else 0)
            out[int(result.split(",")[0]) if result else 0] = given[number]
        if instruction.opcode != "fusion":
            return out
        inner = self.program.computations[instruction.attribute("calls")]
        root = inner.root
        for i, part in enumerate(inner.operands(root) if root.opcode == "tuple" else [root]):
            part = behind(part, inner)
            if i not in out and part.opcode in ("dynamic-update-slice", "scatter", "parameter"):
                target = part if part.opcode == "parameter" else behind(inner.operands(part)[0], inner)
                if target.opcode == "parameter" and (place := given[starts[int(target.inside)]]):
                    out[i] = place
        return out


def _pointwise(inner: Computation, source: Instruction, result: Leaf) -> bool:
    """Whether every element of a fusion's result depends on the same element of a parameter alone."""
    for user in inner.users.get(source.name, ()):
        if user.opcode == "tuple":
            continue
        if user.opcode not in ELEMENTWISE and user.opcode != "bitcast":
            return False
        if not _pointwise(inner, user, result):
            return False
    return math.prod(source.array.dims) == math.prod(result.dims)
