"""Peak memory: the buffers that are live at each step of a program's schedule."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jpeft.planning.hlo.parse import ELEMENTWISE, Computation, Instruction, Leaf, Module, leaves_of, source_line


class Buffer(NamedTuple):
    """An allocation that is live at the peak.

    Attributes:
      bytes: the size of one.
      shape: such as `bf16[1,2048,4096]`.
      op_name: the name that JAX gave the operation that made it.
      source: the line of that operation in the model's code, such as `/home/me/model.py:123`.
      count: how many equal ones are live.
      stack: lines, innermost first.
    """

    bytes: int
    shape: str
    op_name: str
    source: str
    count: int = 1
    stack: tuple[str, ...] = ()


Peak = tuple[int, tuple[Buffer, ...]]  # bytes, and the buffers that are live then


def find_peak(module: Module) -> Peak:
    """The peak of what a program allocates besides its arguments and results."""
    known: dict[str, Peak] = {}

    def peak_of(name: str) -> Peak:
        if name not in known:
            known[name] = _Liveness(module, module.computations[name], peak_of).peak
        return known[name]

    return peak_of(module.entry.name)


def argument_buffers(module: Module) -> list[Buffer]:
    """Buffers of the arguments that lie in the device's memory."""
    return [_buffer(module, p, leaf) for p in module.entry.parameters for leaf in p.leaves if leaf.hbm]


def output_buffers(module: Module) -> list[Buffer]:
    """Buffers of the results that do not reuse an argument's memory."""
    aliased = {int(i or 0) for i in re.findall(r"\{(\d*)\}: \(\d+, \{\}", module.header)}
    root = module.entry.root
    makers = module.entry.results()
    if len(makers) != len(root.leaves):
        makers = [root] * len(root.leaves)
    return [
        _buffer(module, maker, leaf)
        for i, (maker, leaf) in enumerate(zip(makers, root.leaves, strict=True))
        if i not in aliased and leaf.hbm
    ]


def _buffer(module: Module, maker: Instruction, leaf: Leaf) -> Buffer:
    stack = module.stack(maker)
    return Buffer(leaf.padded, str(leaf), maker.op_name, source_line(stack), stack=stack)


_Place = frozenset[int]  # numbers of the buffers that hold an array


