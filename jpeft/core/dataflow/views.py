"""Views (arrays that hold the elements of another array, reshaped, transposed, sliced or cast) and their products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]

VMAPPED = "vmap"  # the source of atoms of an axis that a vmap around the module adds


@dataclass(frozen=True, order=True)
class Atom:
    """A factor of an axis of the viewed array: ``size`` places that are ``stride`` apart along it.

    Attributes:
      source: name of the viewed array. A product has atoms of both operands.
      axis: the axis.
      stride: distance of two places along the axis.
      size: number of places.
    """

    source: str
    axis: int
    stride: int
    size: int

    def split(self, major: int) -> tuple[Atom, Atom]:
        """``(major, rest)`` of an atom whose size ``major`` divides."""
        minor = self.size // major
        return replace(self, size=major, stride=self.stride * minor), replace(self, size=minor)


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """A view. Each of its axes is a product of atoms, major first; an axis of size one has none.

    Attributes:
      axes: the axes.
      fixed: atoms that a slice fixed, and the places that it took.
      flipped: whether an axis was reversed.
    """

    axes: tuple[Axis, ...]
    fixed: tuple[tuple[Atom, int], ...] = ()
    flipped: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], source: str = "w") -> View:
        """The view of a whole array.

        >>> View.of((2, 3)).reshape((6,)).shape
        (6,)
        """
        return cls(tuple((Atom(source, i, 1, n),) if n != 1 else () for i, n in enumerate(shape)))

    @property
    def shape(self) -> Shape:
        return tuple(math.prod(atom.size for atom in axis) for axis in self.axes)

    def transpose(self, order: Sequence[int]) -> View:
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def squeeze(self, axes: Iterable[int]) -> View:
        """Without some axes of size one."""
        dropped = set(axes)
        return replace(self, axes=tuple(a for i, a in enumerate(self.axes) if i not in dropped))

    def expand(self, shape: Sequence[int], axes: Sequence[int]) -> View | None:
        """With axes of size one added: axis ``i`` becomes ``axes[i]`` of ``shape``. None if an axis is broadcast."""
        where = {to: self.axes[i] for i, to in enumerate(axes)}
        view = replace(self, axes=tuple(where.get(i, ()) for i in range(len(shape))))
        return view if view.shape == tuple(shape) else None

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The view in another shape; None if an axis would be neither a product nor a factor of others.

        >>> View.of((6, 4)).reshape((2, 12)).shape, View.of((6, 4)).reshape((4, 6))
        ((2, 12), None)
        """
        rest = [atom for axis in self.axes for atom in axis]
        axes: list[Axis] = []
        for size in shape:
            axis: list[Atom] = []
            while size > 1:
                if not rest:
                    return None
                atom = rest.pop(0)
                if size % atom.size == 0:
                    size //= atom.size
                elif atom.size % size == 0:
                    atom, minor = atom.split(size)
                    rest.insert(0, minor)
                    size = 1
                else:
                    return None
                axis.append(atom)
            axes.append(joined(axis))
        return replace(self, axes=tuple(axes)) if not rest else None

    def slice(self, starts: Sequence[int], stops: Sequence[int]) -> View | None:
        """A slice of whole blocks: of places ``[n * k, n * (k + 1))`` of an axis; None for any other."""
        view = self
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            size = self.shape[i]
            block = stop - start
            if block == size:
                continue
            if block <= 0 or size % block or start % block:
                return None
            shape = self.shape
            blocks = View((self.axes[i],)).reshape((size // block, block))
            if blocks is None:
                return None
            fixed, place = list(view.fixed), start // block
            for atom in reversed(blocks.axes[0]):
                place, index = divmod(place, atom.size)
                fixed.append((atom, index))
            axes = (*view.axes[:i], blocks.axes[1], *view.axes[i + 1 :])
            view = replace(view, axes=axes, fixed=tuple(fixed))
            assert view.shape == (*view.shape[:i], block, *shape[i + 1 :])
        return view

    def without(self, source: str) -> View:
        """The view without the atoms of one source, and without the axes that had no others."""
        axes = []
        for axis in self.axes:
            kept = tuple(atom for atom in axis if atom.source != source)
            if kept or not axis:
                axes.append(joined(kept))
        return replace(self, axes=tuple(axes), fixed=tuple(f for f in self.fixed if f[0].source != source))


def joined(atoms: Iterable[Atom]) -> Axis:
    """An axis with neighbors that make up one larger atom as that atom.

    >>> joined([Atom("w", 0, 3, 2), Atom("w", 0, 1, 3)])
    (Atom(source='w', axis=0, stride=1, size=6),)
    """
    out: list[Atom] = []
    for atom in atoms:
        if out:
            last = out[-1]
            if (last.source, last.axis, last.stride) == (atom.source, atom.axis, atom.stride * atom.size):
                out[-1] = replace(atom, size=last.size * atom.size)
                continue
        out.append(atom)
    return tuple(out)


def refined(axis: int, size: int, atoms: Iterable[Atom]) -> tuple[Atom, ...] | None:
    """An axis as the coarsest atoms of which all the given ones are products, major first; None if there are none.

    >>> refined(0, 12, [Atom("w", 0, 1, 4), Atom("w", 0, 4, 3)])
    (Atom(source='w', axis=0, stride=4, size=3), Atom(source='w', axis=0, stride=1, size=4))
    """
    cuts = {1, size}
    for atom in atoms:
        if atom.axis == axis:
            cuts |= {atom.stride, atom.stride * atom.size}
    strides = sorted(cuts)
    if any(high % low for low, high in itertools.pairwise(strides)):
        return None
    pairs = list(itertools.pairwise(strides))
    return tuple(Atom("w", axis, low, high // low) for low, high in reversed(pairs))


def paired(axes: Iterable[tuple[Axis, Axis]]) -> frozenset[tuple[Atom, Atom]]:
    """Pairs of axes as pairs of atoms of equal size, without those that a vmap adds.

    >>> x, w = View.of((6,), "x"), View.of((2, 3)).reshape((6,))
    >>> sorted((a.axis, b.stride) for a, b in paired([(w.axes[0], x.axes[0])]))
    [(0, 3), (1, 1)]
    """
    out: set[tuple[Atom, Atom]] = set()
    for one, other in axes:
        a, b = list(one), list(other)
        while a and b:
            first, second = a.pop(0), b.pop(0)
            if first.size > second.size and first.size % second.size == 0:
                first, rest = first.split(second.size)
                a.insert(0, rest)
            elif second.size > first.size and second.size % first.size == 0:
                second, rest = second.split(first.size)
                b.insert(0, rest)
            if VMAPPED not in (first.source, second.source):
                out.add((first, second))
    return frozenset(out)


# --- products -------------------------------------------------------------------------------------------------------

DOT = "dot"
CONVOLUTION = "convolution"
LOOKUP = "lookup"
OTHER = "other"


@dataclass(frozen=True)
class Product:
    """A product of a weight and another operand.

    Attributes:
      kind: "dot", "convolution" or "lookup" (a gather of rows); "other" for any other use of the weight.
      weight: the view of the weight that is multiplied.
      operand: index of the weight among the equation's operands.
      contracted: for a dot, the axes of the weight that are summed over, with those of the other operand.
      batch: for a dot, the axes of the weight that are axes of the other operand and of the output too.
    """

    kind: str
    weight: View
    operand: int = 1
    contracted: tuple[tuple[int, int], ...] = ()
    batch: tuple[tuple[int, int], ...] = ()

    @property
    def free(self) -> tuple[int, ...]:
        """For a dot, the other axes of the weight."""
        used = {w for w, _ in (*self.contracted, *self.batch)}
        return tuple(i for i in range(len(self.weight.axes)) if i not in used)

    def output(self, operand: Sequence[Any], weight: Sequence[Any]) -> list[Any]:
        """One entry for each axis of a dot's output, from the entries of both operands' axes."""
        used = {x for _, x in (*self.contracted, *self.batch)}
        rest = [a for i, a in enumerate(operand) if i not in used]
        free = [weight[i] for i in self.free]
        return [weight[w] for w, _ in self.batch] + (rest + free if self.operand == 1 else free + rest)


@dataclass(eq=False)
class Use:
    """One use of a parameter.

    Attributes:
      product: the product that the parameter reaches, or another use.
      call: the innermost call of the parameter's module that the parameter comes from and that the use lies in; None
        if there is none, or if the use lies in a loop or a branch inside of it.
      operand: the other operand as a view of the call's input; None if it is not one.
      returned: the call's output as a view of the product plus values that do not depend on it; None if it is not one.
      final: whether the product, or the call's output if that is the product, is an output of the model that nothing
        else consumes.
    """

    product: Product
    call: int | None
    operand: View | None = None
    returned: View | None = None
    final: bool = False

    def output(self) -> View:
        """The axes of a dot's output, as atoms of the operand ("x") and the weight ("w")."""
        operand = self.operand
        assert operand is not None
        return View(tuple(self.product.output(operand.axes, self.product.weight.axes)))
