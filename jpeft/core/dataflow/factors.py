"""Axes as products of factors, which reshapes split and merge: where every part of an axis comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Factor:
    """A part of an axis.

    Attributes:
      tag: what it is.
      size: its number of places.
      stride: the distance of two places along what the tag names; 0 where places are not told apart.
    """

    tag: Any
    size: int
    stride: int = 0

    def split(self, major: int) -> tuple[Factor, Factor]:
        """``(major, rest)`` of a factor whose size ``major`` divides."""
        minor = self.size // major
        return replace(self, size=major, stride=self.stride * minor), replace(self, size=minor)


# The factors of an axis, major first. Factors of size one are kept: they tell what an axis of one place is.
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def places_of(axis: Axis) -> int:
    """The number of places of an axis."""
    return math.prod(f.size for f in axis)


def joined(factors: Iterable[Factor]) -> Axis:
    """An axis from its factors, with neighbors that are parts of one merged."""
    axis: list[Factor] = []
    for factor in factors:
        if axis and axis[-1].tag == factor.tag and axis[-1].stride == factor.stride * factor.size:
            axis[-1] = replace(factor, size=axis[-1].size * factor.size)
        elif not (factor.size == 1 and any(f.tag == factor.tag for f in axis)):
            axis.append(factor)
    return tuple(axis)


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of a reshaped array; None if a new axis would be neither a product nor a factor of others.

    >>> x, w = Factor("x", 6), Factor("w", 8)
    >>> reshape(((x,), (w,)), (6, 2, 4))
    ((Factor(tag='x', size=6, stride=0),), (Factor(tag='w', size=2, stride=0),), (Factor(tag='w', size=4, stride=0),))
    """
    out: list[Axis] = []
    i = j = 0
    while i < len(axes) or j < len(shape):
        # The smallest groups of old and new axes of one size.
        old, new = [], []
        before = after = 1
        while True:
            if i < len(axes) and (before < after or not old):
                old.append(axes[i])
                before *= places_of(axes[i])
                i += 1
            elif j < len(shape) and (after < before or not new):
                new.append(shape[j])
                after *= shape[j]
                j += 1
            elif before == after:
                break
            else:
                return None
        made = _regroup(old, new)
        if made is None:
            return None
        out += made
    return tuple(out)


def _regroup(old: Sequence[Axis], new: Sequence[int]) -> list[Axis] | None:
    if len(old) == len(new) == 1:
        return list(old)
    rest = [factor for axis in old for factor in axis]
    out: list[Axis] = []
    for place, wanted in enumerate(new):
        taken: list[Factor] = []
        while wanted > 1 or (rest and rest[0].size == 1 and not taken):
            if not rest:
                return None
            factor = rest.pop(0)
            if factor.size > 1 and factor.size > wanted:
                if factor.size % wanted:
                    return None
                factor, minor = factor.split(wanted)
                rest.insert(0, minor)
            elif wanted % factor.size:
                return None
            taken.append(factor)
            wanted //= factor.size
        if place == len(new) - 1:
            taken += rest
            rest = []
        out.append(joined(taken))
    return out if all(f.size == 1 for f in rest) else None


def refined(*axes: Axis) -> list[tuple[Factor, ...]] | None:
    """Several factorizations of one axis in common factors, major first; None if there are none.

    >>> refined((Factor("a", 6),), (Factor("b", 2), Factor("c", 3)))[0]
    (Factor(tag='a', size=2, stride=0), Factor(tag='b', size=2, stride=0))
    """
    # Of an axis of one place, the first factor of each.
    if all(places_of(axis) == 1 for axis in axes):
        return [tuple(axis[0] if axis else Factor(None, 1) for axis in axes)]
    rests = [[f for f in axis if f.size > 1] for axis in axes]
    out = []
    while all(rests):
        step = min(rest[0].size for rest in rests)
        group = []
        for rest in rests:
            factor = rest.pop(0)
            if factor.size % step:
                return None
            if factor.size > step:
                factor, minor = factor.split(step)
                rest.insert(0, minor)
            group.append(factor)
        out.append(tuple(group))
    return None if any(rests) else out


def retagged(axis: Axis, rename: Callable[[Any], Any]) -> Axis:
    """An axis with other tags."""
    return joined(replace(f, tag=rename(f.tag)) for f in axis)