class _Liveness:
    """The buffers of one computation over its schedule. Its parameters and its results belong to the caller."""

    def __init__(self, module: Module, computation: Computation, peak_of: Callable[[str], Peak]):
        self.module, self.computation, self._peak_of = module, computation, peak_of
        self.buffers: list[Buffer | None] = []  # None: the caller's
        self.places: dict[str, list[_Place]] = {}  # of each instruction's arrays
        self.last_read: dict[int, int] = {}
        self.schedule = list(computation.instructions.values())
        self.peak = self._run()

    def _run(self) -> Peak:
        allocated: dict[int, int] = {}
        for step, instruction in enumerate(self.schedule):
            known = len(self.buffers)
            self.places[instruction.name] = self._place(instruction)
            allocated.update((number, step) for number in range(known, len(self.buffers)))
            for number in self._read_by(instruction):
                self.last_read[number] = step
            self._name_buffers(instruction)
        for place in self.places[self.computation.root.name]:
            for number in place:
                self.buffers[number] = None
        return self._sweep(allocated)

    def _name_buffers(self, instruction: Instruction) -> None:
        """Names buffers that were allocated without a name after the instruction that writes them."""
        if not instruction.op_name:
            return
        for number in {n for place in self.places[instruction.name] for n in place}:
            buffer = self.buffers[number]
            if buffer and not buffer.op_name:
                stack = self.module.stack(instruction)
                self.buffers[number] = buffer._replace(
                    op_name=instruction.op_name, source=source_line(stack), stack=stack
                )

    def _sweep(self, allocated: Mapping[int, int]) -> Peak:
        """Walks the schedule and keeps the largest sum of live buffers, those of called computations included."""
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for number, step in allocated.items():
            if self.buffers[number]:
                starts.setdefault(step, []).append(number)
                ends.setdefault(max(step, self.last_read.get(number, step)), []).append(number)
        live: dict[int, Buffer] = {}
        total, peak, snapshot = 0, 0, ()
        for step, instruction in enumerate(self.schedule):
            for number in starts.get(step, ()):
                buffer = self.buffers[number]
                assert buffer
                live[number] = buffer
                total += buffer.bytes
            dying = [number for number in ends.get(step, ()) if allocated[number] < step]
            reused = self._reused(instruction, dying, starts.get(step, ()))
            saved = sum(live[number].bytes for number in reused)
            inner, inside = max((self._peak_of(name) for name in self._callees(instruction)), default=(0, ()))
            if total - saved + inner > peak:
                peak = total - saved + inner
                snapshot = (*(b for number, b in live.items() if number not in reused), *inside)
            for number in ends.get(step, ()):
                total -= live.pop(number).bytes
        return peak, snapshot

    def _callees(self, instruction: Instruction) -> list[str]:
        if instruction.opcode == "while":
            return [instruction.attribute("body"), instruction.attribute("condition")]
        if instruction.opcode == "conditional":
            return instruction.branches
        return [] if instruction.opcode == "fusion" else self.module.callees(instruction)

    def _read_by(self, instruction: Instruction) -> Iterator[int]:
        if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast", "parameter"):
            for name in instruction.operands:
                for place in self.places.get(name, ()):
                    yield from place
        for place in self.places[instruction.name] if instruction.opcode.endswith("-done") else ():
            yield from place

    def _reused(self, instruction: Instruction, dying: Sequence[int], new: Sequence[int]) -> set[int]:
        """Buffers that are last read here and whose memory a result takes."""
        taken: set[int] = set()
        for number in new:
            for i, operand in enumerate(instruction.operands):
                ending = {n for place in self.places.get(operand, ()) if len(place) == 1 for n in place if n in dying}
                fits = [n for n in ending - taken if self._size(n) == self._size(number)]
                if fits and self._may_overwrite(instruction, i):
                    taken.add(fits[0])
                    break
        return taken

    def _size(self, number: int) -> int:
        buffer = self.buffers[number]
        return buffer.bytes if buffer else 0

    def _may_overwrite(self, instruction: Instruction, operand: int) -> bool:
        """True if the result may be written over an operand while that is read: element by element."""
        if instruction.opcode in ELEMENTWISE or instruction.opcode == "all-reduce":
            return True
        if instruction.opcode != "fusion":
            return False
        body = self.module.fusion_body(instruction)
        return _is_pointwise(body, body.parameters[operand], instruction.array)

    # ------------------------------------------------------------------------------------------------------- places

    def _allocate(self, maker: Instruction, leaf: Leaf) -> _Place:
        if not leaf.hbm:
            return frozenset()
        self.buffers.append(_buffer(self.module, maker, leaf))
        return frozenset([len(self.buffers) - 1])

    def _place(self, instruction: Instruction) -> list[_Place]:
        """The buffers that hold each array of a result: its operands' or new ones."""
        opcode, leaves = instruction.opcode, instruction.leaves
        operands = self.computation.operands(instruction)
        given = [place for operand in operands for place in self.places[operand.name]]
        if opcode in ("parameter", "constant"):
            return [frozenset()] * len(leaves)
        if opcode == "get-tuple-element":
            parts = operands[0].shape
            assert isinstance(parts, tuple)
            start = sum(len(leaves_of(part)) for part in parts[: instruction.index])
            return given[start : start + len(leaves)]
        if opcode in ("tuple", "bitcast", "while", "optimization-barrier", "add-dependency", "domain", "async-update"):
            return given[: len(leaves)]
        if opcode in ("dynamic-update-slice", "scatter"):
            return given[: len(leaves)]
        if opcode == "custom-call" and instruction.target == "ConcatBitcast":
            return [frozenset().union(*given)]
        if opcode.endswith("-start"):
            return self._place_start(instruction, given)
        if opcode.endswith("-done"):
            made = operands[0].shape
            if isinstance(made, Leaf):
                return given
            part = 0 if operands[0].opcode in ("copy-start", "all-reduce-start") else 1
            start = sum(len(leaves_of(each)) for each in made[:part])
            return given[start : start + len(leaves)]
        aliases = self._aliases(instruction, given)
        return [aliases[i] if i in aliases else self._allocate(instruction, leaf) for i, leaf in enumerate(leaves)]

    def _place_start(self, instruction: Instruction, given: list[_Place]) -> list[_Place]:
        """The buffers of a tuple (operands, result, context); copy-start's is (result, operand, context)."""
        shape = instruction.shape
        if isinstance(shape, Leaf) or instruction.opcode == "all-reduce-start":
            return [self._allocate(instruction, leaf) for leaf in instruction.leaves]
        source, result = (1, 0) if instruction.opcode == "copy-start" else (0, 1)
        out: list[_Place] = []
        for i, part in enumerate(shape):
            leaves = leaves_of(part)
            if i == source:
                out += given[: len(leaves)] + [frozenset()] * (len(leaves) - len(given))
            elif i == result:
                out += [self._allocate(instruction, leaf) for leaf in leaves]
            else:
                out += [frozenset()] * len(leaves)
        return out

    def _aliases(self, instruction: Instruction, given: list[_Place]) -> dict[int, _Place]:
        """Results that are in an operand's memory, by their position."""
        stated = re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", instruction.attributes)
        pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", stated[0]) if stated else []
        out: dict[int, _Place] = {}
        starts = list(itertools.accumulate((len(o.leaves) for o in self.computation.operands(instruction)), initial=0))
        for result, operand, part in pairs:
            number = starts[int(operand)] + (int(part.split(",")[0]) if part else 0)
            out[int(result.split(",")[0]) if result else 0] = given[number]
        if instruction.opcode != "fusion":
            return out
        body = self.module.fusion_body(instruction)
        for i, part in enumerate(body.results()):
            part = body.skip_bitcasts(part)
            if i not in out and part.opcode in ("dynamic-update-slice", "scatter", "parameter"):
                target = part if part.opcode == "parameter" else body.skip_bitcasts(body.operands(part)[0])
                if target.opcode == "parameter" and (place := given[starts[int(target.argument)]]):
                    out[i] = place
        return out


def _is_pointwise(body: Computation, source: Instruction, result: Leaf) -> bool:
    """True if every element of a fusion's result depends only on the same element of a parameter."""
    for user in body.users.get(source.name, ()):
        if user.opcode == "tuple":
            continue
        if user.opcode not in ELEMENTWISE and user.opcode != "bitcast":
            return False
        if not _is_pointwise(body, user, result):
            return False
    return math.prod(source.array.dims) == math.prod(result.dims)
