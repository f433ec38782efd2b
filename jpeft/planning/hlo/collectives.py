"""jpeft.planning.hlo.collectives."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from jpeft.planning.hlo.parse import Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip


class Collective(NamedTuple):
    """One by which devices send each other arrays."""

    kind: str  # one of `COLLECTIVES`
    times: int  # that the program runs it
    bytes: int  # that a device sends at least, each time
    groups: tuple[tuple[int, ...], ...]  # of devices that exchange with each other
    op_name: str
    source: str
    stack: tuple[str, ...] = ()


def groups_of(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
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
