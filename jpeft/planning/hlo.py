"""What a compiled program does, read from its text: FLOPs, bytes, collectives, and what is alive when memory peaks.

The text is of one device's program, optimised and scheduled, as ``jax.jit(f).lower(...).compile().as_text()`` gives
it for CPUs, GPUs and TPUs, TPUs that are not there included. XLA's own ``cost_analysis`` counts a loop's body once;
here it counts as often as it runs. Nothing is run, and jax is not needed.

    program = read(compiled.as_text())
    program.flops, program.hbm_bytes
    [c for c in program.collectives if c.kind == "all-gather"]
    program.live(10)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# Moves or names what is there: reads and writes nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "while",
         "call", "conditional", "optimization-barrier", "partition-id", "replica-id", "domain", "async-update",
         "async-start"}  # fmt: skip
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AsyncCollectiveDone", "Sharding", "AssumeGatherIndicesInBound")
_ELEMENTWISE = {"abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "convert", "copy", "cosine",
                "divide", "erf", "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one",
                "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "reduce-precision",
                "remainder", "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left",
                "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan", "tanh",
                "xor"}  # fmt: skip
_OTHERS_CODE = re.compile(r"(?:site|dist)-packages/(?:jax|jaxlib|flax|optax)/")
# What of jpeft a model's calls pass through.
_PASSED = re.compile(r"/jpeft/(?:inject|peft|sharding|train|quantization|(?:geometry|methods|planning)/\w+)\.py:")


class Collective(NamedTuple):
    """One by which devices send each other arrays."""

    kind: str  # one of `COLLECTIVES`
    times: int  # that the program runs it
    bytes: int  # that a device sends at least, each time
    groups: tuple[tuple[int, ...], ...]  # of devices that exchange with each other
    op_name: str
    source: str
    stack: tuple[str, ...] = ()


class Buffer(NamedTuple):
    """Memory that lives when the program holds most, and where it comes from."""

    bytes: int  # of one
    shape: str  # e.g. "bf16[1,2048,4096]"
    op_name: str
    source: str  # e.g. "/home/me/model.py:123"
    count: int = 1
    stack: tuple[str, ...] = ()  # lines, innermost first


class Refusal(NamedTuple):
    """What a compiler says when memory does not suffice."""

    buffers: tuple[Buffer, ...]  # those that it names, the largest first
    used: int  # bytes that the program would take, arguments included
    available: int  # bytes of a device's main memory that a program may take; 0: not told


# ------------------------------------------------------------------------------------------------------------- shapes


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array's type, with where and how it lies."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # of dims, the fastest first
    tiles: tuple[tuple[int, ...], ...]
    space: int  # 0: main memory

    @property
    def bits(self) -> int:
        return _dtype_bits(self.dtype)

    @property
    def size(self) -> int:
        """Bytes without padding."""
        return -(-math.prod(self.dims) * self.bits // 8)

    @property
    def padded(self) -> int:
        """Bytes with what tiles add."""
        sizes = [self.dims[i] for i in reversed(self.order)] if len(self.order) == len(self.dims) else [*self.dims]
        for tile in self.tiles:
            sizes = [1] * (len(tile) - len(sizes)) + sizes
            head, tail = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
            sizes = head + [-(-n // t) for n, t in zip(tail, tile, strict=True)] + list(tile)
        return -(-math.prod(sizes) * self.bits // 8)

    @property
    def hbm(self) -> int:
        return self.padded if self.space == 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Shape = Leaf | tuple["Shape", ...]


def _dtype_bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8


_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")


@functools.lru_cache(maxsize=65536)
def _leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
    order, _, rest = (layout or "").partition(":")
    tiles = re.match(r"T((?:\([\d,*]*\))+)", rest)
    space = re.search(r"(?<![A-Z])S\((\d+)\)", rest)
    return Leaf(
        dtype,
        tuple(int(n.strip().lstrip("<=")) for n in dims.split(",") if n.strip()),
        tuple(map(int, order.split(","))) if order else (),
        tuple(tuple(map(int, t.split(","))) for t in re.findall(r"\(([\d,]+)\)", tiles[1])) if tiles else (),
        int(space[1]) if space else 0,
    )


def _shape(text: str) -> Shape:
    """Of `(bf16[8,64]{1,0:T(8,128)(2,1)}, (u32[]))`."""

    def at(i: int) -> tuple[Shape, int]:
        if text[i] != "(":
            found = _LEAF.match(text, i)
            if not found:
                raise ValueError(f"cannot read a shape in {text[i : i + 80]!r}")
            return _leaf(found[1], found[2], found[3]), found.end()
        i, parts = i + 1, []
        while text[i] != ")":
            if text[i] in ", ":
                i += 1
                continue
            part, i = at(i)
            parts.append(part)
        return tuple(parts), i + 1

    return at(0)[0]


def _leaves(shape: Shape) -> list[Leaf]:
    return [shape] if isinstance(shape, Leaf) else [leaf for part in shape for leaf in _leaves(part)]


def _closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text) - 1


# ------------------------------------------------------------------------------------------------------- instructions


@dataclasses.dataclass(eq=False)
class Instruction:
    name: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands in the brackets: a parameter's number, a constant's value
    attributes: str
    root: bool
    _type: str

    @functools.cached_property
    def shape(self) -> Shape:
        return _shape(self._type)

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        return _leaves(self.shape)

    @property
    def array(self) -> Leaf:
        return self.leaves[0]

    @functools.cached_property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    def attribute(self, name: str) -> str:
        """E.g. the computation that `body=%region_0` names."""
        found = re.search(rf"(?:^|[ ,]){name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def integers(self, name: str) -> list[int]:
        found = re.search(rf"(?:^|[ ,]){name}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.attribute(f"{side}_computation") for side in ("true", "false")]


@dataclasses.dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction]  # in the order in which they run

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.root), [*self.instructions.values()][-1])

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        out: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                out.setdefault(name, []).append(instruction)
        return out

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    found = _OPCODE.match(line, end)
    if end <= 0 or not found:
        return None
    close = _closing(line, found.end() - 1)
    inside = line[found.end() : close]
    operands = () if found[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], found[1], operands, inside, line[close + 1 :], bool(head[1]), line[start:end])


def read(text: str) -> Program:
    """A program from its text, which `Program` answers questions of.

    Args:
      text: what ``compiled.as_text()`` gives.

    Raises:
      ValueError: it is no optimised HLO.

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
            if current is not None and (instruction := _instruction(line)):
                current.instructions[instruction.name] = instruction
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif not line.startswith("HloModule") and (head := _HEAD.match(line)):
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
            if own and _index(passed) == index:
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
                return self._value(frame, operands[0], _index(instruction))
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
                total += _dot_flops(instruction, computation)
            elif instruction.opcode == "convolution":
                total += _convolution_flops(instruction, computation)
            elif instruction.opcode == "custom-call":
                total += _custom_flops(instruction, computation)
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
            part = _behind(part, inner)
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
                groups = _groups(instruction, self.devices)
                if kind == "all-reduce" and name in self._fused and _scatters(instruction, computation):
                    kind = "reduce-scatter"
                moved = _moved(kind, instruction, operands, max(map(len, groups), default=1))
                stack = self.stack(instruction)
                source = _line_of(stack)
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
        return Buffer(leaf.padded, str(leaf), maker.op_name, _line_of(stack), stack=stack)

    @functools.cached_property
    def _lives(self) -> dict[str, tuple[int, tuple[Buffer, ...]]]:
        """The peak of every computation that is no fusion: of what it allocates, but for what it returns."""
        out: dict[str, tuple[int, tuple[Buffer, ...]]] = {}

        def peak(name: str) -> tuple[int, tuple[Buffer, ...]]:
            if name not in out:
                out[name] = _Liveness(self, self.computations[name], peak).peak
            return out[name]

        peak(self.entry.name)
        return out


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _line_of(stack: Sequence[str]) -> str:
    """The innermost line that is a model's, or at least not in jax, flax or optax."""
    own = [line for line in stack if not _OTHERS_CODE.search(line)]
    return next((line for line in own if not _PASSED.search(line)), (*own, *stack, "")[0])


