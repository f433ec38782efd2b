"""Optimized HLO text as objects: a `Module` of computations of instructions, and the types of their arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

ELEMENTWISE = {
    "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "erf",
    "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one", "logistic", "maximum",
    "minimum", "multiply", "negate", "not", "or", "power", "reduce-precision", "remainder", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign",
    "sine", "sqrt", "subtract", "tan", "tanh", "xor",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- types


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The type of one array, with its layout.

    Attributes:
      dtype: in XLA's spelling, such as `bf16`.
      dims: sizes of the dimensions.
      order: dimensions from minor (fastest) to major.
      tiles: tile shapes, the outermost tiling first.
      space: the memory space; 0 is main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]
    space: int

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return _dtype_bits(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return -(-math.prod(self.dims) * self.bits // 8)

    @property
    def padded(self) -> int:
        """Bytes with the padding that tiles add."""
        sizes = [self.dims[i] for i in reversed(self.order)] if len(self.order) == len(self.dims) else [*self.dims]
        for tile in self.tiles:
            sizes = [1] * (len(tile) - len(sizes)) + sizes
            head, tail = sizes[: len(sizes) - len(tile)], sizes[len(sizes) - len(tile) :]
            sizes = head + [-(-n // t) for n, t in zip(tail, tile, strict=True)] + list(tile)
        return -(-math.prod(sizes) * self.bits // 8)

    @property
    def hbm(self) -> int:
        """Padded bytes in main memory; 0 for an array in another memory space."""
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
def _read_leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
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


def read_shape(text: str) -> Shape:
    """Parses an array type or a tuple of them.

    >>> str(read_shape("bf16[8,64]{1,0:T(8,128)(2,1)}"))
    'bf16[8,64]'
    >>> [str(leaf) for leaf in leaves_of(read_shape("(bf16[8,64]{1,0}, (u32[]))"))]
    ['bf16[8,64]', 'u32[]']
    """

    def at(i: int) -> tuple[Shape, int]:
        if text[i] != "(":
            found = _LEAF.match(text, i)
            if not found:
                raise ValueError(f"cannot read a shape in {text[i : i + 80]!r}")
            return _read_leaf(found[1], found[2], found[3]), found.end()
        i, parts = i + 1, []
        while text[i] != ")":
            if text[i] in ", ":
                i += 1
                continue
            part, i = at(i)
            parts.append(part)
        return tuple(parts), i + 1

    return at(0)[0]


def leaves_of(shape: Shape) -> list[Leaf]:
    """The arrays of a type, depth first."""
    return [shape] if isinstance(shape, Leaf) else [leaf for part in shape for leaf in leaves_of(part)]


# ------------------------------------------------------------------------------------------------------- instructions


@dataclasses.dataclass(eq=False)
class Instruction:
    """One instruction of a computation.

    Attributes:
      operands: names of the instructions that it reads.
      argument: the text in the parentheses, e.g. a parameter's number or a constant's value.
      attributes: the text after the parentheses.
      root: it is the computation's result.
      type_text: the text of its result type.
    """

    name: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool
    type_text: str

    @functools.cached_property
    def shape(self) -> Shape:
        return read_shape(self.type_text)

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        return leaves_of(self.shape)

    @property
    def array(self) -> Leaf:
        """The first array of the result."""
        return self.leaves[0]

    @functools.cached_property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    def attribute(self, name: str) -> str:
        """The word of an attribute, e.g. `region_0` of `body=%region_0`; empty if it is absent."""
        found = re.search(rf"(?:^|[ ,]){name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def integers(self, name: str) -> list[int]:
        """The numbers of an attribute, e.g. [0, 1] of `dimensions={0,1}`; empty if it is absent."""
        found = re.search(rf"(?:^|[ ,]){name}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []

    @property
    def index(self) -> int:
        """The element that a `get-tuple-element` reads."""
        found = re.search(r"index=(\d+)", self.attributes)
        return int(found[1]) if found else 0

    @property
    def target(self) -> str:
        """The function that a `custom-call` names."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def branches(self) -> list[str]:
        """The computations that a `conditional` chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.attribute(f"{side}_computation") for side in ("true", "false")]


@dataclasses.dataclass(eq=False)
class Computation:
    """A computation and its instructions, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.root), [*self.instructions.values()][-1])

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.argument))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction, by its name."""
        out: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                out.setdefault(name, []).append(instruction)
        return out

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]

    def results(self) -> list[Instruction]:
        """The instructions that make the elements of the result."""
        return self.operands(self.root) if self.root.opcode == "tuple" else [self.root]

    def skip_bitcasts(self, instruction: Instruction) -> Instruction:
        """The instruction that a chain of bitcasts starts at."""
        while instruction.opcode == "bitcast" and instruction.operands:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text) - 1


_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def _read_instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    found = _OPCODE.match(line, end)
    if end <= 0 or not found:
        return None
    close = _closing(line, found.end() - 1)
    argument = line[found.end() : close]
    operands = () if found[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(head[2], found[1], operands, argument, line[close + 1 :], bool(head[1]), line[start:end])


# ------------------------------------------------------------------------------------------------------------- module


@dataclasses.dataclass(eq=False)
class Module:
    """A parsed program: its computations, and the tables that lead from an instruction to lines of Python."""

    header: str
    computations: Mapping[str, Computation]
    entry: Computation
    tables: Mapping[str, Mapping[int, str]]

    @functools.cached_property
    def devices(self) -> int:
        counts = [re.search(rf"{name}=(\d+)", self.header) for name in ("replica_count", "num_partitions")]
        return math.prod(int(n[1]) if n else 1 for n in counts)

    @functools.cached_property
    def fused(self) -> set[str]:
        """Names of the computations inside fusions: only their parameters and results are in memory."""
        instructions = [i for c in self.computations.values() for i in c.instructions.values()]
        return {i.attribute("calls") for i in instructions if i.opcode == "fusion"}

    def fusion_body(self, fusion: Instruction) -> Computation:
        return self.computations[fusion.attribute("calls")]

    def callees(self, instruction: Instruction) -> list[str]:
        """Computations that run once as part of an instruction, without loops, branches and the functions that
        `reduce` and `sort` apply to elements."""
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

    def stack(self, instruction: Instruction) -> tuple[str, ...]:
        """The lines of Python that an instruction comes from, innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if frame:
            return self._frames(int(frame[1]))
        file = re.search(r'source_file="([^"]*)"', instruction.attributes)
        line = re.search(r"source_line=(\d+)", instruction.attributes)
        return (f"{file[1]}:{line[1] if line else 0}",) if file else ()

    @functools.cache  # noqa: B019  # as long as the module lives
    def _frames(self, frame: int) -> tuple[str, ...]:
        row = self.tables.get("StackFrames", {}).get(frame, "")
        numbers = [int(n) for n in re.findall(r"=(\d+)", row)]
        if not numbers:
            return ()
        location = self.tables["FileLocations"].get(numbers[0], "")
        file, line = (re.search(rf"{name}=(\d+)", location) for name in ("file_name_id", "line"))
        path = self.tables["FileNames"].get(int(file[1]) if file else 0, "").strip('"')
        parent = numbers[1] - 1 if len(numbers) > 1 else 0  # as printed it is one more, and 1 is none
        above = self._frames(parent) if 0 < parent < frame else ()
        return (f"{path}:{line[1] if line else 0}", *above)


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def read_module(text: str) -> Module:
    """Parses the text of an optimized program.

    Raises:
      ValueError: it is not optimized HLO.

    >>> read_module("module @jit_f {}")
    Traceback (most recent call last):
    ValueError: not optimized HLO: expected 'HloModule ...' and an ENTRY computation, as compiled.as_text() returns
    """
    text = re.sub(r"/\*index=\d+\*/", "", text)
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    header, entry, current, table = "", "", None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (instruction := _read_instruction(line)):
                current.instructions[instruction.name] = instruction
        elif line in _TABLES:
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif line.startswith("HloModule"):
            header = header or line
        elif head := _COMPUTATION.match(line):
            current = computations[head[2]] = Computation(head[2], {})
            entry = head[2] if head[1] else entry
    if not entry or not header:
        raise ValueError(
            "not optimized HLO: expected 'HloModule ...' and an ENTRY computation, as compiled.as_text() returns"
        )
    return Module(header, computations, computations[entry], tables)


# -------------------------------------------------------------------------------------------------------------- lines

_LIBRARIES = re.compile(r"(?:site|dist)-packages/(?:jax|jaxlib|flax|optax)/")
# Packages of jpeft that a model's own calls pass through.
_ENGINE = re.compile(r"/jpeft/(?:core|linen|nnx|methods|parallel|planning|quantization|training)/(?:\w+/)*\w+\.py:")


def source_line(stack: Sequence[str]) -> str:
    """The innermost line of a model's code; failing that, of code outside jax, flax and optax; failing that, any."""
    own = [line for line in stack if not _LIBRARIES.search(line)]
    return next((line for line in own if not _ENGINE.search(line)), (*own, *stack, "")[0])
