"""Collectives: operations by which devices exchange arrays, the groups that exchange, and the bytes that move."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jpeft.planning.hlo.parse import Computation, Instruction, Leaf, Module, leaves_of, source_line

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """A collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      times: how often the program runs it.
      bytes: the least that a device sends, each time.
      groups: the devices that exchange with each other.
      op_name: the name that JAX gave it.
      source: its line in the model's code.
      stack: lines, innermost first.
    """

    kind: str
    times: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    op_name: str
    source: str
    stack: tuple[str, ...] = ()


def find_collectives(module: Module, runs: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives that run, in the order of the text. One that spans several fusions counts where it starts."""
    out = []
    for name, computation in module.computations.items():
        if not runs[name]:
            continue
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or continues_collective(instruction, computation):
                continue
            groups = _groups_of(instruction, module.devices)
            if kind == "all-reduce" and name in module.fused and _keeps_own_slice(instruction, computation):
                kind = "reduce-scatter"
            size = max(map(len, groups), default=1)
            moved = _bytes_sent(kind, instruction, computation.operands(instruction), size)
            stack = module.stack(instruction)
            out.append(Collective(kind, runs[name], moved, groups, instruction.op_name, source_line(stack), stack))
    return tuple(out)


def _chain(instruction: Instruction) -> str:
    found = re.search(r'chain_id="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def continues_collective(instruction: Instruction, computation: Computation) -> bool:
    """True for the later parts of a collective that started in an earlier fusion (TPU)."""
    if instruction.opcode not in KINDS or not _chain(instruction):
        return False
    return not any(user.target == "AsyncCollectiveStart" for user in computation.users.get(instruction.name, ()))


def _keeps_own_slice(instruction: Instruction, computation: Computation) -> bool:
    """True for an all-reduce of which a fusion keeps the device's own slice: a reduce-scatter on TPUs."""
    users = computation.users.get(instruction.name, [])
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def async_results(start: Instruction) -> list[Leaf]:
    """The arrays that an asynchronous instruction makes, without the operands and contexts in its tuple."""
    shape, kind = start.shape, start.opcode.removesuffix("-start")
    if isinstance(shape, Leaf) or kind == "all-reduce":
        return start.leaves
    return leaves_of(shape[0] if kind == "copy" else shape[1])


def _bytes_sent(kind: str, instruction: Instruction, operands: Sequence[Instruction], group_size: int) -> int:
    given = sum(leaf.nbytes for operand in operands for leaf in operand.leaves)
    if kind == "all-gather":
        made = async_results(instruction) if instruction.opcode.endswith("-start") else instruction.leaves
        return sum(leaf.nbytes for leaf in made) * (group_size - 1) // group_size
    if kind in ("collective-permute", "collective-broadcast"):
        return given if group_size > 1 else 0
    if kind == "ragged-all-to-all":
        given = operands[0].array.nbytes
    return (2 if kind == "all-reduce" else 1) * given * (group_size - 1) // group_size


# ------------------------------------------------------------------------------------------------------------- groups


def _groups_of(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return _connected([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    at = text.find("replica_groups=")
    return replica_groups(text[at + len("replica_groups=") :], devices) if at >= 0 else (tuple(range(devices)),)


def _connected(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Sets of devices that pairs connect, sorted."""
    group: dict[int, set[int]] = {}
    for pair in pairs:
        joined = set().union(*(group.get(device, {device}) for device in pair))
        group.update(dict.fromkeys(joined, joined))
    return tuple(dict.fromkeys(tuple(sorted(group[device])) for device in sorted(group)))


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, from any of XLA's spellings; more text may follow.

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
    """The numbers 0, 1, … as an array of these sizes, transposed and flattened."""
    shape = [int(n) for n in sizes.split(",")]
    permutation = [int(n) for n in order.split(",")] if order else list(range(len(shape)))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    ranges = [range(0, shape[i] * strides[i], strides[i]) for i in permutation]
    return [sum(parts) for parts in itertools.product(*ranges)]


def _mesh_groups(mesh: str, ids: str, wanted: str) -> tuple[tuple[int, ...], ...]:
    """Groups along the wanted axes of a mesh."""
    axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)]
    total = math.prod(size for _, size in axes)
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
    devices = _iota(iota[1], iota[2]) if iota else [int(n) for n in re.findall(r"\d+", ids)] or list(range(total))
    chosen = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", wanted)
    # An axis may be split: 'x':(2)4 is the part of x that has size 4 and follows a part of size 2.
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