def _behind(instruction: Instruction, computation: Computation) -> Instruction:
    while instruction.opcode == "bitcast" and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


# -------------------------------------------------------------------------------------------------------------- FLOPs


def _dot_flops(dot: Instruction, computation: Computation) -> int:
    left = computation.operands(dot)[0].array
    return 2 * math.prod(dot.array.dims) * math.prod(left.dims[i] for i in dot.integers("lhs_contracting_dims"))


def _convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """As XLA's ``HloCostAnalysis``: a position counts where it meets no padding and no hole."""
    left, right = (operand.array for operand in computation.operands(convolution)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        return 0
    lhs, rhs, result = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    spatial = [label for label in rhs if label.isdigit()]
    fields = _window(window[1] if window else "", len(spatial))
    positions = 1
    for i, label in enumerate(sorted(spatial, key=int)):
        sizes = left.dims[lhs.index(label)], convolution.array.dims[result.index(label)]
        positions *= _valid_positions(*sizes, *(fields[key][i] for key in ("size", "stride", "low", "lhs", "rhs")))
    groups = {name: re.search(rf"{name}_group_count=(\d+)", convolution.attributes) for name in ("feature", "batch")}
    feature, batch = (int(found[1]) if found else 1 for found in groups.values())
    features = left.dims[lhs.index("f")] // feature * right.dims[rhs.index("o")]
    return 2 * features * (left.dims[lhs.index("b")] // batch) * positions


def _window(text: str, n: int) -> dict[str, list[int]]:
    given = dict(part.split("=") for part in text.split())
    numbers = lambda key, default: [int(x) for x in given[key].split("x")] if key in given else [default] * n  # noqa: E731
    low = [int(pair.split("_")[0]) for pair in given["pad"].split("x")] if "pad" in given else [0] * n
    return {
        "size": numbers("size", 1),
        "stride": numbers("stride", 1),
        "low": low,
        "lhs": numbers("lhs_dilate", 1),
        "rhs": numbers("rhs_dilate", 1),
    }


@functools.lru_cache(maxsize=4096)
def _valid_positions(size: int, out: int, window: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Pairs of a kernel's and a result's positions at which the left operand has an element."""
    if stride == dilate == spread == 1:  # for each of the kernel's: results k with 0 <= k - low + w < size
        return sum(max(0, min(out, size + low - w) - max(0, low - w)) for w in range(window))
    if dilate == 1:
        starts = [low - w * spread for w in range(window)]
        return sum(max(0, min(out, -(-(size + s) // stride)) - max(0, -(-s // stride))) for s in starts)
    count = 0
    for w, o in itertools.product(range(window), range(out)):
        at, hole = divmod(o * stride - low + w * spread, dilate)
        count += hole == 0 and 0 <= at < size
    return count


def _custom_flops(call: Instruction, computation: Computation) -> int:
    """Of libraries' products, and of kernels that tell their cost."""
    told = re.search(r'"?cost_estimate"?\s*:\s*\{[^}]*?"?flops"?\s*:\s*"?(\d+)', call.attributes)
    if told:
        return int(told[1])
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    if (contracted and "matmul" in call.target) or (contracted and "gemm" in call.target):
        left = computation.operands(call)[0].array
        return 2 * math.prod(call.array.dims) * math.prod(left.dims[int(i)] for i in re.findall(r"\d+", contracted[1]))
    if call.target == "__cudnn$convForward" or call.target.startswith("__cudnn$convBiasActivation"):
        return _convolution_flops(call, computation)
    return 0


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
    return _leaves(shape[0] if kind == "copy" else shape[1])


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


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return _connected([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    at = text.find("replica_groups=")
    return replica_groups(text[at + len("replica_groups=") :], devices) if at >= 0 else (tuple(range(devices)),)


def _connected(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Devices that pairs chain up, sorted."""
    group: dict[int, set[int]] = {}
    for pair in pairs:
        joined = set().union(*(group.get(device, {device}) for device in pair))
        group.update(dict.fromkeys(joined, joined))
    return tuple(dict.fromkeys(tuple(sorted(group[device])) for device in sorted(group)))


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices from any of XLA's spellings, of which more text may follow.

    >>> replica_groups("{{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    >>> replica_groups("[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("mesh['x'=2,'y'=2] {'y'}", 4)
    ((0, 1), (2, 3))
    """
    if text.startswith("{{"):
        inside = text[: text.index("}}")]
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)", inside))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = _iota(iota[2], iota[3])
        size = int(iota[1].split(",")[-1])
        return tuple(tuple(numbers[i : i + size]) for i in range(0, len(numbers), size))
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2] or "", mesh[3])
    return (tuple(range(devices)),)


def _iota(sizes: str, order: str | None) -> list[int]:
    """The numbers 0, 1, .. as an array of some sizes, transposed and laid flat."""
    shape = [int(n) for n in sizes.split(",")]
    permutation = [int(n) for n in order.split(",")] if order else list(range(len(shape)))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    ranges = [range(0, shape[i] * strides[i], strides[i]) for i in permutation]
    return [sum(parts) for parts in itertools.product(*ranges)]


def _mesh_groups(mesh: str, ids: str, wanted: str) -> tuple[tuple[int, ...], ...]:
    axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)]
    total = math.prod(size for _, size in axes)
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
    devices = _iota(iota[1], iota[2]) if iota else [int(n) for n in re.findall(r"\d+", ids)] or list(range(total))
    chosen = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", wanted)
    # An axis may be cut: 'x':(2)4 is the part of x of size 4 of which 2 come before.
    inside = {name: (int(before or 1), int(size)) if size else (1, dict(axes)[name]) for name, before, size in chosen}
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for position in range(total):
        rest, own, left = [], {}, position
        for name, size in reversed(axes):
            left, coordinate = divmod(left, size)
            if name in inside:
                before, part = inside[name]
                after = size // (before * part)
                own[name] = coordinate // after % part
                rest += [coordinate // (after * part), coordinate % after]
            else:
                rest.append(coordinate)
        order = tuple(own[name] for name, _, _ in chosen)
        groups.setdefault(tuple(rest[::-1]), []).append((order, devices[position]))
    return tuple(tuple(device for _, device in sorted(group)) for group in groups.values())


# ------------------------------------------------------------------------------------------------------------- memory

_Place = frozenset[int]  # numbers of the buffers that an array lies in


class _Liveness:
    """One computation's buffers over its schedule. What its caller gives it and what it returns are the caller's."""

    def __init__(
        self, program: Program, computation: Computation, peak: Callable[[str], tuple[int, tuple[Buffer, ...]]]
    ):
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
                        op_name=instruction.op_name, source=_line_of(stack), stack=stack
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
        if instruction.opcode in _ELEMENTWISE or instruction.opcode == "all-reduce":
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
            start = sum(len(_leaves(part)) for part in parts[: _index(instruction)])
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
            start = sum(len(_leaves(each)) for each in made[:part])
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
            leaves = _leaves(part)
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
            part = _behind(part, inner)
            if i not in out and part.opcode in ("dynamic-update-slice", "scatter", "parameter"):
                target = part if part.opcode == "parameter" else _behind(inner.operands(part)[0], inner)
                if target.opcode == "parameter" and (place := given[starts[int(target.inside)]]):
                    out[i] = place
        return out


def _pointwise(inner: Computation, source: Instruction, result: Leaf) -> bool:
    """Whether every element of a fusion's result depends on the same element of a parameter alone."""
    for user in inner.users.get(source.name, ()):
        if user.opcode == "tuple":
            continue
        if user.opcode not in _ELEMENTWISE and user.opcode != "bitcast":
            return False
        if not _pointwise(inner, user, result):
            return False
    return math.prod(source.array.dims) == math.prod(result.dims)


# ----------------------------------------------------------------------------------------------------------- refusals

_KEYS = ("op_name", "source_file", "source_line")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes_of(text: str) -> int:
    found = re.match(r"([\d.]+)\s*([kmgt]?)", text.strip(), re.I)
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def refused(message: str) -> Refusal:
    """Reads what a TPU's compiler says when memory does not suffice.

    Newer compilers name no buffers where they see early that memory does not suffice.

    >>> refusal = refused("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
    >>> refusal.used / 2**30, refusal.available / 2**30
    (20.5, 15.75)
    """
    sizes = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    sizes = sizes or re.search(r"required for .*?\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message)
    found: Counter[Buffer] = Counter()
    temporaries = message.split("Largest program arguments")[0]
    for block in re.split(r"\n\s*\d+\. (?=Size: )", temporaries)[1:]:
        name, path, line = (re.search(rf'{key}="?([^"\n]*?)"?(?=[" \n])', block) for key in _KEYS)
        shape = re.search(r"Shape: (\S+)", block)
        source = f"{path[1]}:{line[1] if line else 0}" if path else ""
        stack = (source,) if source else ()
        kind = ("tuple" if shape[1].startswith("(") else shape[1].split("{")[0]) if shape else ""
        found[Buffer(_bytes_of(block[len("Size: ") :]), kind, name[1] if name else "", source, stack=stack)] += 1
    buffers = [buffer._replace(count=count) for buffer, count in found.items()]
    used, available = (_bytes_of(sizes[i]) if sizes else 0 for i in (1, 2))
    return Refusal(tuple(sorted(buffers, key=lambda b: -b.bytes * b.count)), used, available)
