"""Weights whose use a trace shows: parameters that reach products through casts, reshapes, transposes and slices."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from jpeft.core.dataflow.views import DOT, Atom, Axis, Product, Use, refined
from jpeft.core.geometry.base import Geometry
from jpeft.core.geometry.contraction import Contraction, labels_of

BATCH, IN, OUT = "batch", "in", "out"


@dataclass(frozen=True)
class Traced(Geometry):
    """A weight that was seen to reach products in calls of its module: the products are changed as the call runs.

    Axes that are summed over are inputs, those that slices pick or the other operand has are batch, others are outputs.

    Attributes:
      shape: shape of the parameter in its scope.
      atoms: the parameter's axes and parts of axes, in their order.
      roles: the role of each atom: "batch", "in" or "out".
      calls: names of the calls that the products lie in, such as "module.Class.__call__".
    """

    bias: str | None = None
    shape: tuple[int, ...] = ()
    atoms: tuple[Atom, ...] = ()
    roles: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()  # type: ignore[assignment]

    def _places(self, role: str) -> list[int]:
        return [i for i, r in enumerate(self.roles) if r == role]

    def _sizes(self, places: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.atoms[i].size for i in places)

    @property
    def batch(self) -> tuple[int, ...]:
        return self._sizes(self._places(BATCH))

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        whole = [i for i, atom in enumerate(self.atoms) if atom.size == self.shape[atom.axis]]
        batch, ins, outs = (tuple(self.atoms[i].axis for i in whole if self.roles[i] == r) for r in (BATCH, IN, OUT))
        return batch, ins, outs

    def view(self, w: jax.Array) -> jax.Array:
        ins, outs = self._places(IN), self._places(OUT)
        order = [*self._places(BATCH), *ins, *outs]
        m = w.reshape([atom.size for atom in self.atoms]).transpose(order)
        return m.reshape(*self.batch, math.prod(self._sizes(ins)), math.prod(self._sizes(outs)))

    def unview(self, m: jax.Array) -> jax.Array:
        order = [*self._places(BATCH), *self._places(IN), *self._places(OUT)]
        m = m.reshape(self._sizes(order))
        return m.transpose([order.index(i) for i in range(len(order))]).reshape(self.shape)

    # --- one product ---

    def index(self, product: Product) -> tuple[int | slice, ...]:
        """The matrices that a product takes of ``[batch..., in, out]``."""
        fixed: dict[Atom, int] = {}
        for atom, place in product.weight.fixed:
            for part in reversed(self._parts((atom,))):
                place, fixed[self.atoms[part]] = divmod(place, self.atoms[part].size)
        return tuple(fixed.get(self.atoms[i], slice(None)) for i in self._places(BATCH))

    def weight_of(self, w: jax.Array, product: Product) -> jax.Array:
        """The part of the parameter that a product takes, with an axis for each atom, in their order."""
        return w.reshape([atom.size for atom in self.atoms])[self._full_index(product)]

    def arranged(self, part: jax.Array, product: Product) -> jax.Array:
        """The product's operand, from `weight_of`."""
        kept = [i for i, place in enumerate(self._full_index(product)) if isinstance(place, slice)]
        order = [i for axis in product.weight.axes for i in self._parts(axis)]
        return part.transpose([kept.index(i) for i in order]).reshape(product.weight.shape)

    def contraction(self, product: Product, operand: Sequence[int]) -> tuple[Contraction, list[int], list[int]]:
        """A product as an einsum of the other operand and `weight_of`.

        Args:
          product: the product.
          operand: shape of the other operand.

        Returns:
          The geometry, and the shapes of the operand and of the output in it, in which axes that stand for several
          atoms are split.
        """
        names = string.ascii_letters
        free = [chr(0x5E00 + i) for i in range(len(operand))]
        sizes = {names[i]: atom.size for i, atom in enumerate(self.atoms)} | dict(zip(free, operand, strict=True))
        weight = ["".join(names[i] for i in self._parts(axis)) for axis in product.weight.axes]
        taken = {x: weight[w] for w, x in (*product.contracted, *product.batch)}
        x = [taken.get(i, free[i]) for i in range(len(operand))]
        y = product.output(x, weight)
        kept = [i for i, place in enumerate(self._full_index(product)) if isinstance(place, slice)]
        labels = "".join(names[i] for i in kept)
        spec = _simplified(f"{''.join(x)},{labels}->{''.join(y)}")
        shape = tuple(self.atoms[i].size for i in kept)
        own = Contraction(self.leaf, None, 0, spec, shape, shape)
        return own, [sizes[c] for c in "".join(x)], [sizes[c] for c in "".join(y)]

    def roles_in(self, product: Product) -> tuple[str, ...] | None:
        """The role of each atom in a product; None if one has several, or none."""
        roles: dict[int, str] = {}
        places = {i: BATCH for atom, _ in product.weight.fixed for i in self._parts((atom,))}
        axes = [(IN, [w for w, _ in product.contracted]), (BATCH, [w for w, _ in product.batch]), (OUT, product.free)]
        for role, found in axes:
            for i in (i for axis in found for i in self._parts(product.weight.axes[axis])):
                if i in roles or i in places:
                    return None
                roles[i] = role
        roles |= places
        return tuple(roles[i] for i in range(len(self.atoms))) if len(roles) == len(self.atoms) else None

    def _full_index(self, product: Product) -> tuple[int | slice, ...]:
        fixed = dict(zip(self._places(BATCH), self.index(product), strict=True))
        return tuple(fixed.get(i, slice(None)) for i in range(len(self.atoms)))

    def _parts(self, axis: Axis) -> list[int]:
        """The atoms of the geometry that an axis of a view is the product of, major first."""
        out = []
        for atom in axis:
            end = atom.stride * atom.size
            out += [
                i
                for i, own in enumerate(self.atoms)
                if atom.source == own.source
                and own.axis == atom.axis
                and own.stride >= atom.stride
                and own.stride * own.size <= end
            ]
        return out


def traced(leaf: str, shape: tuple[int, ...], uses: Sequence[Use], calls: Iterable[str]) -> Traced | None:
    """The geometry of a weight with these uses; None if they are not products that agree on its inputs and outputs."""
    products = [use.product for use in uses]
    if not products or 0 in shape or any(p.kind != DOT or p.weight.flipped for p in products):
        return None
    cuts = [atom for p in products for axis in p.weight.axes for atom in axis]
    cuts += [atom for p in products for atom, _ in p.weight.fixed]
    cuts = [atom for atom in cuts if atom.source == "w"]  # an axis of a vmap around the module is not the weight's
    atoms: list[Atom] = []
    for axis, size in enumerate(shape):
        parts = refined(axis, size, cuts)
        if parts is None:
            return None
        atoms += parts
    geometry = Traced(leaf=leaf, shape=shape, atoms=tuple(atoms), calls=tuple(dict.fromkeys(calls)))
    roles = {geometry.roles_in(p) for p in products}
    if len(roles) != 1:
        return None
    (only,) = roles
    if only is None or not {IN, OUT} & set(only):
        return None
    return dataclasses.replace(geometry, roles=only)


def _simplified(spec: str) -> str:
    """The spec of a dense layer for every spec that only differs in the names of the labels.

    >>> _simplified("xyA,AB->xyB"), _simplified("xA,BA->xB")
    ('...i,io->...o', 'xA,BA->xB')
    """
    x, w, y = labels_of(spec)
    is_dense = len(w) == 2 and x[-1:] == w[0] and y[-1:] == w[1] and x[:-1] == y[:-1] and w[0] not in y
    return "...i,io->...o" if is_dense else spec
