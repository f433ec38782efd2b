"""What a compiled program does, read from its text: FLOPs, bytes, collectives, and what is alive when memory peaks.

The text is of one device's program, optimized and scheduled, as ``jax.jit(f).lower(...).compile().as_text()`` gives
it for CPUs, GPUs and TPUs, TPUs that are not there included. XLA's own ``cost_analysis`` counts a loop's body once;
here it counts as often as it runs. Nothing is run, and jax is not needed.

    program = read(compiled.as_text())
    program.flops, program.hbm_bytes
    [c for c in program.collectives if c.kind == "all-gather"]
    program.live(10)
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jpeft.planning.hlo.collectives import COLLECTIVES, Collective, groups_of
from jpeft.planning.hlo.flops import convolution_flops, custom_flops, dot_flops
from jpeft.planning.hlo.liveness import Liveness
from jpeft.planning.hlo.parse import (
    HEAD,
    Buffer,
    Computation,
    Instruction,
    Leaf,
    behind,
    index_of,
    line_of,
    read_instruction,
    read_leaves,
)

# Moves or names what is there: reads and writes nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "while",
         "call", "conditional", "optimization-barrier", "partition-id", "replica-id", "domain", "async-update",
         "async-start"}  # fmt: skip
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AsyncCollectiveDone", "Sharding", "AssumeGatherIndicesInBound")


def read(text: str) -> Program:
    """A program from its text, which `Program` answers questions of.

    Args:
      text: what ``compiled.as_text()`` gives.

    Raises:
      ValueError: it is no optimized HLO.

    >>> program = read('''HloModule f, is_scheduled=true
    ... ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
    ...   %x = f32[8,4]{1,0} parameter(0)
    ...   %w = f32[4,2]{1,0} parameter(1)
    ...   ROOT %dot = f32[8,2]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }''')
    >>> program.flops, program.hbm_bytes
    (128.0, 224.0)
    """
    text = re.sub(r"/\*index=\d+\*/", "", text)
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, current, table = "", None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := read_instruction(line)):
                current.instructions[instruction.name] = instruction
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif not line.startswith("HloModule") and (head := HEAD.match(line)):
            current = computations[head[2]] = Computation(head[2], {})
            entry = head[2] if head[1] else entry
    header = next((line for line in text.splitlines() if line.startswith("HloModule")), "")
    if not entry or not header:
        raise ValueError("no HLO: expected 'HloModule ...' and an ENTRY computation, as compiled.as_text() gives them")
    return Program(header, computations, entry, tables)


# ------------------------------------------------------------------------------------------------------------ scalars


class _Unknown(Exception):
    """A value that the text alone does not tell."""


class _Frame(NamedTuple):
    """A computation with what its parameters are: functions of an element's index, None for an array's own value."""

    computation: Computation
    parameters: Sequence[Callable[[int | None], int]]


def _unknown(_: int | None) -> int:
    raise _Unknown


_SCALAR = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "negate": lambda a: -a,
    "not": lambda a: not a,
    "select": lambda which, a, b: a if which else b,
    "clamp": lambda low, x, high: min(max(low, x), high),
}
_DIRECTIONS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = {"copy", "bitcast", "convert", "copy-done", "reshape", "broadcast", "optimization-barrier", "bitcast-convert"}


# ------------------------------------------------------------------------------------------------------------ program


class Program:
    """What a text says. Figures are of one device and one run."""

    def __init__(
        self, header: str, computations: dict[str, Computation], entry: str, tables: Mapping[str, dict[int, str]]
    ):
        self.computations, self.entry, self._tables = computations, computations[entry], tables
        self._header = header
        counts = [re.search(rf"{name}=(\d+)", header) for name in ("replica_count", "num_partitions")]
        self.devices = math.prod(int(n[1]) if n else 1 for n in counts)
        self.trips: dict[str, int] = {}  # of every loop that runs
        self.unknown_loops: list[str] = []  # whose trips the text does not tell: counted once
        self._runs = self._count(_Frame(self.entry, [_unknown] * len(self.entry.parameters)))
        self._runs_once = self._count_once(self.entry.name)

    # ---------------------------------------------------------------------------------------------- how often what runs

    def _count(self, frame: _Frame) -> Counter[str]:
        """How often a run of a computation runs each, itself included."""
        own = Counter({frame.computation.name: 1})
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "while":
                init = lambda i, at=frame, name=instruction.operands[0]: self._value(at, name, i)  # noqa: E731
                trips = self._trips(instruction, init)
                body = self.computations[instruction.attribute("body")]
                inside = _Frame(body, [lambda i, body=body, init=init: self._invariant(body, init, i)])
                own.update({name: n * trips for name, n in self._count(inside).items()})
                own[instruction.attribute("condition")] += trips + 1
            elif instruction.opcode == "conditional":
                branches = [self._count(self._opaque(name)) for name in instruction.branches]
                own.update(max(branches, key=lambda runs: (self._flops(runs), self._bytes(runs))))
            else:
                for name in self._callees(instruction):
                    own.update(self._count(self._opaque(name)))
        return own

    def _count_once(self, name: str) -> Counter[str]:
        own = Counter({name: 1})
        for instruction in self.computations[name].instructions.values():
            if instruction.opcode == "while":
                for part in ("body", "condition"):
                    own.update(self._count_once(instruction.attribute(part)))
            elif instruction.opcode == "conditional":
                branches = [self._count_once(branch) for branch in instruction.branches]
                own.update(max(branches, key=lambda runs: (self._flops(runs), self._bytes(runs))))
            else:
                for callee in self._callees(instruction):
                    own.update(self._count_once(callee))
        return own

    def _opaque(self, name: str) -> _Frame:
        computation = self.computations[name]
        return _Frame(computation, [_unknown] * len(computation.parameters))

    def _callees(self, instruction: Instruction) -> list[str]:
        """Computations that run as part of an instruction; what `reduce` applies to elements is none."""
        if instruction.opcode == "call":
            names = [instruction.attribute("to_apply")]
        elif instruction.opcode in ("fusion", "async-start"):
            names = [instruction.attribute("calls")]
        elif instruction.opcode == "custom-call":
            listed = re.search(r"called_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
        else:
            names = []
        return [name for name in names if name in self.computations]

    def _trips(self, loop: Instruction, init: Callable[[int | None], int]) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            trips = int(known[1])
        else:
            try:
                trips = self._trips_found(loop, init)
            except (_Unknown, RecursionError):
                trips = 1
                if loop.name not in self.unknown_loops:
                    self.unknown_loops.append(loop.name)
        self.trips[loop.name] = trips
        return trips

    def _trips_found(self, loop: Instruction, init: Callable[[int | None], int]) -> int:
        """From the condition, what it looks at when the loop starts, and how much the body adds to that."""
        body = self.computations[loop.attribute("body")]
        condition = self.computations[loop.attribute("condition")]

        @functools.cache
        def line(index: int | None) -> tuple[int, int]:
            start = init(index)
            first = self._after(body, lambda i: start if i == index else init(i), index)
            second = self._after(body, lambda i: first if i == index else init(i), index)
            if second - first != first - start:
                raise _Unknown
            return start, first - start

        def goes_on(n: int) -> bool:
            state = lambda index: line(index)[0] + n * line(index)[1]  # noqa: E731
            return bool(self._value(_Frame(condition, [state]), condition.root.name, None))

        for n in range(4096):
            if not goes_on(n):
                return n
        low, high = 4095, 8192
        while goes_on(high):
            low, high = high, 2 * high
            if high > 2**40:
                raise _Unknown
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if goes_on(middle) else (low, middle)
        return high

    def _after(self, body: Computation, state: Callable[[int | None], int], index: int | None) -> int:
        """An element of a loop's state after one run of its body."""
        return self._value(_Frame(body, [state]), body.root.name, index)

    def _invariant(self, body: Computation, init: Callable[[int | None], int], index: int | None) -> int:
        """An element of a loop's state, in any of its runs: only of what the body hands on as it is."""
        root = body.root
        if index is not None and root.opcode == "tuple":
            passed = body.instructions[root.operands[index]]
            own = passed.opcode == "get-tuple-element" and passed.operands[0] == body.parameters[0].name
            if own and index_of(passed) == index:
                return init(index)
        raise _Unknown

    def _value(self, frame: _Frame, name: str, index: int | None) -> int:
        """The integer that an instruction, or an element of its tuple, is."""
        instruction = frame.computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return frame.parameters[int(instruction.inside)](index)
        if opcode == "constant":
            if re.fullmatch(r"-?\d+", instruction.inside):
                return int(instruction.inside)
            if instruction.inside in ("true", "false"):
                return instruction.inside == "true"
        elif opcode == "tuple" and index is not None:
            return self._value(frame, operands[index], None)
        elif opcode == "get-tuple-element":
            if index is None:
                return self._value(frame, operands[0], index_of(instruction))
        elif opcode == "copy-start" and index in (0, 1):
            return self._value(frame, operands[0], None)
        elif opcode == "copy-done":
            return self._value(frame, operands[0], 0)
        elif opcode in _SAME:
            return self._value(frame, operands[0], index)
        elif opcode == "fusion" or opcode == "call":
            callee = self.computations[instruction.attribute("calls") or instruction.attribute("to_apply")]
            given = [lambda i, operand=operand: self._value(frame, operand, i) for operand in operands]
            return self._value(_Frame(callee, given), callee.root.name, index)
        elif opcode == "while" and index is not None:
            body = self.computations[instruction.attribute("body")]
            return self._invariant(body, lambda i: self._value(frame, operands[0], i), index)
        elif opcode == "compare":
            direction = _DIRECTIONS[instruction.attribute("direction")]
            return direction(*(self._value(frame, operand, None) for operand in operands))
        elif opcode in _SCALAR:
            return _SCALAR[opcode](*(self._value(frame, operand, None) for operand in operands))
        raise _Unknown

    # ------------------------------------------------------------------------------------------------------------ FLOPs

    @functools.cached_property
    def flops(self) -> float:
        """Of dots and convolutions, two for each product that is added up."""
        return self._flops(self._runs)

    @functools.cached_property
    def flops_once(self) -> float:
        """With every loop's body counted once, as XLA's ``cost_analysis`` counts."""
        return self._flops(self._runs_once)

    def _flops(self, runs: Counter[str]) -> float:
        return float(sum(n * self._own_flops(name) for name, n in runs.items()))

    @functools.cache  # noqa: B019  # as long as the program lives
    def _own_flops(self, name: str) -> int:
        computation, total = self.computations[name], 0
        for instruction in computation.instructions.values():
            if instruction.opcode == "dot":
                total += dot_flops(instruction, computation)
            elif instruction.opcode == "convolution":
                total += convolution_flops(instruction, computation)
            elif instruction.opcode == "custom-call":
                total += custom_flops(instruction, computation)
        return total

    @functools.cached_property
    def custom_calls(self) -> dict[str, int]:
        """How often the program calls code that is no HLO, by its target: its FLOPs count where its text tells them."""
        out: Counter[str] = Counter()
        for name, n in self._runs.items():
            for instruction in self.computations[name].instructions.values():
                if instruction.opcode == "custom-call":
                    out[instruction.target] += n
        return dict(out)

    # ------------------------------------------------------------------------------------------------------------ bytes

    @functools.cached_property
    def hbm_bytes(self) -> float:
        """Read from and written to main memory, by every instruction that is not part of a fusion."""
        return self._bytes(self._runs)

    @functools.cached_property
    def hbm_bytes_once(self) -> float:
        """With every loop's body counted once, as XLA's ``cost_analysis`` counts."""
        return self._bytes(self._runs_once)

    def _bytes(self, runs: Counter[str]) -> float:
        return float(sum(n * self._own_bytes(name) for name, n in runs.items() if name not in self._fused))

    @functools.cached_property
    def _fused(self) -> set[str]:
        """Computations of which only parameters and results lie in memory."""
        instructions = [i for c in self.computations.values() for i in c.instructions.values()]
        return {i.attribute("calls") for i in instructions if i.opcode == "fusion"}

    @functools.cache  # noqa: B019
    def _own_bytes(self, name: str) -> int:
        computation = self.computations[name]
        return sum(self.instruction_bytes(i, computation) for i in computation.instructions.values())

    def instruction_bytes(self, instruction: Instruction, computation: Computation) -> int:
        """What one instruction reads from main memory and writes to it."""
        opcode, operands = instruction.opcode, computation.operands(instruction)
        if opcode in _FREE or opcode.endswith("-done") or instruction.target in _FREE_CALLS:
            return 0
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        written = sum(leaf.hbm for leaf in instruction.leaves)
        if opcode == "slice-start" or opcode == "dynamic-slice-start":
            result = instruction.leaves[len(operands[0].leaves)]
            return result.hbm + (result.padded if operands[0].array.space == 0 else 0)
        if opcode.endswith("-start"):  # its tuple names operands, too
            return sum(leaf.hbm for leaf in _result(instruction)) + sum(o.array.hbm for o in operands)
        if opcode in ("dynamic-slice", "slice", "gather"):
            read = instruction.array.padded if operands[0].array.space == 0 else 0
            return written + read + sum(leaf.hbm for o in operands[1:] for leaf in o.leaves)
        if opcode == "dynamic-update-slice":
            update = operands[1].array
            return update.hbm + (update.padded if instruction.array.space == 0 else 0)
        if opcode == "scatter":
            updates = operands[2 * (len(operands) // 3) + 1 :] or operands[2:]
            return sum(2 * leaf.padded for o in updates for leaf in o.leaves if instruction.array.space == 0)
        return written + sum(leaf.hbm for o in operands for leaf in o.leaves)

    def _fusion_bytes(self, fusion: Instruction, operands: list[Instruction]) -> int:
        inner = self.computations[fusion.attribute("calls")]
        total = 0
        for parameter, operand in zip(inner.parameters, operands, strict=False):
            if operand.array.space == 0:
                total += min(self._read_of(inner, parameter), sum(leaf.hbm for leaf in operand.leaves))
        root = inner.root
        parts = inner.operands(root) if root.opcode == "tuple" else [root]
        if root.target == "AsyncCollectiveStart":
            return total + sum(leaf.hbm for leaf in fusion.leaves[1:])
        if len(parts) != len(fusion.leaves):
            return total + sum(leaf.hbm for leaf in fusion.leaves)
        for part, leaf in zip(parts, fusion.leaves, strict=True):
            part = behind(part, inner)
            if leaf.space or part.opcode == "parameter" or part.target in _FREE_CALLS or _continues(part, inner):
                continue
            if part.opcode == "dynamic-update-slice":
                total += inner.operands(part)[1].array.padded
            else:
                total += leaf.hbm
        return total

    def _read_of(self, inner: Computation, source: Instruction) -> int:
        """Bytes of a fusion's parameter that it reads."""
        total = 0
        for user in inner.users.get(source.name, ()):
            if user.opcode in ("tuple", "get-tuple-element") or user.target in _FREE_CALLS or _continues(user, inner):
                continue
            first = user.operands[0] == source.name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += user.array.padded
            elif user.opcode == "dynamic-update-slice" and first and user.operands.count(source.name) == 1:
                continue
            elif user.opcode == "bitcast" and not user.root:
                total += self._read_of(inner, user)
            elif user.opcode == "fusion":
                callee = self.computations[user.attribute("calls")]
                at = [i for i, name in enumerate(user.operands) if name == source.name]
                total += sum(self._read_of(callee, callee.parameters[i]) for i in at)
            else:
                return sum(leaf.padded for leaf in source.leaves)
        return total

    # ------------------------------------------------------------------------------------------------------ collectives

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Those that run, in the order of the text. What is spread over several fusions counts where it starts."""
        out = []
        for name, computation in self.computations.items():
            if not self._runs[name]:
                continue
            for instruction in computation.instructions.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES or _continues(instruction, computation):
                    continue
                operands = computation.operands(instruction)
                groups = groups_of(instruction, self.devices)
                if kind == "all-reduce" and name in self._fused and _scatters(instruction, computation):
                    kind = "reduce-scatter"
                moved = _moved(kind, instruction, operands, max(map(len, groups), default=1))
                stack = self.stack(instruction)
                source = line_of(stack)
                out.append(Collective(kind, self._runs[name], moved, groups, instruction.op_name, source, stack))
        return tuple(out)

    # ------------------------------------------------------------------------------------------------------------ lines

    def stack(self, instruction: Instruction) -> tuple[str, ...]:
        """Lines of Python that an instruction comes from, innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame:
            return self._stack(int(frame[1]))
        file = re.search(r'source_file="([^"]*)"', instruction.attributes)
        line = re.search(r"source_line=(\d+)", instruction.attributes)
        return (f"{file[1]}:{line[1] if line else 0}",) if file else ()

    @functools.cache  # noqa: B019
    def _stack(self, frame: int) -> tuple[str, ...]:
        row = self._tables.get("StackFrames", {}).get(frame, "")
        numbers = [int(n) for n in re.findall(r"=(\d+)", row)]
        if not numbers:
            return ()
        place = self._tables["FileLocations"].get(numbers[0], "")
        file, line = (re.search(rf"{name}=(\d+)", place) for name in ("file_name_id", "line"))
        path = self._tables["FileNames"].get(int(file[1]) if file else 0, "").strip('"')
        parent = numbers[1] - 1 if len(numbers) > 1 else 0  # as printed it is one more, and 1 is none
        above = self._stack(parent) if 0 < parent < frame else ()
        return (f"{path}:{line[1] if line else 0}", *above)

    # ----------------------------------------------------------------------------------------------------------- memory

    @functools.cached_property
    def parameters(self) -> list[tuple[str, int]]:
        """What the program is given, by name, with the bytes that a device holds of each."""
        return [(p.op_name or p.name, sum(leaf.hbm for leaf in p.leaves)) for p in self.entry.parameters]

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The most that lives at once of what the program allocates for itself, arguments and results aside.

        With arguments and fresh results it is what TPU's compiler holds against a chip's memory, to within 1 %. What
        ``memory_analysis`` calls temporaries may be half as much again: it packs only as tightly as it has to.
        """
        return self._lives[self.entry.name][0]

    def live(self, n: int | None = None, *, arguments: bool = False) -> list[Buffer]:
        """What is in main memory when that holds most, the largest first.

        Args:
          n: how many kinds; None gives all.
          arguments: also what the program is given, and results that take no argument's place.
        """
        found = list(self._lives[self.entry.name][1])
        if arguments:
            found += [self._buffer(p, leaf) for p in self.entry.parameters for leaf in p.leaves if leaf.hbm]
            found += self._fresh_results()
        counts = Counter(found)
        merged = [buffer._replace(count=count) for buffer, count in counts.items()]
        return sorted(merged, key=lambda b: -b.bytes * b.count)[:n]

    def _fresh_results(self) -> list[Buffer]:
        aliased = {int(i or 0) for i in re.findall(r"\{(\d*)\}: \(\d+, \{\}", self._header)}
        root = self.entry.root
        makers = self.entry.operands(root) if root.opcode == "tuple" else [root]
        if len(makers) != len(root.leaves):
            makers = [root] * len(root.leaves)
        return [
            self._buffer(maker, leaf)
            for i, (maker, leaf) in enumerate(zip(makers, root.leaves, strict=True))
            if i not in aliased and leaf.hbm
        ]

    def _buffer(self, maker: Instruction, leaf: Leaf) -> Buffer:
        stack = self.stack(maker)
        return Buffer(leaf.padded, str(leaf), maker.op_name, line_of(stack), stack=stack)

    @functools.cached_property
    def _lives(self) -> dict[str, tuple[int, tuple[Buffer, ...]]]:
        """The peak of every computation that is no fusion: of what it allocates, but for what it returns."""
        out: dict[str, tuple[int, tuple[Buffer, ...]]] = {}

        def peak(name: str) -> tuple[int, tuple[Buffer, ...]]:
            if name not in out:
                out[name] = Liveness(self, self.computations[name], peak).peak
            return out[name]

        peak(self.entry.name)
        return out


# -------------------------------------------------------------------------------------------------------- collectives


def _chain(instruction: Instruction) -> str:
    found = re.search(r'chain_id="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _continues(instruction: Instruction, computation: Computation) -> bool:
    """A collective that stands here to go on or to end: it started in an earlier fusion (TPU), which counts."""
    if instruction.opcode not in COLLECTIVES or not _chain(instruction):
        return False
    return not any(user.target == "AsyncCollectiveStart" for user in computation.users.get(instruction.name, ()))


def _scatters(instruction: Instruction, computation: Computation) -> bool:
    """An all-reduce of which a fusion keeps a device's own slice: what TPUs make of a reduce-scatter."""
    users = computation.users.get(instruction.name, [])
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _result(start: Instruction) -> list[Leaf]:
    """What an asynchronous instruction makes: its tuple may hold operands and context, too."""
    shape, kind = start.shape, start.opcode.removesuffix("-start")
    if isinstance(shape, Leaf) or kind == "all-reduce":
        return start.leaves
    return read_leaves(shape[0] if kind == "copy" else shape[1])


def _moved(kind: str, instruction: Instruction, operands: Sequence[Instruction], n: int) -> int:
    given = sum(leaf.size for operand in operands for leaf in operand.leaves)
    if kind == "all-gather":
        made = _result(instruction) if instruction.opcode.endswith("-start") else instruction.leaves
        return sum(leaf.size for leaf in made) * (n - 1) // n
    if kind in ("collective-permute", "collective-broadcast"):
        return given if n > 1 else 0
    if kind == "ragged-all-to-all":
        given = operands[0].array.size
    return (2 if kind == "all-reduce" else 1) * given * (n - 1) // n
