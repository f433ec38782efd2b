"""The parameters that project states to the keys and values of an attention, found in the trace of a model.

From the keys or values of an attention, the trace is followed back, through position encodings, norms and caches, to
the one product with a parameter that they come from, and forward again until its features are heads of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jpeft.core.dataflow.marks import ENTER
from jpeft.core.dataflow.program import Node, Program, Value, shape_of
from jpeft.core.dataflow.steps import product, step
from jpeft.core.dataflow.views import DOT, Atom, View, refined
from jpeft.core.tree import Path, join

_ELEMENTWISE = frozenset({"add", "add_any", "sub", "mul", "div", "max", "min", "clamp", "select_n"})


class NotFound(ValueError):
    """The trace does not show a projection."""


@dataclass(frozen=True)
class Projection:
    """A parameter that projects states to keys or values.

    Attributes:
      weight: path of the parameter.
      view: its elements ``[inputs..., heads, features]``; axes of one place may lack.
      bias: path of the bias; None without one.
      bias_view: its elements ``[heads, features]``.
      heads: the number of heads, and that of features of each.
    """

    weight: Path
    view: View
    bias: Path | None
    bias_view: View | None
    heads: tuple[int, int]

    def __call__(self, states: Any, weight: Any, bias: Any) -> jax.Array:
        """The projections ``[n, heads, features]`` of states ``[n, inputs]``."""
        w = elements(jnp.asarray(weight), self.view).reshape(-1, *self.heads).astype(states.dtype)
        if w.shape[0] != states.shape[-1]:
            raise ValueError(
                f"{join(self.weight)!r} projects {w.shape[0]} features, and these states have {states.shape[-1]}"
            )
        y = jnp.einsum("nf,fhd->nhd", states, w)
        if self.bias_view is None:
            return y
        return y + elements(jnp.asarray(bias), self.bias_view).reshape(self.heads).astype(y.dtype)


def elements(x: jax.Array, view: View) -> jax.Array:
    """The elements of an array that a view of it has.

    >>> elements(jnp.arange(6).reshape(2, 3), View.of((2, 3)).transpose((1, 0))).shape
    (3, 2)
    """
    cuts = [atom for axis in view.axes for atom in axis] + [atom for atom, _ in view.fixed]
    parts = [part for axis, size in enumerate(x.shape) for part in refined(axis, size, cuts) or ()]
    index: dict[int, int] = {}
    for atom, place in view.fixed:
        for i in reversed(_inside(atom, parts)):
            place, index[i] = divmod(place, parts[i].size)
    kept = [i for i in range(len(parts)) if i not in index]
    order = [i for axis in view.axes for atom in axis for i in _inside(atom, parts)]
    x = x.reshape([part.size for part in parts])[tuple(index.get(i, slice(None)) for i in range(len(parts)))]
    return x.transpose([kept.index(i) for i in order]).reshape(view.shape)


def _inside(atom: Atom, parts: Sequence[Atom]) -> list[int]:
    """The parts that an atom is the product of, major first."""
    end = atom.stride * atom.size
    return [
        i
        for i, own in enumerate(parts)
        if own.axis == atom.axis and own.stride >= atom.stride and own.stride * own.size <= end
    ]


@dataclass(eq=False)
class Parameters:
    """The parameters of a program as its modules see them, and what the inputs of loops and checkpoints are outside.

    Attributes:
      paths: the path of each array that is a parameter.
      outer: the array outside that an input of a body is.
    """

    paths: dict[Value, Path] = field(default_factory=dict)
    outer: dict[Value, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, owners: Mapping[int, Path]) -> Parameters:
        """Those of a program.

        Args:
          program: the program.
          owners: the path of each numbered call's module.
        """
        found = cls()
        found._visit(program, owners)
        return found

    def _visit(self, program: Program, owners: Mapping[int, Path]) -> None:
        for node in program.nodes:
            if node.name == "jpeft_mark" and node.params["kind"] == ENTER and isinstance(node.inputs[0], Value):
                self.paths[node.inputs[0]] = (*owners[node.params["call"]], node.params["name"])
            for body in node.bodies:
                # From the end: a branch has its index first, a loop its conditions' constants.
                for own, outside in zip(reversed(body.inputs), reversed(node.inputs), strict=False):
                    if own.shape == getattr(outside, "shape", ()):
                        self.outer[own] = outside
                self._visit(body, owners)


def find_projection(atom: Any, heads: tuple[int, int], parameters: Parameters) -> Projection:
    """The projection that keys or values come from.

    Args:
      atom: the keys or values.
      heads: their number of heads, and the number of features of each.
      parameters: the parameters of the program.

    Raises:
      NotFound: there is none, or several, or its features are not heads of features.
    """
    trails = _trails(atom, parameters)
    if len(trails) != 1:
        what = "no product with a parameter" if not trails else f"{len(trails)} products with parameters"
        raise NotFound(f"they come from {what}")
    (((node, (operand, path, weight)), trail),) = trails.items()
    return _forward(node, operand, path, weight, trail, heads, parameters)


# (node, index of its operand, index of its output): from a product to what it becomes
_Trail = list[tuple[Node, int, int]]


def _trails(atom: Any, parameters: Parameters) -> dict[tuple[Node, tuple[int, Path, View]], _Trail]:
    """The products with parameters that an array comes from, each with a trail to it."""
    found: dict[Any, _Trail] = {}
    seen: set[Value] = set()
    todo: list[tuple[Any, _Trail]] = [(atom, [])]
    while todo:
        atom, trail = todo.pop()
        if isinstance(atom, Literal) or atom in seen:
            continue
        seen.add(atom)
        node = atom.node
        if node is None:
            if atom in parameters.outer:
                todo.append((parameters.outer[atom], trail))
            continue
        place = node.outputs.index(atom)
        if node.parts:
            todo.append((node.parts[place], trail))
            continue
        if node.name == "dot_general" and (own := _weight_of(node, parameters)) is not None:
            found[node, own] = trail
            continue
        todo += [(operand, [(node, i, place), *trail]) for i, operand in enumerate(node.inputs)]
    return found


def _weight_of(node: Node, parameters: Parameters) -> tuple[int, Path, View] | None:
    """The operand of a product that is a view of a parameter, with the parameter's path and the view."""
    for i, atom in enumerate(node.inputs[:2]):
        if (found := _view_of(atom, parameters)) is not None:
            return i, *found
    return None


def _view_of(atom: Any, parameters: Parameters) -> tuple[Path, View] | None:
    if isinstance(atom, Literal):
        return None
    if (path := parameters.paths.get(atom)) is not None:
        return path, View.of(atom.shape)
    node = atom.node
    if node is None or not node.inputs:
        return None
    if node.parts:
        return _view_of(node.parts[node.outputs.index(atom)], parameters)
    if (found := _view_of(node.inputs[0], parameters)) is None:
        return None
    view = step(node.eqn, found[1])[node.outputs.index(atom)]
    return None if view is None else (found[0], view)


def _forward(
    node: Node, operand: int, path: Path, weight: View, trail: _Trail, heads: tuple[int, int], parameters: Parameters
) -> Projection:
    """The projection of a product, of which the trail shows where its features become heads."""
    found = product(node.eqn, operand, weight)
    assert found.kind == DOT
    x = View.of(shape_of(node.inputs[1 - operand]), "x")
    view = View(tuple(found.output(x.axes, weight.axes)), weight.fixed)
    inputs = tuple(weight.axes[w] for w, _ in found.contracted)
    if found.batch:
        raise NotFound(f"the product with {join(path)!r} is of several matrices")
    bias: tuple[Path, list[tuple[Atom, Atom]], View] | None = None
    for following, place, output in [*trail, (None, 0, 0)]:
        if (axes := _heads_of(view, heads)) is not None:
            if following is not None and following.name == "convert_element_type":
                continue
            if following is not None and following.name.startswith("add") and bias is None:
                bias = _bias_of(following.inputs[1 - place], view, parameters)  # of heads, as the product is
            own = None if bias is None else _of_bias(axes, bias[1], bias[2], view.fixed)
            return Projection(path, View((*inputs, *axes), view.fixed), None if bias is None else bias[0], own, heads)
        if following is None:
            break
        if following.name in _ELEMENTWISE:
            if following.name.startswith("add") and bias is None:
                bias = _bias_of(following.inputs[1 - place], view, parameters)
            after: View | None = view if following.outputs[0].shape == view.shape else None
        else:
            after = step(following.eqn, view)[output] if place == 0 else None
        if after is None:
            raise NotFound(f"a {following.name!r} makes other features of those of {join(path)!r} than heads of them")
        view = after
    raise NotFound(f"the features of {join(path)!r} do not become {heads[0]} heads of {heads[1]}")


def _heads_of(view: View, heads: tuple[int, int]) -> tuple[Any, Any] | None:
    """The axes of a view that are heads and features of each; None if it has no such ones."""
    own = [axis for axis in view.axes if any(atom.source == "w" for atom in axis)]
    if any(atom.source != "w" for axis in own for atom in axis):
        return None
    axes = list(own)
    for i, n in enumerate(heads):
        if n == 1:
            axes.insert(i, ())
    sizes = tuple(View((axis,)).shape[0] for axis in axes)
    if sizes == heads:
        return axes[0], axes[1]
    return (axes[1], axes[0]) if sizes == heads[::-1] else None


def _bias_of(atom: Any, view: View, parameters: Parameters) -> tuple[Path, list[tuple[Atom, Atom]], View] | None:
    """A bias that is added to the features of a view: its path, which of its places meet which of the weight's, and
    the view of it."""
    found = _view_of(atom, parameters) if not isinstance(atom, Literal) else None
    if found is None and isinstance(atom, Value) and atom.node is not None and atom.node.name == "broadcast_in_dim":
        inner, shape = _view_of(atom.node.inputs[0], parameters), atom.shape
        if inner is not None:  # the axes that are repeated are of the states
            dims = atom.node.params["broadcast_dimensions"]
            where = {to: inner[1].axes[i] for i, to in enumerate(dims)}
            found = inner[0], replace(inner[1], axes=tuple(where.get(i, ()) for i in range(len(shape))))
    if found is None:
        return None
    path, own = found
    pairs = []
    for theirs, mine in zip(view.axes, own.axes, strict=True):
        if len(theirs) != len(mine) or any(a.size != b.size for a, b in zip(theirs, mine, strict=True)):
            if mine or any(atom.source == "w" for atom in theirs):
                raise NotFound(f"the bias {join(path)!r} has other axes than the product that it is added to")
            continue
        pairs += zip(theirs, mine, strict=True)
    return path, pairs, own


def _of_bias(axes: Sequence[Any], pairs: Sequence[tuple[Atom, Atom]], bias: View, fixed: Any) -> View:
    """The elements of a bias that axes of the weight meet."""

    def met(atom: Atom) -> Atom | None:
        for whole, own in pairs:
            inside = whole.axis == atom.axis and atom.stride * atom.size <= whole.stride * whole.size
            if inside and whole.stride <= atom.stride:
                return Atom("w", own.axis, own.stride * (atom.stride // whole.stride), atom.size)
        return None

    mine = [(met(atom), place) for atom, place in fixed]
    kept = tuple((atom, place) for atom, place in mine if atom is not None)
    return View(tuple(tuple(met(atom) for atom in axis) for axis in axes), (*bias.fixed, *kept))  # pyright: ignore
