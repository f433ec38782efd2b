"""jpeft.planning.hlo.parse."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

ELEMENTWISE = {"abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "convert", "copy", "cosine",
                "divide", "erf", "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one",
                "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "reduce-precision",
                "remainder", "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left",
                "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan", "tanh",
                "xor"}  # fmt: skip


OTHERS_CODE = re.compile(r"(?:site|dist)-packages/(?:jax|jaxlib|flax|optax)/")


# What of jpeft a model's calls pass through.
PASSED = re.compile(r"/jpeft/(?:inject|peft|sharding|train|quantization|(?:geometry|methods|planning)/\w+)\.py:")


class Buffer(NamedTuple):
    """Memory that lives when the program holds most, and where it comes from."""

    bytes: int  # of one
    shape: str  # e.g. "bf16[1,2048,4096]"
    op_name: str
    source: str  # e.g. "/home/me/model.py:123"
    count: int = 1
    stack: tuple[str, ...] = ()  # lines, innermost first


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
        return dtype_bits(self.dtype)

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


def dtype_bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8


_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")


@functools.lru_cache(maxsize=65536)
def read_leaf(dtype: str, dims: str, layout: str | None) -> Leaf:
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
    """Of `(bf16[8,64]{1,0:T(8,128)(2,1)}, (u32[]))`."""

    def at(i: int) -> tuple[Shape, int]:
        if text[i] != "(":
            found = _LEAF.match(text, i)
            if not found:
                raise ValueError(f"cannot read a shape in {text[i : i + 80]!r}")
            return read_leaf(found[1], found[2], found[3]), found.end()
        i, parts = i + 1, []
        while text[i] != ")":
            if text[i] in ", ":
                i += 1
                continue
            part, i = at(i)
            parts.append(part)
        return tuple(parts), i + 1

    return at(0)[0]


def read_leaves(shape: Shape) -> list[Leaf]:
    return [shape] if isinstance(shape, Leaf) else [leaf for part in shape for leaf in read_leaves(part)]


def closing(text: str, start: int) -> int:
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
        return read_shape(self._type)

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        return read_leaves(self.shape)

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


HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")


LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


OPCODE = re.compile(r"\s*([\w\-]+)\(")


def read_instruction(line: str) -> Instruction | None:
    head = LINE.match(line)
    if not head:
        return None
    start = head.end()
    end = closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    found = OPCODE.match(line, end)
    if end <= 0 or not found:
        return None
    close = closing(line, found.end() - 1)
    inside = line[found.end() : close]
    operands = () if found[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(head[2], found[1], operands, inside, line[close + 1 :], bool(head[1]), line[start:end])


def index_of(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def line_of(stack: Sequence[str]) -> str:
    """The innermost line that is a model's, or at least not in jax, flax or optax."""
    own = [line for line in stack if not OTHERS_CODE.search(line)]
    return next((line for line in own if not PASSED.search(line)), (*own, *stack, "")[0])


def behind(instruction: Instruction, computation: Computation) -> Instruction:
    while instruction.opcode == "bitcast" and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction
